"""Memory stays as it is over a long joint training, whose saves and records are part of it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from joint_steps import BATCH, SIDE, WIDTH

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
