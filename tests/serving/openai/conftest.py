"""Plain HTTP to a live server, and a tiny model whose tokenizer has a chat template."""

import json
import pathlib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from megalith.data.tokenizers.tokenizer import load_tokenizer
from megalith.generation.model import TextModel
from megalith.serving.service import Service
from tests.serving.conftest import serving

TEMPLATE = """{{ bos_token }}{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% if message.role == "assistant" and shout %}{{ raise_exception("nobody may shout") }}{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def post(url: str, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer. body: an object, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def events(url: str, body: Any, path: str = "/v1/completions") -> list[Any]:
    """The events of a streamed answer, with "[DONE]" where it has that; comments are texts that begin with a colon."""
    data = json.dumps({**body, "stream": True}).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        parts = answer.read().decode().split("\n\n")
    assert parts.pop() == ""
    contents = [each if each.startswith(":") else each.removeprefix("data: ") for each in parts]
    return [json.loads(each) if each.startswith("{") else each for each in contents]


@pytest.fixture(scope="session")
def chat_folder(tokenizer_file: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Tokenizer files as of Hugging Face, with a chat template; a BOS stands before every text, as with Llama."""
    folder = tmp_path_factory.mktemp("chat")
    made = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    made.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def chatty(make: Callable[..., TextModel], chat_folder: pathlib.Path) -> TextModel:
    """A tiny model with the tokenizer of chat_folder."""
    tokenizer = load_tokenizer(chat_folder)
    return TextModel(make(vocab_size=tokenizer.vocab_size).model, tokenizer)


@pytest.fixture
def serving_long(make: Callable[..., TextModel]) -> Iterator[tuple[str, Service]]:
    """A server of a model with room for long prompts."""
    with serving(make(max_position_embeddings=2000)) as running:
        yield running
