"""Files of chats to rows: packed and not, for a decoder and for an encoder with one; what is left out is told."""

import json

import numpy as np
import pytest
import transformers

from megalith.common.errors import ConfigError, DataError
from megalith.config.run import RunConfig
from megalith.data.build import build_datasets, prepare_tokenizer
from megalith.data.instructions import store
from megalith.data.instructions.factory import chat, completion
from megalith.data.tokenizers.tokenizer import load_tokenizer, tokenizer_from_config
from tests.chats import CHATML, GEMMA, LENGTHS, LLAMA3, USER, make_config, write_chats, write_tokenizer


def opened(config: RunConfig):
    """(training dataset, validation datasets, tokenizer)."""
    tokenizer = tokenizer_from_config(config.data)
    prepare_tokenizer(config, tokenizer)
    factory = chat if config.data.dataset == "chat" else completion
    return *factory.open_files(config, tokenizer), tokenizer


def samples_of(row) -> list[tuple[list[int], list[int]]]:
    """Each sample's (inputs, labels that count) of a packed row."""
    found = []
    for number in range(int(row["documents"].max()) + 1):
        here = row["documents"] == number
        found.append((row["input_ids"][here].tolist(), row["labels"][here & (row["loss_mask"] > 0)].tolist()))
    return [(inputs, labels) for inputs, labels in found if labels]  # padding has none


def test_rows_hold_every_sample_once_and_positions_begin_anew(tmp_path):
    config = make_config(tmp_path, train_data=[write_chats(tmp_path / "a.jsonl")])
    dataset, _, tokenizer = opened(config)
    for epoch in (0, 1):
        rows = [dataset.in_epoch(epoch, number) for number in range(len(dataset))]
        found = [each for row in rows for each in samples_of(row)]
        answers = sorted(tokenizer.decode(labels) for _, labels in found)
        assert answers == sorted(" ".join(["four"] * n) + "<|im_end|>" for n in LENGTHS)
        for row in rows:
            starts = np.flatnonzero(np.diff(row["documents"], prepend=-1))
            assert (row["positions"][starts] == 0).all() and row["positions"].max() < 64
            assert set(np.diff(row["positions"])) <= {1, *(-row["positions"][starts - 1][1:])}
    assert 1 < len(dataset) < len(LENGTHS)
    alone, _, _ = opened(config.replace(packing=False))
    assert len(alone) == len(LENGTHS) and "documents" not in alone[0]


def test_weights_of_lines_are_those_of_their_tokens(tmp_path):
    path = write_chats(tmp_path / "a.jsonl", weight=0.25)
    dataset, _, _ = opened(make_config(tmp_path, train_data=[path]))
    assert set(np.unique(dataset[0]["loss_mask"])) == {0.0, 0.25}


@pytest.mark.parametrize("strategy", ["drop", "truncate", "raise"])
def test_samples_that_are_too_long_are_told(tmp_path, strategy):
    """Line 2 is cut within its answer; line 3, with a long prompt, loses all of its answer."""
    path = write_chats(tmp_path / "a.jsonl", (1, 60))
    long = {"messages": [{"role": "user", "content": "Why? " * 80}, {"role": "assistant", "content": "four"}]}
    with open(path, "a") as file:
        file.write(json.dumps(long) + "\n")
    config = make_config(tmp_path, train_data=[path], excess_length_strategy=strategy)
    if strategy == "raise":
        with pytest.raises(DataError, match=r"must fit into a row.*2 \(.*a.jsonl:2, .*a.jsonl:3\) of 3 samples"):
            opened(config)
        return
    dataset, _, _ = opened(config)
    told = "\n".join(dataset.describe("training data"))
    assert "2 (" in told and "a.jsonl:2" in told and "a.jsonl:3" in told
    if strategy == "drop":
        assert len(dataset.kept) == 1 and "left out (--excess-length-strategy drop)" in told
    else:
        assert len(dataset.kept) == 2 and "cut: 1 of them within what is trained; 1 have nothing of that left" in told
        assert max(int((row["loss_mask"] > 0).sum()) for row in (dataset[0], dataset[1])) > 20


def test_no_sample_left_is_an_error(tmp_path):
    config = make_config(tmp_path, train_data=[write_chats(tmp_path / "a.jsonl", (90,))])
    with pytest.raises(DataError, match=r"must have a sample to learn from.*longer than --seq-length 64"):
        opened(config)


def test_files_are_blended_by_weights_and_each_is_read_through(tmp_path):
    a, b = write_chats(tmp_path / "a.jsonl", [1] * 40), write_chats(tmp_path / "b.jsonl", [12] * 40)
    together, _, _ = opened(make_config(tmp_path, train_data=[a, b]))
    assert len(together.kept) == 80
    dataset, _, tokenizer = opened(make_config(tmp_path, train_data=["0.25", a, "0.75", b]))
    rows = [dataset.in_epoch(epoch, number) for epoch in (0, 1) for number in range(len(dataset))]
    answers = [[tokenizer.decode(labels).count("four") for _, labels in samples_of(row)] for row in rows]
    short = sum(set(row) == {1} for row in answers)
    assert short + sum(set(row) == {12} for row in answers) == len(rows)
    assert short == pytest.approx(len(rows) / 4, abs=2)
    assert "are taken an epoch" in dataset.describe("training data")[0]


def test_pairs_for_an_encoder_and_a_decoder(tmp_path):
    turns = [USER, {"role": "assistant", "content": "four"}, {"role": "user", "content": "Why?"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [*turns, {"role": "assistant", "content": "Because"}]}) + "\n")
    pairs = tmp_path / "b.jsonl"
    pairs.write_text(json.dumps({"prompt": "two and", "completion": "four"}) + "\n")
    shape = {"model_type": "t5", "loss": "t5", "decoder_seq_length": 8, "seq_length": 128}
    dataset, _, tokenizer = opened(make_config(tmp_path, train_data=[str(path)], **shape))
    found = {}
    for row in (dataset[0], dataset[1]):
        size = int(row["loss_mask"].sum())
        prompt = tokenizer.decode(row["input_ids"][row["padding_mask"] == 1])
        found[tokenizer.decode(row["labels"][:size])] = prompt
        assert row["decoder_input_ids"][0] == tokenizer.decoder_start
        assert row["decoder_input_ids"][1:size].tolist() == row["labels"][: size - 1].tolist()
        assert (row["labels"][size:] == -1).all() and len(row["labels"]) == 8
    assert set(found) == {"four<|im_end|>", "Because<|im_end|>"}
    assert found["Because<|im_end|>"].endswith(
        "four<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    config = make_config(tmp_path, train_data=[str(pairs)], **shape | {"dataset": "completion"})
    dataset, _, tokenizer = opened(config)
    row = dataset[0]
    assert tokenizer.decode(row["input_ids"][row["padding_mask"] == 1]) == "two and"
    assert row["labels"][row["loss_mask"] > 0].tolist() == [*tokenizer.encode("four"), tokenizer.eos]


def test_lines_that_cannot_be_used_are_listed_or_an_error(tmp_path):
    path = write_chats(tmp_path / "a.jsonl", [1] * 30)
    with open(path, "a") as file:
        file.write('{"messages": []}\n\nnonsense\n')
    config = make_config(tmp_path, train_data=[path])
    dataset, _, _ = opened(config)
    told = "\n".join(dataset.describe("training data"))
    assert "a.jsonl:31: 'messages' is no list" in told and "a.jsonl:33: malformed JSON" in told
    assert "2 of 32 lines cannot be used and are skipped" in told
    with pytest.raises(DataError, match=r"a.jsonl:31: (.|\n)*a.jsonl may have at most 1 unusable documents"):
        opened(config.replace(max_unusable="1"))
    with pytest.raises(DataError, match=r"s.jsonl:1: .*System role not supported"):
        messages = [{"role": "system", "content": "B"}, USER, {"role": "assistant", "content": "x"}]
        (tmp_path / "s.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        opened(make_config(tmp_path / "g", GEMMA, train_data=[str(tmp_path / "s.jsonl")]))


def test_a_line_of_several_turns_that_cannot_be_used_is_one_line(tmp_path):
    """Of a T5 each turn is a sample."""
    path = write_chats(tmp_path / "a.jsonl", [1] * 9)
    answer = {"role": "assistant", "content": "x"}
    with open(path, "a") as file:
        file.write(json.dumps({"messages": [{"role": "system", "content": "B"}, USER, answer, USER, answer]}) + "\n")
    shape = {"model_type": "t5", "loss": "t5", "decoder_seq_length": 8, "max_unusable": "1"}
    dataset, _, _ = opened(make_config(tmp_path, GEMMA, train_data=[path], **shape))
    assert "1 of 10 lines cannot be used" in "\n".join(dataset.describe("training data"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", "", "an empty file"),
        ("columns.jsonl", '{"text": "x"}\n', "columns.jsonl:1: no prompt"),
        ("rows.parquet", "PAR1", "must be a file of JSON lines"),
        ("missing.jsonl", None, "must name a file of JSON lines"),
        ("folder", "folder", "must name a file of JSON lines, or a folder with some"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, words):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=words):
        opened(make_config(tmp_path, train_data=[str(path)]))


def test_templates_that_fail_name_the_line(tmp_path):
    path = write_chats(tmp_path / "a.jsonl", (1,))
    template = "{% for m in messages %}{{ m.content if loop.last or add_generation_prompt }}{% endfor %}"
    template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    config = make_config(tmp_path, template, train_data=[path])
    with pytest.raises(DataError, match=r"a.jsonl:1: The chat template must write a chat so that it begins"):
        opened(config)
    with pytest.raises(ConfigError, match="--chat-template must name a file"):
        opened(make_config(tmp_path / "none", "", train_data=[path]))
    (tmp_path / "wrong.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match=r"--chat-template must be a template in Jinja; found .* in line 1"):
        opened(config.replace(chat_template=str(tmp_path / "wrong.jinja")))
    with pytest.raises(ConfigError, match="must name a text file with a template"):
        opened(config.replace(chat_template=str(tmp_path / "absent.jinja")))


def test_template_and_end_of_turn_are_the_tokenizers_and_are_saved(tmp_path):
    write_tokenizer(tmp_path / "llama", LLAMA3)
    (tmp_path / "mine.jinja").write_text(CHATML)
    config = make_config(tmp_path, LLAMA3, chat_template=str(tmp_path / "mine.jinja"))
    tokenizer = tokenizer_from_config(config.data)
    assert tokenizer.eod == tokenizer.backend.token_to_id("</s>")
    (line,) = prepare_tokenizer(config, tokenizer)
    assert "ends a turn with <|im_end|>: it takes the place of </s>" in line
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.eod == again.eos == again.backend.token_to_id("<|im_end|>") and again.chat_template == CHATML
    assert again.fingerprint() == tokenizer.fingerprint() and again.bos == tokenizer.bos
    stored = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert stored["eos_token"] == "<|im_end|>" and stored["pad_token"] == "<pad>"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.eos_token == "<|im_end|>" and theirs.chat_template == CHATML


def test_a_file_is_tokenized_once(tmp_path, monkeypatch):
    config = make_config(tmp_path, train_data=[write_chats(tmp_path / "a.jsonl")], valid_data=[])
    first, _, _ = opened(config)

    def fail(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(store, "tokenize", fail)
    second, _, _ = opened(config)
    assert all(np.array_equal(first[0][name], second[0][name]) for name in first[0])
    with pytest.raises(AssertionError, match="again"):
        opened(config.replace(assistant_only_loss=False))


def test_datasets_of_a_run_have_epochs_and_validation_by_name(tmp_path):
    paths = [write_chats(tmp_path / f"{name}.jsonl") for name in "abc"]
    config = make_config(tmp_path, train_data=paths[:1], valid_data=paths[1:], epochs=2.0, train_iters=None)
    tokenizer = tokenizer_from_config(config.data)
    prepare_tokenizer(config, tokenizer)
    found = build_datasets(config, tokenizer)
    rows = found["train"].samples_per_epoch
    assert len(found["train"]) >= 2 * rows and set(found["valid"]) == {"b", "c"}
    dataset = found["train"].dataset
    for index in range(2 * rows):
        wanted = dataset.in_epoch(*divmod(index, rows))
        assert np.array_equal(found["train"][index]["input_ids"], wanted["input_ids"])
    assert not found["train"][2 * rows]["loss_mask"].any()
