"""Makes tests/checkpoint/data/v1 once, with the release that wrote schema 1: run this file with python."""

import pathlib

import torch

from megalith import checkpoint

CONFIG = """\
model:
  model_type: gpt
  num_layers: 1
  hidden_size: 3
  num_attention_heads: 1
  vocab_size: 4
"""

if __name__ == "__main__":
    state = {
        "model/embedding.weight": torch.arange(12.0).view(4, 3) / 7,
        "model/final_norm.weight": torch.tensor([1, 0.5, -2], dtype=torch.bfloat16),
        "optimizer/exp_avg/embedding.weight": torch.full((4, 3), 0.25),
        "optimizer/step/embedding.weight": torch.tensor(5.0),
    }
    folder = pathlib.Path(__file__).parent / "v1"
    checkpoint.save(
        folder, 5, state, train_state={"consumed_train_samples": 160, "consumed_valid_samples": 0}, config_yaml=CONFIG
    )
