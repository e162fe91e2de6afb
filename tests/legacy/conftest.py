"""NNCF 2.19 is needed here, and its absence is a failure; ``make test-legacy`` makes an environment that has it."""

import importlib.metadata
import os

import pytest

if not importlib.metadata.version("nncf").startswith("2.19.") or os.environ.get("NNCF_TORCH_LEGACY_TRACING") != "1":
    msg = "tests/legacy needs NNCF 2.19 and NNCF_TORCH_LEGACY_TRACING=1: run `make test-legacy`"
    raise pytest.UsageError(msg)

import torch

from nncf_mpq_plugin.adapters import nncf2

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture
def registered():
    """``learned_importance`` is known to NNCF during the test only."""
    nncf2.register()
    yield
    nncf2.unregister()
