"""Models compressed by NNCF 2.19, exported through the deployment module and verified."""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys

import openvino
import pytest
import torch
import torchvision
from compressing import Concat, Depthwise, Net, Repeated, Transposed, compress, config, data, settled
from torch import nn

from nncf_mpq_plugin import deploy
from nncf_mpq_plugin.adapters import nncf2
from nncf_mpq_plugin.adapters.base import native_quantizers
from nncf_mpq_plugin.adapters.nncf2_placement import LimitedQuantizer
from nncf_mpq_plugin.deploy.compiling import kernels
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


def check_exported(controller, folder, size: int = 16, classes: int = 4) -> tuple[nn.Module, dict]:
    """:return: the frozen model, whose exported files have been verified, and the certificate."""
    frozen = nncf2.freeze(controller)
    samples = [images for images, _ in data(64, size, classes)]
    deploy.export(frozen, samples[0], folder)
    report = deploy.verify(frozen, folder, samples)
    report.check()
    return frozen, report.certificate.to_json()


def check_certificate(certificate: dict, sums: str) -> None:
    """
    What holds by construction: the lattice of every tensor is known, and what comes from one layer of few bits is
    certified, since its accumulators are far below 2^24. Sums of several layers need a common fraction for each
    channel, and there may be none with a margin above the error.

    :param sums: pattern of the tensors behind residual additions.
    """
    for tensor, reason in certificate["not_certified"].items():
        assert re.fullmatch(sums, tensor), certificate
        assert reason.startswith("a value may lie"), certificate


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
        frozen, _ = check_exported(controller, tmp_path)
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
    frozen, _ = check_exported(controller, tmp_path)
    quantizer = native_quantizers(frozen)["pre_hooks.conv1/conv2d/0__1.0"]
    assert (quantizer.level_low, quantizer.level_high) == (-8, 7)


def test_export_of_unified_scales(tmp_path) -> None:
    """On an NPU the branches of the concatenation have one quantizer, so the layer behind it runs in integers."""
    padded = {"stem": 8, "right": 8}  # at 4 bits NNCF would adjust their padding for the NPU
    controller, _ = trained(tmp_path, Concat(), device="NPU", bits=[4, 8], compression_ratio=1.1, fixed_bits=padded)
    assert any(len(info.affected_insertions) > 1 for info in controller.non_weight_quantizers.values())
    frozen, _ = check_exported(controller, tmp_path)
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
    frozen, _ = check_exported(controller, tmp_path)
    with torch.no_grad():
        expected = compressed(images)
        assert (frozen(images) - expected).abs().mean() < 0.05 * expected.std()


def test_layers_without_integer_kernels_keep_their_grid(tmp_path) -> None:
    controller, _ = trained(tmp_path, Transposed(), bits=[2, 4], fixed_bits={})
    frozen, _ = check_exported(controller, tmp_path)
    assert frozen.up.weight.unique().numel() <= 16


def test_a_layer_behind_several_quantizers(tmp_path) -> None:
    controller, _ = trained(tmp_path, Repeated(bias=False), type="none")
    check_exported(controller, tmp_path)
    controller, _ = trained(tmp_path, Repeated(bias=True), type="none")
    message = r"\[twice\] has a bias and is called behind .* \(of Repeated/relu_0, Repeated/__mul___0\)"
    with pytest.raises(UnsupportedModelError, match=message):
        nncf2.freeze(controller)


def test_every_call_of_a_layer_gets_room(tmp_path) -> None:
    """With the first call's input at 4 bits and the second's at 8, products saturate in the second only."""
    manual = {"type": "manual", "bitwidth_per_scope": [[4, "Repeated/relu_0|OUTPUT"]]}
    model = Repeated(bias=False)
    with torch.no_grad():
        model.twice.weight.copy_(model.twice.weight.abs().max() * model.twice.weight.sign())
    controller, _ = compress(model, config(tmp_path, **manual))
    frozen = nncf2.freeze(controller)
    assert native_quantizers(frozen)["pre_hooks.twice/conv2d/0__1.0"].level_high == 63


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


@pytest.mark.parametrize("build", [Net, Depthwise])
def test_no_rounding_tie_can_be_reached(tmp_path, build) -> None:
    controller, _ = trained(tmp_path, build(), bits=[2, 4], compression_ratio=1.5)
    _, certificate = check_exported(controller, tmp_path)
    check_certificate(certificate, "__add__/1.quantized")
    assert certificate["tensors"] == (6 if build is Net else 9)


def test_the_step_of_the_input_is_a_power_of_two_and_stays_one(tmp_path) -> None:
    controller, _ = trained(tmp_path, Net(), bits=[2, 4], compression_ratio=1.5)
    quantizers = {str(key): info.quantizer_module_ref for key, info in controller.non_weight_quantizers.items()}
    for name, quantizer in quantizers.items():
        mantissa = math.frexp(float(quantizer.scale.detach()) / quantizer.level_high)[0]
        assert (mantissa == 0.5) == ("nncf_model_input" in name), name


@pytest.mark.parametrize("bits", [4, 8])
def test_values_next_to_a_tie_of_the_input(tmp_path, bits) -> None:
    """The exported quantizer adds its zero point first, which rounds to float32; so does the frozen one."""
    fixed = {"first": bits, "last": 8}
    controller, _ = trained(tmp_path, Net(), bits=[2, 4], fixed_bits=fixed, compression_ratio=1.5)
    frozen = nncf2.freeze(controller)
    quantizer = native_quantizers(frozen)["post_hooks.nncf_model_input/0__0.0"]
    step = float(quantizer.scale) / quantizer.level_high
    ties = (torch.arange(3 * 16 * 16) % 2 ** (bits - 1) - 2 ** (bits - 2) + 0.5) * step
    images = torch.stack([ties * (1 + k * 2.0**-22) for k in range(-8, 8)]).reshape(-1, 3, 16, 16)
    deploy.export(frozen, images, tmp_path)
    report = deploy.verify(frozen, tmp_path, [images])
    assert all(runtime.agreeing == 1.0 for runtime in report.runtimes if runtime.required), report


def full_range(folder) -> object:
    """:return: NNCF's controller of a network whose 8-bit weights lie at the ends of their range."""
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(parameter.abs().max() * parameter.sign())
    return compress(model, config(folder, type="none"))[0]


def test_products_of_8_bit_weights_leave_room_in_16_bits(tmp_path, caplog) -> None:
    controller = full_range(tmp_path)
    with caplog.at_level(logging.WARNING, logger="nncf"):
        frozen = nncf2.freeze(controller)
    assert "Exported with weights of 7 bits" in caplog.text
    for name, quantizer in native_quantizers(frozen).items():
        if "conv2d" in name and name.startswith("pre_hooks"):
            assert quantizer.level_high == 63, name


def test_saturating_kernels_agree(tmp_path) -> None:
    """In a process that has AVX2 kernels only; with weights at the full range of 8 bits, most samples differ there."""
    code = (
        "import sys, pathlib\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from nncf_mpq_plugin.adapters import nncf2\n"
        "nncf2.register()\n"
        "from test_nncf2_freeze import check_exported, full_range\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "check_exported(full_range(folder), folder)\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


def test_learned_8_bit_weights_use_half_of_their_range(tmp_path, caplog) -> None:
    controller, _ = trained(tmp_path, Net(), bits=[2, 4], compression_ratio=1.5)
    assert {
        (quantizer.num_bits, quantizer.level_low, quantizer.level_high)
        for info in controller.weight_quantizers.values()
        for quantizer in [info.quantizer_module_ref]
    } <= {(8, -64, 63), (4, -8, 7), (2, -2, 1)}
    with caplog.at_level(logging.WARNING, logger="nncf"):
        check_exported(controller, tmp_path)
    assert "weights of 7 bits" not in caplog.text


def test_half_range_can_be_switched_off(tmp_path) -> None:
    extra = {"overflow_fix": "disable"}
    controller, _ = compress(Net(), config(tmp_path, extra=extra, bits=[2, 4], compression_ratio=1.5))
    heads = {info.quantizer_module_ref.level_high for info in controller.weight_quantizers.values()}
    assert max(heads) == 127


@pytest.mark.parametrize(
    ("network", "sums"),
    [("resnet18", r"layer\d/\d/relu/relu_/1\.quantized"), ("mobilenet_v2", r"features/\d+/__add__/0\.quantized")],
)
def test_a_network_of_torchvision_end_to_end(tmp_path, network, sums) -> None:
    torch.manual_seed(0)
    model = settled(getattr(torchvision.models, network)(num_classes=10), data(32, 64, 10))
    controller, _ = trained(tmp_path, model, 64, 10, bits=[2, 4], compression_ratio=1.5)
    _, certificate = check_exported(controller, tmp_path, 64, 10)
    check_certificate(certificate, sums)
    precisions = kernel_precisions(tmp_path)
    assert precisions.get("f32", 0) == 0, precisions
