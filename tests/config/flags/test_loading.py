"""Recipe < YAML < flags, every mistake at once, and back to YAML."""

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import ConfigError
from megalith.config.flags.loading import complete, from_yaml, load_config, to_yaml
from megalith.config.flags.values import fields
from megalith.config.run import RunConfig

SHAPE = shlex.split(
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 2 --lr 1e-3 "
    "--train-iters 5"
)
RECIPE = """
about: {summary: a test}
model: {num_layers: 3, hidden_size: 96, num_attention_heads: 6}
data: {seq_length: 16}
batch: {micro_batch_size: 1}
optimizer: {lr: 1e-2}
schedule: {train_iters: 9}
"""


def load(*argv, **options):
    return load_config(argv, data=False, **options)


def errors(*argv, **options):
    with pytest.raises(ConfigError) as caught:
        load(*argv, **options)
    return str(caught.value)


def test_precedence(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  num_layers: 4\n  hidden_size: 48\nlr: 2e-2\n")
    config, _ = load(
        "gpt", "--recipe", "r", "--config", str(file), "--hidden-size", "24", read_recipe=lambda name: RECIPE
    )
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (4, 24, 6)
    assert config.optimizer.lr == 0.02 and config.data.seq_length == 16


def test_a_flag_can_unset_what_a_recipe_sets():
    config, _ = load("--recipe", "r", "--train-samples", "7", "--train-iters", "none", read_recipe=lambda name: RECIPE)
    assert config.schedule.train_iters is None and config.schedule.train_samples == 7


def test_lengths_follow_from_each_other():
    config, notices = load(*SHAPE)
    assert config.model.max_position_embeddings == 32 and notices == [
        "--max-position-embeddings is not given: it is --seq-length, 32"
    ]
    words = [*SHAPE[:6], *SHAPE[8:]]
    config, notices = load(*words, "--max-position-embeddings", "64")
    assert config.data.seq_length == 64 and notices == [
        "--seq-length is not given: it is --max-position-embeddings, 64"
    ]


def test_tokenizer_type_follows_from_its_files():
    assert complete({"vocab_file": "v", "merge_file": "m"}, []).data.tokenizer_type == "GPT2BPETokenizer"
    assert complete({"tokenizer_model": "t.json"}, []).data.tokenizer_type == "HuggingFaceTokenizer"
    assert complete({"tokenizer_model": "t.json", "tokenizer_type": "x"}, []).data.tokenizer_type == "x"


def test_all_sources_of_mistakes_at_once(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  num_layer: 4\n  hidden_size: wide\n  lr: 3\ncolour: red\nbatch: 3\n")
    text = errors("gpt", "word", *SHAPE[4:], "--config", str(file), "--warmup-iters", "3")
    assert text.startswith("7 problems\n")
    assert f"{file}: unknown key num_layer: did you mean num_layers?" in text
    assert f"{file}: hidden_size must be a whole number" in text and "found 'wide'" in text
    assert "lr must be in the section optimizer; found 'model'" in text
    assert "unknown key colour" in text and "batch is a section" in text
    assert "unknown flag --warmup-iters: did you mean --lr-warmup-iters?" in text
    assert "unexpected 'word'" in text
    once = "one mistake is reported once"
    assert "--num-layers must be given" not in text and "--hidden-size must be given" not in text, once


def test_missing_and_unreadable_files(tmp_path):
    assert errors("--config", str(tmp_path / "none.yaml")).startswith("--config must name a readable YAML file")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "readable YAML file" in errors(*SHAPE, "--config", str(tmp_path / "bytes.yaml"))
    assert "reads no recipes" in errors("--recipe", "r")
    (tmp_path / "empty.yaml").write_text("")
    assert load(*SHAPE, "--config", str(tmp_path / "empty.yaml"))[0] == load(*SHAPE)[0]


def test_problems_of_the_combination_are_found_with_those_of_the_flags():
    text = errors(*SHAPE, "--num-attention-heads", "5", "--fp16", "--bf16", "--lr", "fast")
    assert text.startswith("3 problems") and "--lr must be a finite number" in text and "found 'fast'" in text
    assert "--fp16" in text and "--num-attention-heads" in text


def test_the_model_of_a_checkpoint():
    stored = load(*SHAPE, "--hidden-size", "96", "--swiglu", "--vocab-size", "77")[0]
    asked = []

    def read(values):
        asked.append((values["load"], values.get("ckpt_step")))
        return to_yaml(stored)

    config, notices = load(
        *SHAPE,
        "--load",
        "there",
        "--ckpt-step",
        "5",
        "--use-checkpoint-args",
        "--num-layers",
        "9",
        read_checkpoint=read,
    )
    assert config.model == stored.model and config.checkpoint.load == "there" and asked == [("there", 5)]
    assert "--use-checkpoint-args: the model is that of there, whatever recipe, YAML and flags say" in notices
    assert f"--num-layers is {stored.model.num_layers} there, and not 9" in notices
    assert "--hidden-size is 96 there, and not 64" in notices
    assert not any("--num-attention-heads" in line for line in notices), "of which both say the same"
    words = shlex.split("--use-checkpoint-args --load there --micro-batch-size 2 --lr 1e-3 --train-iters 5")
    assert load(*words, read_checkpoint=read)[0].data.seq_length == 32, "the length follows from the model"
    assert "reads no checkpoint" in errors(*words)
    with pytest.raises(ConfigError) as caught:
        load_config(["bert", *words, "--lr", "x"], read_checkpoint=read)
    wanted = "The model must be gpt, that of there, because of --use-checkpoint-args; found 'bert'"
    for part in (wanted, "Write megalith pretrain gpt", "--lr must be a finite number"):
        assert part in str(caught.value)


def test_the_tokenizer_of_a_checkpoint():
    """--use-checkpoint-args takes it from the checkpoint; a tokenizer that the command names wins, with a notice."""
    stored = load(*SHAPE, "--vocab-size", "77")[0]
    words = shlex.split(
        "--use-checkpoint-args --load there --micro-batch-size 2 --lr 1e-3 --train-iters 5 --data-path d"
    )

    def resolved(found, *more):
        return load_config(
            [*words, *more], read_checkpoint=lambda *asked: to_yaml(stored), read_tokenizer=lambda *asked: found
        )

    bpe = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": "there/tokenizer/t.json",
        "vocab_extra_ids": 3,
        "vocab_size": None,
    }
    config, notices = resolved(bpe)
    assert (config.data.tokenizer_model, config.data.vocab_extra_ids) == (
        "there/tokenizer/t.json",
        3,
    ) and config.model == stored.model
    assert "--use-checkpoint-args: the tokenizer is that of there, a HuggingFaceTokenizer" in notices
    assert resolved(bpe, "--tokenizer-type", "HuggingFaceTokenizer")[0] == config
    config, notices = resolved(bpe, "--tokenizer-model", "other.json")
    assert (config.data.tokenizer_model, config.data.vocab_extra_ids) == ("other.json", 0)
    assert "the tokenizer is that of --tokenizer-model other.json, not the HuggingFaceTokenizer in there" in "".join(
        notices
    )
    config, _ = resolved({"tokenizer_type": "NullTokenizer", "vocab_size": 76})
    assert config.model.vocab_size == 76, "--vocab-size of NullTokenizer is a row less"
    with pytest.raises(ConfigError, match=r"The tokenizer must be .*found nothing"):
        resolved({})
    with pytest.raises(ConfigError) as raised:  # a mistake elsewhere leaves it known
        resolved(bpe, "--packin")
    assert str(raised.value).startswith("unknown flag --packin: did you mean --packing?")


def test_what_the_dataset_does_not_read_is_reported():
    notices = load(*SHAPE, "--mask-prob", "0.3", "--decoder-seq-length", "12")[1]
    assert "--mask-prob has no effect: only the dataset bert or t5 reads it" in notices
    assert "--decoder-seq-length has no effect: only the dataset t5 or chat or completion reads it" in notices
    assert not any("no effect" in notice for notice in load(*SHAPE)[1])


def test_a_config_survives_yaml():
    config, _ = load(*SHAPE, "--swiglu", "--lr", "1e-5", "--split", "969, 30, 1", "--name", "ü: #1")
    assert from_yaml(to_yaml(config)) == config == from_yaml(to_yaml(config, changed_only=True))
    assert set(fields()) == {
        line.split(":")[0].strip()
        for line in to_yaml(RunConfig()).splitlines()
        if line.startswith("  ") and not line.lstrip().startswith("- ")
    }
    assert to_yaml(RunConfig(), changed_only=True) == "" and from_yaml("") == RunConfig()


def test_from_yaml_reports_everything():
    with pytest.raises(ConfigError, match="2 problems"):
        from_yaml("lr: fast\nname_of: x\n")
    assert from_yaml("seq_length: 10\ntrain_tokens: 95\n").schedule.train_samples == 10


def values(field):
    strategies = {
        int: st.integers(-(10**12), 10**12),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
    }
    text = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda word: word.lower() not in ("none", "null"))
    one = strategies.get(field.item if field.kind is list else field.kind, text)
    return st.lists(one) if field.kind is list else one | st.none() if field.optional else one


@settings(max_examples=20)  # YAML in pure Python takes 20 ms for a whole config
@given(st.data())
def test_any_config_survives_yaml(data):
    names = data.draw(st.lists(st.sampled_from(sorted(fields())), unique=True))
    config = RunConfig().replace(**{name: data.draw(values(fields()[name])) for name in names})
    assert from_yaml(to_yaml(config)) == config == from_yaml(to_yaml(config, changed_only=True))
