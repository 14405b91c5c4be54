"""The Find page in a real browser."""

from playwright.sync_api import Page, expect

from tests.factories import Ruiji
from tests.serve.conftest import Served, start, write_served_gallery
from tests.serve.page.conftest import Watch


def test_an_address_that_was_shared_shows_the_hits(served: Served, page: Page, watch: Watch) -> None:
    listed = served.get("/objects?count=1").json()["objects"][0]["object_id"]
    found = served.similar(listed, "?metric=cosine&k=10").json()["similarImages"]
    page.goto(f"{served.origin}/?id={listed}&k=10")
    expect(page.locator("#said")).to_have_text("10 look-alikes")
    assert page.locator("#hits .fact").all_text_contents() == [
        f"{one['rank']} · {one['similarity']:.3f}" for one in found
    ]
    assert page.title() == f"{listed} · ruiji"
    page.goto(f"{served.origin}/?id=nobody")
    expect(page.locator("#said")).to_contain_text("the gallery has no object nobody")
    watch.expect("404 .*/similar/nobody")
    page.goto(f"{served.origin}/?id={listed}&min=1")
    expect(page.locator("#said")).to_contain_text("Nothing is as similar")


def test_what_is_not_there_is_said(ruiji: Ruiji, page: Page) -> None:
    write_served_gallery(ruiji)
    ruiji.environment |= {"RUIJI_MEDIA_DIR": "", "RUIJI_MODEL": ""}
    served = start(ruiji)
    page.goto(served.origin)
    expect(page.locator("#said")).to_contain_text("start the service with --model")
    expect(page.locator("#choose")).to_be_hidden()
    listed = served.get("/objects?count=1").json()["objects"][0]["object_id"]
    page.goto(f"{served.origin}/?id={listed}")
    expect(page.locator("#hits li")).to_have_count(30)
    expect(page.locator("img")).to_have_count(0)
