"""Which gallery a request is about, and which of its objects; and what people have to be told of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pipeline.errors import UsageError
from pipeline.streams import counted
from pipeline.versions import are_mixed, other_versions
from search.gallery.opening import find_gallery, open_gallery
from search.gallery.shards import Gallery

if TYPE_CHECKING:
    from search.filters import Condition
    from search.labels import Annotations

#: Called with one line for people, for instance a warning.
Say: TypeAlias = Callable[[str], None]
#: Called with a unit; gives what is to be called with how many units are done, and how many there are.
Progress: TypeAlias = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A gallery and some of its objects.

    Attributes:
        feature_dir: has the galleries, or is one.
        model_path: the model's file, whose name is the gallery's; the file is needed only to embed pictures. None:
            `feature_dir` is the gallery, or has exactly one.
        labels: an annotation CSV.
        where: conditions, each `COLUMN=VALUE`, `COLUMN!=VALUE` or `path=PREFIX`.
        include_stale: also objects that left the object list.
        need_paths: a gallery that does not know paths is refused.
    """

    feature_dir: Path
    model_path: Path | None = None
    labels: Path | None = None
    where: tuple[str, ...] = ()
    include_stale: bool = False
    need_paths: bool = False

    @property
    def folder(self) -> Path:
        """The gallery's folder, which need not exist.

        Raises:
            UsageError: it is not clear which gallery is meant.
        """
        return find_gallery(self.feature_dir, self.model_path)

    def read_filters(self) -> "tuple[list[Condition], Annotations | None]":
        """The conditions, and what the CSV says.

        Raises:
            UsageError: one cannot be read.
        """
        if not self.where and self.labels is None:
            return [], None
        from search.filters import parse_conditions
        from search.labels import read_annotations

        return parse_conditions(self.where), None if self.labels is None else read_annotations(self.labels)

    def open(self, say: Say) -> Gallery:
        """Open the whole gallery and say what is doubtful about it.

        Raises:
            UsageError, GalleryMismatch, ShardCorrupt: as `open_gallery`.
        """
        gallery = open_gallery(self.folder, self.include_stale)
        if self.need_paths and gallery.fingerprint is None:
            raise UsageError(
                "--format paths: this gallery has no gallery.json and does not know paths, only object ids"
            )
        for warning in provenance_warnings(gallery):
            say(f"warning: {warning}")
        return gallery


def provenance_warnings(gallery: Gallery) -> list[str]:
    """What is doubtful about where the features come from."""
    warnings = []
    if gallery.fingerprint is None:
        warnings.append("unverified gallery: nothing says which model and preprocessing made these shards")
    if are_mixed(gallery.versions):
        warnings.append(
            "shards were made with different library versions; similarities can differ in their last digits"
        )
    return warnings


def version_warnings(gallery: Gallery) -> list[str]:
    """Which library versions here differ from those that made the features; of interest if pictures are embedded."""
    warnings = []
    for versions in gallery.versions:
        changed = [f"{name} {made} (here {ours})" for name, (made, ours) in other_versions(versions).items()]
        if changed:
            warnings.append(f"shards were made with {', '.join(changed)}; similarities can differ in their last digits")
    return warnings


def say_unusable(gallery: Gallery, say: Say) -> None:
    """Say how many objects cannot be ranked, and why there is none that can."""
    zero, nonfinite = gallery.unusable_rows
    if zero or nonfinite:
        say(
            f"warning: left out {counted(zero, 'object')} whose feature is all zero and "
            f"{nonfinite} whose feature has NaN or infinite values"
        )
    if gallery.stale_rows == gallery.rows:
        say("none of the gallery's objects is on the object list any more")
    elif not gallery.searched_rows:
        say("none of the gallery's objects meets the conditions")
    elif gallery.searched_rows == zero + nonfinite:
        say("the gallery has no object that can be ranked")


def say_undigested(gallery: Gallery, say: Say) -> None:
    """Say of how many objects it is not known whether their files are identical."""
    if unknown := gallery.rows - gallery.digested_rows:
        objects = counted(unknown, "object has", "objects have")
        say(f"{objects} no digest of their file, so identical files are not told apart among them")
