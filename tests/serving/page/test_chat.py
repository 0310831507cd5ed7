"""Conversations on the page: the prompt of each reply is the model's template around what was said so far."""

import shutil

import pytest
from playwright.sync_api import expect

from megalith.data.tokenizers.tokenizer import build_tokenizer
from megalith.generation.generate import complete
from tests.serving.conftest import serving
from tests.serving.page.conftest import choose, written

pytestmark = pytest.mark.slow

TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant]"


@pytest.fixture
def chat_model(make, tokenizer_file, tmp_path):
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    model = make(max_position_embeddings=1000)
    model.tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json"))
    return model


def test_a_conversation(chat_model, visit):
    options = {"temperature": 0.6, "seed": 3}

    def replies(prompt):
        return [each.continuation for each in complete(chat_model, prompt, num_samples=2, max_new_tokens=15, **options)]

    said = "[system] Be brief.\n[user] Hello\n[assistant]"
    first = replies(said)
    second = replies(f"{said.removesuffix('[assistant]')}[assistant] {first[1]}\n[user] More\n[assistant]")
    assert first[0] != first[1]
    with serving(chat_model) as (url, _):
        page = visit(url)
        page.get_by_text("Chat", exact=True).click()
        page.get_by_text("System message").first.click()
        page.get_by_label("System message").fill("Be brief.")
        choose(page, prompt="Hello", n=2, max_tokens=15, **options)
        page.keyboard.press("Control+Enter")
        assert written(page, 2) == first
        expect(page.locator("#prompt")).to_have_value("")
        expect(page.locator(".said")).to_have_text("Hello")
        page.get_by_role("button", name="Go on with this").last.click()
        expect(page.locator(".result.chosen h3")).to_have_text("Reply 2")

        page.locator("#prompt").fill("More")
        page.keyboard.press("Control+Enter")
        assert written(page, 4)[2:] == second
        page.locator(".result").nth(2).locator(".token").first.focus()
        expect(page.get_by_role("tooltip").locator("ol").first.locator("li").nth(4)).to_be_visible()

        page.get_by_role("button", name="Take back").click()
        expect(page.locator("#prompt")).to_have_value("More")
        expect(page.locator(".result")).to_have_count(2)
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".result")).to_have_count(0)
        page.keyboard.press("Control+Enter")  # an empty message is one, too
        written(page, 2)


def test_chat_is_off_without_a_template(served, visit):
    url, _ = served
    page = visit(url)
    expect(page.get_by_text("this model has no chat template")).to_be_visible()
    expect(page.get_by_role("radio", name="Chat")).to_be_disabled()
