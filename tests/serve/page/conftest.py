"""A real browser on the pages of a real service, and what every page must hold."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright._impl._driver import compute_driver_executable
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    # Containers have little of it, and a page without shared memory crashes.
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: Milliseconds that a page may take to get somewhere; generous, because the machine may be busy.
_PATIENCE_MS = 60_000
expect.set_options(timeout=_PATIENCE_MS)
PHONE = {"width": 390, "height": 844}


def chromium(own: str) -> str | None:
    """Where a Chromium is: the system's, else the one that Playwright installs; None: there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return found or (own if Path(own).is_file() else None)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One browser for all tests of the pages."""
    node, _ = compute_driver_executable()
    started = subprocess.run([node, "--version"], capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"Playwright's driver does not start: run  make test-page  ({started.stderr.strip()})")
    with sync_playwright() as playwright:
        found = chromium(playwright.chromium.executable_path)
        if found is None:
            pytest.skip("no Chromium is installed: run  make test-page, which installs one")
        browser = playwright.chromium.launch(executable_path=found, args=_FLAGS, timeout=_PATIENCE_MS)
        yield browser
        browser.close()


@dataclass
class Watch:
    """What a browser complained of: errors of scripts and of the console, what the policy of the page forbids.

    A test whose page has to complain says so with `expect`.
    """

    complaints: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)

    def expect(self, pattern: str) -> None:
        """Let pass what matches; at least one complaint must."""
        self.expected.append(pattern)

    def listen(self, context: BrowserContext) -> None:
        """Note what the pages of a context complain of."""
        context.on("console", self._console)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.text} ({message.location.get('url')})")

    def allow(self, pattern: str) -> None:
        """Something is complained of or not, depending on what comes first."""
        self.allowed.append(pattern)

    def check(self) -> None:
        """Fail if there was anything but what was expected, or not that."""
        left = [
            one
            for one in self.complaints
            if not any(re.search(pattern, one) for pattern in [*self.expected, *self.allowed])
        ]
        assert not left, f"the browser complains: {left}"
        for pattern in self.expected:
            assert any(re.search(pattern, one) for one in self.complaints), f"no complaint was like {pattern}"


@pytest.fixture
def watch() -> Watch:
    """What the browser complains of in this test."""
    return Watch()


@pytest.fixture
def new_page(browser: Browser, watch: Watch) -> Iterator[Callable[..., Page]]:
    """Opens pages, each in a fresh profile; the options are those of a Playwright context."""
    contexts: list[BrowserContext] = []

    def open_page(**options: object) -> Page:
        settings = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce", **options}
        context = browser.new_context(**settings)  # type: ignore[arg-type]
        contexts.append(context)
        context.set_default_timeout(_PATIENCE_MS)
        watch.listen(context)
        return context.new_page()

    yield open_page
    for context in contexts:
        context.close()
    watch.check()


@pytest.fixture
def page(new_page: Callable[..., Page]) -> Page:
    """A page; the test fails if its browser complains of anything."""
    return new_page()


@pytest.fixture
def phone(new_page: Callable[..., Page]) -> Page:
    """The same on a telephone."""
    return new_page(viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)


def check_accessible(page: Page) -> None:
    """axe finds no serious and no critical fault in what is shown, light and dark."""
    # What differs between the two are colours.
    for scheme, options in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page, options={"resultTypes": ["violations"], **options}).response["violations"]
        faults = [
            f"{scheme}: {one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes']]}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert not faults, "\n".join(faults)
    page.emulate_media(color_scheme="light")


def check_fits(page: Page) -> None:
    """Nothing hangs over the side of the window, and what is pressed is large enough for a finger."""
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], f"the page is {wide[0]} pixels wide, its window {wide[1]}"
    small = page.evaluate(
        """[...document.querySelectorAll("button, select, input, a[href]")].filter((one) => {
             const box = (one.closest("label") ?? one).getBoundingClientRect();
             return one.checkVisibility() && !one.closest("p") && box.width > 0 && (box.width < 24 || box.height < 24);
           }).map((one) => one.outerHTML.slice(0, 200))"""
    )
    assert not small, f"too small for a finger: {small}"
    cut = page.evaluate(
        """[...document.querySelectorAll("button, .button")]
             .filter((one) => one.checkVisibility() && one.scrollWidth > one.clientWidth + 1)
             .map((one) => `${one.scrollWidth} > ${one.clientWidth}: ${one.outerHTML.slice(0, 200)}`)"""
    )
    assert not cut, f"words that are cut off: {cut}"
