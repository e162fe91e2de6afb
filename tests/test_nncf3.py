"""Placement, freezing and loading on real NNCF 3."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

nncf3 = pytest.importorskip("nncf_mpq_plugin.adapters.nncf3", reason="needs NNCF 3")

from networks import Branches, Residual, prepared  # noqa: E402

from nncf_mpq_plugin.adapters.base import native_quantizers  # noqa: E402
from nncf_mpq_plugin.adapters.ties import TOLERANCE  # noqa: E402
from nncf_mpq_plugin.errors import InputError, UnsupportedModelError  # noqa: E402
from nncf_mpq_plugin.types import LayerBits  # noqa: E402


def inputs(batches: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 3, 16, 16) for _ in range(batches)]


def placed(network, **keywords):
    data = inputs()
    return nncf3.place(prepared(network), data[0], data, bits=(2, 3, 4, 5, 6), **keywords)


@pytest.fixture(scope="module")
def residual():
    return placed(Residual)


@pytest.fixture(scope="module")
def branches():
    return placed(Branches)


def test_every_weighted_layer_is_placed_in_order(residual):
    assert [layer.cost.name for layer in residual.layers] == [
        "stem",
        "block1.conv1",
        "block1.conv2",
        "block2.conv1",
        "block2.conv2",
        "block2.shortcut",
        "fc",
    ]
    assert {layer.cost.name for layer in residual.layers if layer.fixed} == {"stem", "fc"}


def test_costs_are_exact(residual, branches):
    costs = {layer.cost.name: layer.cost for layer in (*residual.layers, *branches.layers)}
    assert costs["block1.conv1"].macs == 16 * 16 * 8 * 8 * 9
    assert costs["block2.shortcut"].macs == 8 * 8 * 16 * 8
    assert costs["depthwise"].macs == 16 * 16 * 16 * 9
    assert costs["hidden"].macs == costs["hidden"].weights == 16 * 12


def test_layers_reading_one_tensor_share_a_group(residual, branches):
    groups = {layer.cost.name: layer.cost.activation_group for layer in (*residual.layers, *branches.layers)}
    assert groups["block2.shortcut"] == groups["block2.conv1"]
    assert groups["right"] == groups["left"]
    assert groups["depthwise"] == "depthwise"


def test_model_is_not_changed():
    model = prepared(Residual)
    before = copy.deepcopy(model.state_dict())
    nncf3.place(model, inputs()[0], inputs(), bits=(4,))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_uniform_high_bits_stay_close_to_floating_point(residual):
    x = inputs()[0]
    with torch.no_grad():
        reference = prepared(Residual)(x)
        residual.select_uniform(6)
        assert (residual.model(x) - reference).std() < 0.2 * reference.std()


@pytest.mark.parametrize("network", [Residual, Branches])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_frozen_model_computes_the_same_but_for_small_changes_of_steps_and_biases(network, bits, request):
    quantized = request.getfixturevalue(network.__name__.lower())
    quantized.select_uniform(bits)
    x = inputs()[0]
    with torch.no_grad():
        trained = quantized.model(x)
        frozen = nncf3.freeze(quantized)(x)
    assert (frozen - trained).abs().mean() < 0.25 * trained.std()


def test_frozen_quantizers_carry_bits_scales_and_full_range(residual):
    policy = {layer.cost.name: LayerBits(3, 5) for layer in residual.searchable}
    residual.select(policy)
    quantizers = native_quantizers(nncf3.freeze(residual))
    weight = quantizers["pre_hooks.block1/conv1/conv2d/0__1.0"]
    assert (weight.num_bits, weight.level_low, weight.level_high) == (3, -4, 3)
    step = weight.scale.flatten() / weight.level_high
    norm = residual.model.block1.bn1
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    learned = residual.weight_quantizers["block1.conv1"].effective_scale()
    torch.testing.assert_close(step, (learned * factor).detach(), rtol=4 * TOLERANCE, atol=0)
    first = quantizers["pre_hooks.stem/conv2d/0__1.0"]
    assert (first.num_bits, first.level_low, first.level_high) == (8, -64, 63)
    activation = quantizers["pre_hooks.block1/conv1/conv2d/0__0.0"]
    assert (activation.num_bits, activation.level_low, activation.level_high) == (5, 0, 31)


def test_frozen_weights_and_biases_lie_on_their_grids(residual):
    residual.select_uniform(4)
    frozen = nncf3.freeze(residual)
    quantizers = native_quantizers(frozen)
    weight = quantizers["pre_hooks.block1/conv2/conv2d/0__1.0"]
    step = weight.scale.detach() / weight.level_high
    integers = frozen.block1.conv2.weight / step
    assert (integers - integers.round()).abs().max() < 1e-4
    activation = quantizers["post_hooks.block1/relu/relu/0__0.0"]
    unit = step.flatten().double() * (activation.scale / activation.level_high).double()
    bias = frozen.block1.bn2.bias.double() / unit
    assert (bias - bias.round()).abs().max() < 1e-3


def test_saved_model_loads_in_a_new_process_with_identical_outputs(residual, tmp_path):
    residual.select({layer.cost.name: LayerBits(2, 5) for layer in residual.searchable})
    frozen = nncf3.freeze(residual)
    x = inputs()[0]
    nncf3.save_model(tmp_path, frozen)
    torch.save({"x": x, "y": frozen(x).detach()}, tmp_path / "io.pt")
    script = """
import sys, torch
sys.path.insert(0, "tests")
from networks import Residual
from nncf_mpq_plugin.adapters import nncf3
from nncf_mpq_plugin.adapters.base import native_quantizers
folder = sys.argv[1]
model = nncf3.load_model(folder, Residual())
io = torch.load(folder + "/io.pt", weights_only=True)
assert torch.equal(model(io["x"]), io["y"])
bits = {q.num_bits for q in native_quantizers(model).values()}
assert bits == {2, 5, 8}, bits
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=300)


def test_loading_into_another_model_names_the_folder(residual, tmp_path):
    nncf3.save_model(tmp_path, nncf3.freeze(residual))
    with pytest.raises(InputError, match="does not fit this model"):
        nncf3.load_model(tmp_path, Branches())


def test_truncated_weights_are_an_input_error(residual, tmp_path):
    nncf3.save_model(tmp_path, nncf3.freeze(residual))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        nncf3.load_model(tmp_path, Residual())


def test_fixed_pattern_that_fits_nothing_is_refused():
    with pytest.raises(InputError, match="'blokc1'"):
        placed(Residual, fixed_bits={"blokc1": 8})


def test_ignored_layer_stays_in_floating_point():
    quantized = placed(Residual, ignored_scopes=["block1.conv2"])
    assert "block1.conv2" not in {layer.cost.name for layer in quantized.layers}


def test_model_without_layers_is_refused():
    model = torch.nn.ReLU()
    with pytest.raises(UnsupportedModelError):
        nncf3.place(model, inputs()[0], inputs(), bits=(4,))


class Mixture(nn.Module):
    """Layers that are quantized, and parameters of operations that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose2d(8, 8, 3)
        self.middle = nn.Conv2d(8, 8, 1)
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.last = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.middle(torch.relu(self.up(torch.relu(self.first(x))))))
        return self.last(torch.relu(x.mean((2, 3)) @ self.matrix))


def test_parameters_that_stay_in_floating_point_are_listed() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    quantized = nncf3.place(Mixture().eval(), images[:1], [images], bits=(2, 4))
    assert {layer.cost.name for layer in quantized.layers} == {"first", "middle", "last"}
    assert quantized.floating_parameters == ("matrix", "up.weight")
    assert nncf3.place(prepared(Residual), images[:1], [images], bits=(2, 4)).floating_parameters == ()


class SameNames(nn.Module):
    """Blocks that are called with a keyword: NNCF's names of their operations lack the blocks' path."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
            self.bn = nn.BatchNorm2d(outputs)

        def forward(self, x, scale=None):
            return torch.relu(self.bn(self.conv(x)))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(3, 8), self.Block(8, 12)])
        self.conv = nn.Conv2d(12, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=1.0)
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def test_batch_norm_is_found_by_its_parameters():
    quantized = placed(SameNames)
    assert [quantized.sites[name].batch_norm for name in ("blocks.0.conv", "blocks.1.conv", "conv")] == [
        "blocks.0.bn",
        "blocks.1.bn",
        "bn",
    ]


class SharedNorm(nn.Module):
    """One batch norm behind two layers: folding it into one would change it for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.first(x)))
        return self.fc(torch.relu(self.bn(self.second(x))).mean((2, 3)))


def test_a_batch_norm_of_two_layers_is_not_folded():
    quantized = placed(SharedNorm)
    assert [quantized.sites[name].batch_norm for name in ("first", "second")] == [None, None]
    quantized.select_uniform(4)
    data = inputs()[0]
    with torch.no_grad():
        expected = quantized.model(data)
        frozen = nncf3.freeze(copy.deepcopy(quantized))
        assert (frozen(data) - expected).abs().max() < 0.1 * expected.std()


def test_a_convolution_that_is_called_twice_is_refused():
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.twice = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            x = self.twice(self.stem(x).relu()).relu() * 3
            return self.twice(x).mean((2, 3))

    data = inputs()
    with pytest.raises(UnsupportedModelError, match="its weight 'twice' is used by another operation as well"):
        nncf3.place(Repeated().eval(), data[0], data, bits=(2, 4))
