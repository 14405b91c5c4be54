"""Opening galleries: what is read, what is refused, and how it is said."""

import hashlib
import itertools
import os
import resource
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import GalleryMismatch, RuijiError, ShardCorrupt, UsageError
from pipeline.model import Model, load_model
from pipeline.npy import map_bytes
from pipeline.store import write_atomic
from search.filters import apply_conditions, parse_conditions
from search.gallery import opening, shards
from search.gallery.opening import find_galleries, find_gallery, open_gallery
from search.gallery.paths import Paths
from search.gallery.shards import Gallery, Shard
from search.labels import Annotations
from search.ranking.codes_scan import codes_scan
from search.ranking.rank import rank
from search.ranking.scan import numpy_scan
from tests.pipeline.test_npy import HOSTILE
from tests.search.galleries import in_memory, write_article_shard, write_gallery, write_shard


@pytest.fixture
def model(model_path: Path) -> Model:
    return load_model(model_path)


@pytest.fixture
def folder(tmp_path: Path, model: Model) -> Path:
    """Shards of 4, 4 and 2 rows."""
    folder = tmp_path / "gallery"
    write_gallery(folder, model, some_features(10), some_paths(10), 4)
    return folder


def some_features(n: int, d: int = 12) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(n, d)).astype(np.float32)


def some_paths(n: int) -> list[str]:
    return [f"a/{row:03d}.jpg" for row in range(n)]


def read(gallery: Gallery) -> NDArray[np.float32]:
    blocks = list(gallery.blocks(3))
    assert [block.first for block in blocks] == list(np.cumsum([0] + [len(block.features) for block in blocks])[:-1])
    return np.concatenate([block.features for block in blocks])


def test_rows_ids_and_paths_belong_together(folder: Path, model: Model) -> None:
    gallery = open_gallery(folder)
    assert (gallery.rows, gallery.length, gallery.fingerprint) == (10, 12, model.fingerprint)
    assert np.array_equal(read(gallery), some_features(10))
    for row, path in enumerate(some_paths(10)):
        assert gallery.path(row) == path
        assert gallery.object_id(row) == path[2:]
        assert gallery.digest(row) == hashlib.sha256(path.encode()).digest()
    assert gallery.digested_rows == 10


def test_a_folder_that_may_not_be_read_is_left_out_and_named_once(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    # Not in pytest's folder, which is closed to all others. Root is one of these for a moment.
    with tempfile.TemporaryDirectory() as name:
        features = Path(name)
        features.chmod(0o755)
        write_gallery(features / "gallery", model, some_features(4), some_paths(4), 4)
        (features / "lost+found").mkdir(mode=0o000)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            assert find_galleries(features) == [features / "gallery"]
            assert find_gallery(features, None) == features / "gallery"
        finally:
            if root:
                os.seteuid(0)
    assert [record.args for record in caplog.records] == [(features / "lost+found",)]


@pytest.mark.parametrize("count", [0, 1, 7, 300], ids="{} rows".format)
@pytest.mark.parametrize("ascending", [False, True], ids=["any order", "ascending"])
def test_many_rows_are_the_same_as_each_by_itself(folder: Path, count: int, ascending: bool) -> None:
    gallery = open_gallery(folder)
    rows = np.random.default_rng(count).integers(0, 10, count)
    if ascending:
        rows.sort()
    assert np.array_equal(gallery.take(rows), some_features(10)[rows])
    assert gallery.object_ids(rows) == [gallery.object_id(row) for row in rows.tolist()]
    assert gallery.paths(rows) == [gallery.path(row) for row in rows.tolist()]
    assert gallery.digests(rows) == [gallery.digest(row) for row in rows.tolist()]


@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_that_there_is_not_is_never_made_up(folder: Path, row: int) -> None:
    gallery = open_gallery(folder)
    with pytest.raises(IndexError):
        gallery.take(np.sort(np.array([row, *[5] * 100])))


@pytest.mark.parametrize(
    "digests",
    [np.zeros((3, 32), np.uint8), np.zeros((4, 31), np.uint8), np.zeros((4, 32), np.int8), np.zeros(128, np.uint8)],
    ids=["rows", "length", "dtype", "flat"],
)
def test_digests_of_another_shape_are_refused_by_name(folder: Path, digests: NDArray[np.uint8]) -> None:
    np.save(folder / "0001.digests.npy", digests)
    with pytest.raises(ShardCorrupt, match=r"0001\.digests\.npy is .* not uint8\[4, 32\].*ruiji enqueue"):
        open_gallery(folder)


def test_a_shard_with_the_same_features_of_other_files_is_another(folder: Path, model: Model) -> None:
    before = open_gallery(folder)
    (folder / "0001.json").unlink()
    digests = np.ones((4, 32), np.uint8)
    write_shard(folder, 1, some_features(10)[4:8], some_paths(10)[4:8], model.fingerprint, digests=digests)
    after = open_gallery(folder, before=before)
    assert [one is other for one, other in zip(after.shards, before.shards, strict=True)] == [True, False, True]
    assert after.digest(4) == bytes([1] * 32)


def test_a_shard_with_the_same_features_and_files_of_other_names_is_another(folder: Path, model: Model) -> None:
    before = open_gallery(folder)
    digests = np.load(folder / "0001.digests.npy")
    (folder / "0001.json").unlink()
    renamed = [f"b/{row}.jpg" for row in range(4)]
    write_shard(folder, 1, some_features(10)[4:8], renamed, model.fingerprint, digests=digests)
    after = open_gallery(folder, before=before)
    assert [one is other for one, other in zip(after.shards, before.shards, strict=True)] == [True, False, True]
    assert after.path(4) == renamed[0] and after.rows_key != before.rows_key
    # What is kept of the features is still right.
    assert after.key("anything") == before.key("anything")


def test_shards_whose_files_are_the_same_are_not_opened_again(
    folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of thousands of shards each look would take seconds, and map every file once more than a process may.
    before = open_gallery(folder)
    opened: list[str] = []
    for name in ("map_npy", "read_record"):
        work = getattr(opening, name)
        monkeypatch.setattr(opening, name, lambda *given, work=work: (opened.append(str(given[-1])), work(*given))[1])
    assert open_gallery(folder, before=before) is before and opened == []
    write_shard(folder, 3, some_features(2), ["b/0.jpg", "b/1.jpg"], model.fingerprint)
    after = open_gallery(folder, before=before)
    assert after.shards[:3] == before.shards and after.rows == 12
    assert [Path(one).name[:4].lstrip("0") for one in opened] == ["3"] * 4
    write_atomic(folder / "run" / "stale" / "0001.bits", [np.packbits([True, False, False, False]).tobytes()])
    stale = open_gallery(folder, before=after)
    assert stale.stale_rows == 1 and len(opened) == 4
    (folder / "run" / "stale" / "0001.bits").unlink()
    assert open_gallery(folder, before=stale).stale_rows == 0 and len(opened) == 4
    (folder / "0002.paths.txt").unlink()
    with pytest.raises(ShardCorrupt, match=r"0002 has a record but no 0002\.paths\.txt"):
        open_gallery(folder, before=stale)


def test_a_few_rows_ask_only_their_shards(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gallery(tmp_path, model, some_features(300), some_paths(300), 1)
    gallery, rows = open_gallery(tmp_path), np.array([299, 3, 299])
    want = [some_paths(300)[row] for row in rows]
    assert gallery.paths(rows) == want
    firsts = [block.first for block in gallery.blocks(3, 100, 103)]
    assert firsts == [100, 101, 102]
    asked: list[int] = []

    class Counted(tuple[object, ...]):
        def __iter__(self) -> Iterator[object]:
            asked.append(len(self))
            return super().__iter__()

    monkeypatch.setitem(vars(gallery), "shards", Counted(gallery.shards))
    assert gallery.paths(rows) == want and gallery.object_ids(rows) == [Path(path).name for path in want]
    assert gallery.digests(rows) == [gallery.digest(row) for row in rows.tolist()]
    assert [block.first for block in gallery.blocks(3, 100, 103)] == firsts
    assert asked == []


def test_paths_take_a_few_bytes_of_memory_each(tmp_path: Path) -> None:
    lines = [f"å/{row:05d}/{'x' * 20}.jpg" for row in range(20_000)] + ["", "日本"]
    data = "".join(f"{line}\n" for line in lines).encode()
    tracemalloc.start()
    try:
        paths = Paths(data)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < 6 * len(lines)
    assert len(paths) == len(lines) and list(paths) == lines and paths.at([20_001, 5]) == [lines[20_001], lines[5]]
    assert paths[-1] == lines[-1] and paths[4] == lines[4] and paths[2:9:3] == lines[2:9:3] and "日本" in paths
    (tmp_path / "paths.txt").write_bytes(b"")
    assert len(Paths(map_bytes(tmp_path / "paths.txt"))) == 0 and list(Paths(b"")) == []
    (tmp_path / "paths.txt").write_bytes(data)
    mapped = Paths(map_bytes(tmp_path / "paths.txt"))
    assert list(mapped) == lines and mapped.at([7]) == [lines[7]] and mapped[-2] == ""
    with pytest.raises(IndexError):
        paths[len(lines)]
    with pytest.raises(UnicodeDecodeError):
        Paths(b"caf\xe9\n")


def test_an_articles_shard_with_other_ids_is_another(tmp_path: Path) -> None:
    for number in range(2):
        write_article_shard(tmp_path, number, some_features(2), ["a.jpg", "b.jpg"])
    before = open_gallery(tmp_path)
    assert open_gallery(tmp_path, before=before) is before
    np.save(tmp_path / "0001.object_ids.npy", np.array(["c.jpg", "d.jpg"], "<U44"))
    after = open_gallery(tmp_path, before=before)
    assert [one is other for one, other in zip(after.shards, before.shards, strict=True)] == [True, False]
    assert after.object_id(2) == "c.jpg" and after.rows_key != before.rows_key
    assert after.key("anything") == before.key("anything")


def test_keys_of_what_is_kept_are_those_of_earlier_releases(folder: Path) -> None:
    gallery = open_gallery(folder)
    files = {name: folder / f"{name}.features.npy" for name in ("0000", "0001", "0002")}
    names = [f"{name}.{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}" for name, file in files.items()]
    said = " ".join(["map", "12", *names])
    assert gallery.key("map") == hashlib.sha256(said.encode()).hexdigest()[:16]


def test_a_shard_of_failures_only_has_no_rows_and_is_legal(folder: Path, model: Model) -> None:
    write_shard(folder, 3, some_features(0), [], model.fingerprint)
    write_shard(folder, 4, some_features(1), ["z.jpg"], model.fingerprint)
    gallery = open_gallery(folder)
    assert gallery.rows == 11
    assert gallery.object_id(10) == "z.jpg"
    assert len(read(gallery)) == 11


def test_shard_numbers_may_have_gaps_and_five_digits(folder: Path, model: Model) -> None:
    write_shard(folder, 10000, some_features(1), ["z.jpg"], model.fingerprint)
    assert [shard.name for shard in open_gallery(folder).shards] == ["0000", "0001", "0002", "10000"]


def test_arrays_without_a_record_are_a_killed_reducers_and_ignored(folder: Path, model: Model) -> None:
    write_shard(folder, 3, some_features(4), some_paths(4), model.fingerprint, record=False)
    assert open_gallery(folder).rows == 10


def test_a_shard_of_another_model_is_refused_by_name_and_fingerprint(folder: Path) -> None:
    write_shard(folder, 3, some_features(4), some_paths(4), "f00d" * 16)
    with pytest.raises(GalleryMismatch, match=r"shard 0003 .* f00df00df00d") as caught:
        open_gallery(folder)
    assert caught.value.exit_code == 4


def test_a_shard_of_another_length_is_refused(folder: Path, model: Model) -> None:
    write_shard(folder, 3, some_features(4, 13), some_paths(4), model.fingerprint)
    with pytest.raises(GalleryMismatch, match=r"shard 0003 .* length 13"):
        open_gallery(folder)


@pytest.mark.parametrize("ending", ["features.npy", "digests.npy", "object_ids.npy", "paths.txt"])
def test_a_missing_file_of_a_recorded_shard_is_named(folder: Path, ending: str) -> None:
    (folder / f"0001.{ending}").unlink()
    with pytest.raises(ShardCorrupt, match=f"0001.{ending}"):
        open_gallery(folder)


@pytest.mark.parametrize("ending", ["features.npy", "digests.npy", "object_ids.npy"])
@pytest.mark.parametrize("kept", [0, 5, 100, -8])
def test_a_truncated_array_is_named(folder: Path, ending: str, kept: int) -> None:
    path = folder / f"0001.{ending}"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ShardCorrupt, match=f"0001.{ending}"):
        open_gallery(folder)


@pytest.mark.parametrize(
    "array",
    [
        some_features(4).astype(np.float64),
        np.asfortranarray(some_features(4)),
        some_features(4).astype(">f4"),
        some_features(4)[0],
        some_features(3),
        some_features(4, 11),
        np.array([{"pickled": 1}]),
    ],
    ids=["float64", "fortran", "big-endian", "one-row", "too-few", "too-short", "pickled"],
)
def test_features_that_are_not_what_the_record_says_are_refused(folder: Path, array: NDArray[np.generic]) -> None:
    np.save(folder / "0001.features.npy", array, allow_pickle=True)
    with pytest.raises(ShardCorrupt, match=r"0001\.features\.npy"):
        open_gallery(folder)


@pytest.mark.parametrize(
    "array", [np.array(["a", "b"]), np.arange(4), np.array([["a"] * 4]), np.array(["a", None])], ids=str
)
def test_object_ids_that_do_not_fit_are_refused(folder: Path, array: NDArray[np.generic]) -> None:
    np.save(folder / "0001.object_ids.npy", array, allow_pickle=True)
    with pytest.raises(ShardCorrupt, match="0001"):
        open_gallery(folder)


def test_paths_that_do_not_fit_their_rows_are_refused_when_they_are_read(folder: Path) -> None:
    (folder / "0001.paths.txt").write_text("a/000.jpg\n")
    gallery = open_gallery(folder)
    assert gallery.path(0) == "a/000.jpg"
    with pytest.raises(ShardCorrupt, match=r"0001\.paths\.txt has 1 lines for 4 rows"):
        gallery.path(4)


def test_stale_objects_are_marked_unless_asked_for(folder: Path) -> None:
    mask = np.array([True, False, False, True])
    write_atomic(folder / "run" / "stale" / "0001.bits", [np.packbits(mask).tobytes()])
    gallery = open_gallery(folder)
    assert gallery.stale_rows == 2
    marks = [block.left_out for block in gallery.blocks(100)]
    assert marks[0] is None
    assert marks[2] is None
    assert marks[1] is not None
    assert marks[1].tolist() == mask.tolist()
    assert open_gallery(folder, include_stale=True).stale_rows == 0


def test_a_stale_bitmap_of_another_size_is_refused(folder: Path) -> None:
    write_atomic(folder / "run" / "stale" / "0001.bits", [b"\x00\x00"])
    with pytest.raises(ShardCorrupt, match="shard 0001"):
        open_gallery(folder)


def test_an_articles_shards_are_read_as_they_are(tmp_path: Path) -> None:
    features = some_features(5)
    write_article_shard(tmp_path, 0, features[:3], ["a.jpg", "b.jpg", "c.jpg"])
    write_article_shard(tmp_path, 1, features[3:], ["d.jpg", "e.jpg"])
    gallery = open_gallery(tmp_path)
    assert gallery.fingerprint is None
    assert np.array_equal(read(gallery), features)
    assert gallery.object_id(4) == "e.jpg"
    assert gallery.path(4) is None


def test_an_articles_shards_of_two_lengths_are_refused_by_name(tmp_path: Path) -> None:
    write_article_shard(tmp_path, 0, some_features(1, 12), ["a.jpg"])
    write_article_shard(tmp_path, 7, some_features(1, 13), ["b.jpg"])
    with pytest.raises(GalleryMismatch, match=r"shard 0007 .* length 13") as caught:
        open_gallery(tmp_path)
    assert caught.value.exit_code == 4


def test_an_articles_shard_without_ids_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "0000.features.npy", some_features(2))
    with pytest.raises(ShardCorrupt, match=r"0000\.object_ids\.npy is missing"):
        open_gallery(tmp_path)


def test_no_gallery_and_an_empty_one_say_what_to_run(tmp_path: Path, model: Model) -> None:
    write_gallery(tmp_path / "empty", model, some_features(0), [], 4)
    for folder in (tmp_path / "none", tmp_path / "empty", tmp_path):
        with pytest.raises(UsageError, match="ruiji enqueue"):
            open_gallery(folder)


def test_a_gallery_is_found_by_its_name_and_by_its_models_file(tmp_path: Path) -> None:
    for name in ("net_100.ra_in1k", "other"):
        write_article_shard(tmp_path / name, 0, some_features(1), ["a.jpg"])
    with pytest.raises(UsageError, match=r"several galleries: net_100\.ra_in1k, other"):
        find_gallery(tmp_path, None)
    for model in ("net_100.ra_in1k", "net_100.ra_in1k.onnx", "models/net_100.ra_in1k.onnx"):
        assert find_gallery(tmp_path, Path(model)) == tmp_path / "net_100.ra_in1k"
    for model in ("other", "other.onnx", "models/other.onnx"):
        assert find_gallery(tmp_path, Path(model)) == tmp_path / "other"
    assert find_gallery(tmp_path, Path("new.onnx")) == tmp_path / "new"


def test_a_damaged_record_is_an_error_of_ours(folder: Path) -> None:
    (folder / "0001.json").write_text("{")
    with pytest.raises(RuijiError, match=r"0001\.json is damaged"):
        open_gallery(folder)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    ("ending", "recorded"),
    [*itertools.product(["features.npy", "object_ids.npy"], [True, False]), ("digests.npy", True)],
)
def test_a_hostile_array_is_refused_in_one_line(folder: Path, name: str, ending: str, recorded: bool) -> None:
    if not recorded:
        (folder / "gallery.json").unlink()
    (folder / f"0001.{ending}").write_bytes(HOSTILE[name])
    with pytest.raises(ShardCorrupt, match=rf"0001\.{ending} is damaged") as caught:
        open_gallery(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [0x110005, 0xD800], ids=hex)
def test_object_ids_that_are_no_text_are_refused_when_they_are_read(folder: Path, code: int) -> None:
    np.save(folder / "0001.object_ids.npy", np.full((4, 9), code, np.uint32).view("<U9")[:, 0])
    labels = Annotations(Path("labels.csv"), ("img_name", "label"), ())
    gallery = open_gallery(folder)
    assert gallery.object_id(0) == "000.jpg"
    reads: list[Callable[[], object]] = [
        lambda: gallery.object_id(4),
        lambda: gallery.object_ids(np.arange(10)),
        lambda: apply_conditions(gallery, parse_conditions(["path=a", "label=a"]), labels),
    ]
    for read_ids in reads:
        with pytest.raises(ShardCorrupt, match="object ids of shard 0001 are not text"):
            read_ids()


def test_open_descriptors_do_not_depend_on_the_number_of_shards(tmp_path: Path, model: Model) -> None:
    write_gallery(tmp_path, model, some_features(300), some_paths(300), 1)
    # As many as Python and its libraries need.
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, limits[1]))
    try:
        gallery = open_gallery(tmp_path)
        for shard in gallery.shards:
            shard.keep()
        for scan in (numpy_scan(), codes_scan()):
            hits = rank(open_gallery(tmp_path), some_features(300)[7:8], 2, scan=scan)[0]
            assert hits[0].object_id == "007.jpg"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_shard_has_at_most_five_files_mapped(folder: Path) -> None:
    """A process can map 65,530: with seven, 10^8 rows in 10,000 shards were too many."""

    def mapped() -> set[str]:
        places = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
        return {Path(place[5]).name for place in places if len(place) == 6 and place[5].startswith(str(folder))}

    for shard in open_gallery(folder).shards:
        shard.keep()
    gallery = open_gallery(folder)
    for scan in (numpy_scan(), codes_scan()):
        rank(gallery, some_features(10)[:1], 10, scan=scan)
    assert len(list(gallery.all_paths())) == 10
    assert max(Counter(name.partition(".")[0] for name in mapped()).values()) == 5


def test_what_is_made_of_files_is_made_once_for_all_choices_of_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing can be kept there.
    (folder / "cache").write_text("")
    made: list[str] = []
    for name in ("norms_of", "ShardCodes", "IdIndex"):
        work = getattr(shards, name)
        monkeypatch.setattr(shards, name, lambda *given, name=name, work=work: (made.append(name), work(*given))[1])
    monkeypatch.setattr(shards, "_ASKED_AT_ONCE", 1)
    whole = open_gallery(folder)
    some = whole.only([np.arange(len(shard.features)) > 0 for shard in whole.shards])
    few = some.only([np.arange(len(shard.features)) > 2 for shard in whole.shards])
    query = some_features(10)[:1]
    for gallery in (few, whole, some):
        for scan in (numpy_scan(), codes_scan()):
            rank(gallery, query, 10, scan=scan)
        for _ in range(3):
            gallery.rows_of(["003.jpg"])
        assert all(one.paths is other.paths for one, other in zip(gallery.shards, whole.shards, strict=True))
    assert sorted(made) == sorted(["norms_of", "ShardCodes", "IdIndex"] * 3)
    assert [gallery.searched_rows for gallery in (whole, some, few)] == [10, 7, 2]
    # A list that changed leaves out other rows of the same files.
    write_atomic(folder / "run" / "stale" / "0001.bits", [np.packbits([True, False, False, False]).tobytes()])
    again = open_gallery(folder, before=whole)
    assert again is not whole and (again.stale_rows, again.unusable_rows) == (1, (0, 0))
    assert len(made) == 9


def test_ids_that_are_looked_for_often_are_found_as_in_the_first_look() -> None:
    ids = [f"{row % 700:x}.jpg" for row in range(1000)] + ["", "caf\udce9", "日本.png"]
    gallery = in_memory(np.zeros((len(ids), 2), np.float32), ids, cuts=(400, 401, 1000))
    for asked in (["0.jpg"], ["1f.jpg", "2.jpg", "none"], ["caf\udce9", "日本.png"], [""], ["0.jpg" + "x" * 90], []):
        want = {name: [row for row, own in enumerate(ids) if own == name] for name in asked}
        assert [gallery.rows_of(asked) for _ in range(4)] == [want] * 4


@pytest.mark.parametrize("asked", [["3.jpg\0"], ["3.jpg\0", "3.jpg"], ["\0"], ["\0", "", "2\0.jpg\0\0"]], ids=repr)
def test_an_id_that_ends_with_null_characters_is_that_of_no_object(asked: list[str]) -> None:
    ids = [*(f"{row}.jpg" for row in range(1000)), ""]
    gallery = in_memory(np.zeros((len(ids), 2), np.float32), ids, cuts=(400,))
    want = {name: [ids.index(name)] if name in ids else [] for name in asked}
    assert [gallery.rows_of(asked) for _ in range(4)] == [want] * 4


def test_rows_of_many_ids_are_found_in_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"{row % 90_000:040d}.jpg" for row in range(100_000)]
    gallery = in_memory(np.zeros((100_000, 2), np.float32), ids, cuts=tuple(range(10_000, 100_000, 10_000)))
    asked = ids[:90_000:45]
    looks, look = [], Shard.rows_of
    monkeypatch.setattr(Shard, "rows_of", lambda self, ids: (looks.append(self.name), look(self, ids))[1])
    found = gallery.rows_of([*asked, "none", asked[0]])
    assert looks == [shard.name for shard in gallery.shards]
    want = {
        name: [row, row + 90_000][: 1 + (row < 10_000)] for row, name in zip(range(0, 90_000, 45), asked, strict=True)
    }
    assert found == want | {"none": []}
    assert gallery.rows_of(asked[:1]) == {asked[0]: [0, 90_000]}
    assert gallery.rows_of([]) == {}
