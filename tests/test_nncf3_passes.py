"""Several passes under one mode of NNCF, against NNCF's own way."""

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


class Calls(TorchDispatchMode):
    """Counts the activation functions that run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket._qualified_op_name.split("::")[1].rstrip("_") in ("relu", "hardtanh")
        return func(*args, **(kwargs or {}))


class Rectified(nn.Module):
    """Activation functions in place or not; another operation reads the second one's input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3) for i in range(5))
        self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6(inplace=True)

    def forward(self, x):
        first, second, third, fourth, last = self.layers
        x = self.relu(first(x))
        x = second(x)
        x = third(nn.functional.relu(x)) + x[:, :, 1:-1, 1:-1]
        return last(self.relu6(fourth(nn.functional.hardtanh(x, 0, 3)))).relu().mean((2, 3))


@pytest.mark.parametrize("off", [False, True], ids=["quantized", "floating-point activations"])
def test_activation_functions_run_only_where_no_quantizer_contains_them(off):
    quantized, x = placed(Rectified)
    with Calls() as calls:
        shared = passes(quantized, x, lambda quantized: quantized.several_passes(), off)
    with Calls() as own_calls:
        own = passes(quantized, x, lambda quantized: super(type(quantized), quantized).several_passes(), off)
    assert own_calls.count == 2 * 5
    assert calls.count == 2 * (5 if off else 1)
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
