"""A launcher's variables: everything that is wrong with them is reported at once, at the start."""

import os
import socket

import pytest

from megalith.common.errors import ConfigError
from megalith.config import environment

GOOD = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch):
    """`variables(RANK="1", ...)`: the variables of launchers are these alone."""

    def put(**values: str) -> None:
        for name in {*GOOD, *environment.OTHER_LAUNCHERS, "TORCHELASTIC_USE_AGENT_STORE"} & set(os.environ):
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("values", "size"), [({}, 1), ({"WORLD_SIZE": "1"}, 1), (GOOD, 2), ({"MASTER_ADDR": "nowhere.invalid"}, 1)]
)
def test_what_works(variables, values, size):
    variables(**values)
    environment.check_connection()
    assert environment.world_size() == size and environment.rank() == size - 1


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE must be a whole number, at least 1; found 'two'"]),
        ({"WORLD_SIZE": ""}, ["WORLD_SIZE must be a whole number, at least 1; found ''"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE must be a whole number, at least 1; found '0'"]),
        ({"RANK": "3"}, ["RANK must be from 0 to WORLD_SIZE - 1, 1; found 3"]),
        (
            {"RANK": "-1", "LOCAL_RANK": "x"},
            [
                "RANK must be a whole number, at least 0; found '-1'",
                "LOCAL_RANK must be a whole number, at least 0; found 'x'",
            ],
        ),
        ({"LOCAL_RANK": "2"}, ["LOCAL_RANK must be from 0 to WORLD_SIZE - 1, 1; found 2"]),
        ({"MASTER_PORT": "99999"}, ["MASTER_PORT must be a port, a whole number from 1 to 65535; found '99999'"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT must be a port, a whole number from 1 to 65535; found 'http'"]),
        (
            {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": ""},
            ["MASTER_PORT must be a free port", "MASTER_ADDR must be a host name or IP address"],
        ),
        (
            {"RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None},
            [
                "RANK must be the number of this process",
                "MASTER_ADDR must be the address",
                "MASTER_PORT must be a free port",
            ],
        ),
        ({"WORLD_SIZE": None}, ["WORLD_SIZE must be set, because RANK (1) says"]),
        (
            {"WORLD_SIZE": "two", "MASTER_ADDR": None},
            ["WORLD_SIZE must be a whole number, at least 1; found 'two'", "MASTER_ADDR must be the address"],
        ),
    ],
)
def test_all_that_is_wrong_at_once(variables, changes, messages):
    variables(**{name: value for name, value in (GOOD | changes).items() if value is not None})
    with pytest.raises(ConfigError) as caught:
        environment.check_connection()
    text = str(caught.value)
    assert all(f"environment variable {message}" in text for message in messages)
    assert text.count("environment variable") == len(messages)


@pytest.mark.parametrize("name", environment.OTHER_LAUNCHERS)
def test_other_launchers_do_not_start_the_same_run_several_times(variables, name):
    variables(**{name: "4"})
    with pytest.raises(ConfigError, match=f"started 4 processes \\({name}\\)"):
        environment.world_size()
    variables(**{name: "4"}, **GOOD)
    assert environment.world_size() == 2


def test_a_job_of_several_that_runs_as_one_is_reported(variables, monkeypatch):
    variables()
    for name in ("SLURM_NTASKS", "SLURM_NPROCS"):
        monkeypatch.delenv(name, raising=False)
    assert environment.notices() == []
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert environment.notices() == []
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert (
        environment.world_size() == 1
        and "SLURM_NTASKS is 4, and this is one process, which trains alone" in environment.notices()[0]
    )
    variables(**GOOD)
    assert environment.notices() == []


def test_a_port_that_is_taken(variables):
    """Rank 0 listens there itself, unless torchrun does."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = GOOD | {"RANK": "0", "MASTER_PORT": str(other.getsockname()[1])}
        variables(**taken)
        with pytest.raises(
            ConfigError, match=rf"MASTER_PORT must .*another process .*\); found {taken['MASTER_PORT']}\."
        ):
            environment.check_connection()
        for fine in ({"RANK": "1"}, {"TORCHELASTIC_USE_AGENT_STORE": "True"}):
            variables(**taken | fine)
            environment.check_connection()
