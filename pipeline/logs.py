"""Logging: one line per event on stderr, with a stable event name; stdout is for answers."""

import json
import logging
import sys
import time
from contextlib import suppress

from pipeline.choices import LogFormat
from pipeline.streams import shown

#: LogRecord attributes that are not ours; whatever else a record carries came in through `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
#: What is told may come from anywhere, a forged message or a file's name; a line stays one line, and short.
_LONGEST = 1000


def clipped(text: str) -> str:
    """A text cut to what a line can take, with its whole length."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


class EventFormatter(logging.Formatter):
    """Text (`12:00:05 info worker_ready device=cpu …`) or one JSON object per line."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """Format one record; `extra` keys become fields, `event` comes first."""
        fields = {k: v for k, v in vars(record).items() if k not in _STANDARD}
        event = fields.pop("event", None)
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        trace = "\n".join(map(clipped, trace.splitlines()))
        if self._as_json:
            line: dict[str, object] = {"time": round(record.created, 3), "level": record.levelname.lower()}
            if event:
                line["event"] = event
            line |= {"message": clipped(record.getMessage())}
            line |= {key: clipped(value) if isinstance(value, str) else value for key, value in fields.items()}
            if trace:
                line["traceback"] = trace
            return json.dumps(line, ensure_ascii=False, default=str)
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        words = [clock, record.levelname.lower(), *([str(event)] if event else []), clipped(record.getMessage())]
        words += [f"{key}={clipped(str(value))}" for key, value in fields.items()]
        return shown(" ".join(words)) + (f"\n{trace}" if trace else "")


class EventHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is at the time, so that a progress bar can take the lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or several if there is a traceback."""
        # A log that is full or gone stops nobody's work.
        with suppress(OSError):
            print(self.format(record), file=sys.stderr, flush=True)


def set_up(log_format: LogFormat = LogFormat.text) -> None:
    """Send ruiji's events to stderr; keep Celery and kombu to warnings."""
    handler = EventHandler()
    handler.setFormatter(EventFormatter(as_json=log_format is LogFormat.json))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("pipeline", "workers", "search", "serve"):
        logging.getLogger(name).setLevel(logging.INFO)
