"""Servers of several processes: the texts of one, and what a rank that dies or is stopped does to them."""

import os
import pathlib
import signal
import sys
import time

import pytest

from megalith.generation.generate import complete
from megalith.generation.load import load
from megalith.testing.ranks import run_ranks
from tests.serving.plain_http import call
from tests.serving.server_processes import LONG, TEXT, saved, server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
TP = "--tensor-model-parallel-size=2"


@pytest.fixture
def folder(tokenizer, tmp_path: pathlib.Path) -> pathlib.Path:
    return saved(tokenizer, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("flag", "ended_by"), [
    (TP, "SIGTERM"), ("--pipeline-model-parallel-size=2", "SIGINT"), ("--tensor-model-parallel-size=1", "SIGTERM"),
])  # fmt: skip
def test_texts_are_those_of_one_process(flag: str, ended_by: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model, options = load(folder, device="cpu"), {"max_new_tokens": 8, "stop_at_eod": False}
    sampled = [each.text for each in complete(model, TEXT["prompts"], top_k=1, **options)]
    beams = [each.text for each in complete(model, ["Once"], beam_width=3, num_samples=3, **options)]
    with server(folder, tmp_path / "log", flag, ranks=2) as many:
        time.sleep(7)  # idle for longer than a rank may be silent
        for _ in range(2):
            assert many.put()[2]["text"] == sampled
        search = {"prompts": ["Once"], "tokens_to_generate": 8, "beam_width": 3, "stop_at_eod": False}
        assert many.put(search)[2]["text"] == beams
        running = many.start({**TEXT, "tokens_to_generate": 120})
        many.process.send_signal(getattr(signal, ended_by))  # torchrun sends it on to both
        running.join(60)
        assert running.status == 200
        many.wait(60)
    assert "lost" not in many.said() and "rank 1" not in many.said()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("state", ["idle", "working"])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_is_lost(how: str, state: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with server(folder, tmp_path / "log", TP, ranks=2) as many:
        assert many.put()[0] == 200
        ranks = many.ranks()
        assert set(ranks) == {0, 1}
        running = many.start(LONG) if state == "working" else None
        lost = time.monotonic()
        os.kill(ranks[1], getattr(signal, how))
        while call(many.url, "GET", "/health")[0] == 200:
            assert time.monotonic() - lost < 10
            time.sleep(0.1)
        print(f"{how} while {state}: /health red {time.monotonic() - lost:.1f} s later")
        status, headers, body = many.put()
        assert status == 503 and int(headers["Retry-After"]) > 0
        if how == "SIGSTOP":
            assert "rank 1 of 2 gave no sign of life" in body["message"]
        if running is not None:
            running.join(10)
            assert running.status == 503 and running.ended - lost < 10
        end = time.monotonic() + 20
        while 0 in many.ranks():
            assert time.monotonic() < end
            time.sleep(0.1)
        print(f"{how} while {state}: the process ended {time.monotonic() - lost:.1f} s later")
        if how == "SIGSTOP":
            os.kill(ranks[1], signal.SIGKILL)  # which torchrun would do after half a minute
        assert many.wait(60) != 0
    (line,) = [line for line in many.said().splitlines() if "has lost its model" in line]
    assert f"rank 1 of 2 (process {ranks[1]} on " in line and "no sign of life" in line and "again" in line


def idle_beyond_the_time_limit() -> list[int]:
    """An idle driver and its follower, in groups whose collectives may take two seconds."""
    import datetime

    import torch.distributed as dist

    from megalith.generation.engine import Request
    from megalith.generation.parallel.driver import Driver, follow
    from megalith.generation.parallel.replicas import engine_of
    from megalith.generation.sampling import SamplingParams
    from tests.generation.parallel.layouts import config_of, runtime_of

    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2))
    engine = engine_of(runtime_of(config_of("alibi", "tp2")), max_batch_size=2, max_length=64)
    engine.text_model.eval()
    if dist.get_rank():
        follow(engine)
        return []
    tokens = []
    with Driver(engine) as driver:
        for _ in range(2):
            driver.add(Request(prompt_ids=[5, 6], params=SamplingParams(max_new_tokens=3, temperature=0.0)))
            while driver.busy:
                tokens += [event.token for event in driver.step()]
            time.sleep(4)
    return tokens


@pytest.mark.slow
def test_an_idle_server_outlives_the_time_limit_of_collectives() -> None:
    tokens, _ = run_ranks(idle_beyond_the_time_limit, 2)
    assert len(tokens) == 6 and tokens[:3] == tokens[3:]
