"""Probes: a few images that were readable when their list was enqueued.

They tell an unmounted media folder from missing files.
"""

import os
from pathlib import Path
from typing import Any

from pipeline import layout
from pipeline.errors import GalleryMismatch, RuijiError
from pipeline.objects import ObjectList, read_lines
from pipeline.plans.plan import Plan
from pipeline.store import FORMAT, read_json, to_json, write_atomic

#: How many there are, spread over the list.
PROBES = 8


def find_probes(media_dir: Path, objects: ObjectList) -> tuple[str, ...]:
    """Some readable objects, spread over the list; looks at more places while it finds too few.

    Raises:
        RuijiError: none of the objects can be read below the media folder.
    """
    top = str(media_dir)
    for places in (PROBES, 32 * PROBES, objects.lines):
        step = max(1, objects.lines // places)
        found: list[str] = []
        missing = ""
        for number, path in enumerate(read_lines(objects.path, "looking for an image that can be read")):
            # The list is sorted: what is in a folder that is not there comes in one piece, and is asked for once.
            if number % step or (missing and path.startswith(missing)):
                continue
            if os.access(f"{top}/{path}", os.R_OK):
                found.append(path)
                if len(found) == PROBES:
                    break
            else:
                missing = _missing_folder(top, path)
        if found:
            return tuple(found)
    raise RuijiError(
        f"none of the {objects.lines} objects of the list can be read below {media_dir}: is it mounted, "
        "and is the list relative to it?"
    )


def _missing_folder(top: str, path: str) -> str:
    """The outermost folder of a path that is not there, with a `/` at its end; empty if all are."""
    end = 0
    while (end := path.find("/", end) + 1) > 0:
        if not os.path.lexists(f"{top}/{path[:end]}"):
            return path[:end]
    return ""


def note_probes(plan: Plan, probes: tuple[str, ...]) -> None:
    """Give the open plan fresh probes: its own may be gone, and its images be others than the list's."""
    write_atomic(layout.probes_file(plan.folder), [to_json({"format": FORMAT, "plan": plan.plan_id, "probes": probes})])


def noted_probes(plan: Plan) -> list[str]:
    """The fresh probes of a plan; empty if there are none that can be used."""
    try:
        value: dict[str, Any] = read_json(layout.probes_file(plan.folder))
        probes = value["probes"] if value["plan"] == plan.plan_id else []
    except (OSError, GalleryMismatch, KeyError, TypeError):
        return []
    return [path for path in probes if isinstance(path, str)] if isinstance(probes, list) else []
