import copy

import pytest
import torch
from torch import nn

from nncf_mpq_plugin.adapters.nncf3 import place
from nncf_mpq_plugin.stem import computed_once


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.first(self.dropout(x))).relu_()
        return self.last(self.middle(x).relu_().mean((2, 3)))


def placed(net, **options):
    x = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return place(net.eval(), x[:1], [x], bits=(2, 4), **options), x


def step(quantized, x, stem):
    """:return: outputs and gradients of a pass at each bit width, and how often the first convolution ran."""
    model = copy.deepcopy(quantized)
    stem = model.stem if stem else None
    calls = []
    forward = model.model.first._conv_forward
    model.model.first._conv_forward = lambda *inputs: (calls.append(1), forward(*inputs))[1]
    model.model.train()
    torch.manual_seed(0)
    outputs = []
    with computed_once(stem):
        for bits in (4, 2, 4):
            model.select_uniform(bits)
            outputs.append(model.model(x))
            outputs[-1].square().sum().backward()
    gradients = {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}
    return outputs, gradients, len(calls)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["same input", "another input in each pass"])
def test_outputs_and_gradients_are_those_of_computing_it_in_every_pass(dropout):
    torch.manual_seed(0)
    quantized, x = placed(Net(dropout))
    assert quantized.stem is quantized.model.first
    once, every = step(quantized, x, stem=True), step(quantized, x, stem=False)
    assert (once[2], every[2]) == (3 if dropout else 1, 3)
    assert all(torch.equal(a, b) for a, b in zip(once[0], every[0], strict=True))
    assert once[1].keys() == every[1].keys()
    assert any(name.startswith("first") for name in once[1])
    for name, gradient in once[1].items():
        torch.testing.assert_close(gradient, every[1][name], rtol=1e-4, atol=1e-5)


def test_the_layer_is_as_before_afterwards():
    layer = nn.Conv2d(3, 8, 3)
    with pytest.raises(RuntimeError, match="expected input"), computed_once(layer):
        layer(torch.randn(1, 2, 4, 4))
    assert "forward" not in vars(layer)


def test_only_a_fixed_first_layer_behind_which_a_batch_norm_stands():
    assert placed(Net(), fixed_bits={"last": 8})[0].stem is None
    without_norm = Net()
    without_norm.norm = nn.Identity()
    assert placed(without_norm)[0].stem is None


class ConvolutionWithNorm(nn.Conv2d):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.inner = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        return self.inner(super().forward(x))


class Functional(Net):
    def __init__(self):
        super().__init__()
        self.kernel = self.first.weight
        del self.first

    def forward(self, x):
        x = self.norm(nn.functional.conv2d(x, self.kernel, padding=1)).relu_()
        return self.last(self.middle(x).relu_().mean((2, 3)))


def test_no_layer_that_does_more_or_is_no_module():
    network = Net()
    network.first = ConvolutionWithNorm(3, 8, 3, padding=1, bias=False)
    assert placed(network)[0].stem is None
    assert placed(Functional())[0].stem is None


def test_a_forward_of_the_layers_own_and_other_calls_stay():
    layer = nn.Conv2d(3, 8, 3)
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1
    x = torch.randn(1, 3, 4, 4)
    expected = layer(x)
    with computed_once(layer):
        assert torch.equal(layer(x=x), expected)
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)
