"""A curve of 100 steps per model, kept in a file: a change of any number shows. `python tests/losses/test_losses.py` writes them anew."""

import json
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))

from megalith.training.pretrain import train  # noqa: E402
from tests.tiny import losses, tiny_bert, tiny_config, write_corpus, write_sentences  # noqa: E402

MODELS: dict[str, dict] = {
    "bert": {"hidden_dropout": 0.0, "attention_dropout": 0.0, "lr": 5e-3, "bias_gelu_fusion": False},
    "gpt": {"openai_gelu": True},
    "llama": {"position_embedding_type": "rope", "swiglu": True, "normalization": "RMSNorm", "num_query_groups": 2,
              "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "hidden_dropout": 0.0, "attention_dropout": 0.0},
}  # fmt: skip


def curve(name: str, corpus: str, folder: pathlib.Path) -> list[float]:
    make = tiny_bert if name == "bert" else tiny_config
    train(make(corpus, str(folder / name), train_iters=100, eval_iters=0, **MODELS[name]))
    return losses(str(folder / name))


@pytest.mark.parametrize("name", MODELS)
def test_the_curve_is_the_kept_one(name, corpus, sentences, tmp_path):
    """1e-4: other processors add in another order, and 100 steps amplify that."""
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    found = curve(name, sentences if name == "bert" else corpus, tmp_path)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < 0.65 * found[0]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        tiny, sentences = write_corpus(f"{scratch}/tiny"), write_sentences(f"{scratch}/sentences")
        for model in MODELS:
            path = sentences if model == "bert" else tiny
            (FOLDER / f"{model}.json").write_text(json.dumps(curve(model, path, pathlib.Path(scratch)), indent=0) + "\n")
