import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from nncf_mpq_plugin import convolution, lsq
from nncf_mpq_plugin.adapters.nncf3 import place
from nncf_mpq_plugin.recompute import recomputed


@pytest.fixture
def calls(monkeypatch):
    """:return: the arguments of every call of ``weight_gradient``."""
    calls = []
    gradient = convolution.weight_gradient
    monkeypatch.setattr(convolution, "weight_gradient", lambda *args: calls.append(args) or gradient(*args))
    return calls


def gradients(function, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return output, torch.autograd.grad((output * weights).sum(), leaves)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    pairs,
    pairs,
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_gradients_are_those_of_torch(samples, channels, outputs, kernel, stride, padding):
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    leaves = numbers(samples, channels, 4, 5), numbers(outputs, channels, *kernel), numbers(outputs)
    expected, others = gradients(lambda *args: torch.conv2d(*args, stride, padding), *leaves)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "LARGE", 0)
        patch.setattr(convolution, "FEW", 30)
        got, own = gradients(lambda *args: convolution.conv2d(*args, stride, padding, (1, 1)), *leaves)
    assert "_Convolution" in type(got.grad_fn).__name__
    assert torch.equal(got, expected)
    for one, other in zip(own, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_only_large_weights_with_few_outputs_are_treated(calls):
    def treated(x, weight, *options):
        calls.clear()
        weight.requires_grad_()
        got, expected = (
            torch.autograd.grad(function(x, weight, None, *options).sum(), weight)[0]
            for function in (convolution.conv2d, torch.conv2d)
        )
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        return bool(calls)

    plain = (1, 1), (1, 1), (1, 1)
    small, weight = torch.rand(1, 512, 2, 2), torch.rand(512, 512, 3, 3)
    assert treated(small, weight, *plain)
    assert not treated(torch.rand(1, 512, 3, 2), weight, *plain)
    assert not treated(torch.rand(1, 128, 2, 2), torch.rand(512, 128, 3, 3), *plain)
    assert not treated(small, torch.rand(1024, 256, 3, 3), *plain, 2)
    assert not treated(small, weight, (1, 1), (2, 2), (2, 2))
    assert not treated(small, weight, (1, 1), "same", (1, 1))
    assert not treated(small[0], weight, *plain)
    assert not treated(small, weight, 1, 1, 1)
    assert not treated(small, weight, (1,), (1, 1), (1, 1))
    assert not treated(small, weight, (1, 1), (1,), (1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert not treated(small, weight, *plain)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Linear(32, 4)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu().flatten(1))


def test_passes_of_a_quantized_network_use_it(calls, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    quantized = place(Net().eval(), x[:1], [x], bits=(2, 3, 4))
    quantized.model.train()
    quantized.select_uniform(3)

    def step():
        quantized.model.zero_grad(set_to_none=True)
        with quantized.several_passes(), recomputed():
            quantized.model(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in quantized.model.named_parameters() if p.grad is not None}

    expected = step()
    assert not calls
    monkeypatch.setattr(convolution, "LARGE", 0)
    monkeypatch.setattr(convolution, "FEW", 16)
    got = step()
    assert len(calls) == 2
    storages = []
    monkeypatch.setattr(
        lsq, "listeners", [lambda output, *_: storages.append(StorageWeakRef(output.untyped_storage()))]
    )
    with quantized.several_passes(), recomputed():
        output = quantized.model(x)
    assert len(storages) > 4
    assert all(storage.expired() for storage in storages)  # none is kept for the backward pass
    assert output.requires_grad
    assert len(got) > 6
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
