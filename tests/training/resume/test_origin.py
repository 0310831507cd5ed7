"""A run starts from a checkpoint of the same model and data, or reports the differences."""

import pathlib
import shutil

import pytest

from megalith.common.errors import CheckpointError
from megalith.training.pretrain import train
from tests.tiny import losses, tiny_bert, tiny_config, write_corpus, write_sentences

SHORT = {"train_iters": 4, "lr_warmup_iters": 1, "eval_iters": 0}


@pytest.fixture(scope="module")
def half(corpus, tmp_path_factory) -> pathlib.Path:
    """A run stopped after 2 of its 4 steps, with rotary positions; tests do not go on with it but in a copy."""
    folder = tmp_path_factory.mktemp("half") / "run"
    train(tiny_config(corpus, str(folder), position_embedding_type="rope", exit_interval=2, **SHORT))
    return folder


@pytest.mark.parametrize(
    ("changes", "message", "cure"),
    [
        ({"num_attention_heads": 8}, "--num-attention-heads is 8, was 4", "--num-attention-heads 4,"),
        (
            {"position_embedding_type": "alibi"},
            "--position-embedding-type is alibi, was rope",
            "--position-embedding-type rope,",
        ),
        ({"squared_relu": True}, "--squared-relu is True, was False", "no --squared-relu,"),
        (
            {"rotary_interleaved": True, "layernorm_epsilon": 1e-6},
            "--rotary-interleaved is True, was False; --layernorm-epsilon is 1e-06",
            "no --rotary-interleaved, --layernorm-epsilon 1e-05,",
        ),
        (
            {"apply_residual_connection_post_layernorm": True},
            "--apply-residual-connection-post-layernorm",
            "no --apply-residual",
        ),
    ],
)
def test_another_model_of_the_same_shapes_is_an_error(half, corpus, tmp_path, changes, message, cure):
    """In the run's own folder, and by --load into a new run, with --finetune too."""
    changes = SHORT | {"position_embedding_type": "rope"} | changes
    load = {"load": str(half), "run_dir": str(tmp_path / "new")}
    for place in ({}, load, load | {"finetune": True}):
        with pytest.raises(CheckpointError, match=f"holds another model: .*{message}.* Give .*{cure}"):
            train(tiny_config(corpus, str(half), **changes | place))
    assert len(losses(str(half))) == 2


def test_the_runs_own_folder_is_not_another_source(half, corpus, tmp_path):
    """--load may name the run's folder, as well as its checkpoints in it."""
    shutil.copytree(half, tmp_path / "run")
    config = tiny_config(
        corpus, str(tmp_path / "run"), load=str(tmp_path / "run"), position_embedding_type="rope", **SHORT
    )
    assert train(config).iteration == 4


def test_the_same_data_by_another_name_is_the_same(half, corpus, tmp_path, capsys, monkeypatch):
    shutil.copytree(half, tmp_path / "run")
    monkeypatch.chdir(pathlib.Path(corpus).parent)
    name = pathlib.Path(corpus).name
    config = tiny_config(corpus, str(tmp_path / "run"), position_embedding_type="rope", **SHORT)
    for number, spelled in enumerate((f"./{name}", f"../{pathlib.Path(corpus).parent.name}/{name}.bin"), 3):
        train(config.replace(data_path=[spelled], exit_interval=number))
    assert "changed since" not in capsys.readouterr().out


def test_what_may_change_is_reported_of_a_loaded_checkpoint_too(half, corpus, tmp_path, capsys):
    changes = SHORT | {
        "position_embedding_type": "rope",
        "rotary_base": 5000.0,
        "sliding_window": 8,
        "hidden_dropout": 0.0,
        "lr": 1e-3,
    }
    train(tiny_config(corpus, str(tmp_path / "tuned"), load=str(half), finetune=True, **changes))
    said = capsys.readouterr().out
    for line in (
        "--rotary-base is 5000, was 10000",
        "--sliding-window is 8, was None",
        "--hidden-dropout is 0, was 0.1",
    ):
        assert f"  changed since that checkpoint: {line}\n" in said
    assert "--lr is" not in said, "a new run has its own"


def test_data_replaced_under_its_name_is_reported(half, corpus, tmp_path, capsys):
    shutil.copytree(half, tmp_path / "run")
    for end in (".bin", ".idx"):
        shutil.copyfile(corpus + end, f"{tmp_path}/corpus{end}")
    config = tiny_config(
        f"{tmp_path}/corpus", str(tmp_path / "run"), position_embedding_type="rope", exit_interval=3, **SHORT
    )
    train(config)
    assert "is not what it was" not in capsys.readouterr().out, "another path is reported as such"
    write_corpus(f"{tmp_path}/corpus", seed=1)
    train(config)
    assert f"changed since that checkpoint: {tmp_path}/corpus is not what it was then\n" in capsys.readouterr().out


def test_what_a_folder_and_a_list_name_is_compared(corpus, tmp_path, capsys):
    """A corpus put into the folder that --data-path names, and other shares in the file that --data-file-list names."""
    folder, listed = tmp_path / "corpora", tmp_path / "list.txt"
    folder.mkdir()
    write_corpus(str(folder / "a"))
    listed.write_text(f"1 {folder}/a one\n")
    runs = {"dir": {"data_path": [str(folder)]}, "list": {"data_path": [], "data_file_list": str(listed)}}
    for name, values in runs.items():
        train(tiny_config(corpus, str(tmp_path / name), exit_interval=2, **SHORT | values))
    write_corpus(str(folder / "b"), seed=1)
    listed.write_text(f"1 {folder}/a one\n1 {folder}/b two\n")
    for name, values in runs.items():
        capsys.readouterr()
        train(tiny_config(corpus, str(tmp_path / name), exit_interval=3, **SHORT | values))
        said = capsys.readouterr().out
        assert (
            f"changed since that checkpoint: {folder}/b is read now, and was not then\n" in said
            and "samples that were read may come again" in said
        )
        assert (f"{listed} is not what it was then" in said) is (name == "list")


def test_a_tokenizer_replaced_under_its_name_is_an_error(tmp_path, capsys):
    prefix = write_sentences(str(tmp_path / "tiny"))
    run = {"exit_interval": 2, "save_interval": 1, **SHORT}
    train(tiny_bert(prefix, str(tmp_path / "run"), **run))
    vocabulary, longer = pathlib.Path(f"{prefix}.vocab"), run | {"exit_interval": 3}
    words = vocabulary.read_text().split("\n")
    vocabulary.write_text("\n".join([*words[:6], words[7], words[6], *words[8:]]))
    with pytest.raises(
        CheckpointError,
        match=r"tiny.vocab\) is not the one in .*: 2 ids are other tokens, first 6: 'w2', was 'w1'.*--finetune",
    ):
        train(tiny_bert(prefix, str(tmp_path / "run"), **longer))
    capsys.readouterr()
    train(tiny_bert(prefix, str(tmp_path / "new"), load=str(tmp_path / "run"), finetune=True, **run))
    assert "2 ids are other tokens" in capsys.readouterr().out
    vocabulary.write_text("\n".join(words) + "\n")
    train(tiny_bert(prefix, str(tmp_path / "run"), **longer))
    assert "other tokens" not in capsys.readouterr().out


def test_moments_of_another_optimizer(half, corpus, tmp_path):
    """Both ways, and where one has none: both states are named, and the flag that resumes without."""
    rope = {"position_embedding_type": "rope"} | SHORT
    for changes in ({"optimizer": "sgd"}, {"optimizer": "sgd", "sgd_momentum": 0.0}):
        with pytest.raises(
            CheckpointError,
            match=r"must be (optimizer/momentum_buffer|none) for this run to resume; found optimizer/exp_avg, .*--no-l",
        ):
            train(tiny_config(corpus, str(half), **rope | changes))
    train(tiny_config(corpus, str(tmp_path / "sgd"), optimizer="sgd", load=str(half), no_load_optim=True, **rope))
    with pytest.raises(
        CheckpointError, match=r"must be optimizer/exp_avg, .* for this run to resume; found optimizer/momentum_buffer"
    ):
        train(
            tiny_config(
                corpus, str(tmp_path / "sgd"), **rope | {"train_iters": 6, "override_opt_param_scheduler": True}
            )
        )
