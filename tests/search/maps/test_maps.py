"""The maps of a gallery: principal components against a plain SVD, and what is kept of them."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.cache import look_through
from pipeline.errors import RuijiError, UsageError
from pipeline.model import Model, load_model
from search.gallery.opening import open_gallery
from search.maps import components
from search.maps.store import GalleryMap, make_map, read_map
from search.options import Projection
from tests.factories import Ruiji
from tests.search.galleries import in_memory, write_article_shard, write_gallery, write_shard

LENGTH = 12


def features_of(rows: int, seed: int = 1, length: int = LENGTH) -> NDArray[np.float32]:
    """Rows far from the origin, whose spread differs from axis to axis."""
    rng = np.random.default_rng(seed)
    spread = np.linspace(3, 0.2, length)
    return (5 + rng.standard_normal((rows, length)) * spread).astype(np.float32)


def svd_plane(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """The first two principal components of unit rows, by numpy's SVD of the whole in float64."""
    wide = features.astype(np.float64)
    units = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    centred = units - units.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    signs = np.sign([axis[np.abs(axis).argmax()] for axis in axes])
    return centred @ (axes * signs[:, np.newaxis]).T


def plane_of(features: NDArray[np.float32], cuts: tuple[int, ...] = ()) -> GalleryMap:
    return make_map(in_memory(features, cuts=cuts), Projection.pca)


@pytest.mark.parametrize(("rows", "length"), [(3, LENGTH), (40, LENGTH), (5000, LENGTH), (3, 400), (700, 400)])
def test_the_plane_is_that_of_a_singular_value_decomposition(rows: int, length: int) -> None:
    features = features_of(rows, length=length)
    found = plane_of(features)
    assert found.positions.dtype == np.float32
    assert found.positions == pytest.approx(svd_plane(features), abs=2e-6)
    assert np.array_equal(found.rows, np.arange(rows)) and found.unplaced == 0


def test_rows_that_hardly_differ_keep_their_shape() -> None:
    features = (1000 + features_of(300)).astype(np.float32)
    wanted = svd_plane(features)
    assert np.abs(wanted).max() < 0.01
    assert plane_of(features).positions == pytest.approx(wanted, abs=np.abs(wanted).max() * 1e-3)


def test_a_few_rows_far_from_the_others_take_nothing_from_their_shape() -> None:
    features = (1000 + features_of(9000)).astype(np.float32)
    features[:7] = -features[:7]
    wanted = svd_plane(features)
    assert wanted[:, 1].std() < 0.01
    assert plane_of(features).positions[7:, 1] == pytest.approx(wanted[7:, 1], abs=wanted[7:, 1].std() * 0.02)


def test_shards_and_rows_that_are_left_out_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "_AT_ONCE", 64)
    features = features_of(500)
    whole = plane_of(features).positions
    for cuts in [(1,), (64, 128), (63, 65, 400), tuple(range(10, 500, 10))]:
        assert np.array_equal(plane_of(features, cuts).positions, whole)
    unusable = np.zeros((4, LENGTH), np.float32)
    unusable[1:, 3] = [np.nan, np.inf, -np.inf]
    mixed = np.insert(features, [0, 17, 64, 500], unusable, axis=0)
    found = plane_of(mixed, (30, 200))
    assert np.array_equal(found.positions, whole)
    assert found.unplaced == 4
    assert np.array_equal(mixed[found.rows], features)


def test_small_galleries_have_a_place_for_each_object() -> None:
    assert plane_of(np.zeros((2, LENGTH), np.float32)).positions.shape == (0, 2)
    assert plane_of(features_of(1)).positions.tolist() == [[0, 0]]
    assert plane_of(np.tile(features_of(1), (5, 1))).positions == pytest.approx(0, abs=1e-6)
    line = plane_of(np.array([[1], [-2], [3]], np.float32)).positions
    assert line == pytest.approx(np.array([[2 / 3, 0], [-4 / 3, 0], [2 / 3, 0]]))


def test_a_very_long_row_counts_like_any_other() -> None:
    features = features_of(30)
    scaled = features.copy()
    scaled[3] *= 2.0**100
    scaled[4] *= 2.0**-100
    assert plane_of(scaled).positions == pytest.approx(plane_of(features).positions, abs=1e-6)


def test_progress_ends_with_all_of_all() -> None:
    steps: list[tuple[int, int]] = []
    make_map(in_memory(features_of(5000)), Projection.pca, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (10000, 10000) and steps == sorted(steps) and len(steps) == 4


# What is kept


@pytest.fixture
def model(model_path: Path) -> Model:
    return load_model(model_path)


@pytest.fixture
def folder(tmp_path: Path, model: Model) -> Path:
    folder = tmp_path / "gallery"
    write_gallery(folder, model, features_of(10), [f"a/{row:03d}.jpg" for row in range(10)], 4)
    return folder


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("map.*"))


def test_a_map_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_map(open_gallery(folder), Projection.pca) is None
    first = make_map(open_gallery(folder), Projection.pca)
    assert first.kept and [path.name.split(".", 2)[2] for path in kept(folder)] == ["pca.npy"]
    monkeypatch.setattr("search.maps.store.principal_plane", lambda *_: pytest.fail("made again"))
    again = make_map(open_gallery(folder), Projection.pca)
    assert np.array_equal(again.positions, first.positions) and again.rows_key == first.rows_key
    assert not list(look_through(folder))


def test_a_map_of_other_rows_is_not_read_and_goes(folder: Path, model: Model) -> None:
    before = make_map(open_gallery(folder), Projection.pca)
    old = kept(folder)
    write_shard(folder, 3, features_of(2, seed=2), ["b/0.jpg", "b/1.jpg"], model.fingerprint)
    grown = open_gallery(folder)
    assert read_map(grown, Projection.pca) is None and grown.rows_key != before.rows_key
    assert len(make_map(grown, Projection.pca).rows) == 12
    assert len(kept(folder)) == 1 and kept(folder) != old


def test_an_article_s_shard_that_is_written_anew_has_another_map(tmp_path: Path) -> None:
    write_article_shard(tmp_path, 0, features_of(8), [f"{row}.jpg" for row in range(8)])
    first = make_map(open_gallery(tmp_path), Projection.pca)
    write_article_shard(tmp_path, 0, features_of(9, seed=3), [f"{row}.jpg" for row in range(9)])
    second = make_map(open_gallery(tmp_path), Projection.pca)
    assert len(second.rows) == 9 and second.rows_key != first.rows_key and second.kept


def test_a_damaged_map_is_said_and_made_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make_map(open_gallery(folder), Projection.pca)
    (path,) = kept(folder)
    sound = path.read_bytes()
    for damage in (sound[:200], sound[:-9], sound[:150] + bytes([sound[150] ^ 1]) + sound[151:], b""):
        path.write_bytes(damage)
        assert read_map(open_gallery(folder), Projection.pca) is None
        assert f"{path} is damaged" in capsys.readouterr().err
        assert [(name, damaged) for name, damaged, _ in look_through(folder)] == [(f"cache/{path.name}", True)]
        again = make_map(open_gallery(folder), Projection.pca)
        assert np.array_equal(again.positions, whole.positions)
        assert path.read_bytes() == sound


def test_a_map_that_cannot_be_kept_is_still_given(folder: Path) -> None:
    (folder / "cache").write_text("in the way")
    made = make_map(open_gallery(folder), Projection.pca)
    assert len(made.rows) == 10 and not made.kept


def test_a_part_of_a_gallery_has_the_places_of_the_whole(folder: Path) -> None:
    gallery = open_gallery(folder)
    wanted = [np.array([row % 2 == 0 for row in range(len(shard.features))]) for shard in gallery.shards]
    part = make_map(gallery.only(wanted), Projection.pca)
    whole = make_map(gallery, Projection.pca)
    assert np.array_equal(part.rows, np.flatnonzero(np.concatenate(wanted)))
    assert np.array_equal(part.positions, whole.positions[part.rows]) and part.unplaced == 0


# The command


def test_the_command_says_what_is_on_the_map(ruiji: Ruiji) -> None:
    features = features_of(6)
    features[2] = 0
    write_gallery(ruiji.gallery, load_model(ruiji.model), features, [f"{row}.jpg" for row in range(6)], 4)
    done = ruiji("map")
    assert done.returncode == 0 and done.stdout == ""
    assert "5 objects are on the map; 1 cannot be ranked and are not" in done.stderr
    found = read_map(open_gallery(ruiji.gallery), Projection.pca)
    assert found is not None and found.rows.tolist() == [0, 1, 3, 4, 5]
    shutil.rmtree(ruiji.gallery / "cache")
    (ruiji.gallery / "cache").write_text("in the way")
    assert "the map is not kept; check its permissions" in ruiji("map", code=1).stderr


# UMAP


def test_umap_keeps_groups_apart(tmp_path: Path, model: Model) -> None:
    pytest.importorskip("umap", reason="the extra map is not installed: pip install 'ruiji[map]'")
    rng = np.random.default_rng(1)
    groups = np.repeat(rng.standard_normal((3, LENGTH)), 20, axis=0)
    features = (groups + 0.05 * rng.standard_normal(groups.shape)).astype(np.float32)
    features[7] = 0
    features[21:24] = features[20]
    write_gallery(tmp_path, model, features, [f"{row:02d}.jpg" for row in range(60)], 25)
    found = make_map(open_gallery(tmp_path), Projection.umap)
    assert found.kept and found.unplaced == 1 and len(found.rows) == 59 and np.isfinite(found.positions).all()
    middles = np.array([found.positions[found.rows // 20 == group].mean(axis=0) for group in range(3)])
    nearest = np.linalg.norm(found.positions[:, np.newaxis] - middles, axis=2).argmin(axis=1)
    assert np.array_equal(nearest, found.rows // 20)
    (tmp_path / "cache").rename(tmp_path / "before")
    assert np.array_equal(make_map(open_gallery(tmp_path), Projection.umap).positions, found.positions)
    with pytest.raises(UsageError, match="at least 4 objects"):
        make_map(in_memory(features[:3]), Projection.umap)


def test_umap_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(RuijiError, match=r"pip install 'ruiji\[map\]'"):
        make_map(in_memory(features_of(9)), Projection.umap)
