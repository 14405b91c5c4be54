"""What makes a Python process like one on another host; Python imports it first where its folder is on the path.

OTHER_HOST_CLOCK_S: its clock is this much ahead. OTHER_HOST_LATE_S: it sees feature files only when they are this
old, as on a network folder whose directories are cached.
"""

import os
import re
import sys
import time

_now = time.time
_LATE_S = float(os.environ.get("OTHER_HOST_LATE_S", "0"))
_AHEAD_S = float(os.environ.get("OTHER_HOST_CLOCK_S", "0"))
#: <a>/<b>/<id>.npy; a shard's own arrays lie higher.
_FEATURE = re.compile(r"/[^/]{2}/[^/]{2}/[^/]+\.npy$")


def _see_late(event, arguments):
    if event == "open" and _FEATURE.search(str(arguments[0])):
        try:
            age_s = _now() - os.stat(arguments[0]).st_mtime
        except OSError:
            return
        if age_s < _LATE_S:
            raise FileNotFoundError(2, "not seen here yet", arguments[0])


if _LATE_S:
    # Python asks it before every file that it opens, in whatever way; what is compiled opens files by itself.
    sys.addaudithook(_see_late)
    sys.modules["pipeline._small_files"] = None
if _AHEAD_S:
    time.time = lambda: _now() + _AHEAD_S
