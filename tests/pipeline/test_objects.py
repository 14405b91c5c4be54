"""The object list: what is accepted, what is refused and how, and the names made from it."""

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ObjectListError
from pipeline.objects import IdScheme, ObjectList, prepare, read_lines, write_list
from tests.factories import picture

BASENAME, WHOLE_PATH = IdScheme("basename"), IdScheme("path")


def prepared(tmp_path: Path, content: bytes, scheme: IdScheme = BASENAME) -> ObjectList:
    source, scratch = tmp_path / "objects.txt", tmp_path / "scratch"
    source.write_bytes(content)
    scratch.mkdir(exist_ok=True)
    return prepare(source, scratch, scheme)


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
        "1 blank lines left out",
        "1 duplicate lines left out",
    )


def test_repeated_lines_of_a_sorted_list_do_not_make_it_unsorted(tmp_path: Path) -> None:
    assert prepared(tmp_path, b"a.jpg\na.jpg\nb.jpg\n").notes == ("1 duplicate lines left out",)


@given(st.lists(st.text(st.characters(exclude_categories=["C"], exclude_characters="/"), min_size=5, max_size=9)))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_list_comes_out_as_its_sorted_set_of_bytes(tmp_path: Path, names: list[str]) -> None:
    lines = [f"d/x{name}" for name in names] or ["d/x.jpg"]
    objects = prepared(tmp_path, "\n".join(lines).encode(), WHOLE_PATH)
    assert list(read_lines(objects.path)) == sorted(set(lines), key=str.encode)
    assert objects.lines == len(set(lines))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"/a.jpg", "absolute"),
        (b"a/../b.jpg", "nothing outside the media folder"),
        (b"a//b.jpg", "empty"),
        (b"a/./b.jpg", "empty"),
        (b"a\tb.jpg", "control character"),
        (b"a\xc2\x85b.jpg", "control character"),
        (b"\xff.jpg", "UTF-8"),
        (b"a" * 231, "longer than 230 bytes"),
        ("é".encode() * 116, "longer than 230 bytes"),
        (b"..x.jpg", "--object-id path"),
        (b"ab..jpg", "--object-id path"),
        (b"ab.", "--object-id path"),
    ],
)
def test_an_unusable_line_is_refused_with_its_number(tmp_path: Path, line: bytes, words: str) -> None:
    with pytest.raises(ObjectListError) as caught:
        prepared(tmp_path, b"good.jpg\n" + line + b"\n")
    assert "line 2" in str(caught.value)
    assert words in str(caught.value)


def test_two_paths_with_one_id_are_both_named_and_the_whole_path_sets_them_apart(tmp_path: Path) -> None:
    with pytest.raises(ObjectListError, match=r"'x/same.jpg' and 'y/same.jpg'.*--object-id path"):
        prepared(tmp_path, b"x/same.jpg\ny/same.jpg\n")
    assert prepared(tmp_path, b"x/same.jpg\ny/same.jpg\n", WHOLE_PATH).lines == 2


@pytest.mark.parametrize("content", [b"", b"\n\r\n"])
def test_an_empty_list_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ObjectListError, match="is empty"):
        prepared(tmp_path, content)


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


def test_a_scan_lists_images_of_any_case_in_order_of_bytes(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a 'quoted' $(x).png", "é.jpeg", "Z.webp", "notes.txt", "b.jpg/3.png"):
        picture(tmp_path / "media" / name) if not name.endswith("txt") else (tmp_path / "media" / name).write_text("")
    target = tmp_path / "out" / "objects.txt"
    assert write_list(tmp_path / "media", target) == 5
    assert target.read_text() == "Z.webp\na 'quoted' $(x).png\nb.jpg/3.png\nb/2.JPG\né.jpeg\n"
    assert os.listdir(target.parent) == ["objects.txt"]


def test_a_name_with_a_line_break_and_a_folder_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectListError, match="no image files"):
        write_list(tmp_path, tmp_path / "objects.txt")
    picture(tmp_path / "a\nb.png")
    with pytest.raises(ObjectListError, match="line break"):
        write_list(tmp_path, tmp_path / "objects.txt")
    with pytest.raises(ObjectListError, match="does not exist"):
        write_list(tmp_path / "none", tmp_path / "objects.txt")
