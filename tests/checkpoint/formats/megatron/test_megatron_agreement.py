"""Arguments must agree with tensors, and the files of all ranks with each other: a difference is an error that names
both.
"""

import pathlib
import re
import shutil
from collections.abc import Callable

import pytest
import torch

from megalith.checkpoint import formats
from megalith.common.errors import CheckpointError
from megalith.workflows.conversion import convert
from tests.checkpoint import megatron_files
from tests.checkpoint.formats.deepspeed.test_megatron_deepspeed import write_pipelined
from tests.checkpoint.formats.megatron.test_megatron_dist import core_state, save
from tests.checkpoint.megatron_files import model_of, namespace

Change = Callable[[dict], None]


def edit_files(folder: pathlib.Path, edit: Change, rank: str = "*") -> None:
    """Change the files of these ranks."""
    for file in sorted(folder.glob(f"iter_0000007/mp_rank_{rank}/model_optim_rng.pt")):
        content = torch.load(file, weights_only=False)
        edit(content)
        torch.save(content, file)


def drop_layers(pattern: str) -> Change:
    """What drops layers from a file."""

    def edit(content: dict) -> None:
        for key in [key for key in content if re.fullmatch(r"model\d*", key)]:
            stack = content[key]["language_model"]["encoder"]
            for name in [name for name in stack if re.match(pattern, name)]:
                del stack[name]

    return edit


LAYOUT = dict(tensor=2, pipeline=2)
SAYS = "num_layers: the tensors have {}, the arguments say 4"
HOLE = r"layers of the encoder in .* must be numbered without a gap, but {1} is missing; found \[{0}\]"
ALONE = "encoder.layers.3.* of tensor-parallel rank {} must exist, because rank {} has it .*; found nothing"
EMPTY = "iter_0000007/mp_rank_00_001/.* must hold layers, as each of several pipeline stages does .*; found none"
MISSING = {  # layers that are gone: (the layout, of which ranks, pattern, with arguments, the error)
    "last of all": ({}, "*", r"layers\.3\.", True, SAYS.format(3) + r"\n.*Part of the checkpoint may be missing"),
    "one between": ({}, "*", r"layers\.1\.", True, HOLE.format("0, 2, 3", 1)),
    "one between, no arguments": ({}, "*", r"layers\.1\.", False, HOLE.format("0, 2, 3", 1)),
    "first": ({}, "*", r"layers\.0\.", True, HOLE.format("1, 2, 3", 0)),
    "an empty stage": (LAYOUT, "*_001", r"layers\.", True, SAYS.format(2)),
    "an empty stage, no arguments": (LAYOUT, "*_001", r"layers\.", False, EMPTY),
    "of one rank": (LAYOUT, "01_001", r"layers\.1\.", True, ALONE.format(1, 0)),
    "of rank 0": (LAYOUT, "00_001", r"layers\.1\.", True, SAYS.format(3)),
    "of rank 0, no arguments": (LAYOUT, "00_001", r"layers\.1\.", False, ALONE.format(0, 1)),
    "of a stage, no arguments": (
        LAYOUT,
        "*_000",
        r"layers\.1\.",
        False,
        "number of layers of the encoder must be the same in every .*; found 1 in stage 0, 2 in stage 1",
    ),
    "of a virtual stage": (LAYOUT | dict(virtual=2), "*_001", r"layers\.", True, SAYS.format(2)),
}


@pytest.mark.parametrize("case", MISSING)
def test_missing_layers_are_no_smaller_model(tmp_path: pathlib.Path, case: str) -> None:
    layout, rank, pattern, with_arguments, message = MISSING[case]
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, **layout, args={} if with_arguments else None)
    edit_files(folder, drop_layers(pattern), rank)
    given = {} if with_arguments else dict(num_attention_heads=4)
    with pytest.raises(CheckpointError, match=message):
        formats.read(folder, options=dict(overrides=given))
    with pytest.raises(CheckpointError, match=message):  # nor are they when the layout is changed
        convert(folder, tmp_path / "new", to="megatron", options=dict(overrides=given))
    assert not (tmp_path / "new").exists()


def test_a_missing_virtual_chunk(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, pipeline=1, virtual=4, args={})
    edit_files(folder, lambda content: content.pop("model1"))
    with pytest.raises(CheckpointError, match=r"virtual pipeline chunks .* but 1 is missing; found \[0, 2, 3\]"):
        formats.read(folder)


def test_layers_missing_in_bert(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of(model_type="bert")
    folder = megatron_files.write(tmp_path / "b", config, tensors, args={})
    edit_files(folder, drop_layers(r"layers\.3\."))
    with pytest.raises(CheckpointError, match="num_layers: the tensors have 3, the arguments say 4"):
        formats.read(folder)


WIDE = "must have at most one without parameters between the layers and the modules around them; found none from {}"
GONE = {  # layer files of a DeepSpeed tree: (their numbers, with arguments, the error)
    "last": ("05", True, SAYS.format(3)),
    "last, no arguments": ("05", False, WIDE.format("5 to 6")),
    "first": ("02", True, SAYS.format(3)),
    "first two, no arguments": ("0[23]", False, WIDE.format("2 to 3")),
    "one between": ("03", False, r"modules .* with layers .* without a gap, but 3 is missing; found \[2, 4, 5\]"),
    "all": ("0[2345]", True, "must have encoder.layers.0.mlp.dense_.*, as every model of Megatron has"),
    "the embedding": ("01", True, "first module .* must be the embedding, .*; found layers from 2 on"),
    "the last norm": ("07", True, r"not in the file: \['final_norm.bias', 'final_norm.weight'\]"),
}


@pytest.mark.parametrize("case", GONE)
def test_missing_layer_files_of_deepspeed(tmp_path: pathlib.Path, case: str) -> None:
    number, with_arguments, message = GONE[case]
    write_pipelined(tmp_path, {}, {} if with_arguments else {"num_layers": None}, 2, 1)
    for file in (tmp_path / "global_step7").glob(f"layer_{number}-*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=message):
        formats.read(tmp_path)


def test_layer_files_missing_of_one_rank(tmp_path: pathlib.Path) -> None:
    for rank, other in ((0, 1), (1, 0)):
        write_pipelined(tmp_path / f"{rank}", {}, {"num_layers": None}, 2, 1)
        (tmp_path / f"{rank}/global_step7/layer_05-model_0{rank}-model_states.pt").unlink()
        with pytest.raises(
            CheckpointError, match=rf"layers.3.* of tensor-parallel rank {rank} must exist, because rank {other} has it"
        ):
            formats.read(tmp_path / f"{rank}")


@pytest.mark.parametrize("case", ["stacked", "single", "a hole"])
def test_missing_layers_of_core(tmp_path: pathlib.Path, case: str) -> None:
    config, tensors = model_of()
    state = core_state(config, tensors)
    if case == "stacked":
        state = {name: each[:3].clone() if ".layers." in name else each for name, each in state.items()}
    else:
        kept = (0, 1, 2) if case == "single" else (0, 2, 3)
        apart = {
            name.replace(".layers.", f".layers.{n}."): each[n].clone()
            for name, each in state.items()
            if ".layers." in name
            for n in kept
        }
        state = {name: each for name, each in state.items() if ".layers." not in name} | apart
    save(tmp_path / "c", state, {"args": namespace(config, 1, 1, 128, {}), "iteration": 7})
    message = (
        r"not in the file: \['layers.1" if case == "a hole" else "num_layers: the tensors have 3, the arguments say 4"
    )
    with pytest.raises(CheckpointError, match=message):
        formats.read(tmp_path / "c")


GROUPED = dict(num_query_groups=2)
ROTARY = dict(position_embedding_type="rope")
CONTRADICTED = {  # arguments that a shape or a name also determines: (form of the model, arguments, the error)
    "layers": ({}, dict(num_layers=6), "num_layers: {4}, {6}"),
    "layers, other name": ({}, dict(encoder_num_layers=2), "num_layers: {4}, {2}"),
    "hidden": ({}, dict(hidden_size=64), "hidden_size: {32}, {64}"),
    "heads x channels": ({}, dict(num_attention_heads=8), "num_attention_heads x kv_channels: {32}, {64}"),
    "ffn": ({}, dict(ffn_hidden_size=96), "ffn_hidden_size: {128}, {96}"),
    "ffn, NeoX's name": ({}, dict(intermediate_size=96), "ffn_hidden_size: {128}, {96}"),
    "vocabulary": ({}, dict(padded_vocab_size=256), "padded_vocab_size: {128}, {256}"),
    "positions": ({}, dict(max_position_embeddings=32), "max_position_embeddings: {16}, {32}"),
    "groups": (GROUPED, dict(num_query_groups=4, group_query_attention=True), "num_query_groups: {2}, {4}"),
    "groups, other name": (GROUPED, dict(num_key_value_heads=4), "num_query_groups: {2}, {4}"),
    "groups, none": (GROUPED, dict(group_query_attention=False), "num_query_groups: {2}, {4}"),
    "a table, none": ({}, dict(add_position_embedding=False),
                      "position_embedding_type: {learned_absolute}, {none .add_position}"),
    "a table": ({}, ROTARY, "position_embedding_type: {learned_absolute}, {rope}"),
    "no table": (ROTARY, dict(position_embedding_type="learned_absolute"),
                 "position_embedding_type: {no position_embeddings}, {learned_absolute}"),
    "no table, no word": (ROTARY, {}, "position_embedding_type: {no position_embeddings}, {nothing about others}"),
    "norm": ({}, dict(normalization="RMSNorm"), "normalization: {LayerNorm}, {RMSNorm}"),
    "biases": ({}, dict(add_bias_linear=False), "add_bias_linear: {True}, {False}"),
    "gate": (dict(swiglu=True, ffn_hidden_size=64), dict(swiglu=False),
             "swiglu: {two halves in dense_h_to_4h}, {False}"),
    "one head": ({}, dict(attention_head_type="multiquery"), "attention_head_type: {multihead}, {multiquery}"),
    "norms of heads": ({}, dict(qk_layernorm=True), "qk_layernorm: {False}, {True}"),
    "binary head": (dict(model_type="bert"), dict(bert_binary_head=False), "bert_binary_head: {True}, {False}"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTED)
def test_arguments_that_shapes_contradict(tmp_path: pathlib.Path, case: str) -> None:
    form, args, text = CONTRADICTED[case]
    message = re.sub(r"\{(.*)\}, \{(.*)\}", r"the tensors have \1, the arguments say \2", text)
    config, tensors = model_of(**form)
    folder = megatron_files.write(tmp_path / "m", config, tensors, tensor=2, args=args)
    with pytest.raises(CheckpointError, match=message):
        formats.read(folder)


def test_advised_flags_are_as_they_are_typed(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, args=dict(qk_layernorm=True, add_bias_linear=False))
    with pytest.raises(
        CheckpointError, match=r"give the right values as flags: --add-bias-linear, --no-qk-layernorm\."
    ):
        formats.read(folder)


def test_a_flag_settles_what_arguments_say_wrongly(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of(glu_activation="geglu", ffn_hidden_size=64)
    wrong = dict(ffn_hidden_size=96, swiglu=False, padded_vocab_size=1, num_layers=7)
    folder = megatron_files.write(tmp_path / "m", config, tensors, args=wrong)
    with pytest.raises(
        CheckpointError,
        match=r"--num-layers 4, --ffn-hidden-size 64, --swiglu, or --glu-activation NAME, --vocab-size N",
    ):
        formats.read(folder)
    given = dict(ffn_hidden_size=64, glu_activation="geglu", vocab_size=96, num_layers=4)
    found = formats.read(folder, options=dict(overrides=given)).config.model
    assert (found.activation, found.ffn_size, found.num_layers) == ("geglu", 64, 4)
    # Nor may a flag be wrong
    with pytest.raises(CheckpointError, match="num_query_groups: the tensors have 4, the arguments say 2"):
        formats.read(folder, options=dict(overrides=given | {"num_query_groups": 2}))


def test_one_file_of_several_ranks(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, tensor=2, args={})
    with pytest.raises(CheckpointError, match="ffn_hidden_size: the tensors have 64, the arguments say 128"):
        formats.read(folder / "iter_0000007/mp_rank_00/model_optim_rng.pt")


def test_a_rank_that_is_missing_without_arguments(tmp_path: pathlib.Path) -> None:
    """What is left looks like a model of narrow heads and half the vocabulary."""
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, tensor=2, args=None)
    formats.read(folder, options=dict(overrides=dict(num_attention_heads=4)))
    shutil.rmtree(folder / "iter_0000007/mp_rank_01")
    message = (
        r"in the files of 1 tensor-parallel ranks must be as many as those of the model, 32, .*; found 16\. "
        ".*give --kv-channels 4"
    )
    with pytest.raises(CheckpointError, match=message):
        formats.read(folder, options=dict(overrides=dict(num_attention_heads=4)))
    # Said by the user
    left = formats.read(folder, options=dict(overrides=dict(num_attention_heads=4, kv_channels=4))).config.model
    assert left.head_dim == 4


@pytest.mark.parametrize("what", ["iteration", "checkpoint_version", "num_attention_heads", "layernorm_epsilon"])
def test_files_of_ranks_that_are_of_two_runs(tmp_path: pathlib.Path, what: str) -> None:
    def edit(content: dict) -> None:
        content.update({what: 2}) if what in content else setattr(content["args"], what, 2)

    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, tensor=2, args={})
    edit_files(folder, edit, "01")
    with pytest.raises(
        CheckpointError,
        match=rf"{what} must be the same .*; found \S+ in iter_0000007/mp_rank_00/.*, 2 in iter_0000007/mp_rank_01/.*",
    ):
        formats.read(folder)


@pytest.mark.parametrize("with_arguments", [True, False], ids=["arguments", "no arguments"])
def test_biases_of_which_no_argument_speaks(tmp_path: pathlib.Path, with_arguments: bool) -> None:
    """Without its biases a LayerNorm's file looks like an RMSNorm's.

    Versions before RMSNorm had no argument that tells them apart.
    """

    def without(content: dict) -> None:
        stack = content["model"]["language_model"]["encoder"]
        for name in [name for name in stack if name.endswith(".bias")]:
            del stack[name]

    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, args={} if with_arguments else None)
    given = {} if with_arguments else dict(num_attention_heads=4)
    assert not any("has a bias" in note for note in formats.read(folder, options=dict(overrides=given)).notes)
    edit_files(folder, without)
    found = formats.read(folder, options=dict(overrides=given))
    assert (
        "no norm and no linear layer has a bias, and no argument says so; read as RMSNorm and linear layers without"
        in "".join(found.notes)
    )
    notes = formats.read(
        folder, options=dict(overrides=given | dict(normalization="RMSNorm", add_bias_linear=False))
    ).notes
    assert not any("has a bias" in note for note in notes)
    edit_files(
        folder, lambda content: setattr(content.get("args"), "add_bias_linear", True) if with_arguments else None
    )
    if with_arguments:
        with pytest.raises(CheckpointError, match="add_bias_linear: the tensors have False, the arguments say True"):
            formats.read(folder)


def test_a_folder_that_is_not_of_its_files_iteration(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, args={})
    (folder / "iter_0000007").rename(folder / "iter_0000100")
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    write_pipelined(tmp_path / "d", {}, {}, 1, 1)
    (tmp_path / "d/global_step7").rename(tmp_path / "d/global_step100")
    save(tmp_path / "c", core_state(config, tensors), {"args": namespace(config, 1, 1, 128, {}), "iteration": 7})
    (tmp_path / "c/iter_0000007").rename(tmp_path / "iter_0000100")
    places = {
        "iter_0000100": (folder, folder / "iter_0000100", tmp_path / "iter_0000100"),
        "global_step100": (tmp_path / "d/global_step100",),
    }
    for name, several in places.items():
        for place in several:
            found = formats.read(place)
            assert found.iteration == 7
            assert f"iteration: {name} holds files of iteration 7, which is used" in "".join(found.notes), place


def test_a_bert_without_its_head(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of(model_type="bert")
    folder = megatron_files.write(tmp_path / "b", config, tensors, args={})
    edit_files(folder, lambda content: content["model"].pop("lm_head"))
    with pytest.raises(
        CheckpointError, match=r"parameters of the bert must .*not in the file: \['head.bias', 'head_dense.bias'"
    ):
        formats.read(folder)


def test_a_vocabulary_that_does_not_pad_to_the_rows_has_a_note(tmp_path: pathlib.Path) -> None:
    config, tensors = model_of()
    folder = megatron_files.write(tmp_path / "m", config, tensors, args=dict(orig_vocab_size=50))
    text = "vocabulary: 50 of 128 rows, as the arguments say (orig_vocab_size), though Megatron pads that to 64"
    assert any(text in note for note in formats.read(folder).notes)
