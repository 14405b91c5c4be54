"""The page: what it loads, and what a real browser makes of it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.factories import Ruiji
from tests.serve.conftest import ROOT, Served, start, write_served_gallery

PAGE = ROOT / "serve" / "page"


def test_a_page_loads_little_and_nothing_from_elsewhere(served: Served) -> None:
    weight = 0
    for route in ("/", "/common.js", "/find.js", "/style.css", "/login", "/login.js"):
        answer = served.get(route)
        assert answer.status == 200 and answer.headers["x-content-type-options"] == "nosniff"
        text = answer.body.decode()
        weight += len(answer.body)
        assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)), route
        # The policy would not run them.
        assert not re.search(r"<style|\son[a-z]+=|style=|<script(?![^>]*src=)|innerHTML|eval\(", text), route
    assert weight < 50_000


@pytest.mark.parametrize(("page", "script"), [("index.html", "find.js"), ("login.html", "login.js")])
def test_what_a_script_asks_for_is_in_its_page(page: str, script: str) -> None:
    there = set(re.findall(r'id="(\w+)"', (PAGE / page).read_text()))
    text = (PAGE / script).read_text()
    asked = set(re.findall(r'(?:element|getElementById)\("(\w+)"\)', text))
    for names in re.findall(r"= \[([^\]]*)\]\.map\(element\)", text):
        asked |= set(re.findall(r'"(\w+)"', names))
    assert asked and asked <= there


def browse(url: str) -> str:
    """The page as a browser has it in the end, as HTML."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_a_browser_shows_the_hits_of_an_address_that_was_shared(served: Served) -> None:
    listed = served.get("/objects?count=1").json()["objects"][0]["object_id"]
    found = served.similar(listed, "?metric=cosine&k=10").json()["similarImages"]
    shown = browse(f"{served.origin}/?id={listed}&k=10")
    assert re.findall(r"<b>(.*?)</b>", shown) == [f"{one['rank']} · {one['similarity']:.3f}" for one in found]
    assert re.findall(r'<a href="/\?id=([^&"]*)', shown) == [one["objectId"] for one in found]
    assert "10 look-alikes" in shown and f"<title>{listed} · ruiji</title>" in shown
    assert "40 objects." in browse(served.origin)
    assert "the gallery has no object nobody" in browse(f"{served.origin}/?id=nobody")
    assert "Nothing is as similar" in browse(f"{served.origin}/?id={listed}&min=1")


def test_a_browser_is_told_what_is_not_there(ruiji: Ruiji) -> None:
    write_served_gallery(ruiji)
    ruiji.environment |= {"RUIJI_MEDIA_DIR": "", "RUIJI_MODEL": ""}
    served = start(ruiji)
    shown = browse(served.origin)
    assert "start the service with --model" in shown and re.search(r'id="choose" hidden', shown)
    listed = served.get("/objects?count=1").json()["objects"][0]["object_id"]
    assert "<img" not in browse(f"{served.origin}/?id={listed}")


def test_a_browser_asks_for_the_token(ruiji: Ruiji, tmp_path: Path) -> None:
    write_served_gallery(ruiji)
    file = tmp_path / "token"
    file.write_text("correct-horse-battery")
    served = start(ruiji, "--web-token-file", str(file))
    assert '<input id="token"' in browse(served.origin)
