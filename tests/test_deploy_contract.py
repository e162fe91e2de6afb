"""
The exactness contract over random policies on weights trained at their bits, with the machine's own instruction set
and, in a process of its own, with AVX2.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import Attention, Branches, Dense, Inverted, Merged, Residual, SqueezeExcite, prepared

nncf3 = pytest.importorskip("nncf_mpq_plugin.adapters.nncf3", reason="needs NNCF 3")

from nncf_mpq_plugin import deploy  # noqa: E402
from nncf_mpq_plugin.deploy.compiling import compile_exactly  # noqa: E402
from nncf_mpq_plugin.deploy.divergence import Trace  # noqa: E402
from nncf_mpq_plugin.deploy.measurement import layer_kernels  # noqa: E402
from nncf_mpq_plugin.deploy.runtimes import OUTPUT, run_onnxruntime, run_openvino  # noqa: E402
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune  # noqa: E402
from nncf_mpq_plugin.types import LayerBits, Policy  # noqa: E402

BITS = (2, 3, 4, 5, 6, 8)
LIMIT = "ONEDNN_MAX_CPU_ISA"
EXACT = (Residual, Branches, Inverted, Dense, Merged)  # no floating-point function between quantizers
CASES = [
    pytest.param(network, seed, marks=[pytest.mark.slow] if seed else [], id=f"{network.__name__}-{seed}")
    for network in (*EXACT, SqueezeExcite, Attention)
    for seed in range(3)
]


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


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(scope="module")
def exported(root):
    """:return: (network, seed) -> names of its layers, frozen model and folder; trained and exported once."""
    cases = {}

    def get(network, seed):
        if (network, seed) not in cases:
            batches = data()
            inputs = [x for x, _ in batches]
            quantized = nncf3.place(prepared(network, seed), inputs[0], inputs[:2], bits=BITS)
            config = FinetuneConfig(epochs=2, learning_rate=0.005, seed=seed)
            finetune(quantized, Policy(random_policy(quantized, seed)), batches, config)
            frozen = nncf3.freeze(quantized)
            folder = root / f"{network.__name__}-{seed}"
            deploy.export(frozen, inputs[0], folder)
            nncf3.save_model(folder, frozen)
            cases[network, seed] = [layer.cost.name for layer in quantized.layers], frozen, folder
        return cases[network, seed]

    return get


def assert_contract(network, frozen, folder):
    inputs = torch.cat([x for x, _ in data()])
    report = deploy.verify(frozen, folder, [inputs])
    assert report.samples == 256
    assert report.ok, report.to_json()
    if network not in EXACT:
        return
    assert report.certificate.complete, report.certificate.to_json()
    assert all(runtime.agreeing == 1.0 for runtime in report.runtimes if runtime.required), report.to_json()
    trace = Trace(frozen, inputs)
    names = trace.tensors[:-1]
    results = [
        run_openvino(folder / "model.xml", trace.inputs, names),
        run_openvino(folder / "model.onnx", trace.inputs, names),
        run_onnxruntime(folder / "model.onnx", trace.inputs, names),
    ]
    for result in results:
        for name in names:
            difference = abs(result[name].reshape(trace.float32[name].shape) - trace.float32[name])
            assert difference.max() < 0.01 * trace.steps[name], name
        spread = trace.float32[OUTPUT].std()
        assert abs(result[OUTPUT] - trace.float32[OUTPUT]).max() < 1e-4 * spread


@pytest.mark.parametrize(("network", "seed"), CASES)
def test_the_contract_is_kept(network, seed, exported):
    layers, frozen, folder = exported(network, seed)
    assert_contract(network, frozen, folder)
    for batch_size in (None, 1):
        found = layer_kernels(compile_exactly(folder / "model.xml", batch_size), layers)
        assert set(layers) - set(found) <= {"attention.out_proj"}  # OpenVINO renames that one
        assert all(kernel.split()[0] in ("u8", "i8") for kernel in found.values()), found


@pytest.mark.slow
def test_the_contract_is_kept_with_avx2(exported, root):
    for network in (*EXACT, SqueezeExcite, Attention):
        for seed in range(3):
            exported(network, seed)
    environment = {**os.environ, LIMIT: "AVX2"}
    done = subprocess.run([sys.executable, __file__, str(root)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    checked = set(done.stdout.splitlines())
    assert checked >= {
        f"{network.__name__}-{seed}" for network in (*EXACT, SqueezeExcite, Attention) for seed in range(3)
    }


def check_under_the_limit(root: Path) -> None:
    """In a process with the limit: what another one exported."""
    for network in (*EXACT, SqueezeExcite, Attention):
        for seed in range(3):
            folder = root / f"{network.__name__}-{seed}"
            frozen = nncf3.load_model(folder, prepared(network, seed))
            assert_contract(network, frozen, folder)
            layers = [name.removesuffix(".weight") for name, _ in frozen.named_parameters() if name.endswith(".weight")]
            found = layer_kernels(compile_exactly(folder / "model.xml"), layers)
            assert found
            assert not any("avx512" in kernel for kernel in found.values()), found
            sys.stdout.write(f"{folder.name}\n")


if __name__ == "__main__":
    check_under_the_limit(Path(sys.argv[1]))
