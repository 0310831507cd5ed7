"""The rows of a Megatron embedding that are words, for every tokenizer and way in which the arguments tell it."""

import json
import pathlib
import shlex

import pytest
import torch

from megalith.checkpoint import formats
from megalith.checkpoint.formats.megatron.arguments import to_arguments
from megalith.checkpoint.formats.megatron.vocabulary import true_vocab_size
from megalith.cli.main import main
from megalith.common.errors import CheckpointError
from megalith.config.flags.loading import from_yaml
from tests.tiny import VOCABULARY, tiny_config, write_corpus

CASES = [  # arguments, rows in the file, tensor-parallel ranks, overrides -> tokens, and a piece of the note
    ({"tokenizer_type": "NullTokenizer", "vocab_size": 99}, 128, 1, {}, 100, ""),
    ({"tokenizer_type": "NullMultimodalTokenizer", "vocab_size": 99}, 128, 1, {}, 100, ""),
    ({"tokenizer_type": "NullTokenizer", "vocab_size": 127}, 128, 1, {}, 128, ""),
    ({"tokenizer_type": "NullTokenizer", "vocab_size": 128}, 256, 2, {}, 129, ""),
    ({"tokenizer_type": "NullTokenizer", "vocab_size": 99, "orig_vocab_size": 100}, 128, 1, {}, 100, ""),
    ({"tokenizer_type": "NullTokenizer", "vocab_size": 99}, 128, 1, {"vocab_size": 99}, 99, ""),
    ({"tokenizer_type": "NullTokenizer", "vocab_size": 99}, 256, 1, {}, 100, "100 of 256 rows, as the arguments say"),
    ({"tokenizer_type": "TikTokenizer", "vocab_size": 99}, 128, 1, {}, 99, ""),
    ({"tokenizer_type": "TikTokenizer"}, 131072, 1, {}, 131072, "all 131072 rows are kept"),
    ({"tokenizer_type": "HuggingFaceTokenizer"}, 128, 1, {}, 128, "all 128 rows are kept"),
    ({"tokenizer_type": "Llama2Tokenizer"}, 32768, 8, {}, 32768, "all 32768 rows are kept"),
    ({"tokenizer_type": "GPT2BPETokenizer"}, 50432, 2, {}, 50257, "the size of a GPT2BPETokenizer"),
    ({"tokenizer_type": "GPT2BPETokenizer", "vocab_extra_ids": 100}, 50432, 1, {}, 50357, "50357 of 50432"),
    ({"tokenizer_type": "BertWordPieceLowerCase"}, 30592, 1, {}, 30524, "30524 of 30592"),
    ({"tokenizer_type": "BertWordPieceLowerCase", "vocab_extra_ids": 100}, 30720, 1, {}, 30624, "30624 of 30720"),
    ({"tokenizer_type": "BertWordPieceCase"}, 29056, 1, {}, 28998, "28998 of 29056"),
    ({}, 30592, 1, {}, 30524, "the size of a BertWordPieceLowerCase"),
    ({}, 50304, 1, {}, 50257, "the size of a GPT2BPETokenizer"),
    ({"tokenizer_type": "BertWordPieceCase", "vocab_file": "vocab.txt"}, 128, 1, {}, 8, "with [BOS] and [EOS]"),
    ({"tokenizer_type": "BertWordPieceCase", "vocab_file": "vocab.txt", "make_vocab_size_divisible_by": 1}, 6, 1, {},
     6, "6 tokens"),
    ({"tokenizer_type": "BertWordPieceCase", "vocab_file": "vocab.txt", "vocab_extra_ids": 3}, 128, 1, {},
     11, "11 tokens"),
    ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "vocab.json"}, 128, 1, {}, 5, "5 tokens"),
    ({"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "/their/vocab.json"}, 50304, 1, {"vocab_file": "vocab.json"},
     5, "5 tokens"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_true_size(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, case) -> None:
    args, padded, ranks, overrides, expected, note = case
    monkeypatch.chdir(tmp_path)
    pathlib.Path("vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n")
    pathlib.Path("vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 4}))  # ids 2 and 3 are not given
    notes: list[str] = []
    assert true_vocab_size(args, padded, ranks, overrides, notes) == expected
    assert note in "".join(notes) and bool(notes) == bool(note)


@pytest.mark.parametrize(
    ("args", "overrides", "text"),
    [
        (
            {"tokenizer_type": "NullTokenizer", "vocab_size": 128},
            {},
            "with the tokenizer NullTokenizer must fit into the 128 rows of the embedding, and needs 129; found 128",
        ),
        ({"orig_vocab_size": 200}, {}, "orig_vocab_size of the arguments must fit into the 128 rows .*; found 200"),
        ({"vocab_size": 99}, {"vocab_size": 200}, "--vocab-size must fit into the 128 rows of .*; found 200"),
    ],
)
def test_more_tokens_than_rows_is_an_error(args, overrides, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        true_vocab_size(args, 128, 1, overrides, [])


def test_a_vocabulary_of_another_model_is_told_as_generate_tells_it(tmp_path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({str(number): number for number in range(200)}))
    with pytest.raises(
        CheckpointError,
        match="the tokenizer has 200 tokens and the embedding 128 rows: name the tokenizer that the weights",
    ):
        true_vocab_size(
            {"tokenizer_type": "GPT2BPETokenizer"}, 128, 1, {"vocab_file": str(tmp_path / "vocab.json")}, []
        )


@pytest.mark.slow
def test_a_run_with_null_tokenizer_goes_through_megatron_and_on(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """As Megatron stores it: vocab_size without the end of document, no orig_vocab_size."""
    config = tiny_config(
        write_corpus(str(tmp_path / "corpus")), str(tmp_path / "run"), train_iters=2, lr_warmup_iters=0
    )
    stored = to_arguments(
        config.replace(vocab_size=VOCABULARY + 1),
        iteration=1,
        tensor=1,
        pipeline=1,
        split=None,
        virtual=None,
        data=1,
        padded=128,
    )
    assert (stored["vocab_size"], stored["orig_vocab_size"]) == (VOCABULARY, VOCABULARY + 1)
    words = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 "
    words += "--global-batch-size 2 --lr 1e-3 "
    words += (
        f"--train-iters 2 --data-path {tmp_path}/corpus --split 90,5,5 --eval-iters 0 --progress none --device cpu "
    )
    null = f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY} "
    assert main(["pretrain", "gpt", *shlex.split(words + null + f"--save-interval 2 --run-dir {tmp_path}/run")]) == 0
    assert f"padded vocab (size: {VOCABULARY + 1})" in capsys.readouterr().out
    assert main(["checkpoint", "export", f"{tmp_path}/run", f"{tmp_path}/megatron", "--to", "megatron"]) == 0
    file = next((tmp_path / "megatron").rglob("*.pt"))
    content = torch.load(file, weights_only=False)
    del content["args"].orig_vocab_size
    torch.save(content, file)
    assert main(["checkpoint", "import", f"{tmp_path}/megatron", f"{tmp_path}/back"]) == 0
    imported = formats.read(tmp_path / "back")
    assert imported["model/embedding.weight"].shape[0] == imported.config.model.vocab_size == VOCABULARY + 1
    going_on = words + f"--load {tmp_path}/back --run-dir {tmp_path}/on --finetune "
    assert main(["pretrain", "gpt", *shlex.split(going_on + null)]) == 0, "the value that the run was given"
    capsys.readouterr()
    assert main(["pretrain", "gpt", *shlex.split(going_on + null.replace(str(VOCABULARY), "60"))]) != 0
    assert f"asked for is [61, 32] -> --vocab-size {VOCABULARY}\n" in capsys.readouterr().err
    assert main(["pretrain", "gpt", *shlex.split(going_on + "--use-checkpoint-args")]) == 0
    output = capsys.readouterr()
    assert (
        f"the tokenizer is that of {tmp_path}/back, a NullTokenizer" in output.err
        and f"vocab_size: {VOCABULARY}\n" in output.out
    )
    assert from_yaml(next((tmp_path / "on").rglob("config.yaml")).read_text()).data.tokenizer_type == "NullTokenizer"
