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

NETWORKS = (Residual, Branches, Inverted, Dense, Merged, SqueezeExcite, Attention)


def placed(network):
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return nncf3.place(prepared(network), x, [x], bits=(2, 4)), x


def passes(quantized, x, several):
    """:return: outputs, gradients and buffers after a pass at each bit width."""
    quantized = copy.deepcopy(quantized)
    quantized.model.train()
    outputs = []
    with several(quantized):
        for bits in (4, 2):
            quantized.select_uniform(bits)
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
