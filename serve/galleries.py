"""The galleries of a feature folder, resident: opened once, and kept up to date."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ruiji
from pipeline import layout, settings
from pipeline.choices import Device
from pipeline.errors import QueryError, RuijiError, UsageError
from search.gallery.opening import find_galleries
from search.labels import Annotations

#: Filtered galleries that are kept, of each gallery.
_MOST_PARTS = 16


class NoGallery(RuijiError):
    """There is no gallery of that name, or it is not clear which one is meant."""


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
    #: Why it cannot be searched with words; None: it can.
    no_words: str | None = None
    _parts: dict[tuple[str, ...], ruiji.Gallery] = field(default_factory=dict)
    _parting: threading.Lock = field(default_factory=threading.Lock)

    def only(self, conditions: Sequence[str], annotations: Annotations | None) -> ruiji.Gallery:
        """The objects that meet some conditions, as `ruiji.Gallery.only` has them; kept, because more searches follow.

        Raises:
            UsageError: a condition asks for what is not there.
        """
        if not conditions:
            return self.gallery
        with self._parting:
            # The one that was asked for last is the last to go.
            part = self._parts.pop(tuple(conditions), None) or self.gallery.only(*conditions, labels=annotations)
            self._parts[tuple(conditions)] = part
            while len(self._parts) > _MOST_PARTS:
                del self._parts[next(iter(self._parts))]
        return part

    def refresh(self) -> None:
        """Take up what changed.

        Raises:
            RuijiError: it cannot be taken up; the gallery is then as it was.
        """
        with self._parting:
            if self.gallery.refresh():
                self._parts.clear()


@dataclass
class Galleries:
    """All galleries below a feature folder.

    Attributes:
        feature_dir: a folder of galleries, or one gallery.
        model: the file whose name is that of the gallery that is meant if none is named.
        refused: why a gallery cannot be opened, by its name.
    """

    feature_dir: Path
    model: Path | None = None
    device: Device = Device.auto
    max_pixels: int = settings.MAX_PIXELS
    refused: dict[str, str] = field(default_factory=dict)
    _open: dict[str, Resident] = field(default_factory=dict)
    _looking: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> None:
        """Open all, and make them ready for quick answers; those that cannot be opened are in `refused`.

        Raises:
            UsageError: there is none, or none of the name that is meant.
            RuijiError: none of them can be opened, or not the one that is meant.
        """
        failed: dict[str, RuijiError] = {}
        for folder in find_galleries(self.feature_dir):
            try:
                self._add(folder)
            except RuijiError as error:
                failed[folder.name] = error
                self.refused[folder.name] = str(error)
        if self.model is not None and self._meant not in self._open:
            raise failed.get(self._meant) or UsageError(
                f"{self.feature_dir} has no gallery {self._meant}, only {', '.join(sorted(self._open))}: check --model"
            )
        if not self._open:
            raise next(iter(failed.values()))

    def look(self) -> None:
        """Take up new shards and new galleries; what cannot be taken up leaves a gallery as it was, and is told."""
        with self._looking:
            try:
                folders = find_galleries(self.feature_dir)
            except UsageError:
                folders = []
            for folder in folders:
                resident = self._open.get(folder.name)
                try:
                    if resident is None:
                        self._add(folder)
                        self.refused.pop(folder.name, None)
                    else:
                        resident.refresh()
                        resident.problem = None
                except RuijiError as error:
                    if resident is None:
                        self.refused[folder.name] = str(error)
                    else:
                        resident.problem = str(error)
            for name in self._open.keys() - {folder.name for folder in folders}:
                self._open[name].problem = f"the folder {self._open[name].gallery.folder} is gone"

    @property
    def all(self) -> list[Resident]:
        """Those that are open, by name."""
        return [self._open[name] for name in sorted(self._open)]

    @property
    def default(self) -> str | None:
        """The name of the one that is meant if none is named; None: there are several, and one has to be named."""
        if self.model is not None:
            return self._meant
        return next(iter(self._open)) if len(self._open) == 1 else None

    def get(self, name: str | None = None) -> Resident:
        """A gallery by its name.

        Raises:
            NoGallery: there is none of that name, or several and no name; says which there are.
        """
        wanted = name or self.default
        if wanted in self._open:
            return self._open[wanted]
        if name in self.refused:
            raise NoGallery(f"the gallery {name} cannot be opened: {self.refused[name]}")
        asked = "there are several galleries" if name is None else f"there is no gallery {name}"
        raise NoGallery(f"{asked}; choose one with ?gallery=NAME: {', '.join(sorted(self._open))}")

    @property
    def _meant(self) -> str:
        assert self.model is not None
        return layout.gallery_folder(self.feature_dir, self.model).name

    def _add(self, folder: Path) -> None:
        model = self._model_of(folder.name)
        gallery = ruiji.open_gallery(folder, model, device=self.device, max_pixels=self.max_pixels)
        gallery.warm_up()
        self._open[folder.name] = Resident(folder.name, gallery, model, no_words=_why_no_words(gallery, model))

    def _model_of(self, name: str) -> Path | None:
        """The model that was given, if it is this gallery's by its name, else one of this name in the library."""
        if self.model is not None and self._meant == name:
            return self.model if self.model.is_file() else None
        added = layout.added_model_file(settings.models_dir(), name)
        return added if added.is_file() else None


def _why_no_words(gallery: ruiji.Gallery, model: Path | None) -> str | None:
    """Why a gallery cannot be searched with words; None: its text tower is loaded."""
    if model is None:
        return "the model of this gallery is not known: start the service with --model"
    try:
        gallery.encode_text("words")
    except QueryError:
        # The tower works; it only has no such words.
        return None
    except RuijiError as error:
        return str(error)
    return None
