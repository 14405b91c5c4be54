"""What is kept beside the shards: what it says about rows, and when it is believed."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache import _checksum, look_through
from pipeline.model import Model, load_model
from pipeline.npy import map_npy
from pipeline.store import feature_shards, recorded_shards
from pipeline.verify import repair, verify
from search.gallery.codes import codes_of
from search.gallery.norms import is_plain, norms_of
from search.gallery.opening import open_gallery
from search.ranking.codes_scan import codes_scan
from search.ranking.rank import rank
from search.ranking.scan import Scan, numpy_scan
from tests.pipeline.test_npy import HOSTILE
from tests.search.galleries import write_article_shard, write_gallery, write_shard
from tests.search.ranking.test_rank import KINDS, features_of

ALL = slice(None)
SCANS = (numpy_scan(), codes_scan())


@pytest.fixture
def model(model_path: Path) -> Model:
    return load_model(model_path)


@pytest.fixture
def folder(tmp_path: Path, model: Model) -> Path:
    folder = tmp_path / "gallery"
    write_gallery(folder, model, features_of("random", 10, 12), [f"a/{row:03d}.jpg" for row in range(10)], 4)
    return folder


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").iterdir())


def keep(folder: Path) -> None:
    for shard in open_gallery(folder).shards:
        shard.keep()


def test_a_norm_tells_what_kind_of_row_it_is() -> None:
    rows = np.ones((6, 40), np.float32)
    rows[1] = 0
    rows[2, 3] = np.nan
    rows[3, 4] = -np.inf
    rows[4] = 3e38
    rows[5] = 1e-42
    norms = norms_of(rows)
    assert norms[0] == np.float32(np.sqrt(40))
    assert norms[1] == 0
    assert np.isnan(norms[2:4]).all()
    assert np.isposinf(norms[4])
    assert 0 < norms[5] < 1e-40


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_off_by_what_they_say(kind: str) -> None:
    features = features_of(kind)
    norms = norms_of(features)
    codes = codes_of(features, norms)
    plain = is_plain(norms)
    units = features[plain] / norms[plain, np.newaxis].astype(np.float64)
    rebuilt = codes.integers[plain] * codes.scales[plain, np.newaxis].astype(np.float64)
    assert codes.losses[plain] == pytest.approx(np.linalg.norm(units - rebuilt, axis=1), rel=0.005, abs=1e-6)
    assert (codes.losses[plain] < 0.02).all()
    assert not codes.integers[~plain].any() and not codes.scales[~plain].any()


def test_the_first_use_keeps_norms_and_the_next_one_reads_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [shard.norms for shard in open_gallery(folder).shards]
    assert [name[:5] for name in kept(folder)] == ["0000.", "0001.", "0002."]
    monkeypatch.setattr("search.gallery.shards.norms_of", lambda _: pytest.fail("computed again"))
    for shard, norms in zip(open_gallery(folder).shards, first, strict=True):
        assert np.array_equal(shard.norms, norms)


def test_codes_are_kept_when_asked_for_and_read_then(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = open_gallery(folder)
    _ = [shard.codes.part(ALL) for shard in gallery.shards]
    assert not gallery.coded
    keep(folder)
    assert sorted({name.split(".", 2)[2] for name in kept(folder)}) == ["codes.npy", "norms.npy", "scales.npy"]
    monkeypatch.setattr("search.gallery.codes.codes_of", lambda *_: pytest.fail("made again"))
    keep(folder)
    again = open_gallery(folder)
    assert again.coded
    for one, other in zip(gallery.shards, again.shards, strict=True):
        some, others = one.codes.part(ALL), other.codes.part(ALL)
        assert np.array_equal(some.integers, others.integers)
        assert np.array_equal(some.scales, others.scales)
        assert np.array_equal(some.losses, others.losses)


def test_the_cache_is_never_taken_for_a_shard(folder: Path) -> None:
    before = recorded_shards(folder), feature_shards(folder)
    keep(folder)
    assert (recorded_shards(folder), feature_shards(folder)) == before
    assert open_gallery(folder / ".." / folder.name).rows == 10


def test_what_was_made_of_other_rows_is_not_believed_and_goes(folder: Path, model: Model) -> None:
    keep(folder)
    old = kept(folder)
    (folder / "0001.json").unlink()
    other = features_of("bad_rows", 4, 12)
    write_shard(folder, 1, other, [f"b/{row}.jpg" for row in range(4)], model.fingerprint)
    gallery = open_gallery(folder)
    assert np.array_equal(gallery.shards[1].norms, norms_of(other), equal_nan=True)
    assert gallery.unusable_rows == (1, 3)
    assert not gallery.coded
    assert np.array_equal(gallery.shards[1].codes.part(ALL).integers, codes_of(other, norms_of(other)).integers)
    assert len(kept(folder)) == 7
    keep(folder)
    assert len(kept(folder)) == 9
    assert kept(folder) != old


def zeroed(file: Path) -> None:
    """The header stays valid, and so does the size."""
    data = file.read_bytes()
    file.write_bytes(data[:128] + bytes(len(data) - 128))


def zeroed_word(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:132] + bytes(4) + data[136:])


def one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[130] ^= 4
    file.write_bytes(data)


def as_before_checksums(file: Path) -> None:
    np.save(file, np.zeros_like(map_npy(file, trailing=True).array))


def of_another_shard(file: Path) -> None:
    """Of the same shape."""
    (other,) = file.parent.glob("0001.*." + ".".join(file.name.split(".")[2:]))
    file.write_bytes(other.read_bytes())


def another_shape(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data.replace(b"(", b"(1, ", 1).replace(b" " * 5 + b"\n", b"  \n", 1))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def no_array(file: Path) -> None:
    file.write_bytes(b"x" * 1000)


def hostile(file: Path) -> None:
    file.write_bytes(HOSTILE["deep"])


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = (
    *(zeroed, zeroed_word, one_bit, as_before_checksums, of_another_shard, another_shape, cut, empty, no_array),
    *(hostile, a_folder),
)


@pytest.mark.parametrize("scan", SCANS, ids=["features", "codes"])
@pytest.mark.parametrize("kind", ["norms", "codes", "scales"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_cache_is_never_believed_and_made_anew(
    folder: Path, kind: str, damage: Callable[[Path], None], scan: Scan, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(folder)
    query = features_of("random", 10, 12)[3:4]
    want = rank(open_gallery(folder), query, 10)
    before = {name: (folder / "cache" / name).read_bytes() for name in kept(folder)}
    file = next(folder / "cache" / name for name in before if name.endswith(f"{kind}.npy"))
    damage(file)
    old = damage is as_before_checksums
    assert [(name, broken) for name, broken, _ in look_through(folder)] == [(f"cache/{file.name}", not old)]
    assert rank(open_gallery(folder), query, 10, scan=scan) == want
    read = kind == "norms" or scan is not SCANS[0]
    assert (f"{file} is damaged" in capsys.readouterr().err) == (read and not old)
    if file.is_dir():
        assert not open_gallery(folder).shards[0].keep()
        file.rmdir()
    keep(folder)
    assert {name: (folder / "cache" / name).read_bytes() for name in kept(folder)} == before
    assert not list(look_through(folder))


@pytest.mark.parametrize("kind", ["norms", "codes", "scales"])
def test_verify_names_damaged_files_and_old_ones_and_repair_removes_them(folder: Path, kind: str) -> None:
    keep(folder)
    (folder / "run").mkdir()
    (damaged, old, _) = sorted((folder / "cache").glob(f"*.{kind}.npy"))
    assert not [found for found in verify(folder) if found.name.startswith("cache")]
    one_bit(damaged)
    as_before_checksums(old)
    found = [one for one in verify(folder) if one.name.startswith("cache")]
    assert [(one.kind, one.name, one.broken) for one in found] == [
        ("damaged-cache", f"cache/{damaged.name}", True),
        ("leftover", f"cache/{old.name}", False),
    ]
    repair(folder, found)
    assert not damaged.exists() and not old.exists()


def test_an_old_cache_does_not_count_as_kept(folder: Path) -> None:
    keep(folder)
    gallery = open_gallery(folder)
    assert gallery.coded
    assert all(shard.norms_kept for shard in gallery.shards)
    for name in kept(folder):
        as_before_checksums(folder / "cache" / name)
    gallery = open_gallery(folder)
    assert not gallery.coded
    assert not any(shard.norms_kept for shard in gallery.shards)


def test_a_search_checks_the_codes_that_it_reads_and_an_index_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two rows of codes share a checksum.
    monkeypatch.setattr("pipeline.cache._CHECKED_BYTES", 24)
    keep(folder)
    (file,) = (folder / "cache").glob("0001.*.codes.npy")
    sound = file.read_bytes()
    file.write_bytes(sound[:128] + bytes(12) + sound[140:])
    codes = open_gallery(folder).shards[1].codes
    want = codes_of(features_of("random", 10, 12)[4:8], norms_of(features_of("random", 10, 12)[4:8])).integers
    assert np.array_equal(codes.part(slice(2, 4)).integers, want[2:])
    assert not capsys.readouterr().err
    assert np.array_equal(codes.part(slice(1, 3)).integers, want[1:3])
    assert file.name in capsys.readouterr().err
    assert file.read_bytes() == sound
    file.write_bytes(sound[:-100] + bytes(1) + sound[-99:])
    keep(folder)
    assert file.read_bytes() == sound


@pytest.mark.parametrize("length", [0, 7, 4096, 10000, 1 << 16])
def test_a_checksum_notices_what_is_changed_moved_or_made_up_for(length: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8)
    seen = {_checksum(data)}
    for at in range(0, length - 24, max(1, length // 50)):
        changed, swapped, balanced = data.copy(), data.copy(), data.copy()
        changed[at] ^= 1
        swapped[at : at + 16] = np.roll(data[at : at + 16], 8)
        balanced[at : at + 8].view()[:] = 0
        for one in (changed, swapped, balanced):
            checksum = _checksum(one)
            assert checksum not in seen
            seen.add(checksum)
    lines = data[: length // 4096 * 4096].reshape(-1, 4096)
    if len(lines) > 1:
        assert _checksum(lines[::-1].reshape(-1)) != _checksum(lines.reshape(-1))


def test_the_cache_is_listed_once_however_many_shards_there_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    listdir = os.listdir
    monkeypatch.setattr("os.listdir", lambda place=".": (asked.append(place), listdir(place))[1])
    keep(folder)
    assert asked.count(folder / "cache") == 1


def test_a_folder_that_cannot_hold_a_cache_is_searched_all_the_same(folder: Path) -> None:
    # A file in the folder's place stands for a read-only disk: root may write anywhere.
    (folder / "cache").touch()
    hits = rank(open_gallery(folder), features_of("random", 10, 12)[3:4], 1)[0]
    assert hits[0].row == 3


def test_an_articles_shard_is_known_by_size_and_time(tmp_path: Path) -> None:
    write_article_shard(tmp_path, 0, features_of("random", 4, 12), list("abcd"))
    _ = open_gallery(tmp_path).unusable_rows
    write_article_shard(tmp_path, 0, features_of("positive", 4, 12) * 2, list("abcd"))
    os.utime(tmp_path / "0000.features.npy", ns=(1, 1))
    assert np.array_equal(open_gallery(tmp_path).shards[0].norms, norms_of(features_of("positive", 4, 12) * 2))
    assert len(kept(tmp_path)) == 1
