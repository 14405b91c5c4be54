"""Which of several near-identical files is kept, by rules in an order, and why.

Each rule leaves the files that are best by it, and the next one chooses among these: with `pixels,bytes` the largest
file of those with the most pixels. If several are left after the last rule, the one with the shortest path is kept
(copies are called `a (1).jpg`), and of these the first.

What is not known of one file is not held against it: if nothing here decodes one (HEIF), no rule about pixels chooses.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pipeline.errors import UsageError
from search.duplicates.files import FileFacts


class RuleKind(StrEnum):
    """What files are compared by.

    `pixels`: the most pixels. `bytes`: the largest file. `oldest`: changed longest ago; programs that copy or
    re-encode a picture give the copy a new time, while the date inside of it is often the same. `path`: below a prefix.
    `format`: without loss before lossy before at most 256 colors.
    """

    pixels = "pixels"
    bytes = "bytes"
    oldest = "oldest"
    path = "path"
    form = "format"


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        prefix: of `path`.
    """

    kind: RuleKind
    prefix: str = ""


@dataclass(frozen=True)
class Candidate:
    """One file that could be kept.

    Attributes:
        path: relative to the media folder.
        facts: None if there is no such file; one that exists is always better.
        reference: whether it is in the reference; of files that are equally good, such a one is kept.
    """

    path: str
    facts: FileFacts | None
    reference: bool = False


@dataclass(frozen=True)
class Choice:
    """The file that is kept.

    Attributes:
        kept: its position among the candidates.
        reason: in words, e.g. `most pixels (4000 x 3000), then largest (2,412,331 bytes)`.
    """

    kept: int
    reason: str


#: Formats by what they lose; what is not named loses something, or may.
_LOSSLESS, _FEW_COLORS = {"BMP", "DIB", "PNG", "PPM", "TGA", "TIFF"}, {"GIF", "ICO"}


def parse_rules(text: str, option: str = "--keep") -> tuple[Rule, ...]:
    """Read rules as `--keep` has them; a prefix with a comma stands in double quotes, as in CSV: `"path=a,b"`.

    Args:
        option: what they were given as.

    Raises:
        UsageError: one is unknown, given twice, or a `path` without a prefix; or quotes or line ends are amiss.
    """
    known = "pixels, bytes, oldest, path=PREFIX and format"
    rules = []
    try:
        words = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error:
        raise UsageError(
            f'{option} {text!r}: the rules stand in one line, and quotes around a whole rule: "path=a,b"'
        ) from None
    for word in words:
        name, given, prefix = word.partition("=")
        if name not in list(RuleKind) or bool(given) != (name == RuleKind.path):
            raise UsageError(f"{option} {text}: {word!r} is no rule; the rules are {known}, with commas between")
        if given and not prefix:
            raise UsageError(f"{option} {text}: path= has no prefix")
        rule = Rule(RuleKind(name), prefix)
        if rule in rules:
            raise UsageError(f"{option} {text}: {word} stands there twice")
        rules.append(rule)
    if not rules:
        raise UsageError(f"{option} has no rule; the rules are {known}")
    return tuple(rules)


def choose(candidates: Sequence[Candidate], rules: Sequence[Rule]) -> Choice:
    """Choose the file that is kept.

    Args:
        candidates: at least one.
    """
    left = [number for number, one in enumerate(candidates) if one.facts is not None]
    reasons = [] if len(left) in (0, len(candidates)) else ["is there"]
    left = left or list(range(len(candidates)))
    for rule in rules:
        if len(left) == 1:
            break
        if rule.kind is RuleKind.pixels and any(_is_unknown(candidates[number]) for number in left):
            reasons.append("pixels not known of all")
            continue
        values = [_value(rule, candidates[number]) for number in left]
        best = max(values)
        if min(values) != best:
            left = [number for number, value in zip(left, values, strict=True) if value == best]
            reasons.append(_said(rule, candidates[left[0]]))
    in_reference = [number for number in left if candidates[number].reference]
    if in_reference and in_reference != left:
        left = in_reference
        reasons.append("in the reference")
    if len(left) > 1:
        left = [min(left, key=lambda number: (len(path := _bytes(candidates[number].path)), path))]
        reasons.append("shortest path")
    return Choice(left[0], ", then ".join(reasons) or "the only one")


def _bytes(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _value(rule: Rule, one: Candidate) -> Any:
    """The larger the better."""
    if rule.kind is RuleKind.path:
        return one.path.startswith(rule.prefix)
    if one.facts is None:
        return 0
    return _OF_FACTS[rule.kind](one.facts)


def _is_unknown(one: Candidate) -> bool:
    return one.facts is not None and bool(one.facts.format) and not one.facts.width


def _format_rank(facts: FileFacts) -> int:
    if not facts.format:
        return -1
    return 2 if facts.format in _LOSSLESS else 0 if facts.format in _FEW_COLORS else 1


_OF_FACTS: dict[RuleKind, Callable[[FileFacts], int]] = {
    RuleKind.pixels: lambda facts: facts.width * facts.height,
    RuleKind.bytes: lambda facts: facts.bytes,
    RuleKind.oldest: lambda facts: -facts.mtime_ns,
    RuleKind.form: _format_rank,
}


def _said(rule: Rule, one: Candidate) -> str:
    facts = one.facts
    if rule.kind is RuleKind.path or facts is None:
        return f"below {rule.prefix}"
    if rule.kind is RuleKind.pixels:
        return f"most pixels ({facts.width} x {facts.height})"
    if rule.kind is RuleKind.bytes:
        return f"largest ({facts.bytes:,} bytes)"
    if rule.kind is RuleKind.oldest:
        return f"oldest ({datetime.fromtimestamp(facts.mtime_ns // 10**9, UTC):%Y-%m-%d %H:%M:%S} UTC)"
    return f"best format ({facts.format})"
