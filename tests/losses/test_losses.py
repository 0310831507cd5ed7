"""A curve of 100 steps per model, kept in a file: a change of any number shows, in one process and in every layout.

`python tests/losses/test_losses.py [MODEL ...]` writes the files anew.
"""

import json
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))

from megalith.config.run import RunConfig  # noqa: E402
from megalith.training.pretrain import train  # noqa: E402
from tests.tiny import losses, tiny_bert, tiny_config, tiny_t5, write_corpus, write_sentences  # noqa: E402

MODELS: dict[str, dict] = {
    "alibi": {"position_embedding_type": "alibi", "attention_head_type": "multiquery"},
    "bert": {"hidden_dropout": 0.0, "attention_dropout": 0.0, "lr": 5e-3, "bias_gelu_fusion": False},
    "gpt": {"openai_gelu": True},
    "llama": {"position_embedding_type": "rope", "swiglu": True, "normalization": "RMSNorm", "num_query_groups": 2,
              "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "hidden_dropout": 0.0,
              "attention_dropout": 0.0},
    # T5 v1.1's activation: with ReLU a single unit at zero, where rounding decides, makes layouts' curves differ.
    "t5": {"position_embedding_type": "relative", "normalization": "RMSNorm", "add_bias_linear": False,
           "glu_activation": "geglu_tanh", "softmax_scale": 1.0, "initializer_factor": 1.0, "scale_output": True},
}  # fmt: skip
LAYOUTS: dict[str, dict] = {  # of two processes
    "tp2 sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2 zero-bubble": {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zero_bubble", "micro_batch_size": 2},
    "dp2 sharded": {"data_parallel_sharding": "full"},
    "cp2": {"context_parallel_size": 2},
}
QUICK = (("llama", "dp2 sharded"),)  # the other pairs are slow


def config(name: str, corpus: str, folder: pathlib.Path) -> RunConfig:
    """A run of 100 steps. corpus: the prefix of what the model reads."""
    make = {"bert": tiny_bert, "t5": tiny_t5}.get(name, tiny_config)
    return make(corpus, str(folder / name), train_iters=100, eval_iters=0, **MODELS[name])


def run(config: RunConfig) -> None:
    """On each rank of a pool."""
    train(config)


def assert_kept(name: str, folder: str) -> None:
    """1e-4: other processors add in another order, and 100 steps amplify that."""
    expected, found = json.loads((FOLDER / f"{name}.json").read_text()), losses(folder)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < 0.65 * found[0]


@pytest.fixture
def reads(corpus: str, sentences: str) -> dict[str, str]:
    """Model -> what it reads."""
    return {name: sentences if name in ("bert", "t5") else corpus for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_the_curve_is_the_kept_one(name, reads, tmp_path):
    one = config(name, reads[name], tmp_path)
    train(one)
    assert_kept(name, one.run_folder)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in QUICK else pytest.mark.slow)
        for name in MODELS
        for layout in LAYOUTS
    ],
)
def test_the_curve_is_the_kept_one_in_every_layout(name, layout, reads, ranks, tmp_path):
    one = config(name, reads[name], tmp_path).replace(**LAYOUTS[layout])
    ranks(run, 2, one, timeout=280)
    assert_kept(name, one.run_folder)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        tiny, sentences = write_corpus(f"{scratch}/tiny"), write_sentences(f"{scratch}/sentences")
        for model in sys.argv[1:] or MODELS:
            one = config(model, sentences if model in ("bert", "t5") else tiny, pathlib.Path(scratch))
            train(one)
            (FOLDER / f"{model}.json").write_text(json.dumps(losses(one.run_folder), indent=0) + "\n")
