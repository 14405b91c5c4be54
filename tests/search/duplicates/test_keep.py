"""Keep rules: in their order, each with its reason."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from search.duplicates.files import FileFacts
from search.duplicates.keep import Candidate, Rule, RuleKind, choose, parse_rules

S = 1_700_000_000 * 10**9
BIG = FileFacts(900, S + 5 * 10**9, 400, 300, "JPEG")
SMALL = FileFacts(2_000_000, S, 40, 30, "PNG")
LIKE_BIG = FileFacts(1000, S + 9 * 10**9, 400, 300, "GIF")


@pytest.mark.parametrize(
    ("rules", "kept", "reason"),
    [
        ("pixels,bytes", 2, "most pixels (400 x 300), then largest (1,000 bytes)"),
        ("pixels,oldest", 1, "most pixels (400 x 300), then oldest (2023-11-14 22:13:25 UTC)"),
        ("pixels", 1, "most pixels (400 x 300), then shortest path"),
        ("bytes", 0, "largest (2,000,000 bytes)"),
        ("oldest", 0, "oldest (2023-11-14 22:13:20 UTC)"),
        ("format", 0, "best format (PNG)"),
        ("path=new/,bytes", 2, "below new/, then largest (1,000 bytes)"),
        ("path=nowhere/,bytes", 0, "largest (2,000,000 bytes)"),
        ('"path=a,b/",pixels', 1, "most pixels (400 x 300), then shortest path"),
    ],
)
def test_rules_choose_in_their_order_and_say_why(rules: str, kept: int, reason: str) -> None:
    candidates = [Candidate("old/a.png", SMALL), Candidate("new/b.jpg", BIG), Candidate("new/c.gif", LIKE_BIG)]
    found = choose(candidates, parse_rules(rules))
    assert (found.kept, found.reason) == (kept, reason)


def test_lossless_comes_before_lossy_before_few_colors() -> None:
    (rule,) = parse_rules("format")
    for better, worse in (
        ("PNG", "JPEG"),
        ("TIFF", "WEBP"),
        ("AVIF", "GIF"),
        ("JPEG", "ICO"),
        ("HEIF", "GIF"),
        ("GIF", ""),
    ):
        pair = [Candidate("a", FileFacts(1, 1, 1, 1, worse)), Candidate("b", FileFacts(1, 1, 1, 1, better))]
        assert choose(pair, [rule]).kept == 1


def test_what_is_not_known_of_a_file_is_not_held_against_it() -> None:
    # As of a HEIF picture where nothing decodes it.
    unknown, copy = Candidate("IMG_0001.HEIC", FileFacts(2_000_000, S, format="HEIF")), Candidate("a.jpg", BIG)
    found = choose([copy, unknown], parse_rules("pixels,bytes"))
    assert (found.kept, found.reason) == (1, "pixels not known of all, then largest (2,000,000 bytes)")
    found = choose([copy, unknown], parse_rules("format,pixels"))
    assert (found.kept, found.reason) == (0, "pixels not known of all, then shortest path")
    # One that is out already is not waited for.
    found = choose([copy, unknown, Candidate("a (1).jpg", BIG)], parse_rules("path=a,pixels"))
    assert (found.kept, found.reason) == (0, "below a, then shortest path")


def test_a_file_that_is_there_is_better_than_any_that_is_not() -> None:
    for rules in ("pixels,bytes,oldest,format", "path=gone/"):
        found = choose([Candidate("gone/a", None), Candidate("z", FileFacts(0, S))], parse_rules(rules))
        assert (found.kept, found.reason) == (1, "is there")
    assert choose([Candidate("b", None), Candidate("a", None)], parse_rules("pixels")).kept == 1
    assert choose([Candidate("a (1)", None), Candidate("b", None)], parse_rules("pixels")).kept == 1
    assert choose([Candidate("a", BIG)], parse_rules("pixels")).reason == "the only one"


def test_rules_are_read_or_refused() -> None:
    assert parse_rules("pixels, bytes,path=a") == (
        Rule(RuleKind.pixels),
        Rule(RuleKind.bytes),
        Rule(RuleKind.path, "a"),
    )
    assert parse_rules('"path=a,b"') == (Rule(RuleKind.path, "a,b"),)
    for text in ("", "pixel", "pixels,,bytes", "path", "path=", "pixels=3", "bytes,bytes", "PIXELS"):
        with pytest.raises(UsageError, match="--keep"):
            parse_rules(text)
    for text in ("pixels\nbytes", "pixels\rbytes", '"path=a,b', '"path=a"b', '"path=' + "a" * 200_000 + '"'):
        with pytest.raises(UsageError, match=r"--keep .* the rules stand in one line"):
            parse_rules(text)


@given(st.text() | st.text('pixelsby=,"\r\n\0 '))
def test_no_text_is_worse_than_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_rules(text)
