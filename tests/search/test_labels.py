"""Annotation CSVs: how lines find their objects, and what is refused."""

import contextlib
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from search.labels import read_annotations
from tests.properties import damaged, examples

HEADER = "data_type,img_name,img_path,label,id\n"


def write(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / "anno.csv"
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_the_articles_columns_are_read_in_file_order(tmp_path: Path, encoding: str) -> None:
    source = write(
        tmp_path, HEADER + 'query,a.png,query/a.png,"cat, big",1\n\ngallery,犬.png,./gallery/犬.png,犬,2\n', encoding
    )
    read = read_annotations(source)
    assert read.columns == ("data_type", "img_name", "img_path", "label", "id")
    assert [row["data_type"] for row in read.rows] == ["query", "gallery"]
    assert read.label("a.png", "query/a.png") == "cat, big"
    assert read.label("犬.png", "gallery/犬.png") == "犬"
    assert read.find("none.png", "gallery/none.png") is None


def test_a_path_decides_before_a_name_and_a_name_serves_where_paths_are_unknown(tmp_path: Path) -> None:
    read = read_annotations(
        write(tmp_path, HEADER + "g,a.png,one/a.png,1,1\ng,a.png,two/a.png,2,2\ng,b.png,one/b.png,3,3\n")
    )
    assert read.label("a.png", "two/a.png") == "2"
    assert read.label("b.png", None) == "3"
    assert read.label("elsewhere/b.png", "elsewhere/b.png") == "3"
    for path in (None, "three/a.png"):
        with pytest.raises(UsageError, match=r"several lines for a\.png"):
            read.label("a.png", path)


@pytest.mark.parametrize(
    ("lines", "paths", "labels"),
    [
        # The fault: another file of the same name is not what the line is about.
        (["cat/1.png,cat"], ["cat/1.png", "dog/1.png"], ["cat", None]),
        (["./cat/1.png,cat"], ["cat/1.png", "1.png", "old/cat/1.png"], ["cat", None, None]),
        # Nor is it if the file itself is not in the gallery, but another line's is.
        (["cat/1.png,cat", "cat/2.png,cat"], ["cat/2.png", "dog/1.png"], ["cat", None]),
        (["1.png,cat", "cat/2.png,cat"], ["cat/2.png", "dog/1.png"], ["cat", None]),
        # Paths that begin elsewhere: absolute, from a folder above or below, or in another folder.
        (["/data/cat/1.png,cat"], ["cat/1.png", "dog/1.png", "1.png"], ["cat", None, None]),
        (["/data/cat/1.png,cat", "/data/dog/1.png,dog"], ["cat/1.png", "dog/1.png"], ["cat", "dog"]),
        (["data/cat/1.png,cat", "data/2.png,two"], ["cat/1.png", "dog/1.png", "2.png"], ["cat", None, "two"]),
        (["cat/1.png,cat", "dog/1.png,dog"], ["all/cat/1.png", "all/dog/1.png"], ["cat", "dog"]),
        (["one/1.png,1", "one/2.png,2"], ["two/1.png", "two/2.png"], ["1", "2"]),
        # A file of both kinds: what is absolute has to end as the object.
        (["cat/1.png,cat", "/data/dog/2.png,dog"], ["cat/1.png", "dog/2.png", "cat/2.png"], ["cat", "dog", None]),
        (["cat/1.png,cat", "/data/dog/2.png,dog"], ["cat/1.png", "cow/2.png"], ["cat", None]),
        # Without a path a name is all there is.
        ([",cat"], ["cat/1.png", "dog/1.png"], ["cat", "cat"]),
    ],
    ids=repr,
)
def test_a_line_of_the_same_name_counts_only_if_its_path_is_not_that_of_another_file(
    tmp_path: Path, lines: list[str], paths: list[str], labels: list[str | None]
) -> None:
    text = "".join(f"{Path(line.partition(',')[0]).name or '1.png'},{line}\n" for line in lines)
    read = read_annotations(write(tmp_path, "img_name,img_path,label\n" + text)).among(lambda: paths)
    assert [read.label(path, path) for path in paths] == labels
    assert [read.label(Path(path).name, path) for path in paths] == labels


def test_a_line_that_can_be_of_several_objects_is_refused(tmp_path: Path) -> None:
    read = read_annotations(write(tmp_path, "img_path,label\nold/1.png,cat\n/x/2.png,dog\n"))
    for paths in (["cat/1.png", "dog/1.png"], ["cat/2.png", "dog/2.png"]):
        with pytest.raises(UsageError, match=rf"{paths[0]} or another object of the gallery; make the paths relative"):
            read.among(lambda paths=paths: paths).label(paths[0], paths[0])
        # Where the gallery knows no paths there is only the name.
        assert read.among(lambda: []).label(Path(paths[0]).name, None) in ("cat", "dog")
    # One object whose row is there twice is one.
    assert read.among(lambda: ["cat/1.png"] * 2).label("1.png", "cat/1.png") == "cat"


def test_many_lines_of_one_name_take_no_more_time_than_others(tmp_path: Path) -> None:
    # Each line with each object would take 25 million looks.
    folders = [f"{number:04d}" for number in range(5000)]
    for before in ("", "/data/"):
        text = "".join(f"{before}{folder}/1.png,{folder}\n" for folder in folders[::2])
        read = read_annotations(write(tmp_path, "img_path,label\n" + text))
        read = read.among(lambda: (f"{folder}/1.png" for folder in folders))
        began = time.process_time()
        assert read.label("0002/1.png", "0002/1.png") == "0002"
        assert read.label("0001/1.png", "0001/1.png") is None
        assert time.process_time() - began < 2


def test_a_line_takes_little_more_memory_than_its_text(tmp_path: Path) -> None:
    count = 20_000
    lines = (f"gallery,{number:08d}.jpg,a/{number:08d}.jpg,label {number % 9},{number}\n" for number in range(count))
    source = write(tmp_path, HEADER + "".join(lines))
    tracemalloc.start()
    read = read_annotations(source)
    assert read.label("x/00012345.jpg", "a/00012345.jpg") == "label 6"
    assert read.label("00012345.jpg", None) == "label 6"
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken / count < 450, "with dictionaries it takes 800 bytes"


def test_lines_of_one_path_are_refused_where_they_differ_and_harmless_where_they_do_not(tmp_path: Path) -> None:
    read = read_annotations(
        write(tmp_path, HEADER + "g,a.png,x/a.png,1,1\ng,a.png,./x/a.png,2,2\n" + 2 * "g,b.png,x/b.png,3,3\n")
    )
    for ask in (lambda: read.label("a.png", "x/a.png"), lambda: read.picture_label("x/a.png")):
        with pytest.raises(UsageError, match=r"several lines for x/a\.png that differ"):
            ask()
    assert read.label("b.png", "x/b.png") == "3"
    assert read.label("b.png", None) == "3"


def test_the_name_of_a_picture_that_may_be_in_no_gallery_counts_only_without_a_path(tmp_path: Path) -> None:
    read = read_annotations(write(tmp_path, HEADER + "q,a.png,x/a.png,1,1\nq,b.png,,2,2\nq,c.png,,3,3\nq,c.png,,4,4\n"))
    assert read.picture_label("x/a.png") == "1"
    assert read.picture_label("new/a.png") is None
    assert read.picture_label("new/b.png") == "2"
    assert read.picture_label("new/c.png") is None


def test_a_file_without_labels_or_names_still_serves_its_other_columns(tmp_path: Path) -> None:
    read = read_annotations(write(tmp_path, "img_path,camera\na/b.png,7\n"))
    row = read.find("b.png", "a/b.png")
    assert row is not None
    assert row["camera"] == "7"
    assert read.label("b.png", None) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "begins with nothing"),
        ("label,id\n", "img_path or img_name"),
        ("img_path,label,label\n", "none twice"),
        (HEADER + "g,a.png,a.png,1,1\ng,a.png\n", "record 3: 2 values for 5 columns"),
        (HEADER + 'g,"a.png\n', "not a CSV"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_annotations(write(tmp_path, text))


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_annotations(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="not a CSV"):
        read_annotations(write(tmp_path, HEADER + "g,ä,ä,ä,1\n", "latin-1"))


def test_the_labelled_photos_are_all_found(shared_data: Path) -> None:
    photos = shared_data / "photos-labelled"
    read = read_annotations(photos / "anno.csv")
    for path in (photos / "gallery.txt").read_text().splitlines():
        assert read.label(Path(path).name, path) == Path(path).name.rpartition("_")[0]


GOOD = b'img_path,label,id\r\n"a,b.png",cat,1\r\nd/c.png,dog,2\r\n'


@given(damaged(GOOD) | st.binary() | st.text('img_path,label"\r\n\0\ufeffa/').map(str.encode))
@settings(max_examples=examples(200))
def test_any_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "labels.csv").write_bytes(data)
    with contextlib.suppress(UsageError):
        read = read_annotations(tmp_path / "labels.csv")
        assert all(row.keys() == set(read.columns) for row in read.rows)
        read.label("c.png", "d/c.png")
