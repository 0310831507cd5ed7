"""Indexed datasets in a script: the samples are those of pretrain with the same data, whatever the processes."""

import dataclasses
import types

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from accelerate.utils import GradientAccumulationPlugin

from megalith.common.errors import ConfigError, DataError, TrainingError
from megalith.config.run import RunConfig
from megalith.data.tokenizers.tokenizer import build_tokenizer, tokenizer_from_config
from megalith.integrations.accelerate.batches import IndexedBatch
from megalith.integrations.accelerate.config import run_config
from megalith.integrations.accelerate.data import MegatronLMDummyDataLoader, indexed_loaders
from megalith.integrations.accelerate.plugin import MegatronLMPlugin
from megalith.runtime.load import weights_of
from megalith.training.build import build_loaders, open_datasets
from tests.integrations.accelerate.helpers import accelerating, toy_model
from tests.tiny import tiny_bert, tiny_config, tiny_t5, write_corpus, write_sentences

CONFIGS = {"gpt": tiny_config, "bert": tiny_bert, "t5": tiny_t5}
TOKENIZER = ("tokenizer_type", "vocab_file", "vocab_extra_ids", "decoder_seq_length")


@pytest.fixture(autouse=True)
def clean():
    with accelerating():
        yield


@dataclasses.dataclass
class OneOfMany:
    """As much of a mesh as datasets need."""

    data_rank: int
    data_size: int
    device = torch.device("cpu")

    @property
    def world_size(self):
        return self.data_size


def session_of(config: RunConfig, kind: str, rank: int = 0, size: int = 1, folder=None, **plugin):
    """As much of a Session as datasets need."""
    hf_config = types.SimpleNamespace(eos_token_id=48)
    return types.SimpleNamespace(
        plugin=MegatronLMPlugin(megatron_dataset_flag=True, **plugin), config=config, kind=kind, hf_config=hf_config,
        hf_class=type("Toy", (), {}), runtime=types.SimpleNamespace(mesh=OneOfMany(rank, size)),
        gradient_state=GradientState(), tokenizer_folder=folder,
    )  # fmt: skip


@pytest.fixture
def corpora(tmp_path):
    """The prefix of a corpus for each kind of model."""
    texts, sentences = write_corpus(str(tmp_path / "texts")), write_sentences(str(tmp_path / "sentences"))
    return {"gpt": texts, "bert": sentences, "t5": sentences}


def join(micro_batches):
    return {name: torch.cat([each[name] for each in micro_batches]) for name in micro_batches[0]}


def same(found, expected):
    assert isinstance(found, IndexedBatch) and set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_samples_are_those_of_pretrain(kind, size, corpora, tmp_path):
    config = CONFIGS[kind](corpora[kind], str(tmp_path / "run"), micro_batch_size=2, global_batch_size=4 * size)
    plain = config.replace(data_path=[], tokenizer_type=None, vocab_file=None, split="969, 30, 1", train_iters=None)
    given = {name: getattr(config.data, name) for name in TOKENIZER if getattr(config.data, name)}
    if kind == "gpt":
        given["vocab_size"] = 48
    for rank in range(size):
        session = session_of(plain, kind, rank, size, num_micro_batches=2)
        mesh = session.runtime.mesh
        tokenizer = tokenizer_from_config(config.data, vocab_size=config.model.vocab_size)
        expected = build_loaders(config, mesh, open_datasets(config, mesh, tokenizer))
        dummy = MegatronLMDummyDataLoader(
            data_path=corpora[kind], splits_string="90,5,5", micro_batch_size=2, eval_interval=6, eval_iters=2,
            seq_length=config.data.seq_length, **given,
        )  # fmt: skip
        found = indexed_loaders(dummy, session, train_iters=12)
        assert any("tokenizer of the indexed datasets" in line for line in dummy.notices)
        for loader, name in zip(found, ("train", "valid", "test")):
            for step in range(12 if name == "train" else 2):
                same(next(loader), join(expected[name].step(step * 4 * size, 4 * size)))
        with pytest.raises(TrainingError, match="Raise train_iters of MegatronLMPlugin"):
            for _ in range(len(found[0])):
                next(found[0])


def dummy_of(prefix, **changes):
    given = {"data_path": prefix, "split": "90,5,5", "micro_batch_size": 2, "seq_length": 16}
    return MegatronLMDummyDataLoader(**(given | changes))


def tiny(prefix, tmp_path, **changes):
    return tiny_config(prefix, str(tmp_path), data_path=[], tokenizer_type=None, **changes)


def test_where_loaders_begin_and_begin_again(corpora, tmp_path):
    session = session_of(tiny(corpora["gpt"], tmp_path), "gpt", consumed_samples=[8, 4])
    train, valid, test = indexed_loaders(dummy_of(corpora["gpt"]), session)
    assert [iter(each) is each for each in (train, valid, test)] == [True] * 3
    assert next(train)["samples"].tolist() == [8, 9] and next(train)["samples"].tolist() == [10, 11]
    assert next(valid)["samples"].tolist() == [4, 5] and next(test)["samples"].tolist() == [0, 1]
    firsts = [next(valid)["samples"][0].item() for _ in range(len(valid))]
    assert sorted(firsts) == list(range(0, 2 * len(valid), 2)) and firsts[-1] == 4
    state = train.state_dict()
    following = next(train)
    train.load_state_dict(state)
    same(next(train), following)


def test_accumulation_counts_in_the_length_of_the_run(corpora, tmp_path):
    config = tiny(corpora["gpt"], tmp_path, train_iters=None)
    GradientState(GradientAccumulationPlugin(num_steps=3))
    train, *_ = indexed_loaders(dummy_of(corpora["gpt"]), session_of(config, "gpt", train_iters=None), train_iters=40)
    assert len(train.dataset) >= 40 * 3 * 2


def test_a_model_of_transformers_without_a_tokenizer(corpora, tmp_path):
    plugin = MegatronLMPlugin(megatron_dataset_flag=True, train_iters=10, num_micro_batches=2, seq_length=16)
    model = toy_model("gpt2", eos_token_id=48)
    config = run_config(
        plugin, weights_of(model).config, num_processes=1, micro_batch_size=2, seq_length=16, device="cpu"
    )
    session = session_of(config, "gpt", num_micro_batches=2)
    dummy = dummy_of(corpora["gpt"], reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    batch = next(indexed_loaders(dummy, session)[0])
    assert batch["input_ids"].shape == (4, 16) and torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert torch.equal(batch["loss_mask"], (batch["input_ids"] != 48).float()) and "documents" in batch
    (line,) = dummy.notices
    assert line.endswith("none; the model has 96 tokens, of which 48 ends documents")


def test_the_tokenizer_of_the_models_folder(corpora, tmp_path):
    folder = tmp_path / "model"
    build_tokenizer("BertWordPieceLowerCase", vocab_file=f"{corpora['bert']}.vocab").save(folder)
    config = tiny_bert(corpora["bert"], str(tmp_path), data_path=[], tokenizer_type=None, vocab_file=None)
    config = config.replace(vocab_size=53)
    given = {"seq_length": 24}
    for where in (None, tmp_path):
        with pytest.raises(ConfigError, match=r"The tokenizer must be given, as a bert dataset masks words"):
            indexed_loaders(dummy_of(corpora["bert"], **given), session_of(config, "bert", folder=where))
    dummy = dummy_of(corpora["bert"], **given)
    batch = next(indexed_loaders(dummy, session_of(config, "bert", folder=folder))[0])
    assert set(batch) >= {"input_ids", "token_types", "padding_mask", "labels", "loss_mask", "sentence_order"}
    assert dummy.notices == [f"tokenizer of the indexed datasets: that of {folder}"]
    with pytest.raises(ConfigError, match="the tokenizer has 53 tokens and the embedding 50 rows"):
        session = session_of(config.replace(vocab_size=50), "bert", folder=folder)
        indexed_loaders(dummy_of(corpora["bert"], **given), session)


class Provided:
    """Samples of Megatron's names."""

    def __init__(self, size, form):
        self.size, self.form = size, form

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        text = np.arange(index, index + 9)
        if self.form == "text":
            return {"text": text}
        ones = np.ones(8, np.float32)
        core = {"tokens": text[:-1], "labels": text[1:], "loss_mask": ones, "position_ids": np.arange(8)}
        core["attention_mask"] = np.ones((1, 8, 8), bool)
        return core if self.form == "core" else {"tokens": text[:-1]}


@pytest.mark.parametrize("form", ["text", "core"])
def test_datasets_of_the_users_own_function(form, tmp_path):
    asked = []

    def provider(counts):
        asked.append(counts)
        return Provided(100, form), Provided(10, form), None

    config = tiny("unused", tmp_path, train_iters=10, eval_interval=5, eval_iters=2)
    session = session_of(config, "gpt", custom_megatron_datasets_provider_function=provider)
    dummy = MegatronLMDummyDataLoader(micro_batch_size=2, seq_length=8)
    train, valid, test = indexed_loaders(dummy, session)
    assert asked == [[20, 12, 4]]
    batch = next(train)
    assert batch["input_ids"].tolist() == [list(range(8)), list(range(1, 9))] and len(valid) == 5
    assert torch.equal(batch["labels"], batch["input_ids"] + 1) and batch["loss_mask"].sum() == 16
    assert set(batch) == {"input_ids", "labels", "loss_mask", "samples"} | ({"positions"} if form == "core" else set())
    with pytest.raises(
        ConfigError, match=r"test data must be there .* Raise its part of split, or give test_data_path"
    ):
        next(test)


def test_samples_without_a_loss_mask(tmp_path):
    session = session_of(
        tiny("unused", tmp_path), "gpt",
        custom_megatron_datasets_provider_function=lambda counts: [Provided(100, "bare"), None, None],
    )  # fmt: skip
    with pytest.raises(DataError, match="without labels and loss_mask"):
        next(indexed_loaders(MegatronLMDummyDataLoader(micro_batch_size=2, seq_length=8), session)[0])


def test_a_split_without_documents(corpora, tmp_path):
    session = session_of(tiny(corpora["gpt"], tmp_path), "gpt")
    _, valid, _ = indexed_loaders(dummy_of(corpora["gpt"], split="100,0,0"), session)
    with pytest.raises(ConfigError, match=r"valid data must be there .* found none with split='100,0,0'"):
        next(valid)
    with pytest.raises(ConfigError, match="split '0,90,10' leaves no document to train on"):
        indexed_loaders(dummy_of(corpora["gpt"], split="0,90,10"), session)


def test_arguments_are_checked_all_at_once():
    with pytest.raises(ConfigError) as caught:
        MegatronLMDummyDataLoader(data_pth="x", split="1,0,0", splits_string="90,5,5", num_layers=2, seq_length="long")
    text = str(caught.value)
    for part in (
        "unknown name data_pth: did you mean data_path?",
        "splits_string is another spelling of split, '1,0,0', and must be equal to it; found '90,5,5'",
        "num_layers is no argument of data; found 2. Give it to MegatronLMPlugin",
        "micro_batch_size must be given",
        "seq_length must be a whole number",
    ):
        assert part in text
    both = MegatronLMDummyDataLoader(data_path="x", split="9,1", splits_string="9,1", micro_batch_size=1)
    assert both.values["split"] == "9,1" and both.notices == []
    assert both.dataset_args["splits_string"] == "9,1"


def test_a_prefix_with_spaces(tmp_path):
    prefix = write_corpus(str(tmp_path / "my texts"))
    assert MegatronLMDummyDataLoader(data_path=prefix, micro_batch_size=1).values["data_path"] == [prefix]
    blend = MegatronLMDummyDataLoader(data_path="0.3 a 0.7 b", micro_batch_size=1)
    assert blend.values["data_path"] == ["0.3", "a", "0.7", "b"]


def test_arguments_that_do_nothing_have_a_line(corpora):
    dummy = MegatronLMDummyDataLoader(
        data_path=corpora["gpt"], micro_batch_size=2, data_impl="mmap", encoder_seq_length=16
    )
    assert dummy.values["seq_length"] == 16
    assert [line.split(": ")[1] for line in dummy.notices] == [
        "data_impl is not needed", "encoder_seq_length is read as seq_length VALUE".replace("VALUE", "16"),
    ]  # fmt: skip


def test_what_cannot_be_made(corpora, tmp_path):
    config = tiny(corpora["gpt"], tmp_path, train_iters=None)
    with pytest.raises(ConfigError, match="The number of optimizer steps must be given"):
        indexed_loaders(dummy_of(corpora["gpt"]), session_of(config, "gpt"))
    with pytest.raises(ConfigError, match="The model of indexed datasets must be one that learns from text alone"):
        indexed_loaders(dummy_of(corpora["gpt"]), session_of(config, "bert_classification"), train_iters=4)
    with pytest.raises(ConfigError, match="MegatronLMDummyDataLoader: data_path must name the corpus"):
        dummy = MegatronLMDummyDataLoader(micro_batch_size=2)
        indexed_loaders(dummy, session_of(config, "gpt"), train_iters=4)
    with pytest.raises(DataError, match=r"MegatronLMDummyDataLoader: .*missing"):
        indexed_loaders(dummy_of(str(tmp_path / "missing")), session_of(config, "gpt"), train_iters=4)
