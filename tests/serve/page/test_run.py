"""The Run page in a real browser: a real run, from before it begins to the retry of a picture that was mended."""

import re
from pathlib import Path

from playwright.sync_api import Page, expect

from pipeline.plans.files import open_plan
from pipeline.plans.stops import stop_plan
from tests.chaos.harness import redis_server
from tests.factories import Ruiji, picture, pictures
from tests.serve.conftest import start, write_served_gallery
from tests.serve.page.conftest import Watch, check_accessible, check_fits

COUNT = 300
SLOW_MS = 120_000


def figure(page: Page, name: str) -> str:
    """One of the figures, as it is shown."""
    return page.locator("#figures div", has=page.get_by_text(name, exact=True)).locator("dd").inner_text()


def test_a_run_is_followed_live_and_what_failed_is_tried_again(
    ruiji: Ruiji, redis_url: str, page: Page, watch: Watch
) -> None:
    # Large ones, so that there is something to follow.
    paths = pictures(ruiji.media, COUNT, (1600, 1200), distinct=6)
    broken = ruiji.media / paths[20]
    broken.unlink()
    broken.write_text("<html>")
    ruiji.features.mkdir()
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "100"}
    served = start(ruiji)
    page.goto(f"{served.origin}/run")
    expect(page.locator("#beside")).to_contain_text("nothing was enqueued there")
    check_accessible(page)

    ruiji("enqueue")
    expect(page.locator("#said")).to_have_text("Nobody is at work.")
    assert figure(page, "Pending") == str(COUNT)
    worker = ruiji.start("worker", "--processes", "1")
    expect(page.locator("#said")).to_have_text("The run is going on.", timeout=SLOW_MS)
    expect(page.locator("#workers li").first).to_contain_text("embed", timeout=SLOW_MS)
    expect(page.locator("#figures")).to_contain_text("Time left", timeout=SLOW_MS)
    assert 0 < int(figure(page, "Done")) < COUNT
    assert 0 < int(page.locator("#bar").get_attribute("aria-valuenow") or 0) < COUNT
    assert re.match(r"\d+ % · Run", page.title())
    expect(page.locator("#retry")).to_be_hidden()
    check_accessible(page)

    expect(page.locator("#said")).to_have_text(f"The run is finished; 1 of {COUNT} objects failed.", timeout=SLOW_MS)
    # Why the worker does nothing now.
    expect(page.locator("#workers .state").first).to_contain_text("idle: ")
    expect(page.locator("#failed")).to_have_text("1 failed object")
    failed = page.locator("#failures li")
    expect(failed).to_have_count(1)
    expect(failed).to_contain_text("undecodable")
    expect(failed).to_contain_text(paths[20])
    assert failed.locator("img").evaluate("(image) => image.decode().then(() => image.naturalWidth > 0)")
    check_accessible(page)

    picture(broken, 20)
    page.locator("#retry").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#retried")).to_have_text("1 object is tried again.", timeout=SLOW_MS)
    expect(page.locator("#said")).to_have_text(
        f"The run is finished: all {COUNT} objects are in the gallery.", timeout=SLOW_MS
    )
    expect(failed).to_have_count(0)
    expect(page.locator("#retry")).to_be_hidden()

    # The service goes, and comes again.
    served.process.terminate()
    expect(page.locator("#said")).to_contain_text("does not answer", timeout=SLOW_MS)
    watch.allow("ERR_(CONNECTION_REFUSED|INCOMPLETE_CHUNKED_ENCODING|CONNECTION_RESET|EMPTY_RESPONSE)")
    served.process.wait(180)
    worker.terminate()
    start(ruiji, "--port", str(served.port))
    expect(page.locator("#said")).to_have_text(
        f"The run is finished: all {COUNT} objects are in the gallery.", timeout=SLOW_MS
    )


def test_a_run_whose_redis_is_killed_or_stands_still_says_so_and_goes_on(
    ruiji: Ruiji, tmp_path: Path, page: Page
) -> None:
    pictures(ruiji.media, COUNT, (1600, 1200), distinct=6)
    ruiji.features.mkdir()
    with redis_server(tmp_path / "redis") as server:
        ruiji.environment = {"RUIJI_REDIS_URL": server.url, "RUIJI_SHARD_ROWS": "100"}
        served = start(ruiji)
        ruiji("enqueue")
        page.goto(f"{served.origin}/run")
        worker = ruiji.start("worker", "--processes", "1")
        said, beside = page.locator("#said"), page.locator("#beside")
        expect(said).to_have_text("The run is going on.", timeout=SLOW_MS)

        server.kill()
        expect(said).to_have_text("Redis does not answer: the run waits for it.", timeout=SLOW_MS)
        expect(beside).to_contain_text("counted from the disk")
        expect(beside).to_contain_text("Connection refused")
        # What is in hand, and how fast it goes, is not known then.
        expect(page.locator("#figures dt")).to_have_text(["Done", "Failed", "Pending", "Objects"])
        assert int(figure(page, "Done")) + int(figure(page, "Pending")) == COUNT
        check_accessible(page)
        server.start()
        expect(said).to_have_text("The run is going on.", timeout=SLOW_MS)
        expect(beside).to_have_text("")

        server.freeze()
        expect(said).to_have_text("Redis or the disk does not answer. Trying again…", timeout=SLOW_MS)
        expect(page.locator("#progress")).to_have_class("stale")
        server.thaw()
        expect(said).to_have_text("The run is going on.", timeout=SLOW_MS)
        expect(said).to_have_text(f"The run is finished: all {COUNT} objects are in the gallery.", timeout=SLOW_MS)
        expect(page.locator("#progress")).not_to_have_class("stale")
        worker.terminate()
        worker.wait(60)


def test_without_redis_a_run_is_counted_from_the_disk_and_its_failures_come_in_parts(
    ruiji: Ruiji, page: Page, phone: Page
) -> None:
    paths = pictures(ruiji.media, 70)
    for path in paths[10:]:
        (ruiji.media / path).unlink()
    ruiji("run", "--workers", "1", code=3)
    served = start(ruiji)
    page.goto(f"{served.origin}/run")
    expect(page.locator("#said")).to_have_text("The run is finished; 60 of 70 objects failed.")
    expect(page.locator("#beside")).to_contain_text("Counted from the disk (no Redis")
    expect(page.locator("#beside")).to_contain_text("ruiji retry")
    expect(page.locator("#retry")).to_be_hidden()
    expect(page.locator("#failures li")).to_have_count(48)
    expect(page.locator("#part")).to_have_text("1 to 48 of 60")
    page.locator("#after").press("Enter")
    expect(page.locator("#failures li")).to_have_count(12)
    expect(page.locator("#after")).to_be_disabled()
    page.locator("#before").press("Enter")
    expect(page.locator("#part")).to_have_text("1 to 48 of 60")

    phone.goto(f"{served.origin}/run")
    expect(phone.locator("#failures li")).to_have_count(48)
    check_fits(phone)
    check_accessible(phone)


def test_why_a_run_was_stopped_is_shown(ruiji: Ruiji, redis_url: str, page: Page) -> None:
    pictures(ruiji.media, 6)
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url}
    ruiji("enqueue")
    plan = open_plan(ruiji.gallery)
    assert plan is not None
    stop_plan(plan, "the model gives 13 values, not 12")
    page.goto(f"{start(ruiji).origin}/run")
    expect(page.locator("#said")).to_have_text("The run was stopped.")
    expect(page.locator("#beside")).to_contain_text("13 values, not 12")


def test_of_a_gallery_that_ruiji_did_not_make_no_run_is_known(ruiji: Ruiji, page: Page) -> None:
    write_served_gallery(ruiji)
    for file in (*ruiji.gallery.glob("*.json"), *ruiji.gallery.glob("*.paths.txt")):
        Path(file).unlink()
    page.goto(f"{start(ruiji).origin}/run")
    expect(page.locator("#beside")).to_contain_text("nothing was enqueued there")
    expect(page.locator("#progress")).to_be_hidden()
