"""Flags: every field has one, every mistake is found, nothing is abbreviated."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.config.flags import flags
from megalith.config.flags.text import flag
from megalith.config.flags.values import convert, fields


def texts(reading):
    return [problem.text for problem in reading.problems]


def test_every_field_has_a_flag_and_booleans_have_two():
    table = flags.config_flags()
    for name, field in fields().items():
        assert name in table[flag(name)].sets
        _, no = flags.flag_names(field)
        assert bool(no) == (field.kind is bool)
    assert table["--disable-bias-linear"].sets == {"add_bias_linear": False} == table["--no-add-bias-linear"].sets
    assert table["--load-optim"].sets == {"no_load_optim": False}


def test_no_spelling_means_two_things():
    spellings = [name for field in fields().values() for names in flags.flag_names(field) for name in names]
    assert len(spellings) == len(set(spellings))


def test_forms():
    found = flags.read(
        [
            "gpt",
            "--lr",
            "-1e-5",
            "--num_layers=2",
            "--data-path",
            "1",
            "a",
            "--swiglu",
            "--no-bf16",
            "--lr=3",
            "--split",
            "969, 30, 1",
        ]
    )
    assert found.words == ["gpt"] and not found.problems and not found.notices
    assert found.values == {
        "lr": "3",
        "num_layers": "2",
        "data_path": ["1", "a"],
        "swiglu": True,
        "bf16": False,
        "split": "969, 30, 1",
    }
    assert flags.read(["--swiglu=false"]).values == {"swiglu": False}
    assert flags.read(["--no-bf16=false"]).values == {"bf16": True}
    assert flags.read(["--dry-run", "--recipe", "x"]).values == {"dry_run": True, "recipe": "x"}


def test_all_mistakes_at_once():
    found = flags.read(
        [
            "gpt",
            "--hiden-size",
            "64",
            "--num-layers",
            "--swiglu=5",
            "--print-config",
            "everything",
            "--bf",
            "--zero-stage",
            "7",
        ]
    )
    assert [problem.fields for problem in found.problems] == [
        ("hidden_size",),
        ("num_layers",),
        ("swiglu",),
        ("print_config",),
        ("bf16",),
        (),
    ]
    assert texts(found)[0] == "unknown flag --hiden-size: did you mean --hidden-size?"
    assert texts(found)[1].startswith("--num-layers must have a value; found nothing.")
    assert found.words == ["gpt"], "the value of an unknown flag is no word"


def test_abbreviations_are_unknown():
    assert texts(flags.read(["--num-lay", "2"])) == ["unknown flag --num-lay: did you mean --num-layers?"]
    assert texts(flags.read(["--rl", "2"])) == ["unknown flag --rl: did you mean --lr?"]
    # And not --loss
    assert texts(flags.read(["--bogus", "2"])) == ["unknown flag --bogus: megalith pretrain --help lists them"]


@given(
    st.lists(
        st.one_of(
            st.text(max_size=8),
            st.sampled_from(sorted(flags.config_flags())),
            st.sampled_from(["--", "-x", "--=", "gpt", "1"]),
        )
    )
)
def test_any_words_are_read_without_an_exception(words):
    found = flags.read(words)
    assert set(found.values) <= {*fields(), *flags.legacy.IN_TOKENS, "recipe", "config", "print_config", "dry_run"}


TYPED = {
    int: st.integers(1, 10**9),
    float: st.floats(0, 0.5),
    str: st.text("abcxyz/._", min_size=1),
    bool: st.booleans(),
}


@given(st.data())
def test_flags_say_what_the_config_says(data):
    """Any values, written as flags, come back as the same values."""
    chosen = data.draw(
        st.lists(
            st.sampled_from([field for field in fields().values() if not field.metadata["choices"]]),
            unique_by=lambda f: f.name,
        )
    )
    argv, values = [], {}
    for field in chosen:
        strategy = st.lists(TYPED[field.item], min_size=1) if field.kind is list else TYPED[field.kind]
        values[field.name] = value = data.draw(strategy)
        yes, no = flags.flag_names(field)
        if field.kind is bool:
            argv.append(yes[0] if value else no[0])
        else:
            argv += [yes[0], *map(str, value if field.kind is list else [value])]
    found = flags.read(argv)
    assert not found.problems
    assert {name: convert(fields()[name], raw, name)[0] for name, raw in found.values.items()} == values


def test_help_lists_every_field_once_under_its_section(capsys):
    parser = argparse.ArgumentParser(prog="x")
    flags.add_help(parser)
    text = parser.format_help()
    for name, field in fields().items():
        assert f"  {flag(name)}" in text
        assert f"\n{field.section}:\n" in text
    assert "--num-key-value-heads" in text and "--DDP-impl" not in text


@pytest.mark.parametrize("words", [["--rope-theta", "5"], ["--num-key-value-heads", "2"]])
def test_other_spellings_name_the_main_one(words):
    (notice,) = flags.read(words).notices
    assert notice.startswith(f"{words[0]} is read as --")


def test_words_that_are_another_programs():
    table = {
        each.name: each
        for each in (
            flags.Flag("--size", {"size": flags.VALUE}),
            flags.Flag("--fast", {"fast": True}, 0),
            flags.Flag("-m", {"module": True}, 0),
        )
    }

    def read(*words):
        return flags.read_against(table, words, verb="try", until_word=True)

    found = read("--size", "3", "-m", "script", "--size", "4", "--unknown", "-x")
    assert found.values == {"size": "3", "module": True} and not found.problems
    assert found.words == ["script", "--size", "4", "--unknown", "-x"]
    assert read("--fast", "--", "--size", "4").words == ["--size", "4"]
    near = read("--siez", "3", "--fsat", "--size=2", "script", "--size", "4")
    assert texts(near) == ["unknown flag --siez: did you mean --size?", "unknown flag --fsat: did you mean --fast?"]
    assert near.words == ["script", "--size", "4"] and near.values == {"size": "2"}
    assert read("--siez=3", "script").words == ["script"]
    far = read("--qqqq", "3", "script")
    assert texts(far) == ["unknown flag --qqqq: megalith try --help lists them"] and far.words == []
