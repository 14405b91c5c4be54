"""Property tests fail for what changed, never by chance."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

TRIED = """
import sys
from hypothesis import given
from hypothesis import strategies as st
from tests import properties
properties.set_up()
for name in sys.argv[1:]:
    __import__(name)
tried = []
@given(st.integers() | st.text() | st.sampled_from(sorted({"a", "b", "c"})))
def test(value):
    tried.append(value)
test()
print(len(tried), ascii(tried))
"""


def tried(*modules: str, **environment: str) -> str:
    """What a test tries if these modules are loaded."""
    command = [sys.executable, "-c", TRIED, *modules]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("seed", ["0", "1"])
def test_what_is_tried_depends_on_no_module_that_happens_to_be_loaded(seed: str) -> None:
    assert tried("pipeline.layout", "tests.factories", PYTHONHASHSEED=seed) == tried()


def test_fuzzing_tries_other_examples_each_time_and_more_of_them() -> None:
    assert tried(FUZZ="3") != tried(FUZZ="3")
    assert int(tried(FUZZ="3").split()[0]) > 2 * int(tried().split()[0])
