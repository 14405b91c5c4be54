"""What is written to people and to programs: standard streams that may be closed, full or not UTF-8, and odd names.

People get names with whatever a terminal would obey, or hide, as escapes. Programs get every name exactly, in UTF-8
whatever the locale says; what comes from a file name that is not UTF-8 goes out as the same bytes.
"""

import csv
import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: What an `OSError` of standard output has as its `filename`.
STDOUT = "stdout"

#: Control and formatting characters (direction among them), halves of pairs, line and paragraph separators.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
#: Emoji and Indic scripts are spelled with them.
_JOINERS = "\u200c\u200d"


def shown(text: object) -> str:
    r"""Text for people, on one line: characters that a terminal obeys or hides are escapes such as `\x1b`."""
    value = str(text)
    if value.isprintable():
        return value
    return "".join(map(_shown, value))


def _shown(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    if "\udc80" <= character <= "\udcff":
        # A byte of a file name that is not UTF-8.
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number and the words for it: `1 group`, and `2 groups` if nothing else is said for many."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def tell(line: object) -> None:
    """Write a line for people to stdout."""
    print(shown(line), flush=True)


def note(line: object) -> None:
    """Write a line for people to stderr; a log that cannot be written stops nobody's work."""
    with suppress(OSError):
        print(shown(line), file=sys.stderr, flush=True)


def drop_unwritten_notes() -> None:
    """Let what `note` could not write go nowhere: from Python 3.13 on, a command that leaves it ends with code 120."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def exact_stdout() -> TextIO:
    """Standard output for what programs read."""
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdout


def as_argument(path: object) -> str:
    """A path that no program takes for an option."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text


def to_json(value: object, indent: int | None = None) -> str:
    """JSON with every character as it is, or with escapes if UTF-8 cannot hold one."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def csv_writer(out: TextIO) -> Callable[[Iterable[object]], None]:
    r"""What writes a row as CSV, ended by a newline; fields with a `\r` or `\n` are quoted."""

    class Lines:
        def write(self, row: str) -> None:
            out.write(row.removesuffix("\r\n") + "\n")

    # The module quotes what its line end is made of.
    return csv.writer(Lines(), lineterminator="\r\n").writerow


class _Stdout(io.FileIO):
    """Standard output; its first error says that it is its own, and what comes after that goes nowhere."""

    _failed = False

    def write(self, data: "Buffer", /) -> int:
        if self._failed:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            error.filename = STDOUT
            raise


def open_streams() -> None:
    """Put something in the place of standard streams that are closed; let stdout take every character.

    A file that is opened later would otherwise get their number, and `print` takes stdout for a stderr that is None.
    Reading stdin or writing stdout then fails as it does without.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # The wrong way round, except for stderr.
            descriptor = os.open(os.devnull, os.O_RDONLY if name == "stdout" else os.O_WRONLY)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(1, "w", closefd=False)),
        encoding=sys.stdout.encoding,
        errors="backslashreplace",
        line_buffering=sys.stdout.isatty(),
    )
