"""A server of a tiny model in a process of its own: python -m tests.serving.server_process TOKENIZER.json OPTIONS."""

import json
import pathlib
import sys

import torch

from megalith.config.sections.model import ModelConfig
from megalith.data.tokenizers.tokenizer import build_tokenizer
from megalith.generation.model import TextModel
from megalith.runtime.build import build_model
from megalith.serving.options import ServeOptions


def tiny_model(tokenizer_file: pathlib.Path | str) -> TextModel:
    """The same model in every process."""
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(tokenizer_file))
    config = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=tokenizer.vocab_size,
        max_position_embeddings=200, init_method_std=0.3,
    )  # fmt: skip
    return TextModel(build_model(config, torch.device("cpu"), torch.float32, seed=5), tokenizer)


if __name__ == "__main__":
    from megalith.serving.server import serve_model

    torch.set_num_threads(1)
    sys.exit(serve_model(tiny_model(sys.argv[1]), "tiny", ServeOptions(port=0, **json.loads(sys.argv[2]))))
