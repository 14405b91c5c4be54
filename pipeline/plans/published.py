"""Which shards exist: those that have a record, unless it came too late.

A closed plan lists the shards that it had published. A record of its that this list lacks was linked after the plan was
closed: it does not exist, whoever finds it.
"""

from pathlib import Path

from pipeline import layout
from pipeline.plans.files import OpenPlan, closed_plan_ids, read_closed
from pipeline.plans.plan import Plan, Segment
from pipeline.store import recorded_shards


class Published:
    """Which records exist, asked again and again: a closed plan never changes and is read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = OpenPlan(folder)
        # By id of a closed plan: the numbers of which a record, and one without rows, came too late.
        self._late: dict[str, tuple[set[int], set[int]]] = {}

    def shards(self) -> list[int]:
        """Numbers of all shards that exist, ascending: they have a record, and it did not come too late."""
        recorded = recorded_shards(self._folder)
        if not recorded:
            return []
        late = self._too_late(0)
        if (plan := self._open.now()) is not None:
            late |= set(plan.given_up)
        return [shard for shard in recorded if shard not in late]

    def fruitless(self) -> list[int]:
        """Numbers of the retried segments of which all failed again, likewise."""
        recorded = recorded_shards(layout.fruitless_folder(self._folder))
        late = self._too_late(1) if recorded else set()
        return [shard for shard in recorded if shard not in late]

    def _too_late(self, kind: int) -> set[int]:
        for plan_id in closed_plan_ids(self._folder):
            if plan_id not in self._late:
                closed = read_closed(self._folder, plan_id)
                own = {segment.shard for segment in closed.plan.segments if segment.plan == plan_id}
                fruitless = own - closed.fruitless if closed.fruitless is not None else set()
                self._late[plan_id] = (own - closed.published) | set(closed.plan.given_up), fruitless
        return set().union(*(late[kind] for late in self._late.values()))


def published_shards(folder: Path) -> list[int]:
    """Numbers of all shards that exist, ascending.

    Raises:
        GalleryMismatch: a plan is damaged.
    """
    return Published(folder).shards()


def came_too_late(plan: Plan, segment: Segment) -> bool:
    """Whether the plan was closed before this segment was published."""
    try:
        closed = read_closed(plan.folder, plan.plan_id)
    except FileNotFoundError:
        return False
    # What is made again stands on the list of the plan that made it first.
    return segment.plan == plan.plan_id and segment.shard not in closed.published | (closed.fruitless or frozenset())
