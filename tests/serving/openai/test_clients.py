"""Other programs against a live server: lm-eval gets the library's scores, schemathesis finds no fault."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from megalith.data.tokenizers.tokenizer import load_tokenizer
from megalith.generation.engine import Engine
from megalith.generation.generate import complete, score
from megalith.generation.model import TextModel
from tests.serving.conftest import serving

DOCUMENTS = {
    "choices": [
        {"question": "Once upon a", "choices": ["time", "model wrote", "東京"], "answer": 0},
        {"question": "Zürich, 東京,", "choices": ["naïve café", "Ελλάδα 😀"], "answer": 1},
        {"question": "and the small", "choices": ["model", "upon"], "answer": 0},
    ],
    "writing": [{"question": "Once upon", "answer": "a"}, {"question": "a small model", "answer": "b"}],
    "reading": [{"text": "Once upon a time there was 東京."}, {"text": "and the model wrote; once more."}],
}
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: question
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}]
""",
    "writing": """
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: ["e"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
    "reading": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture
def folder(tokenizer_file: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """lm-eval's tasks, their documents, and tokenizer files for transformers."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, documents in DOCUMENTS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(each) + "\n" for each in documents))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test"
        (tmp_path / f"{name}.yaml").write_text(head + TASKS[name])
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("tokenized", ["True", "False"])
def test_lm_eval_gives_the_scores_of_the_library(make, folder, tokenized):
    model = TextModel(make().model, load_tokenizer(folder))
    with serving(model) as (url, _):
        options = {
            "model": "tiny", "base_url": f"{url}/v1/completions", "tokenizer": str(folder), "max_length": 200,
            "tokenizer_backend": "huggingface", "tokenized_requests": tokenized, "max_retries": 1,
        }  # fmt: skip
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", *TASKS, "--include_path",
            str(folder), "--output_path", str(folder / "out"), "--log_samples", "--batch_size", "2", "--model_args",
            ",".join(f"{name}={value}" for name, value in options.items()),
        ]  # fmt: skip
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
        done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, timeout=280)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
    samples = {}
    for name in TASKS:
        [file] = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        samples[name] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda each: each["doc_id"])

    encode, right = model.tokenizer.encode, []
    for document, sample in zip(DOCUMENTS["choices"], samples["choices"], strict=True):
        question = encode(document["question"])
        texts = [f"{document['question']} {choice}" for choice in document["choices"]]
        wanted = [sum(logprobs[len(question) - 1 :]) for logprobs in score(model, texts)]
        assert [float(each[0][0]) for each in sample["resps"]] == pytest.approx(wanted, abs=1e-9)
        right.append(wanted.index(max(wanted)) == document["answer"])
        assert sample["acc"] == right[-1]
    assert len(set(right)) == 2, "the accuracy must be able to differ"
    for document, sample in zip(DOCUMENTS["writing"], samples["writing"], strict=True):
        wanted = complete(model, document["question"], temperature=0.0, max_new_tokens=12, stop=["e"])
        assert sample["resps"][0][0] == wanted[0].continuation
    for document, sample in zip(DOCUMENTS["reading"], samples["reading"], strict=True):
        [wanted] = score(Engine(model), document["text"], add_bos=True)  # of as many rows as the server's
        assert float(sample["resps"][0][0]) == pytest.approx(sum(wanted), abs=1e-9)


@pytest.mark.slow
def test_schemathesis_finds_no_fault(make, chatty, tmp_path):
    checks = (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    )
    for model, paths in ((make(), "."), (chatty, "^/v1")):  # all of the schema; what chats change of it
        with serving(model, request_timeout=30.0) as (url, service):
            command = [
                sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--include-path-regex", paths,
                "--checks", ",".join(checks), "--max-examples", "40", "--seed", "1", "--request-timeout", "60",
                "--generation-database", "none",
            ]  # fmt: skip
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=280)
            assert done.returncode == 0, done.stdout.decode()[-6000:] + done.stderr.decode()[-2000:]
            said = re.search(r"(\d+) generated, (\d+) passed", done.stdout.decode())
            assert said and said[1] == said[2] and int(said[1]) > 300, done.stdout.decode()[-3000:]
            assert service.failure is None
