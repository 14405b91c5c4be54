"""The galleries of a feature folder, resident: opened once, and kept up to date."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ruiji
from pipeline import layout, settings
from pipeline.choices import Device
from pipeline.errors import NoShards, QueryError, RuijiError, UsageError
from pipeline.store import machine_faults
from pipeline.streams import counted, note
from search.filters import check_columns, parse_conditions
from search.gallery.opening import find_galleries, is_gallery
from search.labels import Annotations

#: Filtered galleries that are kept, of each gallery.
_MOST_PARTS = 16


class NoGallery(RuijiError):
    """There is no gallery of that name that can be searched, or it is not clear which one is meant."""


@dataclass
class Resident:
    """One gallery that stays in memory.

    Attributes:
        model: of the pictures that are searched with; None: only its own objects are.
        problem: why its newest shards are not searched; None: they are.
    """

    name: str
    gallery: ruiji.Gallery
    model: Path | None
    problem: str | None = None
    #: Why it cannot be searched with pictures, or with words; None: it can.
    no_pictures: str | None = None
    no_words: str | None = None
    #: Of the model's files when it was opened.
    stamp: tuple[object, ...] = ()
    _parts: dict[tuple[str, ...], ruiji.Gallery] = field(default_factory=dict)
    _labels: Annotations | None = None
    _parting: threading.Lock = field(default_factory=threading.Lock)

    def only(self, conditions: Sequence[str], annotations: Annotations | None) -> ruiji.Gallery:
        """The objects that meet some conditions, as `ruiji.Gallery.only` has them; kept, because more searches follow.

        Raises:
            UsageError: a condition asks for what is not there.
        """
        if not conditions:
            return self.gallery
        check_columns(parse_conditions(conditions, "where"), annotations, "where", "start the service with --labels")
        with self._parting:
            # The one that was asked for last is the last to go.
            part = self._parts.pop(tuple(conditions), None) or self.gallery.only(*conditions, labels=annotations)
            self._parts[tuple(conditions)] = part
            while len(self._parts) > _MOST_PARTS:
                del self._parts[next(iter(self._parts))]
        return part

    def labels(self, annotations: Annotations | None) -> Annotations | None:
        """What the annotations say of its objects, as `ruiji.Gallery.labels` has it; kept, for the same reason."""
        if annotations is None:
            return None
        with self._parting:
            self._labels = self._labels or self.gallery.labels(annotations)
            return self._labels

    def refresh(self) -> None:
        """Take up what changed.

        Raises:
            RuijiError: it cannot be taken up; the gallery is then as it was.
        """
        with self._parting:
            if self.gallery.refresh():
                self._parts.clear()
                self._labels = None


@dataclass(frozen=True)
class _Known:
    """What a look found, by name."""

    folders: dict[str, Path] = field(default_factory=dict)
    open: dict[str, Resident] = field(default_factory=dict)
    failed: dict[str, RuijiError] = field(default_factory=dict)


@dataclass
class Galleries:
    """All galleries below a feature folder: open, or without a shard yet, or refused because they are damaged.

    Attributes:
        feature_dir: a folder of galleries, or one gallery.
        model: the file whose name is that of the gallery that is meant if none is named.
    """

    feature_dir: Path
    model: Path | None = None
    device: Device = Device.auto
    max_pixels: int = settings.MAX_PIXELS
    # Replaced as a whole by each look: whoever reads meanwhile sees one state or the other.
    _known: _Known = field(default_factory=_Known)
    _looking: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> None:
        """Open all, and make them ready for quick answers; those that have no shard yet are waited for.

        Raises:
            UsageError: there is none, or none of the name that is meant.
            RuijiError: none of them can be opened, or not the one that is meant.
        """
        if not self.feature_dir.is_dir():
            raise UsageError(f"the feature folder {self.feature_dir} does not exist or is not a folder")
        self.look()
        known = self._known
        if not known.folders:
            find_galleries(self.feature_dir)
        if self.model is not None and self._meant not in known.folders:
            raise UsageError(
                f"{self.feature_dir} has no gallery {self._meant}, only {', '.join(self.names)}: check --model"
            )
        needed = [self._meant] if self.model is not None else self.names
        if not any(name in known.open or name in self.coming for name in needed):
            raise known.failed[needed[0]]

    def look(self) -> None:
        """Take up new shards and new galleries; what cannot be taken up leaves a gallery as it was.

        Each change is told once.
        """
        with self._looking:
            before, folders = self._known, self._find()
            opened, failed = dict(before.open), dict[str, RuijiError]()
            for name, folder in folders.items():
                try:
                    with machine_faults(f"cannot read {folder}"):
                        if name in opened:
                            opened[name].refresh()
                        if name not in opened or self._has_more(opened[name]):
                            opened[name] = self._opened(folder)
                except RuijiError as error:
                    failed[name] = error
            for name, resident in opened.items():
                gone = None if name in folders else f"the folder {resident.gallery.folder} is gone or may not be read"
                problem = str(failed.pop(name)) if name in failed else gone
                if problem not in (None, resident.problem):
                    note(f"warning: the gallery {name} is searched as it was: {problem}")
                resident.problem = problem
            for name, resident in opened.items():
                if name not in before.open:
                    note(f"gallery {name}: {counted(len(resident.gallery), 'object')}; {resident.gallery.way()}")
                elif resident is not before.open[name]:
                    note(f"gallery {name}: the model is {resident.model} from now on")
            for name, why in failed.items():
                if str(why) != str(before.failed.get(name)):
                    coming = isinstance(why, NoShards)
                    note(f"gallery {name}: no shards yet" if coming else f"warning: gallery {name}: {why}")
            kept = {name: one.gallery.folder for name, one in opened.items()}
            self._known = _Known(kept | folders, opened, failed)

    @property
    def names(self) -> list[str]:
        """Of all that are known, those that cannot be searched among them."""
        return sorted(self._known.folders)

    @property
    def all(self) -> list[Resident]:
        """Those that are open, by name."""
        return [one for _, one in sorted(self._known.open.items())]

    @property
    def coming(self) -> list[str]:
        """Names of those that have no shard yet."""
        return sorted(name for name, error in self._known.failed.items() if isinstance(error, NoShards))

    @property
    def refused(self) -> dict[str, str]:
        """Why a gallery cannot be opened, by name."""
        return {
            name: str(error) for name, error in sorted(self._known.failed.items()) if not isinstance(error, NoShards)
        }

    @property
    def default(self) -> str | None:
        """The name of the one that is meant if none is named; None: there are several, and one has to be named."""
        if self.model is not None:
            return self._meant
        return self.names[0] if len(self.names) == 1 else None

    def get(self, name: str | None = None) -> Resident:
        """A gallery by its name, to be searched.

        Raises:
            NoGallery: there is none of that name, or several and no name; or it cannot be searched, and why.
        """
        known = self._known
        wanted = self._named(known, name)
        if wanted in known.open:
            return known.open[wanted]
        error = known.failed[wanted]
        if isinstance(error, NoShards):
            raise NoGallery(f"the gallery {wanted} has no shards yet; it is searched as soon as it has one")
        raise NoGallery(f"the gallery {wanted} cannot be opened: {error}")

    def folder(self, name: str | None = None) -> Path:
        """The folder of a gallery by its name, whether it can be searched or not.

        Raises:
            NoGallery: there is none of that name, or several and no name.
        """
        known = self._known
        return known.folders[self._named(known, name)]

    def model_of(self, name: str) -> Path | None:
        """The model that was given, if it is this gallery's by its name, else one of this name in the library."""
        file = self._model_file(name)
        return file if file.is_file() else None

    def _model_file(self, name: str) -> Path:
        if self.model is not None and self._meant == name:
            # Again: a name is that of a model that may have been added since.
            return settings.model_file(self.model)
        return layout.added_model_file(settings.models_dir(), name)

    def _named(self, known: _Known, name: str | None) -> str:
        wanted = name or self.default
        if wanted in known.folders:
            return wanted
        asked = "there are several galleries" if wanted is None else f"there is no gallery {wanted}"
        raise NoGallery(f"{asked}; choose one with ?gallery=NAME: {', '.join(sorted(known.folders))}")

    @property
    def _meant(self) -> str:
        assert self.model is not None
        return layout.gallery_folder(self.feature_dir, self.model).name

    def _find(self) -> dict[str, Path]:
        """The folders by name; that of a model that is there, before its first run has made it."""
        try:
            found = {folder.name: folder for folder in find_galleries(self.feature_dir)}
        except UsageError:
            found = {}
        if self.model is not None and self.model_of(self._meant) is not None and not is_gallery(self.feature_dir):
            found.setdefault(self._meant, layout.gallery_folder(self.feature_dir, self.model))
        return found

    def _opened(self, folder: Path) -> Resident:
        if not is_gallery(folder):
            raise NoShards(f"no run into {folder} has begun yet")
        model = self.model_of(folder.name)
        stamp = _stamp(model)
        gallery = ruiji.open_gallery(folder, model, device=self.device, max_pixels=self.max_pixels)
        if model is not None:
            # Another gallery's model is refused before all rows are read: each look tries it again.
            _ = gallery.spec
        gallery.warm_up()
        no_pictures = self._why_no_pictures(folder.name) if model is None else None
        return Resident(
            folder.name,
            gallery,
            model,
            no_pictures=no_pictures,
            no_words=no_pictures or _why_no_words(gallery),
            stamp=stamp,
        )

    def _has_more(self, resident: Resident) -> bool:
        """Whether a model may be there now, or its text tower, that was not when a gallery was opened."""
        model = self.model_of(resident.name)
        return model is not None and resident.no_words is not None and _stamp(model) != resident.stamp

    def _why_no_pictures(self, name: str) -> str:
        missing = f"there is no model {self._model_file(name)}"
        if self.model is not None and self._meant == name:
            return f"{missing}; it is used as soon as it is there"
        return f"{missing}: add the model of the gallery {name} as that, or start the service with --model"


def _stamp(model: Path | None) -> tuple[object, ...]:
    """Changes with a model's file, and with the `.toml` that names its text tower."""
    found: list[object] = []
    for file in () if model is None else (model, layout.toml_file(model)):
        try:
            status = file.stat()
        except OSError:
            continue
        found.append((file, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _why_no_words(gallery: ruiji.Gallery) -> str | None:
    """Why a gallery cannot be searched with words; None: its text tower is loaded."""
    try:
        gallery.encode_text("words")
    except QueryError:
        # The tower works; it only has no such words.
        return None
    except RuijiError as error:
        return str(error)
    return None
