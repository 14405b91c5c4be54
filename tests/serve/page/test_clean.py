"""The Clean up page in a real browser."""

import json
import os
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Request, Route, expect

from tests.factories import Ruiji, wait_until
from tests.search.galleries import write_article_shard
from tests.serve.cleaning import add_rows, compare, comparers, draw, look_alikes, write_look_alikes
from tests.serve.conftest import Served, start
from tests.serve.page.conftest import Watch, check_accessible, check_fits

#: Milliseconds; the process that compares has a low priority.
COMPARED_MS = 120_000


def open_clean(served: Served, page: Page, query: str = "") -> None:
    """The page with its first group."""
    page.goto(f"{served.origin}/clean{query}")
    expect(page.locator("#group")).to_be_visible()


def counts(page: Page, decided: int, groups: int) -> None:
    expect(page.locator("#counts")).to_contain_text(f"{decided} of {groups} groups decided")


def standing(served: Served) -> Any:
    return served.get("/decisions/status").json()


def first_of(page: Page) -> str:
    return page.locator("#members .path").first.inner_text()


def test_a_hundred_groups_are_decided_by_keyboard_undone_and_stay_decided(ruiji: Ruiji, page: Page) -> None:
    write_look_alikes(ruiji, 103)
    served = start(ruiji)
    page.goto(f"{served.origin}/clean")
    expect(page.locator("#notice-text")).to_contain_text("206 pictures will be compared")
    page.locator("#act").click()
    expect(page.locator("#group")).to_be_visible(timeout=COMPARED_MS)
    counts(page, 0, 103)
    assert (first_of(page), page.locator("#members .fact").first.inner_text()) == (
        "000/000-large.jpg",
        "Best: most pixels (128 x 96)",
    )
    # An option can be changed with the keyboard, step by step.
    page.focus("#threshold")
    for value in ("0.96", "0.97"):
        page.keyboard.press("ArrowRight")
        expect(page.locator("#threshold")).to_have_value(value)
        expect(page).to_have_url(re.compile(f"threshold={value}"))
        expect(page.locator("#group")).to_be_visible(timeout=COMPARED_MS)
    expect(page.locator("#threshold")).to_be_focused()
    open_clean(served, page)
    # A key that is held down decides once.
    for _ in range(3):
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    counts(page, 1, 103)
    page.keyboard.press("z")
    # One after the other.
    for key in ["Enter"] * 60 + ["d"] * 20 + ["s"] * 20:
        page.keyboard.press(key)
    counts(page, 100, 103)
    wait_until(lambda: standing(served)["decided"] == 100, what="the decisions")
    assert [standing(served)[verdict] for verdict in ("same", "different", "skip")] == [60, 20, 20]
    told = json.loads(ruiji("duplicates", "status", "--json").stdout)
    assert (told["open"], told["decided"], told["to_remove"]) == (3, 100, 60)
    freed = sum((ruiji.media / f"{n:03d}/{n:03d}-small1.jpg").stat().st_size for n in range(60))
    assert told["frees_bytes"] == freed
    expect(page.locator("#counts")).to_contain_text(f"{freed / 1000:.1f} kB would be freed")
    for _ in range(100):
        page.keyboard.press("z")
    counts(page, 0, 103)
    wait_until(lambda: standing(served)["decided"] == 0, what="the undoing")
    assert first_of(page) == "000/000-large.jpg"
    # All at once.
    page.keyboard.press("Shift+Enter")
    counts(page, 100, 103)
    page.keyboard.press("z")
    counts(page, 0, 103)
    page.keyboard.press("Shift+Enter")
    wait_until(lambda: standing(served)["same"] == 100, what="the decisions")
    page.reload()
    counts(page, 100, 103)
    assert first_of(page) == "100/100-large.jpg"
    # What was decided before can be undone where it is listed.
    page.locator("#show").select_option("decided")
    rows = page.locator("#decisions li")
    expect(rows).to_have_count(100)
    expect(rows.first).to_contain_text("Keep 099/099-large.jpg, remove 099/099-small1.jpg")
    rows.first.get_by_role("button").click()
    expect(rows).to_have_count(99)
    page.locator("#show").select_option("open")
    counts(page, 99, 103)
    assert first_of(page) == "099/099-large.jpg"
    assert not [path for path in ruiji.media.rglob("*-small1.jpg") if not path.is_file()]


def test_what_another_page_decided_is_not_overruled_and_choices_stay(
    ruiji: Ruiji, page: Page, new_page: Callable[..., Page], watch: Watch
) -> None:
    write_look_alikes(ruiji, 5)
    served = start(ruiji)
    compare(served)
    other = new_page()
    for each in (page, other):
        open_clean(served, each)
    # In one, the small picture of the second group is kept; in the other, the first group is decided.
    page.keyboard.press("n")
    page.keyboard.press("2")
    page.keyboard.press("p")
    other.keyboard.press("d")
    wait_until(lambda: standing(served)["different"] == 1, what="the decision")
    page.keyboard.press("Shift+Enter")
    expect(page.locator("#said")).to_contain_text(
        "Not recorded: somebody has decided about 000-large.jpg and 000-small1.jpg since they were shown: different, 20"
    )
    watch.expect("409 .*/decisions")
    counts(page, 1, 5)
    assert first_of(page) == "001/001-large.jpg"
    expect(page.locator("#members .mark")).to_have_text(["Remove", "Keep"])
    page.keyboard.press("Shift+Enter")
    wait_until(lambda: standing(served)["same"] == 4, what="the decisions")
    assert b"001-large.jpg" in served.get("/decisions/files").body
    # Undone in the list of the other, and decided anew: the first page takes nothing back that it does not know.
    other.locator("#show").select_option("decided")
    expect(other.locator("#decisions li")).to_have_count(5)
    other.locator("#decisions li", has_text="004").get_by_role("button").click()
    expect(other.locator("#said")).to_have_text("Undone. The group is open again.")
    open_clean(served, other)
    other.keyboard.press("s")
    wait_until(lambda: standing(served)["skip"] == 1, what="the decision")
    page.keyboard.press("z")
    expect(page.locator("#said")).to_contain_text("Not recorded: somebody has decided about 004-large.jpg")
    counts(page, 5, 5)
    expect(page.locator("#undo")).to_be_disabled()
    assert standing(served)["skip"] == 1 and standing(served)["same"] == 3
    # So does a row of the list.
    page.locator("#show").select_option("decided")
    expect(page.locator("#decisions li")).to_have_count(5)
    ruiji("duplicates", "undo", "003-large.jpg")
    ruiji("duplicates", "decide", stdin='{"decision": "different", "objects": ["003-large.jpg", "003-small1.jpg"]}')
    page.locator("#decisions li", has_text="003").get_by_role("button").click()
    expect(page.locator("#said")).to_contain_text("somebody has decided about 003-large.jpg")
    expect(page.locator("#decisions li").first).to_contain_text("Not duplicates003/003-large.jpg")


def test_letters_can_be_switched_off_as_keys(ruiji: Ruiji, page: Page) -> None:
    write_look_alikes(ruiji, 3)
    served = start(ruiji)
    compare(served)
    open_clean(served, page)
    page.locator("#letters").uncheck()
    expect(page.locator("#different kbd")).to_be_hidden()
    for _ in range(2):
        for key in "dsnx2c":
            page.keyboard.press(key)
        expect(page.locator("#about")).to_contain_text("Group 1 of 3")
        expect(page.locator("#members .mark")).to_have_text(["Keep", "Remove"])
        expect(page.locator("dialog[open]")).to_have_count(0)
        # It is remembered.
        open_clean(served, page)
        expect(page.locator("#letters")).not_to_be_checked()
    page.locator("#compare").click()
    page.keyboard.press("f")
    expect(page.locator("dialog[open] figure")).to_have_count(2)
    expect(page.locator("dialog[open] figure >> nth=1")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Enter")
    counts(page, 1, 3)
    page.locator("#letters").check()
    page.keyboard.press("d")
    page.locator("#about").click()
    page.keyboard.press("d")
    counts(page, 2, 3)


def test_pictures_are_chosen_compared_and_listed(ruiji: Ruiji, page: Page) -> None:
    write_look_alikes(ruiji, 4, members=3)
    served = start(ruiji)
    compare(served)
    open_clean(served, page)
    marks = page.locator("#members .mark")
    expect(marks).to_have_text(["Keep", "Remove", "Remove"])
    page.keyboard.press("2")
    expect(marks).to_have_text(["Remove", "Keep", "Remove"])
    page.keyboard.press("ArrowRight")
    page.keyboard.press("x")
    expect(marks).to_have_text(["Remove", "Keep", "Keep"])
    expect(page.locator("#accept")).to_contain_text("Keep 2, remove 1")
    # Side by side, and in turn in one place.
    page.keyboard.press("c")
    figures = page.locator("dialog[open] figure")
    expect(figures).to_have_count(2)
    page.keyboard.press("f")
    expect(figures.nth(1)).to_be_hidden()
    first = figures.nth(0).locator("img")
    box = first.bounding_box()
    page.keyboard.press("Space")
    expect(figures.nth(0)).to_be_hidden()
    second = figures.nth(1).locator("img")
    assert second.bounding_box() == box and second.get_attribute("alt") != "000-small1.jpg"
    page.keyboard.press("Escape")
    expect(page.locator("dialog[open]")).to_have_count(0)
    page.keyboard.press("Enter")
    counts(page, 1, 4)
    # With the mouse: another picture is kept, and that is accepted by key.
    page.locator(".shot").nth(2).click()
    expect(marks).to_have_text(["Remove", "Remove", "Keep"])
    page.keyboard.press("Enter")
    # None is kept: nothing to accept.
    page.keyboard.press("x")
    expect(page.locator("#accept")).to_be_disabled()
    page.keyboard.press("Enter")
    page.keyboard.press("n")
    expect(page.locator("#about")).to_contain_text("Group 2")
    page.keyboard.press("p")
    expect(page.locator("#about")).to_contain_text("Group 1")
    wait_until(lambda: standing(served)["same"] == 2, what="the decisions")
    groups = served.get("/duplicates").json()["groups"]
    assert [group["name"] for group in groups] == [6, 9]
    kept = ruiji("duplicates", "list", "--keep").stdout.splitlines()
    assert [Path(line).name for line in kept] == ["000-small1.jpg", "001-small2.jpg"]
    page.locator("#list").click()
    expect(page.locator("#listing")).to_contain_text("ruiji deletes nothing.")
    for form, option in (("paths", "paths"), ("csv", "csv"), ("jsonl", "jsonl")):
        page.locator("#format").select_option(form)
        with page.expect_download() as downloading:
            page.locator("#download").click()
        text = Path(downloading.value.path()).read_text()
        assert text == ruiji("duplicates", "list", "--remove", "--format", option).stdout
        assert downloading.value.suggested_filename.startswith("ruiji-remove.")
        expect(page.locator("#read")).to_have_text("3 files listed.")


def test_files_that_are_gone_are_told_from_those_that_are_left_out(ruiji: Ruiji, page: Page) -> None:
    write_look_alikes(ruiji, 4)
    served = start(ruiji)
    compare(served)
    open_clean(served, page)
    page.keyboard.press("Shift+Enter")
    wait_until(lambda: standing(served)["same"] == 4, what="the decisions")
    for n in (0, 1):
        (ruiji.media / f"00{n}/00{n}-small1.jpg").unlink()
    (ruiji.media / "002/002-small1.jpg").write_bytes(b"edited")
    page.locator("#list").click()
    page.locator("#download").click()
    left_out = "1 file left out: choose “left out” for the reasons."
    expect(page.locator("#read")).to_have_text(f"1 file listed. {left_out} 2 files are gone already.")


def test_any_number_of_groups_without_files_is_passed_over(ruiji: Ruiji, page: Page) -> None:
    # More than the service looks through for two answers.
    write_look_alikes(ruiji, 431, pictures=False)
    served = start(ruiji)
    compare(served)
    for n in range(430):
        for name in ("large", "small1"):
            (ruiji.media / f"{n:03d}/{n:03d}-{name}.jpg").unlink()
    open_clean(served, page)
    assert first_of(page) == "430/430-small1.jpg"
    left_out = "430 groups left out: none of the files is there."
    expect(page.locator("#said")).to_contain_text(left_out)
    (ruiji.media / "430/430-large.jpg").unlink()
    (ruiji.media / "430/430-small1.jpg").unlink()
    page.reload()
    expect(page.locator("#notice-title")).to_have_text("No group has files any more")
    expect(page.locator("#notice-text")).to_contain_text(left_out.replace("430", "431"))


def test_a_large_group_is_shown_in_parts_and_what_fails_is_asked_for_once(
    ruiji: Ruiji, page: Page, watch: Watch
) -> None:
    write_look_alikes(ruiji, 2)
    served = start(ruiji)
    compare(served)
    asked: list[str] = []

    def answer(route: Route, request: Request) -> None:
        if "after=-1" not in request.url:
            asked.append(request.url)
            return route.abort()
        found = route.fetch().json()
        found["groups"][0]["members"] *= 150
        found["next"] = 3
        return route.fulfill(json=found)

    page.route("**/duplicates?*", answer)
    open_clean(served, page)
    expect(page.locator("#said")).to_contain_text("The service does not answer")
    shots = page.locator(".shot")
    expect(shots).to_have_count(24)
    page.get_by_text("Show 240 more of 276").click()
    expect(shots).to_have_count(264)
    page.get_by_text("Show 36 more of 36").click()
    expect(shots).to_have_count(300)
    # One request when the groups were drawn, and one for each of the two steps at most.
    assert 1 <= len(asked) <= 3
    watch.expect("net::ERR_FAILED .*/duplicates")


def test_what_is_in_a_folder_can_be_kept(ruiji: Ruiji, page: Page, watch: Watch) -> None:
    # Its name needs quotes in a rule.
    paths = ["a/large.jpg", 'best, "of"/small.jpg']
    for path, side in zip(paths, (96, 48), strict=True):
        draw(ruiji.media / path, 1, side)
    add_rows(ruiji, paths, look_alikes(1))
    served = start(ruiji)
    compare(served)
    open_clean(served, page)
    expect(page.locator("#said")).to_contain_text("Nothing is deleted here")
    expect(page.locator("#prefix")).to_be_hidden()
    assert first_of(page) == "a/large.jpg"
    page.select_option("#keep", "path")
    page.fill("#prefix", 'best, "of"/')
    page.press("#prefix", "Enter")
    expect(page.locator("#members .fact").first).to_have_text('Best: below best, "of"/')
    assert first_of(page) == 'best, "of"/small.jpg'
    page.reload()
    expect(page.locator("#prefix")).to_have_value('best, "of"/')
    expect(page.locator("#members .path").first).to_have_text('best, "of"/small.jpg')
    page.fill("#prefix", "nowhere/")
    page.press("#prefix", "Enter")
    expect(page.locator("#notice-text")).to_contain_text("no path of the gallery begins with it")
    watch.expect("409 .*/duplicates")


def test_what_is_wrong_is_said_and_nothing_is_taken_for_recorded(ruiji: Ruiji, page: Page, watch: Watch) -> None:
    write_look_alikes(ruiji, 3)
    served = start(ruiji)
    file = ruiji.features / "decisions.jsonl"
    page.goto(f"{served.origin}/clean")
    page.locator("#act").click()
    wait_until(lambda: comparers(served), what="the comparison")
    os.kill(comparers(served)[0], signal.SIGSTOP)
    expect(page.locator("#notice-title")).to_have_text("Comparing all pictures…")
    os.kill(comparers(served)[0], signal.SIGKILL)
    expect(page.locator("#notice-title")).to_have_text("The comparison ended early")
    expect(page.locator("#notice-text")).to_contain_text("SIGKILL")
    page.locator("#act").click()
    expect(page.locator("#group")).to_be_visible(timeout=COMPARED_MS)

    # A full disk: the groups come back.
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    page.keyboard.press("Enter")
    page.keyboard.press("d")
    expect(page.locator("#said")).to_contain_text(f"Not recorded: cannot write {file}")
    watch.expect("503 .*/decisions")
    counts(page, 0, 3)
    assert first_of(page) == "000/000-large.jpg"
    expect(page.locator("#undo")).to_be_disabled()
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    page.keyboard.press("Enter")
    wait_until(lambda: standing(served)["same"] == 1, what="the decision")

    sound = file.read_bytes()
    file.write_bytes(sound + b"{}\n")
    page.reload()
    expect(page.locator("#notice-text")).to_contain_text(f"of {file} is damaged")
    watch.expect("503 .*/decisions/status")
    expect(page.locator("#group")).to_be_hidden()
    file.write_bytes(sound)
    page.locator("#act").click()
    counts(page, 1, 3)
    # Filters that leave nothing, and the end of all groups.
    page.locator("#contains").fill("nowhere")
    page.locator("#contains").press("Enter")
    expect(page.locator("#notice-title")).to_have_text("No group is like that")
    page.locator("#contains").fill("002")
    page.locator("#contains").press("Enter")
    expect(page.locator("#about")).to_have_text("Group 1 of 1 open group · 2 pictures")
    assert first_of(page) == "002/002-large.jpg"
    open_clean(served, page)
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator("#notice-title")).to_have_text("All groups are decided")
    expect(page.locator("#notice-title")).to_be_focused()
    # One that is hidden, and asked for with the keyboard's undo.
    page.keyboard.press("z")
    counts(page, 2, 3)
    ruiji.media.rename(ruiji.media.parent / "away")
    page.reload()
    expect(page.locator("#notice-text")).to_contain_text("there is no media folder")
    watch.expect("409 .*/decisions/status")


def test_without_media_folder_there_are_names_and_what_is_missing(ruiji: Ruiji, page: Page) -> None:
    write_look_alikes(ruiji, 2)
    ruiji.environment |= {"RUIJI_MEDIA_DIR": ""}
    served = start(ruiji)
    compare(served)
    open_clean(served, page)
    expect(page.locator("#said")).to_contain_text("start the service with --media-dir")
    expect(page.locator("img")).to_have_count(0)
    expect(page.locator("#members .path")).to_have_text(["000/000-large.jpg", "000/000-small1.jpg"])
    expect(page.locator("#list")).to_be_disabled()
    page.keyboard.press("d")
    counts(page, 1, 2)
    wait_until(lambda: standing(served)["different"] == 1, what="the decision")


def test_a_gallery_that_knows_no_paths_is_cleaned_up_by_names(ruiji: Ruiji, page: Page) -> None:
    ruiji.media.mkdir()
    write_article_shard(ruiji.gallery, 0, look_alikes(2), ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    served = start(ruiji)
    compare(served)
    open_clean(served, page)
    expect(page.locator("#said")).to_contain_text("this gallery has no gallery.json and does not know paths")
    expect(page.locator("#members .path")).to_have_text(["a.jpg", "b.jpg"])
    expect(page.locator("#keep")).to_be_disabled()
    page.keyboard.press("d")
    counts(page, 1, 2)
    expect(page.locator("#list")).to_be_disabled()


def test_it_is_accessible_and_works_with_a_finger(
    ruiji: Ruiji, new_page: Callable[..., Page], page: Page, phone: Page
) -> None:
    write_look_alikes(ruiji, 5, members=2)
    served = start(ruiji)
    page.goto(f"{served.origin}/clean")
    expect(page.locator("#act")).to_be_visible()
    check_accessible(page)
    compare(served)
    open_clean(served, page)
    check_accessible(page)
    check_fits(page)
    # What has the focus is not below the header or the bar, also where the window is low.
    page.set_viewport_size({"width": 640, "height": 400})
    for name in ("#identical", ".card-keys button >> nth=0", "#next"):
        page.locator(name).focus()
        box = page.locator(name).bounding_box()
        top, bottom = page.locator("body > header").bounding_box(), page.locator("#actions").bounding_box()
        assert box and top and bottom
        assert top["y"] + top["height"] <= box["y"] and box["y"] + box["height"] <= bottom["y"], name
    page.set_viewport_size({"width": 1280, "height": 800})
    page.keyboard.press("c")
    expect(page.locator("dialog[open]")).to_be_visible()
    check_accessible(page)
    page.keyboard.press("Escape")

    open_clean(served, phone)
    check_accessible(phone)
    check_fits(phone)
    expect(phone.locator("#tools")).to_be_hidden()
    phone.locator("#accept").tap()
    counts(phone, 1, 5)
    phone.locator("#undo").tap()
    counts(phone, 0, 5)
    phone.locator(".shot").nth(1).tap()
    expect(phone.locator("#members .mark")).to_have_text(["Remove", "Keep"])
    phone.locator("#accept").tap()
    phone.locator("#different").tap()
    phone.locator("#skip").tap()
    counts(phone, 3, 5)
    wait_until(lambda: standing(served)["decided"] == 3, what="the decisions")
    phone.locator("#list").tap()
    check_fits(phone)
    check_accessible(phone)
    page.goto(f"{served.origin}/clean?show=decided")
    expect(page.locator("#decisions li")).to_have_count(3)
    check_accessible(page)
    check_fits(page)
    page.locator("#decisions button").first.press("Enter")
    expect(page.locator("#decisions li")).to_have_count(2)
    expect(page.locator("#decisions button").first).to_be_focused()
