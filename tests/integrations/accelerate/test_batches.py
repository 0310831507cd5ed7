"""Losses and every gradient of transformers' batches equal transformers' own: families, heads, padding, positions."""

import warnings

import pytest
import torch
import transformers

from megalith.common.errors import ConfigError
from megalith.integrations.accelerate.batches import shift_right
from tests.integrations.accelerate.placed import IGNORED, LENGTH, PADDED, TOLERANCE, Placed, drawn, masked_lm
from tests.originals.families import BERTS, HEADED, MODELS, t5

NAMES = "gpt2", "llama, padding", "mistral", "qwen2, half slides", "qwen3", "gemma, padding", "falcon 7b", "neox"
GPTS = {name: (MODELS | PADDED)[name] for name in NAMES}
ALIBI = {name: MODELS[name] for name in ("bloom", "falcon rw")}


@pytest.mark.parametrize("name", GPTS)
def test_causal_models(name: str) -> None:
    """Padding on either side, where the last padding before a text predicts its first token; and labels of padding."""
    placed = Placed("gpt", GPTS[name])
    pad = placed.hf_config.pad_token_id or 0
    for padding in ("right", "left", "both", "gaps"):
        given = drawn(padding, pad)
        placed.check(given)
        placed.check(given | {"labels": given["input_ids"]})
    whole = {key: value for key, value in drawn("left", pad).items() if key != "attention_mask"}
    placed.check(whole)
    ones = placed.batch(whole | {"attention_mask": torch.ones_like(whole["input_ids"])})
    assert "padding_mask" not in ones


@pytest.mark.parametrize("name", ALIBI)
def test_alibi(name: str) -> None:
    """Transformers' slopes count tokens. Padding that sees no token sees all of them there, which has to be masked."""
    placed = Placed("gpt", ALIBI[name])
    placed.check(drawn("right"))
    placed.check(drawn("right") | {"labels": drawn("right")["input_ids"]})
    given = drawn("left")
    first = given["attention_mask"].cumsum(1) == 1
    with pytest.raises(ConfigError, match=r"must have no loss with ALiBi: .*; found 2 labels. Pad on the right"):
        placed.check(given)
    placed.check(given | {"labels": torch.where(first, IGNORED, given["labels"])})
    with pytest.raises(ConfigError, match="before or after the tokens of a row with ALiBi; found gaps"):
        placed.batch(drawn("gaps"))
    with pytest.raises(ConfigError, match="position_ids must be for a model with learned or rotary positions"):
        placed.batch(drawn("right") | {"position_ids": torch.arange(LENGTH)[None]})


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "falcon 7b"])
def test_packed_texts(name: str) -> None:
    """position_ids that begin anew: texts of their own where transformers takes them so."""
    placed = Placed("gpt", MODELS[name])
    given = {key: drawn("right")["input_ids"] for key in ("input_ids", "labels")}
    apart = torch.tensor([*range(7), *range(10)])[None]
    given["position_ids"] = apart.repeat(3, 1)
    placed.check(given | {"use_cache": False})
    documents = placed.batch(given | {"use_cache": False}).get("documents")
    assert (documents is None) == (name == "falcon 7b")
    placed.check(given | {"attention_mask": torch.ones(3, LENGTH), "position_ids": apart})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        placed.check(given)
    if name == "llama":
        with pytest.warns(UserWarning, match="begin anew within a row: as in transformers with use_cache=True"):
            placed.batch(given)
        placed.hf_config.use_cache = False
        placed.check(given)
    placed.check(given | {"position_ids": torch.arange(3, 3 + LENGTH)[None]})


@pytest.mark.parametrize("name", BERTS)
def test_bert_for_pretraining(name: str) -> None:
    placed = Placed("bert", BERTS[name])
    order = {"next_sentence_label": torch.tensor([0, 1, 1])}
    for padding in ("right", "left", "gaps"):
        given = drawn(padding)
        given["token_type_ids"] = (torch.arange(LENGTH) > 8).long().repeat(3, 1)
        placed.check(given | order)
    placed.check(given | {"next_sentence_label": torch.tensor([[0], [IGNORED], [1]])})
    placed.check(given | order | {"position_ids": torch.arange(LENGTH - 1, -1, -1)[None]})
    for lacking in ("labels", "next_sentence_label"):
        with pytest.raises(ConfigError, match=r"both labels and next_sentence_label.*ForMaskedLM"):
            placed.batch({key: value for key, value in (given | order).items() if key != lacking})


@pytest.mark.parametrize("kind", ["Bert", "MegatronBert"])
def test_masked_lm(kind: str) -> None:
    """Its segments' embedding is merged into that of the positions, whose gradient is compared by itself."""
    placed = Placed("bert", masked_lm(kind))
    for padding in ("right", "left"):
        placed.check(drawn(padding), but=("position_embedding.weight",))
        theirs = placed.original.bert.embeddings.position_embeddings.weight.grad
        assert (placed.model.position_embedding.weight.grad - theirs).abs().max() < TOLERANCE
    types = torch.zeros(3, LENGTH, dtype=torch.long)
    assert "token_types" not in placed.batch(drawn("right") | {"token_type_ids": types})
    with pytest.raises(ConfigError, match=r"token_type_ids must be 0 .*; found 1"):
        placed.batch(drawn("right") | {"token_type_ids": types + 1})
    with pytest.raises(ConfigError, match="next_sentence_label is for a model with a head for it"):
        placed.batch(drawn("right") | {"next_sentence_label": torch.tensor([0, 1, 1])})


@pytest.mark.parametrize("name", ["bert classes", "megatron-bert classes"])
def test_classification(name: str) -> None:
    placed = Placed("bert_classification", HEADED[name])
    given = drawn("right") | {"labels": torch.tensor([0, placed.hf_config.num_labels - 1, 1])}
    placed.check(given)
    placed.check(given | {"labels": torch.tensor([[0], [IGNORED], [1]]), "token_type_ids": given["attention_mask"]})
    with pytest.raises(ConfigError, match=r"single_label_classification: .*; found 'multi_label_classification'"):
        placed.batch(given | {"labels": torch.zeros(3, 2)})
    placed.hf_config.problem_type = "regression"
    with pytest.raises(ConfigError, match=r"found 'regression'. Take logits"):
        placed.batch(given)


@pytest.mark.parametrize("kind", ["T5", "MT5"])
def test_t5(kind: str) -> None:
    """With and without the decoder's inputs and its mask."""
    sizes = {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4, "vocab_size": 97}

    def made() -> transformers.PreTrainedModel:
        if kind == "T5":
            return t5()()
        return transformers.MT5ForConditionalGeneration(transformers.MT5Config(**sizes, dropout_rate=0.0))

    placed = Placed("t5", made)
    source = {key: value for key, value in drawn("right").items() if key != "labels"}
    target = {key: value[:, :7] for key, value in drawn("right", seed=2).items()}
    for padding in ("right", "left"):
        placed.check({**drawn(padding), "labels": target["labels"][:, :7]})
    shifted = shift_right(target["labels"], placed.hf_config)
    assert torch.equal(shifted, placed.original.prepare_decoder_input_ids_from_labels(target["labels"]))
    for padding in ("right", "left", "gaps"):
        given = drawn(padding, seed=3)
        labels = torch.where(given["attention_mask"].cumsum(1) == 0, IGNORED, given["input_ids"])
        decoder = {"decoder_input_ids": given["input_ids"], "decoder_attention_mask": given["attention_mask"]}
        placed.check({**source, **decoder, "labels": labels})
    with pytest.raises(ConfigError, match="must have no loss in a decoder"):
        placed.batch({**source, **decoder, "decoder_attention_mask": drawn("left")["attention_mask"]} | {
            "labels": given["input_ids"]
        })  # fmt: skip
    with pytest.raises(ConfigError, match="decoder_input_ids or labels must be there"):
        placed.batch(source)
    placed.hf_config.decoder_start_token_id = None
    with pytest.raises(ConfigError, match=r"decoder_start_token_id must be set, .*; found None"):
        placed.batch({**source, "labels": target["labels"]})
