"""Ranks end with their launcher, however it ends, and only where one started them."""

import os
import subprocess
import sys
import time

import pytest

# A launcher that starts a rank, by a shell where asked to; a rank that ignores SIGTERM, as inside a collective.
LAUNCH = """
import os, subprocess, sys
subprocess.Popen(sys.argv[1:], env=os.environ | {'RANK': '1'} | eval(os.environ['GIVEN'])).wait()
"""
RANK = """
import os, signal, time
from megalith.common.orphans import ends_with_launcher
signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True))
with ends_with_launcher(grace=1.0):
    print(os.getpid(), flush=True)
    time.sleep(float(os.environ["LASTS"]))
print("left", flush=True)
"""
SHELL = ["/bin/sh", "-c", '"$@"; exit $?', "sh"]


@pytest.mark.parametrize(
    ("given", "between", "lasts", "says"),
    [
        ({"TORCHELASTIC_RUN_ID": "x"}, [], 60, ["SIGTERM"]),
        ({"TORCHELASTIC_RUN_ID": "x"}, SHELL, 60, ["SIGTERM"]),
        ({"TORCHELASTIC_RUN_ID": "x"}, [], 2, ["left"]),
        ({}, [], 2, ["left"]),
    ],
    ids=["killed", "shell-between", "launcher-lives", "none"],
)
def test_a_rank_ends_with_its_launcher(given, between, lasts, says):
    words = [sys.executable, "-c", LAUNCH, *between, sys.executable, "-c", RANK]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    environment |= {"GIVEN": repr(given), "LASTS": str(lasts)}
    launcher = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launcher.stdout.readline()
    began = time.monotonic()
    if says == ["SIGTERM"] or not given:
        launcher.kill()
    said, errors = launcher.stdout.read(), launcher.stderr.read()  # until the rank has ended
    launcher.wait()
    assert said.split() == says and time.monotonic() - began < 30
    assert (f"rank 1: the launcher, process {launcher.pid}, has died" in errors) is (says == ["SIGTERM"])
