"""Text generation with encoder-decoders: against runs without a cache, transformers, and the command line."""

import json
import pathlib

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

import megalith
from megalith.cli.main import main
from megalith.common.errors import ConfigError
from megalith.data.tokenizers.tokenizer import build_tokenizer
from megalith.generation.beam import beam_search
from megalith.generation.generate import complete, generate, score

PROMPTS = ["the model wrote a small text", "once", "upon a time the model wrote, and wrote again", ""]
WORDS = ["the", "model", "wrote", "a", "small", "text", "once", "upon", "time", "and", "again", ","]
FORMS = {
    "megatron": {"add_bias_linear": True},
    "its own": {"position_embedding_type": "relative", "normalization": "RMSNorm", "add_bias_linear": False,
                "softmax_scale": 1.0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12},
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tokenizer.json as T5's: pieces with their likelihood, <pad>, </s> and no bos; </s> after every text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in WORDS)]
    pieces += [(letter, -6.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("t5")
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture
def make_t5(make, vocabulary):
    """`make_t5(form)`: a T5 in float64 with that vocabulary."""

    def made(form: str):
        tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(vocabulary))
        sizes = {"decoder_num_layers": 3, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 40}
        model = make(torch.float64, model_type="t5", **sizes, **FORMS[form])
        model.tokenizer = tokenizer
        return model

    return made


@torch.no_grad()
def greedy_without_cache(model, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding that reads everything again for each token."""
    ids = [model.tokenizer.pad]
    for _ in range(count):
        ids.append(model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([ids]))[0, -1].argmax().item())
    return ids[1:]


@pytest.mark.parametrize("form", FORMS)
def test_greedy_equals_reading_everything_again(form: str, make_t5) -> None:
    model = make_t5(form)
    together = complete(model, PROMPTS, max_new_tokens=20, top_k=1, stop_at_eod=False)
    for made in together:
        assert made.ids == greedy_without_cache(model, made.prompt_ids, 20)
        assert made.text == made.continuation
    assert len({tuple(made.ids) for made in together}) == len(PROMPTS)  # the prompts matter
    assert together == complete(model, PROMPTS, max_new_tokens=20, top_k=1, stop_at_eod=False, batch_size=1)


def test_rows_that_end_leave_the_others_as_they_were(make_t5) -> None:
    model = make_t5("its own")
    options = {"max_new_tokens": 30, "seed": 3, "num_samples": 4, "temperature": 1.5}
    free = complete(model, PROMPTS, stop_at_eod=False, **options)
    ended = complete(model, PROMPTS, **options)
    eos = model.tokenizer.eos
    assert {made.finish for made in ended} == {"stop", "length"}
    for made, longer in zip(ended, free):
        count = longer.ids.index(eos) + 1 if eos in longer.ids else 30
        assert made.ids == longer.ids[:count] and "</s>" not in made.text


@pytest.mark.parametrize("form", FORMS)
def test_beams(form: str, make_t5) -> None:
    model = make_t5(form)
    prompt = model.tokenizer.encode(PROMPTS[0])
    (greedy,) = complete(model, [prompt], max_new_tokens=6, top_k=1)
    assert beam_search(model, prompt, beam_width=1, max_new_tokens=6)[0].ids == greedy.ids
    beams = beam_search(model, prompt, beam_width=4, max_new_tokens=6)
    for made in beams:
        target = torch.tensor([made.ids])
        with torch.no_grad():
            losses = model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *made.ids[:-1]]]), labels=target)
        assert made.score == pytest.approx(-losses.sum().item() / len(made.ids), abs=1e-5)
    assert generate(model, PROMPTS[0], beam_width=4, max_new_tokens=6, num_samples=4) == [made.text for made in beams]


def test_the_model_is_as_before(make_t5) -> None:
    model = make_t5("its own")
    given = {"inputs": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[0, 7]])}
    before = model(**given)
    complete(model, PROMPTS, max_new_tokens=3)
    assert torch.equal(model(**given), before)


def test_transformers_writes_the_same(vocabulary: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
    config = transformers.T5Config(
        vocab_size=42, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=12, decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    reference = transformers.T5ForConditionalGeneration(config).eval()
    reference.lm_head.weight = torch.nn.Parameter(torch.randn(42, 32))
    their_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(vocabulary), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    for part in (reference, their_tokenizer):
        part.save_pretrained(tmp_path / "folder")
    model = megalith.load(tmp_path / "folder")
    given = their_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    expected = reference.generate(
        given.input_ids, attention_mask=given.attention_mask, max_new_tokens=25, do_sample=False, num_beams=1
    )
    made = complete(model, PROMPTS, max_new_tokens=25, temperature=0.0)
    rows = [row[1 : row.index(1) + 1] if 1 in row else row[1:] for row in expected.tolist()]
    assert [one.ids for one in made] == rows and len(set(map(tuple, rows))) > 2

    capsys.readouterr()
    words = [
        "generate",
        "--load",
        str(tmp_path / "folder"),
        "--prompt",
        PROMPTS[0],
        "--greedy",
        "--max-new-tokens",
        "25",
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out == made[0].text + "\n"
    assert main([*words, "--out-file", str(tmp_path / "out.jsonl")]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["continuation"] == made[0].text


def test_what_cannot_be(make_t5) -> None:
    model = make_t5("megatron")
    with pytest.raises(ConfigError, match="prompt has 41 tokens"):
        complete(model, [[3] * 41], max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"after its start token has 41; .* Ask for at most 39"):
        complete(model, [[3]], max_new_tokens=40)
    with pytest.raises(ConfigError, match="Load a GPT"):
        score(model, PROMPTS)
    model.tokenizer = None
    with pytest.raises(ConfigError, match=r"set model\.tokenizer"):
        complete(model, [[3]], max_new_tokens=2)
