"""The maps of the galleries: read from their caches, or made beside the event loop, one at a time."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import ruiji
from pipeline.errors import RuijiError, UsageError
from search.options import Projection
from serve.galleries import Resident

#: Seconds after which who asks is told how far the map is.
_PATIENCE_S = 0.5
#: A point has 12 bytes in an answer, some 50 in this process meanwhile, and all are in the page's memory at once: with
#: 10^8 of them one click on the map would end a service that has 4 GB.
_MOST_POINTS = 20_000_000


class _GivenUp(RuijiError):
    """Nobody wants the map any more."""


@dataclass(eq=False)
class Making:
    """A map that is being made, or is made.

    Attributes:
        rows_key: of the gallery when it was begun.
        done, total: rows gone through, and to go through; 0 of 0 before it is its turn.
    """

    rows_key: str
    done: int = 0
    total: int = 0
    made: "asyncio.Future[ruiji.GalleryMap]" = field(init=False)


class Maps:
    """All maps of a service; to be used in one event loop."""

    def __init__(self, closing: Callable[[], bool]) -> None:
        """Nothing is read before it is asked for.

        Args:
            closing: whether the service is about to end; a map that is being made is then given up.
        """
        self._closing = closing
        self._thread = ThreadPoolExecutor(1, "map")
        self._makings: dict[str, Making] = {}

    async def get(self, resident: Resident, projection: Projection | None) -> ruiji.GalleryMap | Making:
        """The map of a gallery as it is now. That of principal components is made if it is not kept.

        Args:
            projection: None: UMAP if that is kept, else principal components.

        Returns:
            The map, or how far it is.

        Raises:
            UsageError: UMAP is asked for, and not kept; or the gallery is too large.
            RuijiError: the map cannot be made; the next one who asks has it tried again.
        """
        gallery = resident.gallery
        if len(gallery) > _MOST_POINTS:
            raise UsageError(
                f"the map shows up to {_MOST_POINTS:,} objects, and this gallery has {len(gallery):,}; Python gives "
                "their positions (Gallery.map)"
            )
        if projection is not Projection.pca:
            kept = await asyncio.to_thread(gallery.kept_map, Projection.umap)
            if kept is not None:
                return kept
            if projection is Projection.umap:
                raise UsageError("no UMAP is kept of this gallery as it is now: run ruiji map --projection umap")
        making = self._makings.get(resident.name)
        if making is None or making.rows_key != gallery.rows_key:
            making = self._begin(resident)
        await asyncio.wait([making.made], timeout=_PATIENCE_S)
        if not making.made.done():
            return making
        if making.made.exception() is not None and self._makings.get(resident.name) is making:
            del self._makings[resident.name]
        # Stale rows do not count in the key: since it was made, objects may have left the list or come back.
        return await asyncio.to_thread(gallery.updated_map, making.made.result())

    def _begin(self, resident: Resident) -> Making:
        making = self._makings[resident.name] = Making(resident.gallery.rows_key)

        def step(done: int, total: int) -> None:
            if self._closing() or self._makings.get(resident.name) is not making:
                raise _GivenUp("the gallery has changed meanwhile; ask again")
            making.done, making.total = done, total

        work = resident.gallery.map
        making.made = asyncio.get_running_loop().run_in_executor(self._thread, work, Projection.pca, step)
        # If nobody asks again, nobody takes its failure either.
        making.made.add_done_callback(lambda made: made.cancelled() or made.exception())
        return making

    def close(self) -> None:
        """Wait until the thread has ended."""
        self._thread.shutdown(cancel_futures=True)
