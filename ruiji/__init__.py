"""ruiji from Python: open a gallery, search it, find near-duplicates, embed pictures, follow a run.

Example:
    >>> import ruiji
    >>> gallery = ruiji.open_gallery("features", model="model.onnx")
    >>> for hit in gallery.search("photo.jpg", top_k=5).hits:
    ...     print(hit.path, hit.similarity)

`docs/python.md` has an example of everything. Importing this loads numpy, and neither ONNX Runtime nor torch. Every
error that ruiji raises on purpose is a `RuijiError`, and says what to do next.
"""

from typing import TYPE_CHECKING

from pipeline.errors import (
    BrokerUnavailable,
    GalleryMismatch,
    ImageError,
    MachineFault,
    ModelError,
    QueryError,
    RuijiError,
    ShardCorrupt,
    UnknownObject,
    UsageError,
)
from ruiji.embedding import Embedder
from ruiji.galleries import Gallery, open_gallery
from ruiji.results import GalleryObject, NearDuplicates, QueryResult, SearchResults
from ruiji.runs import status
from ruiji.warning import RuijiWarning
from search.duplicates.groups import Group, Member
from search.labels import Annotations
from search.maps.store import GalleryMap
from search.ranking.rank import Hit

if TYPE_CHECKING:
    from pipeline.status import Status

__all__ = [
    "Annotations",
    "BrokerUnavailable",
    "Embedder",
    "Gallery",
    "GalleryMap",
    "GalleryMismatch",
    "GalleryObject",
    "Group",
    "Hit",
    "ImageError",
    "MachineFault",
    "Member",
    "ModelError",
    "NearDuplicates",
    "QueryError",
    "QueryResult",
    "RuijiError",
    "RuijiWarning",
    "SearchResults",
    "ShardCorrupt",
    "Status",
    "UnknownObject",
    "UsageError",
    "open_gallery",
    "status",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # It brings Celery, which nothing else here needs.
        if name == "Status":
            from pipeline.status import Status

            return Status
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
