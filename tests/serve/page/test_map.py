"""The Map page in a real browser."""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Page, Route, expect

from pipeline.model import load_model
from tests.factories import Ruiji, pictures
from tests.search.galleries import write_article_shard, write_gallery, write_shard
from tests.serve.conftest import COUNT, Served, start, write_served_gallery
from tests.serve.page.conftest import Watch, check_accessible, check_fits

#: Of a feature of the test model.
LENGTH = 12


@dataclass
class Points:
    """What /map/points says, with positions as the page has them: the longer side from -1 to 1, y downwards."""

    rows: NDArray[np.uint32]
    places: NDArray[np.float64]

    def nearest(self, x: float, y: float) -> int:
        return int(self.rows[np.hypot(*(self.places - [x, y]).T).argmin()])


def points(served: Served) -> Points:
    body = served.get("/map/points").body
    count = int(np.frombuffer(body, "<u4", 1)[0])
    places = np.frombuffer(body, "<f4", offset=4 + 4 * count).reshape(-1, 2).astype(float)
    low, high = places.min(axis=0), places.max(axis=0)
    return Points(np.frombuffer(body, "<u4", count, 4), (places - (low + high) / 2) * 2 / (high - low).max() * [1, -1])


def looked_at(page: Page) -> tuple[float, float, float]:
    """The view that the address says."""
    asked = parse_qs(urlsplit(page.url).query)
    return float(asked["x"][0]), float(asked["y"][0]), float(asked["zoom"][0])


def show(page: Page, served: Served, query: str = "") -> None:
    page.goto(f"{served.origin}/map{query}")
    page.wait_for_url(re.compile("zoom="))


def middle(page: Page) -> tuple[float, float]:
    box = page.locator("#stage").bounding_box()
    assert box
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def ids(served: Served) -> list[str]:
    return [one["object_id"] for one in served.get("/objects?count=100").json()["objects"]]


def test_the_whole_gallery_is_shown_and_looked_through(served: Served, page: Page) -> None:
    show(page, served)
    expect(page.locator("#heading")).to_have_text(f"{COUNT} in view")
    expect(page.locator("#list li")).to_have_count(COUNT)
    expect(page.locator("#pictures img.here").first).to_be_attached()
    x, y, zoom = looked_at(page)
    assert zoom == 1 and x == 0
    at = middle(page)
    page.mouse.move(*at)
    page.mouse.wheel(0, -400)
    page.wait_for_url(re.compile("zoom=2"))
    assert looked_at(page)[0] == pytest.approx(x, abs=1e-3) and looked_at(page)[1] == pytest.approx(y, abs=1e-3)
    # Not on a picture: from the corner.
    box = page.locator("#stage").bounding_box()
    assert box
    page.mouse.move(box["x"] + 30, box["y"] + box["height"] - 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 230, box["y"] + box["height"] - 160, steps=4)
    page.mouse.up()
    page.wait_for_url(lambda url: "x=0&" not in url)
    assert looked_at(page)[0] < x and looked_at(page)[1] > y
    page.click("#whole")
    page.wait_for_url(re.compile("x=0&.*zoom=1$"))


def test_keys_do_all_that_a_mouse_does(served: Served, page: Page) -> None:
    show(page, served)
    page.focus("#surface")
    page.keyboard.press("+")
    page.keyboard.press("+")
    page.wait_for_url(re.compile(r"zoom=2\.25"))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.wait_for_url(lambda url: "x=0&" not in url)
    x, y, _ = looked_at(page)
    assert x > 0 and y > 0
    expect(page.locator("#heading")).not_to_have_text(f"{COUNT} in view")
    seen = int((page.locator("#heading").text_content() or "").split()[0])
    page.keyboard.press("v")
    expect(page.locator("#heading")).to_have_text(f"{seen} selected")
    page.keyboard.press("0")
    page.wait_for_url(re.compile(r"zoom=1$"))
    expect(page.locator("#heading")).to_have_text(f"{seen} selected")
    page.keyboard.press("Escape")
    expect(page.locator("#heading")).to_have_text(f"{COUNT} in view")
    page.keyboard.press("p")
    expect(page.locator("#pictures a")).to_have_count(0)


def test_a_view_can_be_shared_and_a_click_finds_what_is_there(served: Served, page: Page) -> None:
    found = points(served)
    row = 7
    x, y = found.places[found.rows == row][0]
    show(page, served, f"?x={x:.6f}&y={y:.6f}&zoom=500")
    assert looked_at(page) == pytest.approx((x, y, 500), abs=1e-5)
    wanted = ids(served)[row]
    picture = page.locator(f'#pictures a[title="{wanted}"]')
    expect(picture.locator("img.here")).to_be_attached()
    picture.click()
    page.wait_for_url(f"**/?id={quote(wanted)}*")
    page.go_back()
    page.wait_for_url(re.compile("zoom=500"))
    page.click("#shown")
    expect(page.locator("#pictures a")).to_have_count(0)
    page.mouse.move(*middle(page))
    expect(page.locator("#preview .name")).to_have_text(wanted)
    page.mouse.click(*middle(page))
    page.wait_for_url(f"**/?id={quote(wanted)}*")


def test_what_is_drawn_round_is_selected_and_its_list_is_saved(served: Served, world: Ruiji, page: Page) -> None:
    show(page, served)
    found = points(served)
    # The left half, some way past everything.
    box = page.locator("#stage").bounding_box()
    assert box
    x, bottom = middle(page)[0], box["y"] + box["height"] - 5
    left = [int(row) for row, place in zip(found.rows, found.places, strict=True) if place[0] < 0]
    assert 5 < len(left) < COUNT
    page.click("#lasso")
    expect(page.locator("#said")).to_have_text("Draw round what you want.")
    # Below the controls, so that these are not pressed.
    page.mouse.move(x, box["y"] + 75)
    page.mouse.down()
    for to in [(box["x"] + 2, box["y"] + 75), (box["x"] + 2, bottom), (x, bottom)]:
        page.mouse.move(*to, steps=3)
    expect(page.locator("#outline path")).to_have_attribute("d", re.compile("^M.*Z$"))
    page.mouse.up()
    expect(page.locator("#heading")).to_have_text(f"{len(left)} selected")
    expect(page.locator("#lasso")).to_have_attribute("aria-pressed", "false")
    check_accessible(page)
    with page.expect_download() as download:
        page.click("#export")
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(), newline="")))
    listed = served.get("/objects?count=100").json()["objects"]
    wanted = [[one["object_id"], one["path"]] for one in listed if one["row"] in left]
    assert rows == [["object_id", "path"], *wanted] and download.value.suggested_filename == "selected.csv"
    page.click("#clear")
    expect(page.locator("#heading")).to_have_text(f"{COUNT} in view")


def test_names_in_a_saved_list_are_their_bytes(ruiji: Ruiji, page: Page) -> None:
    names = ['comma, "quoted".png', "plain.png", "\udcff\udcfe.png", "é.png"]
    features = np.random.default_rng(1).standard_normal((4, LENGTH)).astype(np.float32)
    write_article_shard(ruiji.gallery, 0, features, names)
    ruiji.environment |= {"RUIJI_MEDIA_DIR": "", "RUIJI_MODEL": ""}
    show(page, start(ruiji))
    expect(page.locator("img")).to_have_count(0)
    expect(page.locator("#shown")).to_be_hidden()
    expect(page.locator("#list")).to_contain_text("plain.png")
    page.click("#view")
    with page.expect_download() as download:
        page.click("#export")
    lines = Path(download.value.path()).read_bytes().split(b"\r\n")
    assert lines[:2] == [b"object_id,path", b'"comma, ""quoted"".png",']
    assert lines[2:] == [b"plain.png,", b"\xff\xfe.png,", "é.png,".encode(), b""]


def test_two_fingers_zoom_and_one_moves(served: Served, phone: Page) -> None:
    show(phone, served)
    check_fits(phone)
    check_accessible(phone)
    touch = phone.context.new_cdp_session(phone)
    x, y = middle(phone)

    def send(kind: str, *at: tuple[float, float]) -> None:
        fingers = [{"x": x, "y": y, "id": n} for n, (x, y) in enumerate(at)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    send("touchStart", (x - 30, y), (x + 30, y))
    for apart in (45, 60, 75, 90):
        send("touchMove", (x - apart, y), (x + apart, y))
    send("touchEnd")
    # On a busy machine the address has a step between as well.
    phone.wait_for_url(lambda url: float(parse_qs(urlsplit(url).query)["zoom"][0]) == pytest.approx(3, rel=0.1))
    before = looked_at(phone)
    send("touchStart", (x, y))
    for by in (20, 40, 60):
        send("touchMove", (x - by, y))
    send("touchEnd")
    phone.wait_for_url(lambda url: float(parse_qs(urlsplit(url).query)["x"][0]) > before[0])
    assert looked_at(phone)[2] == before[2]


def test_a_map_that_is_being_made_shows_how_far_it_is(served: Served, page: Page) -> None:
    answers = iter([{"done": 0, "total": 0}, {"done": 30, "total": 120}])

    def slow(route: Route) -> None:
        body = next(answers, None)
        if body is None:
            expect(page.locator("#said")).to_have_text("Making the map: 25 %")
            expect(page.locator("#making")).to_have_attribute("value", "30")
            route.continue_()
        else:
            route.fulfill(status=202, json=body)

    page.route("**/map/points*", slow)
    show(page, served)
    expect(page.locator("#making")).to_be_hidden()
    expect(page.locator("#heading")).to_have_text(f"{COUNT} in view")


def test_a_gallery_that_changes_is_loaded_again(ruiji: Ruiji, page: Page, watch: Watch) -> None:
    write_served_gallery(ruiji)
    served = start(ruiji)
    found = points(served)
    x, y = found.places[found.rows == 7][0]
    show(page, served, f"?x={x:.6f}&y={y:.6f}&zoom=500")
    key = served.get("/map/points").headers["x-ruiji-rows"]
    model = load_model(ruiji.model)
    paths = pictures(ruiji.media, COUNT + 2)[-2:]
    write_shard(ruiji.gallery, 3, np.ones((2, LENGTH), np.float32), paths, model.fingerprint)
    page.wait_for_timeout(100)
    for _ in range(300):
        if served.get("/map/points").headers["x-ruiji-rows"] != key:
            break
        page.wait_for_timeout(200)
    page.focus("#surface")
    page.keyboard.press("0")
    expect(page.locator("#heading")).to_have_text(f"{COUNT + 2} in view")
    expect(page.locator("#said")).to_have_text("The gallery has changed; the map was loaded again.")
    watch.expected += ["409 .*/map/objects"]


def test_what_cannot_be_shown_is_said(ruiji: Ruiji, page: Page, watch: Watch) -> None:
    features = np.zeros((3, LENGTH), np.float32)
    write_gallery(ruiji.gallery, load_model(ruiji.model), features, ["a.png", "b.png", "c.png"], 3)
    ruiji.environment |= {"RUIJI_MEDIA_DIR": ""}
    served = start(ruiji)
    page.goto(f"{served.origin}/map")
    expect(page.locator("#said")).to_have_text("None of the objects can be ranked, so there is no map.")
    expect(page.locator("#panel")).to_be_hidden()
    check_accessible(page)
    page.goto(f"{served.origin}/map?projection=umap")
    expect(page.locator("#said")).to_contain_text("run ruiji map --projection umap")
    page.goto(f"{served.origin}/map?gallery=nobody")
    expect(page.locator("#said")).to_contain_text("There is no gallery nobody")
    watch.expect("409 .*/map/points")


def test_a_service_that_does_not_answer_is_said(served: Served, page: Page, watch: Watch) -> None:
    page.route("**/map/points*", lambda route: route.abort())
    page.goto(f"{served.origin}/map")
    expect(page.locator("#said")).to_have_text("The service does not answer. Is it running?")
    watch.expect("ERR_FAILED .*/map/points")


@pytest.mark.slow
def test_a_hundred_thousand_objects_have_a_place(ruiji: Ruiji, page: Page) -> None:
    rng = np.random.default_rng(1)
    middles = rng.standard_normal((50, LENGTH)) * np.linspace(3, 0.1, LENGTH)
    features = (middles[rng.integers(0, 50, 100_000)] + 0.2 * rng.standard_normal((100_000, LENGTH))).astype(np.float32)
    write_gallery(ruiji.gallery, load_model(ruiji.model), features, [f"{n:06d}.png" for n in range(100_000)], 10_000)
    ruiji.environment |= {"RUIJI_MEDIA_DIR": ""}
    served = start(ruiji)
    show(page, served)
    expect(page.locator("#heading")).to_have_text("100,000 in view")
    expect(page.locator("#note")).to_have_text("60 of them, spread evenly:")
    page.click("#view")
    expect(page.locator("#heading")).to_have_text("100,000 selected")
    found = points(served)
    x, y = found.places[found.rows == 77_777][0]
    show(page, served, f"?x={x:.7f}&y={y:.7f}&zoom=100000")
    expect(page.locator("#list")).to_contain_text("077777.png")
