"""A browser, and pages in it that may report no errors and ask other sites for nothing."""

import math
import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
PATIENCE = 20_000  # milliseconds


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI is root
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`visit(url, width=1280, height=800, **context)`: the page of a server in a new window."""
    contexts, troubles = [], list[str]()
    expect.set_options(timeout=PATIENCE)

    def opened(url: str, width: int = 1280, height: int = 800, **options) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda line: troubles.append(line.text) if is_trouble(line) else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: request.url.startswith(url) or troubles.append(request.url))
        page.goto(url)
        expect(page.locator("#model")).to_have_text("tiny")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


def is_trouble(line) -> bool:
    """Whether a line of the console is one; Chromium writes a line for every answer that is an error, and for none."""
    return line.type in ("error", "warning") and not line.text.startswith("Failed to load resource")


def percent(logprob: float) -> str:
    """A probability as the page writes it."""
    share = 100 * math.exp(logprob)
    return "< 0.01 %" if share < 0.005 else f"{share:.{2 if share < 1 else 1}f} %"


def choose(page: Page, **values: object) -> None:
    """Fill in settings."""
    for name, value in values.items():
        box = page.locator(f"#{name}")
        if name == "n":
            box.select_option(str(value))
        else:
            box.fill(str(value))


def written(page: Page, count: int = 1) -> list[str]:
    """What the results say without their prompt, once all are complete."""
    expect(page.locator(".result .state", has_text="token")).to_have_count(count)
    texts = page.locator(".result .text").all()
    return [
        text.evaluate("each => [...each.children].slice(1).map(span => span.textContent).join('')") for text in texts
    ]
