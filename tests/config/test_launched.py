"""A launcher's variables: all that is wrong with them is told at once, at the start."""

import os
import socket

import pytest

from megalith.common.errors import ConfigError
from megalith.config import launched

GOOD = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch):
    """`variables(RANK="1", ...)`: the variables of launchers are these alone."""

    def put(**values: str) -> None:
        for name in {*GOOD, *launched.OTHERS, "TORCHELASTIC_USE_AGENT_STORE"} & set(os.environ):
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("values", "size"), [({}, 1), ({"WORLD_SIZE": "1"}, 1), (GOOD, 2), ({"MASTER_ADDR": "nowhere.invalid"}, 1)]
)
def test_what_works(variables, values, size):
    variables(**values)
    launched.check_connection()
    assert launched.world_size() == size and launched.rank() == size - 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE: found 'two'"]),
        ({"WORLD_SIZE": ""}, ["WORLD_SIZE: found ''"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE: found '0'"]),
        ({"RANK": "3"}, ["RANK: found 3; processes are numbered from 0 to WORLD_SIZE - 1, 1"]),
        ({"RANK": "-1", "LOCAL_RANK": "x"}, ["RANK: found '-1'", "LOCAL_RANK: found 'x'"]),
        ({"LOCAL_RANK": "2"}, ["LOCAL_RANK: found 2"]),
        ({"MASTER_PORT": "99999"}, ["MASTER_PORT: found '99999'"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT: found 'http'"]),
        (
            {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": ""},
            ["MASTER_PORT: found nothing", "MASTER_ADDR: found 'nowhere.invalid'"],
        ),
        (
            {"RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None},
            ["RANK: found nothing", "MASTER_ADDR: found", "MASTER_PORT: found"],
        ),
        ({"WORLD_SIZE": None}, ["WORLD_SIZE: found nothing; RANK, which is 1"]),
        ({"WORLD_SIZE": "two", "MASTER_ADDR": None}, ["WORLD_SIZE: found 'two'", "MASTER_ADDR: found nothing"]),
    ],
)
def test_all_that_is_wrong_at_once(variables, changes, told):
    variables(**{name: value for name, value in (GOOD | changes).items() if value is not None})
    with pytest.raises(ConfigError) as caught:
        launched.check_connection()
    text = str(caught.value)
    assert all(f"environment variable {each}" in text for each in told) and text.count("environment variable") == len(
        told
    )


@pytest.mark.parametrize("name", launched.OTHERS)
def test_other_launchers_do_not_start_the_same_run_several_times(variables, name):
    variables(**{name: "4"})
    with pytest.raises(ConfigError, match=f"started 4 processes \\({name}\\)"):
        launched.world_size()
    variables(**{name: "4"}, **GOOD)
    assert launched.world_size() == 2


def test_a_job_of_several_that_runs_as_one_is_told(variables, monkeypatch):
    variables()
    for name in launched.ALLOCATED:
        monkeypatch.delenv(name, raising=False)
    assert launched.notices() == []
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert launched.notices() == []
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert (
        launched.world_size() == 1
        and "SLURM_NTASKS is 4, and this is one process, which trains alone" in launched.notices()[0]
    )
    variables(**GOOD)
    assert launched.notices() == []


def test_a_port_that_is_taken(variables):
    """Rank 0 listens there itself, unless torchrun does."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = GOOD | {"RANK": "0", "MASTER_PORT": str(other.getsockname()[1])}
        variables(**taken)
        with pytest.raises(ConfigError, match=f"MASTER_PORT: found {taken['MASTER_PORT']}; .*another process"):
            launched.check_connection()
        for fine in ({"RANK": "1"}, {"TORCHELASTIC_USE_AGENT_STORE": "True"}):
            variables(**taken | fine)
            launched.check_connection()
