import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.processes import Watch, tree_cpu_s

#: Burns CPU time in a child of a child, writes features before and after it, and ends.
WORK = """
import subprocess, sys, time
from pathlib import Path
def burn(seconds):
    while time.process_time() < seconds: pass
out = Path(sys.argv[1])
if len(sys.argv) == 2:
    burn(0.5)
    for name in ("aabb", "ccdd"):
        folder = out / name[:2] / name[2:]
        folder.mkdir(parents=True)
        (folder / f"{name}.npy").touch()
        subprocess.run([sys.executable, __file__, str(out), "child"])
else:
    burn(0.4)
"""


def test_a_window_has_the_cpu_time_of_children_that_ended(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(WORK)
    watch, before = Watch(), tree_cpu_s()
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "out")])
    window = watch.follow(tmp_path / "out", 2, lambda: process.poll() is not None)
    assert tree_cpu_s() - before >= 0.5 + 0.4 + 0.4
    assert window.images == 1
    assert window.start_cpu_s >= 0.4
    # Up to the last feature: the first child, and not the second.
    assert 0 < window.cpu_s <= tree_cpu_s() - before - window.start_cpu_s - 0.1


#: Burns CPU time in a child whose end nobody waits for: the kernel then adds its time to no one's.
FORGETFUL = """
import signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def feature(name):
    (Path(sys.argv[1]) / name / name).mkdir(parents=True)
    (Path(sys.argv[1]) / name / name / f"{name}.npy").touch()
feature("aa")
child = subprocess.Popen([sys.executable, "-c", "import time\\nwhile time.process_time() < 2: pass"])
while Path(f"/proc/{child.pid}").exists():
    time.sleep(0.05)
time.sleep(0.6)
feature("bb")
"""


def test_a_window_has_the_cpu_time_of_children_that_their_parent_forgets(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(FORGETFUL)
    watch = Watch()
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "out")])
    window = watch.follow(tmp_path / "out", 2, lambda: process.poll() is not None)
    # What it burned since the last look, half a second before its end, is not seen.
    assert 1.2 <= window.cpu_s <= 3


def test_a_peer_that_makes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nothing appeared"):
        Watch().follow(tmp_path, 1, lambda: True)
