"""Models compressed by NNCF 2.19, exported through the deployment module and verified."""

from __future__ import annotations

import openvino
import pytest
import torch
import torchvision
from compressing import Concat, Net, Transposed, compress, config, data
from torch import nn

from nncf_mpq_plugin import deploy
from nncf_mpq_plugin.adapters import nncf2
from nncf_mpq_plugin.adapters.base import native_quantizers
from nncf_mpq_plugin.adapters.nncf2_placement import LimitedQuantizer
from nncf_mpq_plugin.deploy.openvino import kernels
from nncf_mpq_plugin.errors import InputError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("registered")


def trained(folder, model: nn.Module, size: int = 16, classes: int = 4, **options):
    """:return: controller and model after a few steps of training, in evaluation mode."""
    torch.manual_seed(0)
    loader = data(32, size, classes)
    controller, compressed = compress(model, config(folder, size=size, **options), loader)
    optimizer = torch.optim.SGD(compressed.parameters(), 1e-3)
    compressed.train()
    for images, target in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(compressed(images), target).backward()
        optimizer.step()
    return controller, compressed.eval()


def check_exported(controller, folder, size: int = 16, classes: int = 4) -> nn.Module:
    """:return: the frozen model, whose exported files have been verified."""
    frozen = nncf2.freeze(controller)
    samples = [images for images, _ in data(64, size, classes)]
    deploy.export(frozen, samples[0], folder)
    deploy.verify(frozen, folder, samples).check()
    return frozen


def kernel_precisions(folder) -> dict[str, int]:
    compiled = deploy.compile(folder / "model.xml", INFERENCE_NUM_THREADS=1)
    found: dict[str, int] = {}
    for kernel in kernels(compiled):
        if kernel["type"] in ("Convolution", "FullyConnected"):
            found[kernel["precision"]] = found.get(kernel["precision"], 0) + 1
    return found


def test_export_of_learned_bits(tmp_path) -> None:
    controller, compressed = trained(tmp_path, Net(), bits=[2, 4], compression_ratio=1.5)
    images = next(iter(data()))[0]
    with torch.no_grad():
        before = compressed(images)
        frozen = check_exported(controller, tmp_path)
        assert torch.equal(before, compressed(images))
        difference = (frozen(images) - before).abs().mean() / before.std()
    assert difference < 0.05  # what the rounding of biases to the accumulator's grid changes
    assert set(kernel_precisions(tmp_path)) <= {"u8", "i8"}
    operations = openvino.Core().read_model(tmp_path / "model.xml").get_ops()
    types = {op.get_element_type() for op in operations if op.get_type_name() == "Constant"}
    packed = {2: openvino.Type.u2, 4: openvino.Type.u4}
    bits = {info.quantizer_module_ref.num_bits for info in controller.weight_quantizers.values()}
    assert bits > {8}
    assert {packed[b] for b in bits - {8}} <= types


def test_no_quantizer_is_left_before_a_residual_addition(tmp_path) -> None:
    controller, _ = compress(Net(), config(tmp_path, bits=[2, 4], compression_ratio=1.5))
    names = {str(key) for key in controller.non_weight_quantizers}
    assert "Net/NNCFConv2d[conv2]/conv2d_0|OUTPUT" not in names
    assert not {"Net/ReLU[relu]/relu__3|OUTPUT", "Net/ReLU[relu]/relu__4|OUTPUT"} & names
    assert {"Net/ReLU[relu]/relu__0|OUTPUT", "Net/__add___1|OUTPUT"} <= names
    plain, _ = compress(Net(), config(tmp_path, type="none"))
    assert "Net/NNCFConv2d[conv2]/conv2d_0|OUTPUT" in {str(key) for key in plain.non_weight_quantizers}
    assert "post_hooks.conv2/conv2d/0__0.0" not in native_quantizers(nncf2.freeze(plain))


def test_every_quantizer_runs_in_joint_training(tmp_path, monkeypatch) -> None:
    """Those behind ``+`` and ``mean`` as well, which NNCF sees on its own tensors only."""
    calls: dict[int, int] = {}
    forward = LimitedQuantizer.forward

    def counted(self, x):
        if self._observed is None:
            calls[id(self)] = calls.get(id(self), 0) + 1
        return forward(self, x)

    monkeypatch.setattr(LimitedQuantizer, "forward", counted)
    controller, _ = compress(Net(), config(tmp_path, bits=[2, 4], compression_ratio=1.5))
    assert len(calls) == len(controller.all_quantizations)


def test_export_after_other_precision_initialisations(tmp_path) -> None:
    manual = {"type": "manual", "bitwidth_per_scope": [[4, "Net/NNCFConv2d[conv1]/conv2d_0|WEIGHT"]]}
    controller, _ = trained(tmp_path, Net(), **manual)
    frozen = check_exported(controller, tmp_path)
    quantizer = native_quantizers(frozen)["pre_hooks.conv1/conv2d/0__1.0"]
    assert (quantizer.level_low, quantizer.level_high) == (-8, 7)


def test_export_of_unified_scales(tmp_path) -> None:
    """On an NPU the branches of the concatenation have one quantizer, so the layer behind it runs in integers."""
    padded = {"stem": 8, "right": 8}  # at 4 bits NNCF would adjust their padding for the NPU
    controller, _ = trained(tmp_path, Concat(), device="NPU", bits=[4, 8], compression_ratio=1.1, fixed_bits=padded)
    assert any(len(info.affected_insertions) > 1 for info in controller.non_weight_quantizers.values())
    frozen = check_exported(controller, tmp_path)
    steps = {name: float(quantizer.scale) for name, quantizer in native_quantizers(frozen).items() if "relu/" in name}
    assert steps["post_hooks.relu/1__0.0"] == steps["post_hooks.relu/2__0.0"]
    assert set(kernel_precisions(tmp_path)) <= {"u8", "i8"}


def test_batch_norm_that_mirrors_channels(tmp_path) -> None:
    model = Net()
    with torch.no_grad():
        model.bn.weight[::2] = -1
        model.bn1.weight[1] = 0
    controller, compressed = trained(tmp_path, model, bits=[2, 4], compression_ratio=1.5)
    images = next(iter(data()))[0]
    frozen = check_exported(controller, tmp_path)
    with torch.no_grad():
        expected = compressed(images)
        assert (frozen(images) - expected).abs().mean() < 0.05 * expected.std()


def test_layers_without_integer_kernels_keep_their_grid(tmp_path) -> None:
    controller, _ = trained(tmp_path, Transposed(), bits=[2, 4], fixed_bits={})
    frozen = check_exported(controller, tmp_path)
    assert frozen.up.weight.unique().numel() <= 16


def test_what_cannot_be_exported(tmp_path) -> None:
    with pytest.raises(InputError, match="pass the controller"):
        nncf2.freeze(Net())
    asymmetric, _ = compress(Net(), config(tmp_path, type="none", extra={"preset": "mixed"}))
    with pytest.raises(UnsupportedModelError, match="is asymmetric"):
        nncf2.freeze(asymmetric)
    channels, _ = compress(Net(), config(tmp_path, type="none"))
    next(iter(channels.non_weight_quantizers.values())).quantizer_module_ref.scale = nn.Parameter(
        torch.ones(1, 3, 1, 1)
    )
    with pytest.raises(UnsupportedModelError, match="one scale per channel of activations"):
        nncf2.freeze(channels)


def test_mobilenet_v2_end_to_end(tmp_path) -> None:
    model = torchvision.models.mobilenet_v2(num_classes=10)
    controller, _ = trained(tmp_path, model, 64, 10, bits=[2, 4, 8], compression_ratio=1.5)
    frozen = nncf2.freeze(controller)
    samples = [images for images, _ in data(64, 64, 10)]
    deploy.export(frozen, samples[0], tmp_path)
    report = deploy.verify(frozen, tmp_path, samples)
    for runtime in report.runtimes:
        if runtime.required:  # random weights amplify near-ties, so the share of equal samples is not held here
            assert runtime.mean_difference <= max(0.01, 2 * report.torch_float64.mean_difference), runtime
            assert runtime.top1_decided == 1.0, runtime
    precisions = kernel_precisions(tmp_path)
    assert precisions.get("f32", 0) == 0, precisions
