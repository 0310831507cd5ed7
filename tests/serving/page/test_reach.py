"""The page by keyboard alone, on a phone, in light and dark; and conversations."""

import pytest
from playwright.sync_api import expect

from tests.serving.page.conftest import choose, written

pytestmark = pytest.mark.slow

NAMELESS = """[...document.querySelectorAll("input, select, textarea, button")].filter(each =>
    !each.labels?.length && !each.textContent.trim() && !each.getAttribute("aria-label")).map(each => each.id)"""
FOCUSED = "document.activeElement.id || document.activeElement.className || document.activeElement.value"
OUTLINE = "getComputedStyle(document.activeElement).outlineStyle"


def test_keyboard_alone(served, visit):
    url, _ = served
    page = visit(url)
    assert page.evaluate(NAMELESS) == []
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("Once upon")
    stops = []
    for _ in range(40):
        page.keyboard.press("Tab")
        if (now := page.evaluate(FOCUSED)) == "max_tokens":
            page.keyboard.type("12")
        stops.append(now)
        if now == "defaults":
            break
        assert page.evaluate(OUTLINE) != "none", now
    settings = ["max_tokens", "n", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed"]
    assert [each for each in stops if each in settings] == settings and "generate" in stops
    page.keyboard.press("Control+Enter")
    written(page)
    page.keyboard.press("Tab")  # the first token; the arrow keys lead to the others
    tokens = page.locator(".token")
    expect(tokens.first).to_be_focused()
    tooltip = page.get_by_role("tooltip")
    expect(tooltip).to_be_visible()
    expect(tokens.first).to_have_attribute("aria-describedby", "popover")
    for key, number in (("ArrowRight", 1), ("End", tokens.count() - 1), ("ArrowLeft", tokens.count() - 2), ("Home", 0)):
        page.keyboard.press(key)
        expect(tokens.nth(number)).to_be_focused()
        expect(tooltip).to_be_visible()
    page.keyboard.press("Escape")
    expect(tooltip).to_be_hidden()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Copy"
    page.keyboard.press("Tab")
    text = written(page)[0]
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_have_value(f"Once upon{text}")
    expect(page.locator("#prompt")).to_be_focused()


def test_copy(served, visit):
    url, _ = served
    page = visit(url, permissions=["clipboard-read", "clipboard-write"])
    choose(page, prompt="Once", max_tokens=8)
    page.keyboard.press("Control+Enter")
    (text,) = written(page)
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_a_phone_needs_no_sideways_scrolling(served, visit):
    url, _ = served
    page = visit(url, width=360, height=740, has_touch=True, is_mobile=True)
    assert page.locator("#settings").get_attribute("open") is None
    page.locator("#settings summary").tap()
    choose(page, prompt="x" * 90, max_tokens=30, n=4)
    page.get_by_role("button", name="Generate").tap()
    written(page, 4)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for token in (page.locator(".token").first, page.locator(".token").last):
        token.tap()
        box = page.get_by_role("tooltip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and 0 <= box["y"] <= 740
    small = (
        "[...document.querySelectorAll('button')].filter(each => each.offsetHeight && each.offsetHeight < 36).length"
    )
    assert page.evaluate(small) == 0


def test_light_and_dark(served, visit):
    url, _ = served
    background = "getComputedStyle(document.documentElement).backgroundColor"
    light, dark = "rgb(250, 248, 245)", "rgb(21, 23, 26)"
    assert visit(url, color_scheme="light").evaluate(background) == light
    page = visit(url, color_scheme="dark")
    assert page.evaluate(background) == dark
    page.get_by_label("Theme").select_option("Light")
    assert page.evaluate(background) == light
    page.reload()
    expect(page.get_by_label("Theme")).to_have_value("light")
    assert page.evaluate(background) == light


def test_motion_is_reduced_where_asked(served, visit):
    url, _ = served
    for motion, animated in (("no-preference", True), ("reduce", False)):
        page = visit(url, reduced_motion=motion)
        found = page.evaluate("getComputedStyle(document.querySelector('#generate')).transitionDuration")
        assert (found != "0s") is animated
