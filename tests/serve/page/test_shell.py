"""What all pages share: their header, their weight, the form that asks for the token."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from tests.conftest import ROOT
from tests.factories import Ruiji
from tests.serve.conftest import Served, start, write_served_gallery
from tests.serve.page.conftest import PHONE, Watch, check_accessible, check_fits

PAGES = ROOT / "serve" / "page"
#: Bytes of all pages together, without pictures.
MOST_BYTES = 150_000


def test_the_pages_weigh_little_and_load_nothing_from_elsewhere(served: Served) -> None:
    weight = 0
    for file in PAGES.iterdir():
        route = f"/{file.stem}" if file.suffix == ".html" else f"/{file.name}"
        answer = served.get("/" if route == "/index" else route, Accept="text/html")
        wanted = 404 if route == "/missing" else 200
        assert answer.status == wanted and answer.headers["x-content-type-options"] == "nosniff", route
        text = (
            answer.body.decode()
            .replace('xmlns="http://www.w3.org/2000/svg"', "")
            .replace('"http://www.w3.org/2000/svg"', "")
        )
        weight += len(answer.body)
        assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)), route
        # The policy would not run them.
        assert not re.search(r"<style|\son[a-z]+=|\bstyle=\"|<script(?![^>]*src=)|innerHTML|eval\(", text), route
    assert weight <= MOST_BYTES


@pytest.mark.parametrize("script", sorted(file.name for file in PAGES.glob("*.js")))
def test_what_a_script_asks_for_is_in_its_page(script: str) -> None:
    page = {"find.js": "index.html", "listing.js": "clean.html"}.get(script, script.replace(".js", ".html"))
    # A module that has no page of its own works in all of the gallery.
    whole = [file for file in PAGES.glob("*.html") if file.stem not in ("login", "missing")]
    pages = [PAGES / page] if (PAGES / page).exists() else whole
    text = (PAGES / script).read_text()
    asked = set(re.findall(r'(?:element|getElementById)\("([\w-]+)"\)', text))
    for names in re.findall(r"= \[([^\]]*)\]\.map\(element\)", text):
        asked |= set(re.findall(r'"([\w-]+)"', names))
    for file in pages:
        there = set(re.findall(r'id="([\w-]+)"', file.read_text())) | {"galleries", "gallery", "logout"}
        assert asked <= there, file.name


def test_the_header_leads_to_the_pages_that_are_there(served: Served, page: Page) -> None:
    page.goto(served.origin)
    links = page.locator("header nav a")
    expect(links.first).to_have_text("Find")
    expect(links.first).to_have_attribute("aria-current", "page")
    for n in range(links.count()):
        route = links.nth(n).get_attribute("href")
        assert route and served.get(route).status == 200
    # With one gallery, and without a token, there is nothing to choose and nowhere to log out from.
    expect(page.locator("#said")).to_contain_text("40 pictures")
    expect(page.locator("#galleries")).to_be_hidden()
    expect(page.locator("#logout")).to_be_hidden()


def test_the_choice_of_a_gallery_goes_along(ruiji: Ruiji, page: Page) -> None:
    write_served_gallery(ruiji)
    other = Ruiji(ruiji.media, ruiji.features, ruiji.model.with_name("other.onnx"), ruiji.state, ROOT)
    other.model.write_bytes(ruiji.model.read_bytes())
    write_served_gallery(other, 20)
    page.goto(start(ruiji).origin)
    page.select_option("#gallery", "other")
    expect(page).to_have_url(re.compile(r"/\?gallery=other$"))
    expect(page.locator("#said")).to_contain_text("20 pictures")
    for link in page.locator("header nav a").all():
        assert (link.get_attribute("href") or "").endswith("?gallery=other")


def test_a_token_is_asked_for_and_forgotten(
    ruiji: Ruiji, tmp_path: Path, new_page: Callable[..., Page], watch: Watch
) -> None:
    write_served_gallery(ruiji)
    file = tmp_path / "token"
    file.write_text("correct-horse-battery")
    # Pictures that are still asked for are refused after the end of a session, and the browser would complain of that.
    ruiji.environment["RUIJI_MEDIA_DIR"] = ""
    served = start(ruiji, "--web-token-file", str(file))
    page = new_page()
    page.goto(served.origin)
    expect(page).to_have_url(re.compile("/login$"))
    check_accessible(page)
    # What was asked for is shown after that.
    page.goto(f"{served.origin}/clean?show=decided&contains=%26%25")
    expect(page).to_have_url(re.compile("/login.to="))
    page.fill("#token", "wrong-horse-battery")
    page.press("#token", "Enter")
    expect(page.locator("#said")).to_contain_text("not the token")
    watch.expect("403 .*/login")
    page.fill("#token", "correct-horse-battery")
    page.press("#token", "Enter")
    expect(page).to_have_url(f"{served.origin}/clean?show=decided&contains=%26%25")
    expect(page.locator("#notice-title")).to_have_text("Nothing is decided yet")
    # The session ends while the page is open.
    page.context.clear_cookies()
    page.select_option("#show", "open")
    expect(page).to_have_url(re.compile("/login.to="))
    watch.expect("401 .*/decisions")
    # No address leads to another site.
    for to in ("https://other.example/", "//other.example", "javascript:alert(1)"):
        page.goto(f"{served.origin}/login?to={quote(to, safe='')}")
        page.fill("#token", "correct-horse-battery")
        page.press("#token", "Enter")
        expect(page.locator("#said")).to_contain_text("40 pictures")
    page.click("#logout")
    expect(page).to_have_url(re.compile("/login$"))
    page.goto(served.origin)
    expect(page).to_have_url(re.compile("/login$"))


def test_a_proxy_that_answers_for_the_service_is_not_taken_for_it(served: Served, page: Page, watch: Watch) -> None:
    # One that there is: what is asked besides must not fail sooner.
    known = json.loads(served.get("/objects?count=1").body)["objects"][0]["object_id"]
    places = [
        (f"?id={known}", "**/objects/*", "#said"),
        ("clean", "**/decisions/status*", "#notice-text"),
        ("map", "**/map/points*", "#said"),
        ("run", "**/failures*", "#said"),
        ("run", "**/healthz", "#said"),
    ]
    for body in ("", "<html>Bad Gateway</html>"):
        for name, route, said in places:
            page.route(route, lambda route, _, body=body: route.fulfill(status=502, body=body))
            page.goto(f"{served.origin}/{name}")
            expect(page.locator(said)).to_have_text("The service does not answer. Is it running?")
            page.unroute(route)
    watch.expect("502 ")


def test_a_telephone_shows_the_pages_whole(served: Served, phone: Page, watch: Watch) -> None:
    watch.expect("404 .*/missing")
    # The narrowest that a page must fit into: 1280 pixels at 400 %.
    phone.set_viewport_size({"width": 320, "height": 640})
    for name in sorted(file.stem for file in PAGES.glob("*.html")):
        phone.goto(f"{served.origin}/{'' if name == 'index' else name}")
        check_fits(phone)
    phone.set_viewport_size(PHONE)
    for name in sorted(file.stem for file in PAGES.glob("*.html")):
        phone.goto(f"{served.origin}/{'' if name == 'index' else name}")
        check_fits(phone)
        check_accessible(phone)
