"""The MNIST example: its data, its draws, its tables, and (with torch) a short training, exported and searched."""

import csv
import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.mnist import data, draw
from pipeline.choices import ObjectIds
from pipeline.objects import IdScheme, prepare
from search.labels import read_annotations

MADE = 40


@pytest.fixture
def digits() -> data.Digits:
    """Images that are no digits, but all different."""
    draw_from = np.random.default_rng(1)
    return data.Digits(draw_from.integers(0, 256, (MADE, 28, 28), dtype=np.uint8), np.arange(MADE) % 10)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Without a line on stderr for each request."""

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A real server of a folder: its address and the folder."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()


def configure(tmp_path: Path, mirrors: list[str], files: dict[str, bytes]) -> Path:
    lines = [f"mirrors = {mirrors!r}", "[sha256]"]
    lines += [f'{name} = "{hashlib.sha256(content).hexdigest()}"' for name, content in files.items()]
    path = tmp_path / "mirrors.toml"
    path.write_text("\n".join(lines))
    return path


def test_files_come_from_the_first_mirror_that_has_them_right(tmp_path: Path, mirror: tuple[str, Path]) -> None:
    address, folder = mirror
    for name, content in (("wrong", b"another"), ("right", b"content")):
        (folder / name).mkdir()
        (folder / name / "a.gz").write_bytes(gzip.compress(content))
    mirrors = configure(tmp_path, [f"{address}/none", f"{address}/wrong/", f"{address}/right"], {"a": b"content"})
    data.fetch(tmp_path / "data", mirrors=mirrors)
    assert gzip.decompress((tmp_path / "data" / "a.gz").read_bytes()) == b"content"
    # What is there and right is not fetched again; what is damaged is.
    (folder / "right" / "a.gz").unlink()
    data.fetch(tmp_path / "data", mirrors=mirrors)
    (tmp_path / "data" / "a.gz").write_bytes(b"damaged")
    with pytest.raises(data.DataError, match=r"none/a\.gz: File not found.*wrong/a\.gz: its content has"):
        data.fetch(tmp_path / "data", mirrors=mirrors)


def test_files_come_from_a_folder_packed_or_not(tmp_path: Path) -> None:
    mirrors = configure(tmp_path, [], {"a": b"first", "b": b"second"})
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.gz").write_bytes(gzip.compress(b"first"))
    (source / "b").write_bytes(b"second")
    data.fetch(tmp_path / "data", source, mirrors)
    assert gzip.decompress((tmp_path / "data" / "b.gz").read_bytes()) == b"second"
    (source / "b").write_bytes(b"third")
    with pytest.raises(data.DataError, match="is not MNIST's"):
        data.fetch(tmp_path / "elsewhere", source, mirrors)
    (source / "b").unlink()
    with pytest.raises(data.DataError, match="neither"):
        data.fetch(tmp_path / "elsewhere", source, mirrors)


def test_only_an_idx_file_of_the_right_shape_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_PARTS", {"test": ("t10k", 2)})
    pixels, labels = tmp_path / "t10k-images-idx3-ubyte.gz", tmp_path / "t10k-labels-idx1-ubyte.gz"
    header = b"\0\0\x08\x03" + b"\0\0\0\x02" + b"\0\0\0\x1c" * 2
    content = bytes(range(256)) * 7
    labels.write_bytes(gzip.compress(b"\0\0\x08\x01" + b"\0\0\0\x02" + b"\x07\x03"))
    pixels.write_bytes(gzip.compress(header + content[: 2 * 784]))
    read = data.load(tmp_path, "test")
    assert read.labels.tolist() == [7, 3]
    assert read.pixels.shape == (2, 28, 28)
    assert read.pixels.tobytes() == content[: 2 * 784]
    for damaged in (b"\0\0\x09" + header[3:] + content[: 2 * 784], header + content[:784], b""):
        pixels.write_bytes(gzip.compress(damaged))
        with pytest.raises(data.DataError, match="no idx file"):
            data.load(tmp_path, "test")
    pixels.write_bytes(b"not gzip")
    with pytest.raises(data.DataError, match="cannot be read"):
        data.load(tmp_path, "test")


def test_the_real_files_are_the_ones_expected(shared_data: Path, tmp_path: Path) -> None:
    data.fetch(tmp_path, shared_data / "mnist")
    assert np.bincount(data.load(tmp_path, "test").labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_draw_is_seeded_and_has_the_articles_columns(digits: data.Digits, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        draw.draw(digits, tmp_path / name, 3, 20, seed)
    assert tree(tmp_path / "one") == tree(tmp_path / "again")
    assert set(tree(tmp_path / "one")) != set(tree(tmp_path / "other"))
    with (tmp_path / "one" / "anno.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["data_type", "img_name", "img_path", "label", "id"]
    assert [row["data_type"] for row in rows] == ["query"] * 3 + ["gallery"] * 20
    assert len({row["id"] for row in rows}) == 23
    for row in rows:
        assert row["img_path"] == f"{row['data_type']}/{row['label']}_{row['id']}.png"
        assert int(row["label"]) == digits.labels[int(row["id"])]
        with Image.open(tmp_path / "one" / row["img_path"]) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), digits.pixels[int(row["id"])])


def test_a_draws_list_is_as_enqueue_wants_it_and_its_labels_are_found(digits: data.Digits, tmp_path: Path) -> None:
    draw.draw(digits, tmp_path / "media", 5, 35, 0)
    listed = prepare(tmp_path / "media" / "objects.txt", tmp_path, IdScheme(ObjectIds.basename))
    assert (listed.lines, listed.notes) == (MADE, ())
    annotations = read_annotations(tmp_path / "media" / "anno.csv")
    for path in listed.path.read_text().splitlines():
        assert annotations.label(path.rpartition("/")[2], path) == path.rpartition("/")[2][0]
    with pytest.raises(data.DataError, match="more than 40"):
        draw.draw(digits, tmp_path / "media", 5, 36, 0)


def test_the_articles_table_and_label_counts() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from examples.mnist.show import Found, table

    found = [
        Found(0.005382, 0.99998, "9", "gallery/9_1801.png"),
        Found(0.018921, 0.9998, "9", "gallery/9_4237.png"),
        Found(0.5, 0.87, "3", "gallery/3_81.png"),
    ]
    assert list(table("9", found, 2)) == [
        "Query Image Label: 9",
        "",
        "Search Result",
        "          dist  label            img_path",
        "0     0.005382      9  gallery/9_1801.png",
        "1     0.018921      9  gallery/9_4237.png",
        "",
        "Labels in the gallery",
        "9      2  # <- this",
        "3      1",
    ]


def test_targets_are_judged_as_they_stand() -> None:
    from examples.mnist.__main__ import Network, judge

    def answer(rank_1: float, average: float, valid: int = 10_000) -> dict[str, Any]:
        metrics = {"rank_1": {"value": rank_1}, "map": {"value": average}}
        return {"queries": {"given": 10_000, "valid": valid}, "metrics": metrics}

    assert judge(Network.many, answer(0.992, 0.992)) == []
    assert judge(Network.many, answer(0.9919, 0.993)) == ["64d has rank_1 0.99190, not 0.992"]
    assert judge(Network.many_full, answer(0.994, 0.9939)) == ["64d-full has map 0.99390, not 0.994"]
    assert judge(Network.many, answer(1, 1, 9_999)) == ["64d has scores of 9999 queries only, of 10000"]


def test_a_step_before_its_draw_says_which_to_run_first(tmp_path: Path) -> None:
    from examples.mnist.__main__ import Network, extract

    with pytest.raises(data.DataError, match="draw --queries 1 --gallery 100 --seed 7"):
        extract(Network.two, 1, 100, 7, tmp_path)
