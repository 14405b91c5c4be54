"""The map over HTTP: positions as numbers, the objects that they are of, and a map that takes its time."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import ruiji as api
from pipeline import layout
from pipeline.cache import write_array
from pipeline.errors import UsageError
from pipeline.model import load_model
from pipeline.store import write_atomic
from search.gallery.opening import open_gallery
from search.options import Projection
from serve.galleries import Resident
from serve.maps import Making, Maps
from tests.factories import Ruiji, wait_until
from tests.search.galleries import write_gallery, write_shard
from tests.serve.conftest import COUNT, Answer, Served, start, write_served_gallery

#: Of a feature of the test model.
LENGTH = 12


def points(answer: Answer) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Rows and positions, read as docs/serve.md has it."""
    assert answer.status == 200 and answer.headers["content-type"] == "application/octet-stream"
    count = int(np.frombuffer(answer.body, "<u4", 1)[0])
    assert len(answer.body) == 4 + 12 * count
    rows = np.frombuffer(answer.body, "<u4", count, 4)
    return rows, np.frombuffer(answer.body, "<f4", offset=4 + 4 * count).reshape(-1, 2)


def test_points_are_those_of_the_gallery_s_map(served: Served, world: Ruiji) -> None:
    answer = served.get("/map/points")
    rows, positions = points(answer)
    gallery = api.open_gallery(world.gallery)
    wanted = gallery.map()
    assert rows.tolist() == list(range(COUNT)) and np.array_equal(positions, wanted.positions)
    assert answer.headers["x-ruiji-projection"] == "pca" and answer.headers["x-ruiji-unplaced"] == "0"
    assert answer.headers["x-ruiji-rows"] == gallery.rows_key
    assert served.get("/map/points?projection=pca").body == answer.body
    asked = f"/map/objects?rows_key={gallery.rows_key}&rows="
    found = served.get(f"{asked}39,0,7,7").json()["objects"]
    assert [one["row"] for one in found] == [39, 0, 7, 7]
    listed = served.get("/objects?count=40").json()["objects"]
    assert found == [listed[row] for row in (39, 0, 7, 7)]


def test_what_cannot_be_asked_is_refused(served: Served) -> None:
    key = served.get("/map/points").headers["x-ruiji-rows"]
    assert "run ruiji map --projection umap" in served.get("/map/points?projection=umap").error
    assert served.get("/map/points?projection=umap").status == 409
    assert served.get("/map/points?projection=tsne").status == 422
    assert served.get("/map/points?gallery=nobody").status == 404
    assert "no row 40, only 0 to 39" in served.get(f"/map/objects?rows_key={key}&rows=40").error
    many = ",".join(["1"] * 1001)
    for rows in ("", "-1", "1,", "a", "1-3", many):
        assert served.get(f"/map/objects?rows_key={key}&rows={rows}").status == 422, rows
    assert served.get(f"/map/objects?rows_key={key}&rows={many[2:]}").status == 200


def test_a_map_that_no_page_can_hold_is_refused_before_it_is_made(
    ruiji: Ruiji, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_served_gallery(ruiji)
    monkeypatch.setattr("serve.maps._MOST_POINTS", COUNT - 1)
    maps, resident = Maps(lambda: False), Resident("tiny", api.open_gallery(ruiji.gallery), None)
    with pytest.raises(UsageError, match=f"up to {COUNT - 1} objects, and this gallery has {COUNT}"):
        asyncio.run(maps.get(resident, None))
    maps.close()
    assert not list((ruiji.gallery / "cache").glob("map.*"))


def test_rows_that_were_renumbered_are_not_mixed_up(ruiji: Ruiji) -> None:
    write_served_gallery(ruiji)
    served = start(ruiji)
    first = served.get("/map/points")
    key, asked = first.headers["x-ruiji-rows"], "/map/objects?rows=39&rows_key="
    assert served.get(asked + key).status == 200
    model = load_model(ruiji.model)
    features = np.ones((2, LENGTH), np.float32)
    write_shard(ruiji.gallery, 3, features, ["new/a.png", "new/b.png"], model.fingerprint)
    wait_until(lambda: served.get(asked + key).status == 409, 60, "the new shard")
    answer = served.get(asked + key)
    assert answer.status == 409 and "load the map again" in answer.error
    rows, _ = points(served.get("/map/points"))
    assert len(rows) == COUNT + 2


@pytest.mark.parametrize("cache", ["kept", "not kept"])
def test_a_map_that_was_made_follows_the_object_list(ruiji: Ruiji, cache: str) -> None:
    write_served_gallery(ruiji)
    if cache == "not kept":
        (ruiji.gallery / "cache").write_text("in the way")
    leave(ruiji, 30, 31)
    served = start(ruiji)
    first, places = points(served.get("/map/points"))
    assert first.tolist() == [row for row in range(COUNT) if row not in (30, 31)]
    # One comes back, others leave.
    leave(ruiji, 31, 4, 5)
    wait_until(lambda: len(points(served.get("/map/points"))[0]) == COUNT - 3, 60, "the shorter list")
    now = served.get("/map/points")
    rows, positions = points(now)
    assert rows.tolist() == [row for row in range(COUNT) if row not in (4, 5, 31)]
    both = [row for row in rows.tolist() if row != 30]
    assert np.array_equal(positions[np.isin(rows, both)], places[np.isin(first, both)])
    asked = served.get(f"/map/objects?rows_key={now.headers['x-ruiji-rows']}&rows={','.join(map(str, rows))}")
    assert [one["row"] for one in asked.json()["objects"]] == rows.tolist()


def leave(ruiji: Ruiji, *gone: int) -> None:
    """Take the objects of these rows off the list, and no others."""
    folder = ruiji.gallery / "run" / "stale"
    folder.mkdir(parents=True, exist_ok=True)
    marked = np.isin(np.arange(COUNT), gone)
    for number, first in enumerate(range(0, COUNT, 16)):
        write_atomic(folder / f"{number:04d}.bits", [np.packbits(marked[first : first + 16]).tobytes()])


def test_umap_is_shown_if_it_is_kept(ruiji: Ruiji) -> None:
    write_served_gallery(ruiji)
    gallery = api.open_gallery(ruiji.gallery)
    made = gallery.map()
    (kept,) = (ruiji.gallery / "cache").glob("map.*.pca.npy")
    key = open_gallery(ruiji.gallery).key("umap 1")
    write_array(layout.map_file(kept.parent, key, Projection.umap), -made.positions)
    served = start(ruiji)
    answer = served.get("/map/points")
    assert answer.headers["x-ruiji-projection"] == "umap"
    assert np.array_equal(points(answer)[1], -made.positions)
    assert np.array_equal(points(served.get("/map/points?projection=pca"))[1], made.positions)


# A map that takes its time


@pytest.fixture
def resident(tmp_path: Path, model_path: Path) -> Resident:
    model = load_model(model_path)
    features = np.random.default_rng(1).standard_normal((30, LENGTH)).astype(np.float32)
    write_gallery(tmp_path / "tiny", model, features, [f"{row:02d}.png" for row in range(30)], 10)
    return Resident("tiny", api.open_gallery(tmp_path / "tiny"), None)


def test_a_map_is_made_once_for_all_who_ask_and_they_are_told_how_far_it_is(
    resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, makers = threading.Event(), threading.Event(), []

    def slow(gallery: object, rows: NDArray[np.int64], step: Callable[[int, int], None]) -> object:
        makers.append(threading.current_thread())
        step(7, 90)
        begun.set()
        assert go_on.wait(180)
        return np.zeros((len(rows), 2), np.float32)

    monkeypatch.setattr("search.maps.store.principal_plane", slow)

    async def ask() -> None:
        maps = Maps(lambda: False)
        asked = [asyncio.create_task(maps.get(resident, None)) for _ in range(3)]
        # The loop is free meanwhile.
        await asyncio.to_thread(begun.wait, 60)
        for answer in await asyncio.gather(*asked):
            assert isinstance(answer, Making) and (answer.done, answer.total) == (7, 90)
        go_on.set()
        answer = await maps.get(resident, None)
        assert isinstance(answer, api.GalleryMap) and len(answer.rows) == 30
        again = await maps.get(resident, Projection.pca)
        assert isinstance(again, api.GalleryMap) and np.array_equal(again.positions, answer.positions)
        maps.close()

    asyncio.run(ask())
    assert len(makers) == 1 and makers[0] is not threading.main_thread()


def test_a_map_that_fails_is_tried_again(resident: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resident.gallery.map()
    tried: list[None] = []

    def fail(*_: object) -> None:
        tried.append(None)
        raise api.MachineFault("the disk is gone")

    async def ask() -> None:
        maps = Maps(lambda: False)
        for _ in range(2):
            with pytest.raises(api.MachineFault, match="the disk is gone"):
                await maps.get(resident, None)
        assert len(tried) == 2
        monkeypatch.undo()
        answer = await maps.get(resident, None)
        assert isinstance(answer, api.GalleryMap) and np.array_equal(answer.positions, whole.positions)
        maps.close()

    monkeypatch.setattr("ruiji.galleries.make_map", fail)
    asyncio.run(ask())


def test_a_service_that_ends_gives_up_its_map(resident: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.maps.components._AT_ONCE", 1)
    closing = threading.Event()
    steps: list[int] = []
    real = Making.__setattr__

    def note(making: Making, name: str, value: object) -> None:
        real(making, name, value)
        if name == "done" and value:
            steps.append(1)
            closing.set()

    monkeypatch.setattr(Making, "__setattr__", note)

    async def ask() -> None:
        maps = Maps(closing.is_set)
        with pytest.raises(api.RuijiError, match="ask again"):
            await maps.get(resident, None)
        maps.close()

    asyncio.run(ask())
    assert len(steps) == 1
