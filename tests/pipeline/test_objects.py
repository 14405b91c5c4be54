"""The object list: what is accepted, what is refused or fails alone, and the names made from it."""

import contextlib
import hashlib
import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.choices import ObjectIds
from pipeline.errors import ObjectListError, UsageError
from pipeline.objects import Exclude, IdScheme, ObjectList, escaped, is_bad_name, prepare, read_lines, sort_lines
from pipeline.progress import StillAt
from tests.factories import processes_below
from tests.properties import examples

BASENAME, WHOLE_PATH = IdScheme(ObjectIds.basename), IdScheme(ObjectIds.path)


def prepared(tmp_path: Path, content: bytes, scheme: IdScheme = BASENAME, exclude: Exclude | None = None) -> ObjectList:
    source, scratch = tmp_path / "objects.txt", tmp_path / "scratch"
    source.write_bytes(content)
    scratch.mkdir(exist_ok=True)
    return prepare(source, scratch, scheme, exclude)


def test_a_sorted_list_passes_unchanged(tmp_path: Path) -> None:
    objects = prepared(tmp_path, b"a/1.jpg\nb/2.jpg\n")
    assert objects.path.read_bytes() == b"a/1.jpg\nb/2.jpg\n"
    assert (objects.lines, objects.notes) == (2, ())
    assert objects.digest == hashlib.sha256(b"a/1.jpg\nb/2.jpg\n").hexdigest()
    assert objects.by_id.read_bytes() == b"1.jpg\ta/1.jpg\n2.jpg\tb/2.jpg\n"


def test_order_line_ends_blanks_duplicates_and_a_leading_dot_are_mended_and_said(tmp_path: Path) -> None:
    objects = prepared(tmp_path, b"./b.jpg\r\n\r\na.jpg\r\n./b.jpg\r\nB.jpg")
    assert objects.path.read_bytes() == b"B.jpg\na.jpg\nb.jpg\n"
    assert objects.notes == (
        "sorted by bytes, as LC_ALL=C sort does",
        "1 blank line left out",
        "1 duplicate line left out",
    )


def test_repeated_lines_of_a_sorted_list_do_not_make_it_unsorted(tmp_path: Path) -> None:
    assert prepared(tmp_path, b"a.jpg\na.jpg\nb.jpg\n").notes == ("1 duplicate line left out",)


@given(st.lists(st.text(st.characters(exclude_categories=["C"], exclude_characters="/"), min_size=5, max_size=9)))
@settings(max_examples=examples(25))
def test_any_list_comes_out_as_its_sorted_set_of_bytes(tmp_path: Path, names: list[str]) -> None:
    lines = [f"d/x{name}" for name in names] or ["d/x.jpg"]
    objects = prepared(tmp_path, "\n".join(lines).encode(), WHOLE_PATH)
    assert list(read_lines(objects.path)) == sorted(set(lines), key=str.encode)
    assert objects.lines == len(set(lines))


@pytest.mark.parametrize(
    ("line", "on_list", "words"),
    [
        (b"/etc/passwd", r"\x2fetc/passwd/", "absolute"),
        (b"a/../b.jpg", r"a/\x2e\x2e/b.jpg/", "nothing outside the media folder"),
        (b"..", r"\x2e\x2e/", "nothing outside the media folder"),
        (b"a//b.jpg", r"a\x2f\x2fb.jpg/", "empty"),
        (b"a/./b.jpg", r"a/\x2e/b.jpg/", "empty"),
        (b"/", r"\x2f/", "absolute"),
        (b"./", r"\x2e\x2f/", "empty"),
        (b"a\tb.jpg", r"a\x09b.jpg/", "control character"),
        (b"a\rb.jpg", r"a\x0db.jpg/", "control character"),
        (b"a\xc2\x85b.jpg", r"a\xc2\x85b.jpg/", "control character"),
        (b"d/\xff\\.jpg", r"d/\xff\x5c.jpg/", "UTF-8"),
        (b"a" * 231, "a" * 231 + "/", "longer than 230 bytes"),
        ("é".encode() * 116, "é" * 116 + "/", "longer than 230 bytes"),
        (b"..x.jpg", "..x.jpg/", "--object-id path"),
        (b"ab..jpg", "ab..jpg/", "--object-id path"),
        (b"ab.", "ab./", "--object-id path"),
    ],
)
def test_an_unusable_line_fails_alone_in_a_form_that_no_path_has(
    tmp_path: Path, line: bytes, on_list: str, words: str
) -> None:
    objects = prepared(tmp_path, b"good.jpg\n" + line + b"\n")
    assert sorted(read_lines(objects.path)) == sorted(["good.jpg", on_list])
    assert any("line 2" in note and words in note and "bad-name" in note for note in objects.notes)
    assert words in (BASENAME.bad_name(on_list) or "")
    assert BASENAME.bad_name("good.jpg") is None
    assert is_bad_name(BASENAME.object_id(on_list)), "no other object has its id"
    assert f"{on_list}\t{on_list}" in set(read_lines(objects.by_id))
    again = prepared(tmp_path, objects.path.read_bytes())
    assert again.digest == objects.digest, "a list that was written is taken as it is"
    with pytest.raises(ObjectListError, match=r"no line .* can be used; the first is line 1"):
        prepared(tmp_path, line)


@given(st.binary(min_size=1, max_size=12).filter(lambda line: not {0, 10} & set(line)))
@settings(max_examples=examples(300))
def test_the_escaped_form_is_a_legal_path_and_no_two_lines_share_it(line: bytes) -> None:
    form = escaped(line)
    assert WHOLE_PATH.problem(form.encode().removesuffix(b"/")) is None
    assert WHOLE_PATH.problem(form.encode()) is not None
    back = form[:-1].encode()
    for byte in range(256):
        if byte != 0x5C:
            back = back.replace(b"\\x%02x" % byte, bytes([byte]))
    assert back.replace(b"\\x5c", b"\\") == line


@given(st.text(st.sampled_from("a./ \\é\x7f\t~-0"), max_size=7))
@example("a" * 231)
@example("d/" + "a" * 231)
def test_a_plain_line_is_one_without_any_problem(line: str) -> None:
    for scheme in (BASENAME, WHOLE_PATH):
        problem = scheme.problem(line.encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.objects._PLAIN", re.compile(b"(?!)"))
            assert problem == scheme.problem(line.encode())


def test_a_line_that_the_other_ids_allow_is_usable_again(tmp_path: Path) -> None:
    on_list = prepared(tmp_path, b"..x.jpg\na.jpg\n").path.read_bytes()
    assert on_list == b"..x.jpg/\na.jpg\n"
    assert list(read_lines(prepared(tmp_path, on_list, WHOLE_PATH).path)) == ["..x.jpg", "a.jpg"]


def test_a_line_that_is_too_long_for_a_path_is_cut(tmp_path: Path) -> None:
    long = b"x" * 100_000
    objects = prepared(tmp_path, b"a.jpg\n" + long + b"1\n" + long + b"2\nb.jpg\n", WHOLE_PATH)
    lines = list(read_lines(objects.path))
    assert [line[:6] for line in lines] == ["a.jpg", "b.jpg", "xxxxxx", "xxxxxx"]
    assert max(map(len, lines)) < 300
    assert "longer than" in (WHOLE_PATH.bad_name(lines[2]) or "")
    assert prepared(tmp_path, objects.path.read_bytes(), WHOLE_PATH).digest == objects.digest


def test_what_is_no_text_in_utf8_is_refused_and_a_mark_dropped(tmp_path: Path) -> None:
    assert prepared(tmp_path, b"\xef\xbb\xbfa.jpg\r\nb.jpg\r\n").path.read_bytes() == b"a.jpg\nb.jpg\n"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        with pytest.raises(UsageError, match="UTF-16" if encoding == "utf-16" else "null characters"):
            prepared(tmp_path, "a.jpg\nb.jpg\n".encode(encoding))
    with pytest.raises(ObjectListError, match="-print0"):
        prepared(tmp_path, b"a.jpg\0b.jpg\0")


@pytest.mark.parametrize(
    ("globs", "left"),
    [
        (["b.jpg"], ["a/c.jpg", "x.png"]),
        (["./d/"], ["a/b.jpg", "a/c.jpg", "x.png"]),
        (["*.png"], ["a/b.jpg", "a/c.jpg"]),
        (["a/*"], ["d/b.jpg/e.png", "x.png"]),
        (["/a/b.jpg", "x.p?g"], ["a/c.jpg", "d/b.jpg/e.png"]),
        (["*/b.jpg"], ["a/c.jpg", "x.png"]),
        (["A", "B.JPG"], ["a/b.jpg", "a/c.jpg", "d/b.jpg/e.png", "x.png"]),
    ],
)
def test_globs_leave_out_lines_by_name_or_by_path(tmp_path: Path, globs: list[str], left: list[str]) -> None:
    every = ["a/b.jpg", "a/c.jpg", "d/b.jpg/e.png", "x.png"]
    objects = prepared(tmp_path, "\n".join(every).encode(), WHOLE_PATH, Exclude(globs))
    assert list(read_lines(objects.path)) == left
    assert objects.notes == ((f"lines left out by --exclude: {4 - len(left)}",) if len(left) < 4 else ())


def test_a_glob_takes_names_that_no_line_can_hold_and_may_not_take_all(tmp_path: Path) -> None:
    assert prepared(tmp_path, b"a.jpg\nx\xe9\n", exclude=Exclude(["x*"])).lines == 1
    with pytest.raises(ObjectListError, match=r"has only lines that --exclude leaves out \(2 lines\)"):
        prepared(tmp_path, b"a.jpg\nb.jpg\n", exclude=Exclude(["*"]))
    with pytest.raises(UsageError, match="names nothing"):
        Exclude(["/"])


def test_two_paths_with_one_id_are_both_named_and_the_whole_path_sets_them_apart(tmp_path: Path) -> None:
    with pytest.raises(ObjectListError, match=r"'x/same.jpg' and 'y/same.jpg'.*--object-id path"):
        prepared(tmp_path, b"x/same.jpg\ny/same.jpg\n")
    assert prepared(tmp_path, b"x/same.jpg\ny/same.jpg\n", WHOLE_PATH).lines == 2


@pytest.mark.parametrize("content", [b"", b"\n\r\n"])
def test_an_empty_list_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ObjectListError, match="is empty"):
        prepared(tmp_path, content)


@pytest.mark.parametrize("interval_s", [0.0, 10.0])
def test_a_long_list_tells_how_far_it_is(
    tmp_path: Path, interval_s: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.progress.LINE_INTERVAL_S", interval_s)
    monkeypatch.setattr("pipeline.objects._TOLD_EVERY", 2)
    caplog.set_level("INFO")
    prepared(tmp_path, b"a/1.jpg\na/2.jpg\na/3.jpg\n")
    assert {(vars(record)["event"], record.getMessage()) for record in caplog.records} == (
        {
            ("still_at", "checking the object list: 2 lines"),
            ("still_at", "taking the ids of the object list: 100%"),
            ("still_at", "sorting: 0 MB"),
            ("still_at", "looking for ids that the object list has twice: 100%"),
        }
        if interval_s == 0
        else set()
    )


def test_sorting_tells_that_it_goes_on_and_ends_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sort"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("pipeline.objects.LINE_INTERVAL_S", 0.01)

    def interrupt(still: StillAt, so_far: str) -> None:
        raise KeyboardInterrupt(so_far)

    monkeypatch.setattr(StillAt, "__call__", interrupt)
    (tmp_path / "lines").write_text("b\na\n")
    before = processes_below()
    with pytest.raises(KeyboardInterrupt, match="0 MB"):
        sort_lines(tmp_path / "lines", tmp_path / "sorted")
    assert set(processes_below()) <= set(before)


def test_a_missing_list_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ObjectListError, match="ruiji list"):
        prepare(tmp_path / "none", tmp_path, BASENAME)


def test_nested_names_are_the_articles() -> None:
    name = "0000bada96b0c1c131ebdf41c37964f308cb21d3.jpg"
    assert BASENAME.nested(BASENAME.object_id(f"object/00/00/{name}"), ".npy") == f"00/00/{name}.npy"
    assert [BASENAME.nested(i, ".npy") for i in ("a", "ab", "abc", "漢字かな")] == [
        "a/a.npy",
        "ab/ab.npy",
        "ab/c/abc.npy",
        "漢字/かな/漢字かな.npy",
    ]


def test_whole_paths_get_hashed_folders_and_escaped_names() -> None:
    object_id = WHOLE_PATH.object_id("x/50%/a.jpg")
    digest = hashlib.sha1(b"x/50%/a.jpg").hexdigest()
    assert object_id == "x/50%/a.jpg"
    assert WHOLE_PATH.nested(object_id, ".npy") == f"{digest[:2]}/{digest[2:4]}/x%2F50%25%2Fa.jpg.npy"


def test_a_quoted_path_that_is_no_file_name_any_more_becomes_a_digest() -> None:
    fits, long = "a/" * 57 + "b" * 2, "写真/" * 40 + "a.jpg"
    assert len(WHOLE_PATH.nested(fits, ".npy").rpartition("/")[2]) == len(fits) + 2 * 57 + len(".npy") == 234
    assert WHOLE_PATH.nested(fits, ".npy").endswith("a%2Fbb.npy")
    assert WHOLE_PATH.nested(fits + "b", ".npy").endswith(f"/%-{hashlib.sha256(fits.encode() + b'b').hexdigest()}.npy")
    assert WHOLE_PATH.problem(long.encode()) is None
    assert WHOLE_PATH.object_id(long) == long
    digest = hashlib.sha1(long.encode()).hexdigest()
    name = f"%-{hashlib.sha256(long.encode()).hexdigest()}.error.json"
    assert WHOLE_PATH.nested(long, ".error.json") == f"{digest[:2]}/{digest[2:4]}/{name}"


def test_the_failure_of_a_bad_name_has_a_file_that_no_other_object_has() -> None:
    for scheme in (BASENAME, WHOLE_PATH):
        outer, inner, name = scheme.nested("../x/", ".error.json").split("/")
        assert (len(outer), len(inner), name[:2]) == (2, 2, "%-")
    assert BASENAME.nested("%-x.jpg", ".npy") == "%-/x./%-x.jpg.npy"


@given(
    st.lists(
        st.binary(max_size=20)
        | st.sampled_from([b"\xef\xbb\xbf", b"a/../b", b"/a", b"./a", b"a\r", b"\xff", b"d//a", b"a"])
    )
)
@settings(max_examples=examples(50))
def test_any_file_is_a_list_or_refused(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "any").write_bytes(b"\n".join(lines))
    scratch = Path(tempfile.mkdtemp(dir=tmp_path))
    with contextlib.suppress(UsageError):
        found = prepare(tmp_path / "any", scratch, WHOLE_PATH)
        assert len(list(read_lines(found.path))) == found.lines


@given(st.text(), st.text(min_size=1))
def test_any_glob_is_one_or_refused(glob: str, path: str) -> None:
    with contextlib.suppress(UsageError):
        Exclude([glob]).takes_line(path)
