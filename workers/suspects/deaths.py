"""Objects that were in hand when a worker process died, and how often: on disk, for all hosts.

`run/suspects/<plan id>/<sha1 of the path>.json`; the folder goes when the plan is closed.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline import layout
from pipeline.choices import Reason
from pipeline.errors import GalleryMismatch, ImageError
from pipeline.plans.plan import Limits, Plan
from pipeline.store import FORMAT, as_type, read_json, to_json, write_atomic

#: So many deaths make a suspect a failed object; at least two of them with nothing else in hand.
MOST_DEATHS = 3
#: How a process can die of an image.
_DEATHS = (Reason.crashed_worker, Reason.memory, Reason.timeout)


@dataclass(frozen=True)
class Suspect:
    """One object that may kill its worker.

    Attributes:
        reason: how the last process died: `crashed-worker`, `memory` or `timeout`.
    """

    path: str
    deaths: int
    reason: Reason

    def failure(self, limits: Limits) -> ImageError:
        """What the object fails with after the last death."""
        words = {
            Reason.timeout: f"decoding it takes longer than {limits.max_image_s} s",
            Reason.memory: "memory ran out on its machine, or in its container, each time it was decoded alone",
        }
        return ImageError(words.get(self.reason, "it ended every process that worked on it"), self.reason, self.deaths)


def suspect_names(plan: Plan) -> frozenset[str]:
    """Names of the plan's suspects; one call to the file system, and empty nearly always."""
    try:
        return frozenset(os.listdir(layout.suspects_folder(plan.folder, plan.plan_id)))
    except FileNotFoundError:
        return frozenset()


def read_suspect(plan: Plan, path: str) -> Suspect:
    """The suspicion as it stands; a damaged or missing file counts one death."""
    try:
        file = layout.suspects_folder(plan.folder, plan.plan_id) / layout.suspect_name(path)
        told = as_type(read_json(file), Suspect, file)
        if told.path == path and told.reason in _DEATHS and told.deaths > 0:
            return told
    except (FileNotFoundError, GalleryMismatch):
        pass
    return Suspect(path, 1, Reason.crashed_worker)


def note_deaths(plan: Plan, paths: Iterable[str], reason: Reason, alone: bool) -> None:
    """Suspect objects that were in hand when a process died.

    Only a death with nothing else in hand counts beyond the first: no object is blamed for its batch mates.

    Raises:
        MachineFault: the folder cannot be written.
    """
    known = suspect_names(plan)
    for path in paths:
        before = read_suspect(plan, path).deaths if layout.suspect_name(path) in known else 0
        deaths = before + 1 if alone else max(before, 1)
        value = {"format": FORMAT, "path": path, "deaths": deaths, "reason": reason}
        write_atomic(layout.suspects_folder(plan.folder, plan.plan_id) / layout.suspect_name(path), [to_json(value)])


def clear(plan: Plan, path: str) -> None:
    """The object is through: nothing is held against it."""
    (layout.suspects_folder(plan.folder, plan.plan_id) / layout.suspect_name(path)).unlink(missing_ok=True)
