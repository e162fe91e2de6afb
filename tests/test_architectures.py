"""All stages, with random weights and a few steps, on torchvision's networks."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

nncf3 = pytest.importorskip("nncf_mpq_plugin.adapters.nncf3", reason="needs NNCF 3")

from nncf_mpq_plugin import deploy  # noqa: E402
from nncf_mpq_plugin.allocation import search  # noqa: E402
from nncf_mpq_plugin.deploy.openvino import compile_exactly, kernels  # noqa: E402
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune  # noqa: E402
from nncf_mpq_plugin.importance import importance_from_scales  # noqa: E402
from nncf_mpq_plugin.joint import JointConfig, train_jointly  # noqa: E402
from nncf_mpq_plugin.types import AverageBits, Budget  # noqa: E402

pytestmark = pytest.mark.slow

SIZE, BATCH, BATCHES = 64, 8, 4
CONVOLUTIONAL = ["resnet18", "mobilenet_v2", "squeezenet1_1", "densenet121"]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(torchvision.models, name)(num_classes=10).eval()


def examples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ten classes, each a fixed random pattern under noise, so that a few steps learn something."""
    generator = torch.Generator().manual_seed(3)
    patterns = torch.randn(10, 3, SIZE, SIZE, generator=generator)
    labels = torch.arange(BATCH * BATCHES) % 10
    noise = torch.randn(len(labels), 3, SIZE, SIZE, generator=generator)
    images = patterns[labels] + 0.5 * noise
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_stage_runs(name, tmp_path):
    data = examples()
    inputs = [x for x, _ in data]
    quantized = nncf3.place(build(name), inputs[0][:1], inputs[:2], bits=(2, 3, 4, 5, 6))
    train_jointly(quantized, data, JointConfig(epochs=1, data_fraction=0.5, learning_rate=1e-3))
    table = importance_from_scales(quantized, name)
    solution = search(table, Budget(average_bits=AverageBits(4, 4)))
    assert solution.status == "optimal"
    finetune(quantized, solution.policy, data, FinetuneConfig(epochs=2, learning_rate=1e-3))
    frozen = nncf3.freeze(quantized)

    nncf3.save_model(tmp_path, frozen)
    restored = nncf3.load_model(tmp_path, build(name))
    with torch.no_grad():
        assert torch.equal(restored(inputs[0]), frozen(inputs[0]))

    deploy.export(frozen, inputs[0][:1], tmp_path)
    report = deploy.verify(frozen, tmp_path, inputs)
    assert report.ok, report.to_json()
    layers = [
        k for k in kernels(compile_exactly(tmp_path / "model.xml")) if k["type"] in ("Convolution", "FullyConnected")
    ]
    integer = sum(layer["precision"] in ("u8", "i8") for layer in layers)
    assert integer >= 0.95 * len(layers) >= 0.95 * len(quantized.layers)
