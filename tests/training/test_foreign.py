"""A run begins with another program's weights in every layout: its first loss is that of transformers."""

import pathlib
import shutil

import pytest
import torch
import transformers

import megalith
from megalith.checkpoint import formats
from megalith.checkpoint.formats import FORMATS, HuggingFaceOptions, MegatronOptions
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.cli.main import main
from megalith.common.errors import CheckpointError, ConfigError
from megalith.config.run import RunConfig
from megalith.data.build import build_datasets
from megalith.data.tokenizers.tokenizer import tokenizer_from_config
from megalith.runtime.load import weights_of
from megalith.training.pretrain import train
from megalith.workflows.conversion import convert
from tests.checkpoint import megatron_files
from tests.originals.families import MODELS, bert, make
from tests.originals.test_t5 import original
from tests.tiny import losses, tiny_bert, tiny_config, tiny_t5, write_sentences
from tests.training.placing import parallelized

MEGATRON = pathlib.Path(__file__).parents[3] / "shared/data/megatron/models/tp2pp1"
needs_shared = pytest.mark.skipif(not MEGATRON.exists(), reason="needs the Megatron files of ../shared/data")
ONE = {"train_iters": 1, "lr_warmup_iters": 0, "eval_iters": 0}
LAYOUTS = {  # name: (processes, what differs from one)
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "dp2, optimizer": (2, {"data_parallel_sharding": "optimizer"}),
    "dp2, full": (2, {"data_parallel_sharding": "full"}),
    "cp2": (2, {"context_parallel_size": 2}),
}


def llama(folder: pathlib.Path) -> str:
    """A Llama with grouped heads, of the vocabulary of the tiny corpus, as transformers saves it."""
    torch.manual_seed(0)
    make("Llama", vocab_size=49, num_key_value_heads=2, num_hidden_layers=2)().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """Folders of other programs."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    bert("Bert", vocab_size=60, num_hidden_layers=2)().save_pretrained(folder / "bert")
    original("t5").save_pretrained(folder / "t5")
    return {
        "llama": llama(folder / "llama"),
        "megatron": str(MEGATRON),
        "bert": str(folder / "bert"),
        "t5": str(folder / "t5"),
    }


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> str:
    return write_sentences(str(tmp_path_factory.mktemp("sentences") / "tiny"))


def config_of(source: str, load: str, corpus: str, sentences: str, folder: pathlib.Path, **changes) -> RunConfig:
    """A run of one step with the model of `load`; without dropout, which transformers draws otherwise."""
    run, prefix = {"bert": (tiny_bert, sentences), "t5": (tiny_t5, sentences)}.get(source, (tiny_config, corpus))
    form = vars(formats.read(load, options=dict(replicas="first")).config.model)
    rows = {"vocab_size": form["vocab_size"] - 1 if prefix == corpus else form["vocab_size"]}  # NullTokenizer adds one
    given = {
        **form,
        **rows,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "load": load,
        "finetune": source == "megatron",
    }
    return run(prefix, str(folder), **{**ONE, **given, "micro_batch_size": 4, **changes})


def run_all(configs: list[RunConfig]) -> list[float]:
    """On each rank: the runs one after another; the first loss of each."""
    for config in configs:
        train(config)
    return []


def of_transformers(model: torch.nn.Module, config: RunConfig) -> float:
    """Mean loss of the first global batch."""
    tokenizer = tokenizer_from_config(config.data, vocab_size=config.model.vocab_size)
    dataset = build_datasets(config, tokenizer, run_folder=config.run_folder)["train"]
    batch = {name: torch.stack([torch.tensor(dataset[i][name]).long() for i in range(8)]) for name in dataset[0]}
    more = (
        {"attention_mask": batch["padding_mask"], "decoder_input_ids": batch["decoder_input_ids"]}
        if "padding_mask" in batch
        else {}
    )
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], **more).logits
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="none", ignore_index=-1
    )
    return float((each * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["llama", pytest.param("megatron", marks=needs_shared), "t5", "bert"])
def test_the_first_loss_in_every_layout(source, sources, ranks, corpus, sentences, tmp_path) -> None:
    def config(name: str, **changes) -> RunConfig:
        return config_of(source, sources[source], corpus, sentences, tmp_path / name, **changes)

    train(config("one"))
    (one,) = losses(str(tmp_path / "one"))
    if source == "megatron":
        huggingface.write(formats.read(MEGATRON), tmp_path / "hf", HuggingFaceOptions())
    if source != "bert":  # whose second loss is of tests/originals
        kinds = {"t5": transformers.AutoModelForSeq2SeqLM}
        model = kinds.get(source, transformers.AutoModelForCausalLM).from_pretrained(
            tmp_path / "hf" if source == "megatron" else sources[source], dtype=torch.float32
        )
        assert one == pytest.approx(of_transformers(model, config("one")), rel=1e-5)
    for size in (2, 4):
        ours = {name: changes for name, (processes, changes) in LAYOUTS.items() if processes == size}
        ranks(run_all, size, [config(name, **changes) for name, changes in ours.items()], timeout=300)
        for name in ours:
            assert losses(str(tmp_path / name)) == pytest.approx([one], rel=1e-5), name


def test_two_layouts_of_a_hugging_face_folder(sources, ranks, corpus, sentences, tmp_path, capsys) -> None:
    """The covering set of the test above; and what the run says of its beginning."""
    one, two = (config_of("llama", sources["llama"], corpus, sentences, tmp_path / name) for name in ("one", "two"))
    train(one)
    said = capsys.readouterr().out
    assert (
        f"--load {sources['llama']} holds weights that belong to no step of a run: it begins with them at step 0"
        in said
    )
    assert (
        f"loaded from {sources['llama']}: the weights; not the optimizer's state, the schedule and the counts of steps"
        in said
    )
    assert train(one).iteration == 1, "the same command resumes the run's own checkpoint"
    ranks(run_all, 2, [two.replace(**LAYOUTS["tp2"][1])])
    assert losses(str(tmp_path / "two")) == pytest.approx(losses(str(tmp_path / "one")), rel=1e-5)


def test_another_model_names_both_values(sources, corpus, sentences, tmp_path) -> None:
    config = config_of("llama", sources["llama"], corpus, sentences, tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"--num-query-groups is 4, was 2.* Give --num-query-groups 2, or --use-checkpoint-args"
    ):
        train(config.replace(num_query_groups=4))
    with pytest.raises(CheckpointError, match="--rotary-interleaved is True, was False"):
        train(config.replace(rotary_interleaved=True))
    with pytest.raises(CheckpointError, match=r"--ckpt-step .* holds one state of a model; found 5. Leave it out"):
        train(config.replace(ckpt_step=5))


def test_megatron_resumes_where_it_has_a_state(corpus, tmp_path, ranks) -> None:
    """Weights, moments, schedule and counts directly from Megatron's files, exact in one process, and in a layout."""
    run = tmp_path / "run"
    train(tiny_config(corpus, str(run), save_interval=6, eval_iters=0))
    options = MegatronOptions(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        with_optimizer=True,
        use_distributed_optimizer=True,
    )
    FORMATS.find("megatron").write(formats.read(run / "checkpoints/iter_0000006"), tmp_path / "megatron", options)
    on = tiny_config(corpus, str(tmp_path / "on"), load=str(tmp_path / "megatron"), eval_iters=0)
    train(on)
    assert losses(str(tmp_path / "on")) == losses(str(run))[6:]
    ranks(run_all, 4, [on.replace(run_dir=str(tmp_path / "split"), **LAYOUTS["tp2 pp2"][1])])
    assert losses(str(tmp_path / "split")) == pytest.approx(losses(str(run))[6:], rel=1e-4)
    with pytest.raises(ConfigError, match="only one of them can be resumed"):
        train(on)
    for flags, iteration in (({"no_load_optim": True}, 12), ({"finetune": True}, 2)):
        other = on.replace(run_dir=str(tmp_path / "other"), fresh=True, **flags)
        assert (
            train(other.replace(train_iters=2, lr_warmup_iters=1) if iteration == 2 else other).iteration == iteration
        )
    shutil.copytree(tmp_path / "megatron", tmp_path / "both")
    with pytest.raises(
        ConfigError, match=r"both .*, which holds a checkpoint in the format megatron.*Name another --save"
    ):
        train(on.replace(load=str(tmp_path / "both"), save=str(tmp_path / "both"), run_dir=str(tmp_path / "new")))


@needs_shared
def test_megatron_without_the_optimizer_is_reported(corpus, sentences, tmp_path, capsys) -> None:
    config = config_of("megatron", str(MEGATRON), corpus, sentences, tmp_path / "run", finetune=False)
    with pytest.raises(CheckpointError, match=r"optimizer.*--no-load-optim.*--finetune"):
        train(config.replace(train_iters=6))
    capsys.readouterr()
    assert train(config.replace(train_iters=6, no_load_optim=True)).iteration == 6
    said = capsys.readouterr().out
    assert f"loaded from {MEGATRON}: the weights and the counts of steps and samples; not the optimizer's state" in said
    assert f"{MEGATRON}: checkpoint_version 3.0: rows of query_key_value are read as grouped" in said


def test_a_release_without_arguments(corpus, tmp_path, monkeypatch) -> None:
    """The zip of one, as it was downloaded: what its files do not say, the command says; it begins at step 0."""
    monkeypatch.setenv("MEGALITH_CACHE", str(tmp_path / "cache"))
    model, _ = megatron_files.release(tmp_path / "release.zip", words=49, padded=128)
    run = tiny_config(
        corpus, str(tmp_path / "run"), **{**ONE, **vars(model), "vocab_size": 48, "load": str(tmp_path / "release.zip")}
    )
    train(run)
    given = {"num_attention_heads": 8, "vocab_size": 49}
    convert(tmp_path / "release.zip", tmp_path / "ours", to="megalith", options=dict(overrides=given))
    train(run.replace(load=str(tmp_path / "ours"), run_dir=str(tmp_path / "converted")))
    assert losses(str(tmp_path / "run")) == losses(str(tmp_path / "converted"))


COMMAND = (
    "pretrain gpt --load {load} --save {save} --data-path {corpus} --split 90,5,5 --seq-length 16 "
    "--tokenizer-type NullTokenizer --micro-batch-size 4 --global-batch-size 8 --train-iters 1 --lr 1e-3 "
    "--lr-warmup-iters 0 --eval-iters 0 --device cpu --progress none --print-config none"
)


def test_the_command_line(sources, corpus, tmp_path, capsys) -> None:
    """--use-checkpoint-args takes the model from the source, and --dry-run judges the source as training does."""
    command = COMMAND.format(load=sources["llama"], save=tmp_path / "run", corpus=corpus)
    assert main([*command.split(), "--use-checkpoint-args"]) == 0
    shape = "--num-layers 2 --hidden-size 48 --num-attention-heads 4 --vocab-size 48"
    capsys.readouterr()
    assert main([*command.split(), *shape.split(), "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert "--load: " in said and "holds another model: --ffn-hidden-size is None, was 80" in said
    assert main([*command.split(), "--use-checkpoint-args", "--dry-run"]) == 0
    assert "--load: " not in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert (
        main(
            [
                *COMMAND.format(load=tmp_path / "empty", save=tmp_path / "new", corpus=corpus).split(),
                *shape.split(),
                "--dry-run",
            ]
        )
        == 1
    )
    assert (
        "holds no complete checkpoint (iter_NNNNNNN/), nor weights in another known format" in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_model_in_memory(name, sources) -> None:
    """The logits of a model object of transformers, without a folder; and its Weights are those of its folder."""
    kind = {"llama": "AutoModelForCausalLM", "bert": "BertForPreTraining", "t5": "AutoModelForSeq2SeqLM"}[name]
    theirs = getattr(transformers, kind).from_pretrained(sources[name], dtype=torch.float32).eval()
    weights, folder = weights_of(theirs), formats.read(sources[name])
    assert weights.config.model == folder.config.model and sorted(weights) == sorted(folder)
    assert all(torch.equal(weights[each], folder[each]) for each in weights)
    ids = torch.arange(24).view(2, 12)
    second = {"decoder_input_ids": ids} if name == "t5" else {}
    with torch.no_grad():
        found, wanted = megalith.load(theirs, device="cpu")(ids, **second), theirs(ids, **second)[0]
    assert ((found[0] if name == "bert" else found) - wanted).abs().max() < 1e-5
    again = megalith.load(megalith.load(theirs, device="cpu"), device="cpu")
    assert all(map(torch.equal, again.parameters(), megalith.load(sources[name], device="cpu").parameters()))
    with pytest.raises(CheckpointError, match=r"The model must have an attribute `config` that is .*; found Linear"):
        megalith.load(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", MODELS)
def test_every_family_in_memory_is_what_it_is_saved_as(name, tmp_path) -> None:
    torch.manual_seed(0)
    theirs = MODELS[name]()
    theirs.save_pretrained(tmp_path)
    weights, folder = weights_of(theirs), formats.read(tmp_path)
    assert weights.config == folder.config and weights.tensors.keys() == folder.tensors.keys()
    assert all(torch.equal(weights[each], folder[each]) for each in weights)


@pytest.mark.parametrize(("layout", "kind"), [("tp2", "transformers"), ("pp2", "folder"), ("dp2, full", "ours")])
def test_a_model_that_exists_is_placed(layout, kind, sources, ranks) -> None:
    processes, changes = LAYOUTS[layout]
    config = RunConfig(model=formats.read(sources["llama"]).config.model).replace(
        device="cpu", micro_batch_size=2, global_batch_size=4, seq_length=16, **changes
    )
    whole, found = formats.read(sources["llama"]), {}
    for part in ranks(parallelized, processes, config, sources["llama"], kind):
        found |= part
    assert found.keys() == {name.removeprefix("model/") for name in whole}
    assert all(torch.equal(tensor, whole[f"model/{name}"]) for name, tensor in found.items())
    with pytest.raises(CheckpointError, match=r"--layernorm-epsilon is 0.1, was 1e-06"):
        ranks(parallelized, processes, config.replace(layernorm_epsilon=0.1), sources["llama"], "folder")
