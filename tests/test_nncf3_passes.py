"""Several passes under one mode of NNCF, against NNCF's own way."""

import contextlib
import copy

import pytest
import torch

nncf3 = pytest.importorskip("nncf_mpq_plugin.adapters.nncf3", reason="needs NNCF 3")

from networks import (  # noqa: E402
    Attention,
    Branches,
    Dense,
    Inverted,
    Merged,
    Residual,
    SqueezeExcite,
    prepared,
)
from nncf.torch.function_hook import register_post_function_hook  # noqa: E402
from torch import nn  # noqa: E402
from torch.overrides import _get_current_function_mode_stack  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from nncf_mpq_plugin.refine import JointLoss  # noqa: E402
from nncf_mpq_plugin.sensitivity import loss_change_importance  # noqa: E402
from nncf_mpq_plugin.types import LayerBits  # noqa: E402

NETWORKS = (Residual, Branches, Inverted, Dense, Merged, SqueezeExcite, Attention)


def placed(network):
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return nncf3.place(prepared(network), x, [x], bits=(2, 4)), x


def passes(quantized, x, several, off=False):
    """:return: outputs, gradients and buffers after a pass at each bit width, or with activations as they are."""
    quantized = copy.deepcopy(quantized)
    quantized.model.train()
    outputs = []
    with several(quantized):
        for bits in (4, 2):
            quantized.select_uniform(bits)
            for quantizer in (*quantized.activation_quantizers.values(), *quantized.stored_quantizers.values()):
                quantizer.enabled = not off
            outputs.append(quantized.model(x=x) if bits == 2 else quantized.model(x))
            outputs[-1].square().sum().backward()
    gradients = {name: p.grad for name, p in quantized.model.named_parameters() if p.grad is not None}
    return {**dict(enumerate(outputs)), **gradients, **dict(quantized.model.named_buffers())}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_outputs_and_gradients_are_those_of_nncfs_own_passes(network):
    quantized, x = placed(network)
    shared = passes(quantized, x, lambda quantized: quantized.several_passes())
    own = passes(quantized, x, lambda quantized: super(type(quantized), quantized).several_passes())
    assert shared.keys() == own.keys()
    for name, value in own.items():
        assert torch.equal(shared[name], value), name


@pytest.mark.parametrize("label_free", [False, True])
def test_losses_are_those_of_nncfs_own_passes(label_free, monkeypatch):
    quantized, x = placed(Inverted)
    batches = [(part, torch.arange(4)) for part in x.split(4)]
    bits = {layer.cost.name: LayerBits(2, 4) for layer in quantized.searchable}
    measure = JointLoss(quantized, [x], batches, label_free=label_free)
    entered = []

    def several_passes(self):
        entered.append(self)
        return contextlib.nullcontext()

    def measured():
        return measure(bits), loss_change_importance(quantized, batches, label_free=label_free)

    loss, table = measured()
    monkeypatch.setattr(nncf3.NNCFQuantizedModel, "several_passes", several_passes)
    assert measured() == (loss, table)
    assert len(entered) == 2


class Calls(TorchDispatchMode):
    """Counts the activation functions that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.split("::")[1].rstrip("_")
        self.count += name in ("relu", "hardtanh", "clamp")
        return func(*args, **(kwargs or {}))


class Rectified(nn.Module):
    """Four convolutions, and activation functions as the classes below have them."""

    runs = 0  # activation functions that no quantizer can stand for

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
        self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6(inplace=True)

    def forward(self, x):
        first, second, third, last = self.layers
        return last(self.body(first(x), second, third)).relu().mean((2, 3))

    def body(self, x, second, third):
        return nn.functional.hardtanh(third(self.relu6(second(self.relu(x)))), 0, 3)


class InputReadTwice(Rectified):
    runs = 1

    def body(self, x, second, third):
        return self.relu(third(nn.functional.relu(x)) + x)


class ChangedUnderTheReader(Rectified):
    """As in MiDaS' residual units: the addition reads what the function in place has made of ``x``."""

    runs = 1

    def body(self, x, second, third):
        return self.relu(third(self.relu(x)) + x)


class ResultNotTaken(Rectified):
    runs = 1

    def body(self, x, second, third):
        self.relu(x)
        return self.relu(third(x))


class ThroughAView(Rectified):
    runs = 1

    def body(self, x, second, third):
        y = self.relu(x.flatten(2))
        return self.relu(third(y.reshape(x.shape)) + second(x))


class AdditionInPlace(Rectified):
    def body(self, x, second, third):
        x = self.relu(x)
        y = second(x)
        y += third(x)
        return self.relu(y)


class Clamped(Rectified):
    """Clamping has a gradient at the bounds themselves, unlike ReLU6."""

    runs = 2

    def body(self, x, second, third):
        return third(torch.clamp(second(x.clamp(0, 6)), 0, 6))


class Slices(Rectified):
    """A ReLU makes a dense tensor of a slice."""

    runs = 1

    def body(self, x, second, third):
        return third(nn.functional.relu(second(x)[:, :, ::2]))


CASES = (
    Rectified,
    InputReadTwice,
    ChangedUnderTheReader,
    ResultNotTaken,
    ThroughAView,
    AdditionInPlace,
    Clamped,
    Slices,
)


@pytest.mark.parametrize("off", [False, True], ids=["quantized", "floating-point activations"])
@pytest.mark.parametrize("network", CASES, ids=lambda network: network.__name__)
def test_activation_functions_run_only_where_no_quantizer_stands_for_them(network, off):
    quantized, x = placed(network)
    with Calls() as calls:
        shared = passes(quantized, x, lambda quantized: quantized.several_passes(), off)
    with Calls() as own_calls:
        own = passes(quantized, x, lambda quantized: super(type(quantized), quantized).several_passes(), off)
    assert calls.count == own_calls.count if off else calls.count == 2 * network.runs
    assert own_calls.count >= 2 * (network.runs + 1)
    for name, value in own.items():
        assert torch.equal(shared[name], value), name


def test_hooks_on_parameters_are_not_passed_over():
    quantized, _ = placed(Residual)
    register_post_function_hook(quantized.model, "stem.weight", 0, nn.Identity())
    with pytest.raises(AssertionError, match="hooks on parameters"):
        quantized.several_passes()


def test_the_model_is_as_before_afterwards():
    quantized, x = placed(Residual)
    forward = quantized.model.forward
    with pytest.raises(RuntimeError, match="channels"), quantized.several_passes():
        quantized.model(x[:, :2])
    assert quantized.model.forward is forward
    assert not [name for name, module in quantized.model.named_modules() if "_call_impl" in vars(module)]
    assert not _get_current_function_mode_stack()
    assert torch.isfinite(quantized.model(x)).all()
