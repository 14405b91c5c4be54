"""The child that compares all pairs of a gallery, for `serve.comparing`: what it finds is kept as files.

It writes a line of JSON for each step, `{"done": …, "total": …}`, and `{"error": …}` if it fails. It may be killed at
any moment: the next one goes on with the panels that are kept.
"""

import json
import os
import sys
import time
from pathlib import Path

from pipeline import layout
from pipeline.choices import Device
from pipeline.errors import MachineFault, RuijiError
from search.duplicates.groups import PairsMissing, find_groups, only_kept
from search.gallery.opening import open_gallery
from search.ranking.planner import Planner, Purpose, wait_asleep

#: Seconds between two lines.
_SAID_S = 0.2


def _main() -> None:
    # C libraries write to stdout as they please.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder, threshold, device = Path(sys.argv[1]), float(sys.argv[2]), Device(sys.argv[3])
    # Searches of the service come first; beside a run of workers it still gets a tenth of their share.
    os.nice(10)
    wait_asleep()
    said = -_SAID_S

    def progress(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _SAID_S:
            said = time.monotonic()
            print(json.dumps({"done": done, "total": total}), file=answers, flush=True)

    try:
        gallery, planner = open_gallery(folder), Planner(device)
        arithmetic = planner.arithmetic(planner.way(gallery, Purpose.pairs, gallery.rows))
        find_groups(gallery, threshold, None, arithmetic, progress)
        try:
            find_groups(gallery, threshold, progress=only_kept)
        except PairsMissing:
            kept = layout.cache_folder(folder)
            raise MachineFault(f"the pairs cannot be kept: make {kept} writable, or free space there") from None
    except RuijiError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _main()
