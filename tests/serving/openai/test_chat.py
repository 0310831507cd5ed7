"""/v1/chat/completions: the tokenizer's template makes the prompt, and `complete` the answer."""

import openai
import pytest
import transformers

from megalith.data.tokenizers.chat_template import ChatTemplate
from megalith.data.tokenizers.tokenizer import load_tokenizer
from megalith.generation.generate import complete
from tests.serving.conftest import serving
from tests.serving.openai.conftest import events, post

MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "東京 <|im_end|> <s>?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
PATH = "/v1/chat/completions"


def test_prompt_is_that_of_transformers(chat_folder, tmp_path):
    """Also after being saved; with one BOS, and with the template's special tokens as tokens."""
    theirs = transformers.AutoTokenizer.from_pretrained(chat_folder)
    wanted = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    tokenizer = load_tokenizer(chat_folder)
    ids = ChatTemplate.of(tokenizer).encode(MESSAGES, {})
    assert ids == wanted and ids.count(tokenizer.bos) == 2  # its own, and the one that the user has written
    tokenizer.save(tmp_path)
    assert ChatTemplate.of(load_tokenizer(tmp_path)).encode(MESSAGES, {}) == wanted


@pytest.mark.parametrize("template", [
    "{%- for m in messages %}\n  {%- if m.role == 'system' %}{% continue %}{% endif %}\n {{ m|tojson }}\n{% endfor %}",
    "{% generation %}{{ messages[0]['content'] }}{% endgeneration %} {{ eos_token }}",
    "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{{ s.n }}{{ unk_token }}{% endfor %}",
    "{{ messages | map(attribute='role') | list | tojson(indent=1) }}{{ tools is none }}{{ documents is none }}",
    "{{ strftime_now('%Y') }}",
])  # fmt: skip
def test_templates_render_as_in_transformers(chat_folder, template):
    theirs = transformers.AutoTokenizer.from_pretrained(chat_folder)
    wanted = theirs.apply_chat_template(MESSAGES, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert ChatTemplate(load_tokenizer(chat_folder), template).render(MESSAGES, {}) == wanted


def test_special_tokens_of_the_template_are_tokens_even_where_texts_have_none(chat_folder):
    tokenizer = load_tokenizer(chat_folder)
    tokenizer.backend.encode_special_tokens = True  # split_special_tokens of tokenizer_config.json
    ids = ChatTemplate.of(tokenizer).encode(MESSAGES[3:], {})
    assert ids[0] == tokenizer.bos and tokenizer.encode("<s>")[1] != tokenizer.bos


def test_chat_is_what_complete_writes(chatty):
    ids = ChatTemplate.of(chatty.tokenizer).encode(MESSAGES, {})
    with serving(chatty) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        options = {"model": "tiny", "messages": MESSAGES, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 2}
        got = client.chat.completions.create(**options, max_completion_tokens=7)
        wanted = complete(chatty, [ids], seed=5, num_samples=2, max_new_tokens=7, top_logprobs=2)
        for choice, each in zip(got.choices, wanted, strict=True):
            assert choice.message.content == each.continuation and choice.message.role == "assistant"
            content = choice.logprobs.content
            assert [one.logprob for one in content] == each.logprobs
            said = b"".join(bytes(one.bytes) for one in content)
            assert said.decode(errors="replace").startswith(each.continuation.rstrip("\ufffd"))
            assert [[top.logprob for top in one.top_logprobs] for one in content] == [
                [logprob for _, logprob in top] for top in each.top_logprobs
            ]
        assert got.usage.prompt_tokens == len(ids) and got.id.startswith("chatcmpl-")
        assert got.object == "chat.completion"

        pieces = list(client.chat.completions.create(
            **options, max_tokens=7, stream=True, stream_options={"include_usage": True}
        ))  # fmt: skip
        assert pieces[-1].usage == got.usage and pieces[0].object == "chat.completion.chunk"
        for number in range(2):
            mine = [piece.choices[0] for piece in pieces if piece.choices and piece.choices[0].index == number]
            assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
            assert "".join(one.delta.content or "" for one in mine) == got.choices[number].message.content
            assert mine[-1].finish_reason == got.choices[number].finish_reason
            logprobs = [one for each in mine if each.logprobs for one in each.logprobs.content]
            assert logprobs == got.choices[number].logprobs.content


def test_without_a_limit_the_context_is_filled(chatty):
    with serving(chatty) as (url, _):
        status, got = post(url, {"messages": MESSAGES, "ignore_eos": True, "seed": 1}, PATH)
        usage = got["usage"]
        assert status == 200 and usage["total_tokens"] == 200 and got["choices"][0]["finish_reason"] == "length"
        long = [{"role": "user", "content": "a " * 400}]
        status, got = post(url, {"messages": long}, PATH)
        assert status == 400 and got["error"]["code"] == "context_length_exceeded"


def test_forms_of_messages(chatty):
    with serving(chatty) as (url, _):

        def text(*messages, **fields):
            status, got = post(url, {"messages": messages, "max_tokens": 5, "temperature": 0, **fields}, PATH)
            return got["choices"][0]["message"]["content"] if status == 200 else got["error"]

        parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
        assert text({"role": "user", "content": parts}) == text({"role": "user", "content": "Hello there"})
        brief = {"role": "user", "content": "Hi", "refusal": None, "tool_calls": []}
        assert text({"role": "developer", "content": "B"}, brief) == text({"role": "system", "content": "B"}, brief)
        error = text({"role": "assistant", "content": "x"}, chat_template_kwargs={"shout": True})
        assert "nobody may shout" in error["message"] and error["param"] == "messages"
        wrong = {
            "messages[0].role": {"role": "tool", "content": "x"},
            "messages[0].content": {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].tool_calls": {"role": "assistant", "content": "x", "tool_calls": [{}]},
            "messages[0].contents": {"role": "assistant", "contents": "x"},
        }
        assert {name: text(message)["param"] for name, message in wrong.items()} == {name: name for name in wrong}
        assert text({"role": "user"})["param"] == "messages[0].content"
        assert post(url, {"messages": []}, PATH)[1]["error"]["param"] == "messages"
        assert post(url, {}, PATH)[1]["error"]["message"].startswith("messages must be given")
        assert post(url, {"messages": [brief], "top_logprobs": 2}, PATH)[1]["error"]["param"] == "top_logprobs"
        assert events(url, {"messages": [brief], "max_tokens": 0}, PATH)[-1] == "[DONE]"


def test_without_a_template_the_error_names_completions(served):
    status, got = post(served[0], {"messages": MESSAGES}, PATH)
    assert status == 400 and "/v1/completions" in got["error"]["message"]
