"""A tiny tokenizer of many scripts and tiny models with random weights, for every test of this folder."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from megalith import checkpoint
from megalith.config.flags.loading import to_yaml
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megalith.generation.model import TextModel
from megalith.runtime.build import build_model
from megalith.runtime.state import weights

CORPUS = [
    "Once upon a time there was a small model, and the model wrote.",
    "Zürich, 東京, Ελλάδα, 😀 naïve café; once more upon a time.",
]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tokenizer.json: byte-level BPE of 300 tokens, the first `<|endoftext|>`."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: pathlib.Path) -> Tokenizer:
    return build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tokenizer_file))


@pytest.fixture
def make(tokenizer: Tokenizer) -> Callable[..., TextModel]:
    """`make(dtype=..., **config)`: a model in evaluation mode with its tokenizer."""

    def made(dtype: torch.dtype = torch.float32, **form: Any) -> TextModel:
        base = {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": 200,
            "init_method_std": 0.3,
        }
        return TextModel(build_model(ModelConfig(**{**base, **form}), torch.device("cpu"), dtype, seed=5), tokenizer)

    return made


@pytest.fixture
def run(make: Callable[..., TextModel], tokenizer: Tokenizer, tmp_path: pathlib.Path) -> tuple[pathlib.Path, TextModel]:
    """A run's folder with two checkpoints of an ALiBi model of three heads, and the model of the latest."""
    form = {"position_embedding_type": "alibi", "num_attention_heads": 3, "hidden_size": 36, "hidden_dropout": 0.5}
    model = make(**form)
    names = ("num_layers", "vocab_size", "max_position_embeddings", "init_method_std", *form)
    text = to_yaml(RunConfig().replace(**{name: getattr(model.config, name) for name in names}))
    tokenizer.save(tmp_path / "tokenizer")
    files = {f"tokenizer/{path.name}": path for path in (tmp_path / "tokenizer").iterdir()}
    folder = tmp_path / "run"
    for iteration in (10, 20):
        with torch.no_grad():
            model.embedding.weight.mul_(1.1)
        checkpoint.save(
            folder / "checkpoints", iteration, weights(model), train_state={}, config_yaml=text, files=files
        )
    return folder, model
