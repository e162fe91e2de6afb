"""
The exactness contract over random policies on weights trained at their bits, with the machine's own instruction set
and, in a process of its own, with AVX2.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from networks import Attention, Branches, Residual, SqueezeExcite, prepared

nncf3 = pytest.importorskip("nncf_mpq_plugin.adapters.nncf3", reason="needs NNCF 3")

from nncf_mpq_plugin import deploy  # noqa: E402
from nncf_mpq_plugin.deploy.measurement import layer_kernels  # noqa: E402
from nncf_mpq_plugin.deploy.openvino import compile_exactly  # noqa: E402
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune  # noqa: E402
from nncf_mpq_plugin.types import LayerBits, Policy  # noqa: E402

BITS = (2, 3, 4, 5, 6, 8)
LIMIT = "ONEDNN_MAX_CPU_ISA"


def data(count: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ten fixed patterns under noise."""
    generator = torch.Generator().manual_seed(5)
    patterns = torch.randn(10, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (count, 32), generator=generator)
    return [(patterns[y] + 0.5 * torch.randn(32, 3, 16, 16, generator=generator), y) for y in labels]


def random_policy(quantized, seed: int) -> dict[str, LayerBits]:
    choose = random.Random(seed).choice
    groups = {group: choose(BITS) for group in quantized.searchable_groups}
    return {
        layer.cost.name: LayerBits(choose(BITS), groups[layer.cost.activation_group]) for layer in quantized.searchable
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("network", [Residual, Branches, SqueezeExcite, Attention], ids=lambda kind: kind.__name__)
def test_the_contract_is_kept(network, seed, tmp_path):
    batches = data()
    inputs = [x for x, _ in batches]
    quantized = nncf3.place(prepared(network, seed), inputs[0], inputs[:2], bits=BITS)
    config = FinetuneConfig(epochs=2, learning_rate=0.005, seed=seed)
    finetune(quantized, Policy(random_policy(quantized, seed)), batches, config)
    frozen = nncf3.freeze(quantized)
    deploy.export(frozen, inputs[0], tmp_path)
    report = deploy.verify(frozen, tmp_path, inputs)
    assert report.samples == 256
    assert report.ok, report.to_json()
    found = layer_kernels(compile_exactly(tmp_path / "model.xml"), [layer.cost.name for layer in quantized.layers])
    unnamed = {layer.cost.name for layer in quantized.layers} - set(found)
    assert unnamed <= {"attention.out_proj"}  # OpenVINO renames that one
    assert all(kernel.split()[0] in ("u8", "i8") for kernel in found.values()), found
    if os.environ.get(LIMIT) == "AVX2":
        assert not any("avx512" in kernel for kernel in found.values()), found


@pytest.mark.skipif(LIMIT in os.environ, reason="this is the process with the limit")
def test_the_contract_is_kept_with_avx2():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, LIMIT: "AVX2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "12 passed, 1 skipped" in done.stdout
