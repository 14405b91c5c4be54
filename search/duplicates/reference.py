"""Two galleries of one model as one, to find what of the second is in the first: the reference.

The reference comes first, so that pairs that were found stay right when the other gallery grows. Its folder is only
read.
"""

from dataclasses import replace

from pipeline.errors import GalleryMismatch, UsageError
from search.gallery.shards import Gallery, Shard


def join(gallery: Gallery, reference: Gallery, reference_id: str) -> Gallery:
    """Put a reference before a gallery.

    Args:
        reference_id: its gallery's id.

    Returns:
        The rows of the reference, and behind them those of the gallery. Nothing is written to the reference's cache.

    Raises:
        UsageError: it is not known which model made one of them.
        GalleryMismatch: they are of different models.
    """
    if gallery.fingerprint is None or reference.fingerprint is None:
        which = "this gallery" if gallery.fingerprint is None else "the reference"
        raise UsageError(f"{which} has no gallery.json: nothing says that one model made both galleries")
    if gallery.fingerprint != reference.fingerprint or gallery.length != reference.length:
        raise GalleryMismatch(
            f"the reference is of another model (fingerprint {reference.fingerprint[:12]}, d {reference.length}) than "
            f"this gallery ({gallery.fingerprint[:12]}, d {gallery.length}): extract one of them with the other's model"
        )
    shards = (*only_read(reference).shards, *gallery.shards)
    return replace(gallery, shards=shards, reference_shards=len(reference.shards), reference_id=reference_id)


def only_read(gallery: Gallery) -> Gallery:
    """The same gallery, into whose cache nothing is written."""
    return replace(gallery, shards=tuple(map(_only_read, gallery.shards)))


def _only_read(shard: Shard) -> Shard:
    if shard.cache is None or shard.cache.folder.read_only:
        return shard
    cache = replace(shard.cache, folder=replace(shard.cache.folder, read_only=True))
    return replace(shard, cache=cache)
