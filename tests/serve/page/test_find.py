"""The Find page in a real browser: queries of every kind, both views, filters, the list, and what goes wrong."""

import csv
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.conftest import ROOT
from tests.factories import Ruiji, picture, tiny_model
from tests.search.galleries import write_article_shard
from tests.serve.conftest import Served, start, write_served_gallery
from tests.serve.page.conftest import Watch, check_accessible, check_fits
from tests.words import with_words

COUNT = 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ruiji]:
    """A gallery whose model has a text tower, with annotations."""
    base = tmp_path_factory.mktemp("find")
    model = with_words(tiny_model(base / "model.onnx"))
    ruiji = Ruiji(base / "media", base / "features", model, base / "state", ROOT)
    paths = write_served_gallery(ruiji, COUNT)
    lines = [f"{path},{'cat' if n % 4 else 'dog'},{n}" for n, path in enumerate(paths)]
    (base / "anno.csv").write_text("\n".join(["img_path,label,number", *lines, ""]))
    yield ruiji
    ruiji.stop_all()


@pytest.fixture(scope="module")
def find(photos: Ruiji) -> Served:
    return start(photos, "--labels", str(photos.media.parent / "anno.csv"))


@pytest.fixture(scope="module")
def listed(find: Served) -> list[dict[str, Any]]:
    objects: list[dict[str, Any]] = find.get("/objects").json()["objects"]
    return objects


def similar(find: Served, object_id: str, query: str = "?metric=cosine&k=30") -> list[dict[str, Any]]:
    hits: list[dict[str, Any]] = find.similar(object_id, query).json()["similarImages"]
    return hits


def shown(page: Page) -> list[str]:
    """The ids of the hits of the grid, in their order."""
    hrefs = [link.get_attribute("href") or "" for link in page.locator("#hits a").all()]
    return [href.partition("id=")[2].partition("&")[0] for href in hrefs]


def look_alikes(page: Page, count: int) -> None:
    """Wait until so many are shown."""
    expect(page.locator("#said")).to_have_text(re.compile(rf"^{count} look-alikes?\b"))


def test_it_begins_with_pictures_to_click_and_each_hit_is_the_next_query(
    find: Served, page: Page, listed: list[dict[str, Any]]
) -> None:
    page.goto(f"{find.origin}/?where=label%3Ddog")
    expect(page.locator("#said")).to_contain_text("10 of 40 pictures. Drop a picture on this page")
    page.goto(find.origin)
    expect(page.locator("#said")).to_have_text(re.compile("^40 pictures. Drop a picture on this page"))
    begun = shown(page)
    assert len(set(begun)) == 24
    page.locator("#hits a").nth(2).click()
    look_alikes(page, 30)
    hits = similar(find, begun[2])
    assert shown(page) == [one["objectId"] for one in hits]
    facts = [f"{one['rank']} · {one['similarity']:.3f}" for one in hits]
    assert page.locator("#hits b").all_text_contents() == facts
    expect(page.locator("#query h2")).to_have_text(begun[2])
    page.locator("#hits a").nth(1).click()
    expect(page.locator("#query h2")).to_have_text(hits[1]["objectId"])
    page.go_back()
    expect(page.locator("#query h2")).to_have_text(begun[2])
    page.go_back()
    expect(page.locator("#said")).to_contain_text("40 pictures")
    assert shown(page) == begun
    page.go_forward()
    expect(page.locator("#query h2")).to_have_text(begun[2])
    page.click("#random")
    expect(page).not_to_have_url(re.compile(begun[2]))
    look_alikes(page, 30)


def test_a_picture_can_be_chosen_dropped_and_pasted(find: Served, page: Page, tmp_path: Path) -> None:
    data = picture(tmp_path / "mine.png", 7, (60, 40)).read_bytes()
    wanted = [one["objectId"] for one in find.search(data, "?k=30").json()["similarImages"]]
    page.goto(find.origin)
    expect(page.locator("#said")).to_contain_text("40 pictures")
    page.set_input_files("#file", tmp_path / "mine.png")
    look_alikes(page, 30)
    assert shown(page) == wanted and page.title() == "mine.png · ruiji"
    expect(page.locator("#query img")).to_have_js_property("naturalWidth", 60)
    bring = """([kind, bytes, name]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
        const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
          : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
        document.body.dispatchEvent(event);
    }"""
    for kind in ("drop", "paste"):
        page.goto(find.origin)
        expect(page.locator("#said")).to_contain_text("40 pictures")
        page.evaluate(bring, [kind, list(data), f"{kind}.png"])
        expect(page.locator("#query h2")).to_have_text(f"{kind}.png")
        look_alikes(page, 30)
        assert shown(page) == wanted
    # A page that is loaded again does not have it any more, and says so.
    page.reload()
    expect(page.locator("#said")).to_contain_text("gone with the page")


def test_words_are_queries_with_an_address(find: Served, page: Page) -> None:
    page.goto(find.origin)
    page.fill("#words", "a red car & more")
    page.press("#words", "Enter")
    look_alikes(page, 30)
    expect(page.locator("#query h2")).to_have_text("“a red car & more”")
    assert page.url.endswith("/?text=a%20red%20car%20%26%20more")
    by_words = shown(page)
    page.goto(f"{find.origin}/?text=a%20red%20car%20%26%20more&k=5")
    look_alikes(page, 5)
    assert shown(page) == by_words[:5]
    # There is no picture to compare with.
    assert page.locator(".compare").count() == 0


def circles(page: Page) -> list[dict[str, float]]:
    """Middle and radius of each hit of the rings, in the order of their ranks; the query's first."""
    read = """(one) => { const circle = one.querySelector("circle");
        return { x: +circle.getAttribute("cx"), y: +circle.getAttribute("cy"), r: +circle.getAttribute("r") }; }"""
    return [one.evaluate(read) for one in page.locator("#sky .query, #sky a").all()]


@pytest.mark.parametrize("count", [5, 30, 39])
def test_the_rings_have_the_nearest_inside_and_none_on_another(
    find: Served, page: Page, listed: list[dict[str, Any]], count: int
) -> None:
    query = listed[0]["object_id"]
    page.goto(f"{find.origin}/?id={query}&k={count}&view=rings")
    look_alikes(page, count)
    middle, *hits = circles(page)
    assert (middle["x"], middle["y"], len(hits)) == (0, 0, count)
    everything = [middle, *hits]
    for n, one in enumerate(everything):
        for other in everything[:n]:
            assert math.hypot(one["x"] - other["x"], one["y"] - other["y"]) > one["r"] + other["r"]
    radii = [math.hypot(one["x"], one["y"]) for one in hits]
    assert all(inner <= outer + 1e-9 for inner, outer in itertools.pairwise(radii))
    # A ring has inside what is as similar as it says, and nothing else.
    found = similar(find, query, f"?metric=cosine&k={count}")
    rings = page.locator("#sky .ring").evaluate_all("all => all.map((one) => +one.getAttribute('r'))")
    scales = [float(text) for text in page.locator("#sky .scale").all_text_contents()]
    assert len(rings) == len(scales) >= 1
    for ring, scale in zip(rings, scales, strict=True):
        inside = [one["similarity"] >= scale for one in found]
        assert inside == [radius <= ring + 1e-9 for radius in radii]
    box = page.locator("#sky svg").bounding_box()
    assert box and box["width"] >= 400


def test_many_equal_hits_find_room_in_the_rings(find: Served, page: Page) -> None:
    page.goto(find.origin)
    for distances in (
        "Array(150).fill(0.5)",
        "[0, ...Array(60).fill(1e-9), 1]",
        "[0.3]",
        "Array.from({length: 150}, (_, n) => n ** 3)",
    ):
        spots = page.evaluate(f"import('/rings.js').then((rings) => rings.places({distances}))")
        radii = [one["radius"] for one in spots]
        assert radii == sorted(radii)
        for n, one in enumerate(spots):
            assert one["radius"] >= 1.45
            for other in spots[:n]:
                assert math.hypot(one["x"] - other["x"], one["y"] - other["y"]) >= 1.08


def test_the_rings_can_be_walked_with_the_keyboard(find: Served, page: Page, listed: list[dict[str, Any]]) -> None:
    query = listed[0]["object_id"]
    hits = similar(find, query)
    page.goto(f"{find.origin}/?id={query}")
    look_alikes(page, 30)
    page.focus("#rings")
    page.keyboard.press("Enter")
    expect(page.locator("#sky a")).to_have_count(30)
    assert page.url.endswith("&view=rings")
    page.locator("#sky a").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    expect(page.locator("#pointed b")).to_have_text(f"3 · {hits[2]['similarity']:.3f}")
    page.keyboard.press("Enter")
    expect(page.locator("#query h2")).to_have_text(hits[2]["objectId"])
    # The view goes along, and who walks goes on among the new hits.
    expect(page.locator("#sky a")).to_have_count(30)
    expect(page.locator("#sky a").first).to_be_focused()
    page.go_back()
    expect(page.locator("#query h2")).to_have_text(query)
    page.click("#grid")
    expect(page.locator("#hits a")).to_have_count(30)
    page.locator("#hits a").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    across = page.evaluate(
        "[...document.querySelectorAll('#hits a')].filter((one, _, all) => one.offsetTop === all[0].offsetTop"
        " && one.getBoundingClientRect().top === all[0].getBoundingClientRect().top).length"
    )
    assert page.evaluate("[...document.querySelectorAll('#hits a')].indexOf(document.activeElement)") == across - 1
    page.keyboard.press("Enter")
    expect(page.locator("#query h2")).not_to_have_text(query)
    expect(page.locator("#hits a").first).to_be_focused()


def slide(slider: Locator, value: str) -> None:
    """Move a slider as a hand does."""
    slider.evaluate("(one, value) => { one.value = value; one.dispatchEvent(new Event('input')); }", value)


def test_sliders_change_number_and_least_similarity_and_the_address(
    find: Served, page: Page, listed: list[dict[str, Any]]
) -> None:
    query = listed[1]["object_id"]
    page.goto(f"{find.origin}/?id={query}")
    look_alikes(page, 30)
    slide(page.locator("#count"), "1")
    look_alikes(page, 10)
    expect(page).to_have_url(re.compile(r"/\?id=.*&k=10$"))
    least = math.floor(similar(find, query)[3]["similarity"] * 100) / 100
    wanted = [one["objectId"] for one in similar(find, query, "?metric=cosine&k=10") if one["similarity"] >= least]
    slide(page.locator("#least"), str(least))
    look_alikes(page, len(wanted))
    assert shown(page) == wanted and f"min={least}" in page.url
    slide(page.locator("#least"), "1")
    expect(page.locator("#said")).to_contain_text("Nothing is as similar as that")
    # A shared address shows the same, and what it says of numbers that no slider has.
    page.goto(f"{find.origin}/?id={query}&k=7&view=rings")
    look_alikes(page, 7)
    expect(page.locator("output[for=count]")).to_have_text("7")
    expect(page.locator("#sky a")).to_have_count(7)


def test_filters_are_added_shared_and_removed(find: Served, page: Page, listed: list[dict[str, Any]]) -> None:
    query = listed[0]["object_id"]
    page.goto(f"{find.origin}/?id={query}")
    look_alikes(page, 30)
    page.click("text=Add a filter")
    check_accessible(page)
    page.select_option("dialog select[aria-label=Column]", "label")
    page.select_option("dialog select[aria-label=Value]", "dog")
    page.click("dialog button:has-text('Add')")
    add = page.get_by_role("button", name="Add a filter")
    expect(add).to_be_focused()
    dogs = [one["objectId"] for one in similar(find, query, "?metric=cosine&k=30&where=label%3Ddog")]
    look_alikes(page, len(dogs))
    assert shown(page) == dogs and "where=label%3Ddog" in page.url
    page.reload()
    look_alikes(page, len(dogs))
    page.click("text=Add a filter")
    page.select_option("dialog select[aria-label=Relation]", "!=")
    page.fill("dialog input", listed[4]["path"])
    page.press("dialog input", "Enter")
    expect(page.locator(".chip")).to_have_count(2)
    look_alikes(page, len(dogs) - 1)
    # What it begins with is filtered too.
    page.goto(f"{find.origin}/?where=label%3Ddog")
    expect(page.locator("#said")).to_contain_text("begin with one of these")
    assert set(shown(page)) == {*dogs, query}
    page.goto(f"{find.origin}/?where=label%3Dcow")
    expect(page.locator("#said")).to_contain_text("No picture meets these conditions")
    page.click("button.chip")
    expect(page.locator("#hits a")).to_have_count(24)
    expect(add).to_be_focused()
    # A folder of the query's path is a filter too; the file's name stands in the heading alone.
    page.goto(f"{find.origin}/?id={query}")
    expect(page.locator("#query a")).to_have_count(len(listed[0]["path"].split("/")) - 1)
    assert page.locator("#query").inner_text().count(query) == 1
    page.locator("#query a").nth(1).click()
    folder = "/".join(listed[0]["path"].split("/")[:2])
    expect(page.locator(".chip")).to_contain_text(f"path begins with {folder}/")


def test_copies_are_hidden_compared_and_listed(ruiji: Ruiji, page: Page) -> None:
    paths = write_served_gallery(ruiji, 6)
    served = start(ruiji)
    query = paths[0].rpartition("/")[2]
    page.goto(f"{served.origin}/?id={query}")
    look_alikes(page, 5)
    hits = similar(served, query)
    # At this threshold all are copies of the first.
    page.evaluate("history.replaceState(null, '', location.search + '&collapse=0.01')")
    page.reload()
    collapsed = similar(served, query, "?metric=cosine&collapse=0.01")
    look_alikes(page, len(collapsed))
    expect(page.locator("#collapse")).to_be_checked()
    others = [f"+{one['others']}" for one in collapsed if one["others"]]
    assert others and page.locator(".others").all_text_contents() == others
    page.uncheck("#collapse")
    look_alikes(page, 5)
    page.check("#collapse")
    expect(page).to_have_url(re.compile("&collapse=0.95$"))
    page.uncheck("#collapse")
    look_alikes(page, 5)

    page.click(f"[aria-label='Compare with {hits[1]['objectId']}']")
    dialog = page.locator("dialog")
    expect(dialog).to_contain_text(f"similarity {hits[1]['similarity']:.4f}")
    expect(dialog).to_contain_text(hits[1]["path"])
    expect(dialog).to_contain_text(paths[0])
    expect(dialog.locator("img")).to_have_count(2)
    check_accessible(page)
    page.keyboard.press("f")
    expect(dialog.locator("figure:visible")).to_have_count(1)
    expect(dialog.locator("figure:visible")).to_contain_text(query)
    page.keyboard.press("Space")
    expect(dialog.locator("figure:visible")).to_contain_text(hits[1]["objectId"])
    page.keyboard.press("f")
    expect(dialog.locator("figure:visible")).to_have_count(2)
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)

    with page.expect_download() as waiting:
        page.click("#download")
    assert waiting.value.suggested_filename == "look-alikes.csv"
    with Path(waiting.value.path()).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["query"], row["rank"], row["object_id"], row["path"], float(row["similarity"])) for row in rows] == [
        (query, str(one["rank"]), one["objectId"], one["path"], one["similarity"]) for one in hits
    ]


def test_names_that_are_not_utf_8_are_shown_searched_with_and_listed(ruiji: Ruiji, page: Page) -> None:
    names = ["a/b.png", 'odd, "\udce9" #1?.png', "日本.png"]
    write_article_shard(ruiji.gallery, 0, np.eye(3, 12, dtype=np.float32), names)
    ruiji.media.mkdir()
    page.goto(f"{start(ruiji).origin}/?id={quote(names[0], safe='')}")
    look_alikes(page, 2)
    with page.expect_download() as waiting:
        page.click("#download")
    written = Path(waiting.value.path()).read_bytes()
    assert names[1].replace('"', '""').encode(errors="surrogateescape") in written
    assert names[2].encode() in written
    page.locator("#hits a[href*=odd]").click()
    expect(page).to_have_url(re.compile("%E9", re.IGNORECASE))
    expect(page.locator("#query h2")).to_contain_text("odd, ")
    look_alikes(page, 2)
    assert sorted(shown(page)) == sorted([quote(names[0], safe=""), quote(names[2], safe="")])
    # Without paths nothing can be filtered, and no button says otherwise.
    expect(page.locator("#filters")).to_be_empty()


def test_what_goes_wrong_is_said(ruiji: Ruiji, new_page: Callable[..., Page], watch: Watch, tmp_path: Path) -> None:
    write_served_gallery(ruiji, 8)
    served = start(ruiji)
    page = new_page()
    page.goto(f"{served.origin}/?id=nobody")
    expect(page.locator("#said")).to_contain_text("the gallery has no object nobody")
    expect(page.locator("#again")).to_be_hidden()
    watch.expect("404")
    check_accessible(page)
    page.goto(f"{served.origin}/?gallery=nowhere")
    expect(page.locator("#said")).to_contain_text("There is no gallery nowhere")
    page.goto(f"{served.origin}/?where=colour%3Dred")
    expect(page.locator("#said")).to_contain_text("--labels")
    watch.expect("409")
    page.goto(served.origin)
    expect(page.locator("#said")).to_contain_text("8 pictures")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "broken.png")
    expect(page.locator("#said")).to_contain_text("not an image in a known format")
    watch.expect("422")
    mine = picture(tmp_path / "mine.png", 7)
    page.set_input_files("#file", mine)
    look_alikes(page, 8)
    mine.unlink()
    page.locator("#collapse").check()
    expect(page.locator("#said")).to_contain_text("mine.png cannot be read")
    page.evaluate(
        """() => {
            const data = new DataTransfer();
            for (const name of ["a", "b"]) data.items.add(new File(["x"], name));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }"""
    )
    expect(page.locator("#said")).to_have_text("Drop one picture: there is one answer.")
    # A picture that is gone since is a placeholder, and the rest is there.
    listed = served.get("/objects").json()["objects"]
    (ruiji.media / listed[2]["path"]).unlink()
    page.goto(f"{served.origin}/?id={listed[0]['object_id']}")
    look_alikes(page, 7)
    gone = page.locator(f"#hits img[alt='{listed[2]['object_id']}']")
    expect(gone).to_have_js_property("complete", True)
    assert gone.evaluate("(one) => one.naturalWidth") > 0
    # The service ends, and is there again.
    page.click("#rings")
    expect(page.locator("#sky a")).to_have_count(7)
    ruiji.stop_all()
    slide(page.locator("#count"), "0")
    expect(page.locator("#said")).to_contain_text("The service does not answer")
    watch.expect("net::ERR_")
    check_accessible(page)
    again = Ruiji(ruiji.media, ruiji.features, ruiji.model, ruiji.state, ROOT)
    try:
        start(again, "--port", str(served.port))
        page.click("#again")
        look_alikes(page, 5)
    finally:
        again.stop_all()


def test_what_is_not_there_is_said(ruiji: Ruiji, page: Page) -> None:
    write_served_gallery(ruiji)
    ruiji.environment |= {"RUIJI_MEDIA_DIR": "", "RUIJI_MODEL": ""}
    served = start(ruiji)
    page.goto(served.origin)
    expect(page.locator("#said")).to_contain_text("start the service with --model")
    expect(page.locator("#said")).to_contain_text("start it with --media-dir")
    for hidden in ("#choose", "#wording"):
        expect(page.locator(hidden)).to_be_hidden()
    page.locator("#hits a").first.click()
    look_alikes(page, 30)
    expect(page.locator("img")).to_have_count(0)
    expect(page.locator(".compare")).to_have_count(0)
    page.click("#rings")
    expect(page.locator("#sky a")).to_have_count(30)
    expect(page.locator("#sky image")).to_have_count(0)
    assert page.locator("#sky a .label").first.text_content()
    check_accessible(page)


def test_a_telephone_shows_both_views(find: Served, phone: Page, listed: list[dict[str, Any]]) -> None:
    phone.goto(f"{find.origin}/?id={listed[0]['object_id']}&where=label%3Dcat")
    look_alikes(phone, 29 if listed[0]["annotations"]["label"] == "cat" else 30)
    check_fits(phone)
    check_accessible(phone)
    phone.tap("#rings")
    expect(phone.locator("#sky svg")).to_be_visible()
    check_fits(phone)
    check_accessible(phone)
    sizes = phone.locator("#sky a").evaluate_all("all => all.map((one) => one.getBoundingClientRect().width)")
    assert min(sizes) >= 24


def test_the_desk_shows_both_views_without_a_fault(find: Served, page: Page, listed: list[dict[str, Any]]) -> None:
    for view in ("grid", "rings"):
        page.goto(f"{find.origin}/?id={listed[0]['object_id']}&view={view}")
        look_alikes(page, 30)
        check_accessible(page)
    page.goto(find.origin)
    expect(page.locator("#hits a")).to_have_count(24)
    check_accessible(page)
