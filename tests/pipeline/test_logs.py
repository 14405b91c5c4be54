"""A line of the log is one short line, whatever is told in it."""

import json
import logging

import pytest

from pipeline.logs import EventFormatter

NAME = "a\nb\x1b[2J\u202egnp.jpg" + "x" * 10**6


def record(message: str, error: Exception | None = None, **fields: object) -> logging.LogRecord:
    found = logging.LogRecord(
        "workers", logging.WARNING, "", 0, "%s", (message,), (type(error), error, None) if error else None
    )  # type: ignore[arg-type]
    vars(found).update(fields)
    return found


@pytest.mark.parametrize("as_json", [True, False])
def test_foreign_text_is_cut_and_cannot_break_the_line(as_json: bool) -> None:
    line = EventFormatter(as_json).format(record(NAME, event="object_failed", path=NAME))
    assert "\n" not in line and "\x1b" not in line
    assert len(line) < 3000 and "1,000,015 characters" in line
    if as_json:
        assert json.loads(line)["path"].startswith("a\nb\x1b")
    else:
        assert "\u202e" not in line


def test_a_name_in_any_script_stays_readable() -> None:
    assert "写真/été 1.jpg" in EventFormatter(False).format(record("m", path="写真/été 1.jpg"))


@pytest.mark.parametrize("as_json", [True, False])
def test_a_traceback_is_cut_as_well(as_json: bool) -> None:
    assert len(EventFormatter(as_json).format(record("m", ValueError("y" * 10**6)))) < 3000
