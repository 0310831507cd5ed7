"""The page in Chromium against a live server: what it shows is what `complete` returns for the same options."""

import pytest
from playwright.sync_api import expect

from megalith.generation.generate import complete
from tests.serving.conftest import serving
from tests.serving.page.conftest import choose, percent, written

PROMPT = "Once <b>upon</b> a"  # a tag of a prompt, or of a model, is text
COUNT_LENGTHS = """text => {
  window.lengths = new Set();
  new MutationObserver(() => lengths.add(text.textContent.length)).observe(text, {childList: true, subtree: true});
}"""


def test_text_comes_as_it_is_written_and_its_tokens_tell_their_probabilities(served, visit):
    url, service = served
    greedy = {"temperature": 0, "max_new_tokens": 40}
    (wanted,) = complete(service.model, PROMPT, top_logprobs=5, **greedy)
    page = visit(url)
    page.evaluate(COUNT_LENGTHS.replace("text.textContent", "text.innerText").join(["(", ")(document.body)"]))
    choose(page, prompt=PROMPT, temperature=0, max_tokens=40)
    page.keyboard.press("Control+Enter")
    assert written(page) == [wanted.continuation]
    assert page.evaluate("lengths.size") > 3
    assert page.locator(".before").inner_text() == PROMPT and page.locator(".result b").count() == 0
    expect(page.get_by_role("status")).to_contain_text("Done: 40 tokens in")
    expect(page.locator(".result .state")).to_have_text("40 tokens, at the limit of tokens")

    page.locator(".token").first.hover()
    popover = page.get_by_role("tooltip")
    expect(popover.locator(".name span").first).to_have_text(percent(wanted.logprobs[0]))
    lines = popover.locator("ol").first.locator("li").locator("span").all_inner_texts()
    assert lines == [percent(logprob) for _, logprob in wanted.top_logprobs[0]]
    assert popover.locator(".taken span").first.inner_text() == percent(wanted.logprobs[0])
    tokens = page.evaluate("document.querySelectorAll('.token').length")
    page.locator("#tint").uncheck()
    tints = "[...document.querySelectorAll('.token')].filter(each => getComputedStyle(each).backgroundColor != '%s')"
    assert page.evaluate(f"{tints % 'rgba(0, 0, 0, 0)'}.length") == 0 < tokens
    page.locator("#tint").check()
    assert page.evaluate(f"{tints % 'rgba(0, 0, 0, 0)'}.length") > 0


@pytest.mark.slow
def test_settings_reach_the_model_and_are_remembered(served, visit):
    url, service = served
    page = visit(url)
    options = {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 11}
    wanted = complete(service.model, "Once upon", num_samples=3, max_new_tokens=20, **options)
    choose(page, prompt="Once upon", max_tokens=20, n=3, **options)
    page.get_by_role("button", name="Generate").click()
    assert written(page, 3) == [each.continuation for each in wanted]

    (stop,) = {wanted[0].continuation[8:10]}
    ended = complete(service.model, "Once upon", num_samples=3, max_new_tokens=20, stop=stop, **options)
    choose(page, stop=stop.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t"))
    page.get_by_role("button", name="Generate").click()
    assert written(page, 3) == [each.continuation for each in ended]
    assert ended[0].finish == "stop"
    expect(page.locator(".result .state").first).to_contain_text("ended by itself")

    page.reload()
    expect(page.locator("#seed")).to_have_value("11")
    expect(page.locator("#n")).to_have_value("3")
    expect(page.locator("#prompt")).to_have_value("")
    page.get_by_role("button", name="Reset settings").click()
    expect(page.locator("#seed")).to_have_value("")
    expect(page.locator("#max_tokens")).to_have_value("64")
    expect(page.locator("#n")).to_have_value("1")


@pytest.mark.slow
def test_beams_come_best_first(served, visit):
    url, service = served
    wanted = complete(service.model, "Once", beam_width=3, num_samples=2, max_new_tokens=10, logprobs=True)
    page = visit(url)
    choose(page, prompt="Once", max_tokens=10, n=2, temperature=0.5, beam_width=3)
    expect(page.locator("#temperature")).to_be_disabled()  # and so left out
    page.get_by_role("button", name="Generate").click()
    assert written(page, 2) == [each.continuation for each in wanted]
    page.locator(".result").last.locator(".token").first.hover()
    expect(page.get_by_role("tooltip").locator(".name span").first).to_have_text(percent(wanted[1].logprobs[0]))


@pytest.mark.slow
def test_a_bad_value_gets_the_servers_words_beside_its_setting(served, visit):
    url, _ = served
    for width in (1280, 360):
        page = visit(url, width=width)
        page.locator("#settings").evaluate("each => (each.open = true)")
        choose(page, prompt="Once", top_p=3, max_tokens=3)
        page.locator("#settings").evaluate("each => (each.open = false)")
        page.get_by_role("button", name="Generate").click()
        words = page.locator("#top_p-problem")
        expect(words).to_contain_text("must be less than or equal to 1; found 3")
        expect(words).to_be_in_viewport()
        expect(page.locator("#top_p")).to_be_focused()
        expect(page.locator("#top_p")).to_have_attribute("aria-invalid", "true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("#top_p").fill("0.9")
        expect(words).to_be_empty()
        page.keyboard.press("Enter")
        written(page)
    choose(page, prompt="Once " * 200)
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert").filter(has_text="too long")).to_be_visible()
    assert page.locator(".result").count() == 1  # what was there stays


@pytest.mark.slow
def test_stop_frees_the_slot(make, visit):
    with serving(make(max_position_embeddings=20_000)) as (url, service):
        page = visit(url)
        for how in ("Escape", "Stop"):
            choose(page, prompt="Once", temperature=0, max_tokens=19_000)
            page.keyboard.press("Control+Enter")
            expect(page.get_by_role("status")).to_have_text("Writing.")
            expect(page.locator(".token").nth(5)).to_be_visible()
            assert service.unfinished == 1
            if how == "Stop":
                page.get_by_role("button", name="Stop").click()
            else:
                page.keyboard.press(how)
            expect(page.get_by_role("status")).to_have_text("Stopped.")
            expect(page.locator(".result .state")).to_contain_text("stopped")
            page.wait_for_timeout(500)
            assert service.unfinished == 0 and not service.engine.busy
            (text,) = written(page)
            new = len(service.model.tokenizer.encode(text)) + 20  # pieces of characters, and other ways to spell it
            (wanted,) = complete(service.model, "Once", temperature=0, max_new_tokens=new)
            assert wanted.continuation.startswith(text.rstrip("\ufffd")) and text


@pytest.mark.slow
def test_the_token_is_asked_for(make, visit, tmp_path):
    file = tmp_path / "token"
    file.write_text("a-secret-of-this-test\n")
    file.chmod(0o600)
    with serving(make(), token_file=str(file)) as (url, _):
        page = visit(url)
        expect(page.get_by_role("alert").filter(has_text="token")).to_be_visible()
        expect(page.get_by_label("Token", exact=True)).to_be_focused()
        page.keyboard.type("a-wrong-one")
        page.keyboard.press("Enter")
        expect(page.locator("#token-words")).to_contain_text("refuses this token")
        page.keyboard.type("a-secret-of-this-test")
        page.keyboard.press("Enter")
        expect(page.locator("#token-form")).to_be_hidden()
        expect(page.get_by_role("button", name="Forget token")).to_be_visible()
        choose(page, prompt="Once", max_tokens=3)
        page.keyboard.press("Control+Enter")
        written(page)
        assert "a-secret" not in page.evaluate("JSON.stringify(localStorage)")
        assert "a-secret" in page.evaluate("JSON.stringify(sessionStorage)")
        page.reload()
        expect(page.get_by_role("button", name="Forget token")).to_be_visible()
        page.get_by_role("button", name="Forget token").click()
        expect(page.get_by_label("Token", exact=True)).to_be_focused()


@pytest.mark.slow
def test_what_the_server_cannot_do_is_said(make, visit):
    with serving(make(max_position_embeddings=20_000), max_batch_size=1, max_waiting=0) as (url, service):
        page, other = visit(url), visit(url)
        for each in (page, other):
            expect(each.locator("#health")).to_have_text("ready")
        choose(other, prompt="Once", temperature=0, max_tokens=19_000)
        other.keyboard.press("Control+Enter")
        expect(other.get_by_role("status")).to_have_text("Writing.")
        choose(page, prompt="Once", max_tokens=3)
        page.keyboard.press("Control+Enter")
        expect(page.locator("#problem")).to_contain_text("busy")
        expect(page.locator("#health")).to_contain_text("1 running")
        other.keyboard.press("Escape")
        expect(other.get_by_role("status")).to_have_text("Stopped.")
        page.get_by_role("button", name="Try again").click()  # waits until Retry-After has passed
        written(page)

        service.draining = True
        page.keyboard.press("Control+Enter")
        expect(page.locator("#problem")).to_contain_text("the server is ending")
        expect(page.locator("#problem-wait")).to_contain_text("trying again in")
        expect(page.locator("#health")).to_have_text("the server is ending")
        service.draining = False
    choose(page, prompt="Once")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#problem")).to_contain_text("cannot be reached")
    expect(page.locator("#health")).to_have_text("unreachable")
