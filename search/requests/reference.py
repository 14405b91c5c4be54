"""The gallery that another one is compared with: `--against-gallery`."""

from dataclasses import dataclass
from pathlib import Path

from pipeline import layout
from pipeline.errors import UsageError
from pipeline.gallery import read_gallery
from search.duplicates.decided import decided_in
from search.duplicates.decisions import read_decisions
from search.duplicates.reference import join, only_read
from search.gallery.opening import is_gallery, open_gallery
from search.gallery.shards import Gallery
from search.requests.selection import Say, provenance_warnings, say_undigested, say_unusable


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A second gallery; only read.

    Attributes:
        feature_dir: the gallery's folder, or a FEATURE_DIR that has a gallery of the same name.
        media_dir: where its pictures are; None: not known.
    """

    feature_dir: Path
    media_dir: Path | None = None

    @property
    def media(self) -> Path:
        """Its media folder.

        Raises:
            UsageError: none is given, or it is not there.
        """
        if self.media_dir is None:
            raise UsageError("files of the reference are looked at: say where they are with --against-media-dir")
        if not self.media_dir.is_dir():
            raise UsageError(f"there is no media folder {self.media_dir}; mount it, or check --against-media-dir")
        return self.media_dir

    def put_before(self, folder: Path, gallery: Gallery, decisions: Path, say: Say) -> "Both":
        """Open it and put it before a gallery.

        Args:
            folder: of that gallery.
            decisions: its decisions file.

        Raises:
            UsageError, GalleryMismatch, ShardCorrupt: as `open_gallery` and `put_together`.
        """
        there = self.feature_dir
        if not is_gallery(there):
            there = there / folder.absolute().name
        if not is_gallery(there):
            raise UsageError(f"--against-gallery: there is no gallery {there}; name the folder of the other gallery")
        reference = only_read(open_gallery(there))
        for warning in provenance_warnings(reference):
            say(f"warning: reference: {warning}")
        for tell in (say_unusable, say_undigested):
            tell(reference, lambda line: say(f"reference: {line}"))
        return put_together(folder, gallery, there, reference, decisions)


@dataclass(frozen=True)
class Both:
    """Two galleries as one.

    Attributes:
        gallery: the rows of the reference, and those of the gallery behind them.
        gone: rows of the reference that are to go, as its own decisions say.
        decisions: the file of those.
    """

    gallery: Gallery
    gone: frozenset[int]
    decisions: Path


def put_together(folder: Path, gallery: Gallery, there: Path, reference: Gallery, decisions: Path | None) -> Both:
    """Put a reference before a gallery; what its own decisions say of it is read from beside it.

    Args:
        folder, gallery: the gallery that is cleaned up, and where it lies.
        there, reference: the other one.
        decisions: the file of the gallery that is cleaned up; None: it has none.

    Raises:
        UsageError: they are one gallery, or would have one decisions file.
        GalleryMismatch: they are of different models, or a newer ruiji wrote the reference's decisions.
        FileDamaged: the reference's decisions cannot be read.
    """
    own, other = read_gallery(folder), read_gallery(there)
    if folder.resolve() == there.resolve() or (own and other and own.gallery_id == other.gallery_id):
        raise UsageError(f"{there} is this gallery itself, or a copy: compare parts of one with --against path=PREFIX")
    file = layout.decisions_file(there)
    if decisions is not None and decisions.resolve() == file.resolve():
        raise UsageError(f"both galleries have the decisions file {file}: name another for this one with --decisions")
    joined = join(gallery, reference, "" if other is None else other.gallery_id)
    gone: frozenset[int] = frozenset()
    if own is not None and (known := read_decisions(file)):
        seen_from_there = decided_in(join(reference, gallery, own.gallery_id), known)
        removals = (one.remove - gallery.rows for one in seen_from_there.removals())
        gone = frozenset(row for row in removals if row >= 0)
    return Both(joined, gone, file)
