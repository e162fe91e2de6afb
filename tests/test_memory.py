"""Memory stays as it is over a long joint training, and what a step frees serves the next one."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from joint_steps import BATCH, SIDE, WIDTH

from nncf_mpq_plugin.memory import ENVIRONMENT

WARM_UP = 4  # of the 20 values: the first 100 steps, in which allocators and the first save take what they keep
# What would leak is at least one activation of one pass a step, 256 KiB here. A tenth of that for each of 400 steps is
# far above what the allocators' pools go up and down by.
ACTIVATION = 4 * BATCH * WIDTH * SIDE * SIDE
MARGIN = ACTIVATION // 10 * 400


@pytest.mark.slow
def test_memory_does_not_grow_over_five_hundred_joint_steps(tmp_path: Path) -> None:
    """In a process of its own: what other tests have freed would hide what this training takes."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    command = [sys.executable, str(here / "joint_steps.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    resident = json.loads(result.stdout.splitlines()[-1])
    assert len(resident) == 20
    growth = max(resident[WARM_UP:]) - resident[WARM_UP - 1]
    logging.info("%.1f MiB after 100 steps, %+.2f MiB later", resident[WARM_UP - 1] / 2**20, growth / 2**20)
    assert growth < MARGIN


CODE = """
import resource, sys, torch
from nncf_mpq_plugin.memory import keep_freed_memory
keep_freed_memory()
def step():
    tensors = [torch.ones(2**20) for _ in range(16)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> int:
    """:return: pages that ten steps ask the system for, in a process of its own, since the setting is for good."""
    inherited = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_what_a_step_freed_serves_the_next_one_unless_the_environment_says_otherwise():
    given_back = faults(MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="131072")
    if given_back < 1000:
        pytest.skip(f"{given_back} faults: pages are large here")
    assert faults() * 5 < given_back
