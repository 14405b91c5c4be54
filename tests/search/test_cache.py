"""What is kept beside the shards: what it says about rows, and when it is believed."""

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.model import Model, load_model
from pipeline.store import feature_shards, recorded_shards
from search.codes import codes_of
from search.gallery import open_gallery
from search.norms import is_plain, norms_of
from search.ranking import rank
from tests.search.galleries import write_article_shard, write_gallery, write_shard
from tests.search.test_ranking import KINDS, features_of


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
        shard.keep_codes()


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
    monkeypatch.setattr("search.gallery.norms_of", lambda _: pytest.fail("computed again"))
    for shard, norms in zip(open_gallery(folder).shards, first, strict=True):
        assert np.array_equal(shard.norms, norms)


def test_codes_are_kept_when_asked_for_and_read_then(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = open_gallery(folder)
    _ = [shard.codes for shard in gallery.shards]
    assert not gallery.coded
    keep(folder)
    assert sorted({name.split(".", 2)[2] for name in kept(folder)}) == ["codes.npy", "norms.npy", "scales.npy"]
    monkeypatch.setattr("search.gallery.codes_of", lambda *_: pytest.fail("made again"))
    keep(folder)
    again = open_gallery(folder)
    assert again.coded
    for one, other in zip(gallery.shards, again.shards, strict=True):
        assert np.array_equal(one.codes.integers, other.codes.integers)
        assert np.array_equal(one.codes.scales, other.codes.scales)
        assert np.array_equal(one.codes.losses, other.codes.losses)


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
    assert np.array_equal(gallery.shards[1].codes.integers, codes_of(other, norms_of(other)).integers)
    assert len(kept(folder)) == 7
    keep(folder)
    assert len(kept(folder)) == 9
    assert kept(folder) != old


@pytest.mark.parametrize("damage", [b"", b"no array", None])
def test_a_damaged_cache_is_made_again(folder: Path, damage: bytes | None) -> None:
    keep(folder)
    want = [(shard.norms.copy(), shard.codes.integers.copy()) for shard in open_gallery(folder).shards]
    for name in kept(folder):
        if damage is None:
            np.save(folder / "cache" / name, np.ones(3, np.float32))
        else:
            (folder / "cache" / name).write_bytes(damage)
    for _ in range(2):
        for shard, (norms, integers) in zip(open_gallery(folder).shards, want, strict=True):
            assert np.array_equal(shard.norms, norms)
            assert np.array_equal(shard.codes.integers, integers)
        keep(folder)
    assert all(len((folder / "cache" / name).read_bytes()) > 128 for name in kept(folder))


def test_a_folder_that_cannot_hold_a_cache_is_searched_all_the_same(folder: Path) -> None:
    # A file in the folder's place stands for a read-only disk: root may write anywhere.
    (folder / "cache").touch()
    hits = rank(open_gallery(folder), features_of("random", 10, 12)[3:4], 1).hits[0]
    assert hits[0].row == 3


def test_an_articles_shard_is_known_by_size_and_time(tmp_path: Path) -> None:
    write_article_shard(tmp_path, 0, features_of("random", 4, 12), list("abcd"))
    _ = open_gallery(tmp_path).unusable_rows
    write_article_shard(tmp_path, 0, features_of("positive", 4, 12) * 2, list("abcd"))
    os.utime(tmp_path / "0000.features.npy", ns=(1, 1))
    assert np.array_equal(open_gallery(tmp_path).shards[0].norms, norms_of(features_of("positive", 4, 12) * 2))
    assert len(kept(tmp_path)) == 1
