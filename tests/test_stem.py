import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from nncf_mpq_plugin.adapters.nncf3 import place
from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.recompute import recomputed
from nncf_mpq_plugin.stem import computed_once
from nncf_mpq_plugin.training import BatchNormStatistics


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.first(self.dropout(x))).relu_()
        return self.last(self.middle(x).relu_().mean((2, 3)))


def placed(net, **options):
    x = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return place(net.eval(), x[:1], [x], bits=(2, 3, 4), **options), x


def step(quantized, x, stem):
    """:return: outputs, gradients and running statistics of three passes, and how often each of the stem ran."""
    model = copy.deepcopy(quantized)
    calls = []
    for module in model.stem:
        plain = module.forward
        module.forward = lambda x, plain=plain, module=module: (calls.append(type(module).__name__), plain(x))[1]
    model.model.train()
    statistics = BatchNormStatistics(model.model, [4, 2, 3])
    torch.manual_seed(0)
    outputs = []
    with model.several_passes(), computed_once(model.stem if stem else ()):
        for bits in (4, 2, 3):
            statistics.use(bits)
            model.select_uniform(bits)
            with recomputed():
                outputs.append(model.model(x))
            outputs[-1].square().sum().backward()
    gradients = {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}
    return outputs, gradients, statistics.tensors(), Counter(calls)


def assert_same(once, every):
    assert all(torch.equal(a, b) for a, b in zip(once[0], every[0], strict=True))
    assert once[1].keys() == every[1].keys()
    for name, gradient in once[1].items():
        torch.testing.assert_close(gradient, every[1][name], rtol=1e-4, atol=1e-5)
    for name, value in once[2].items():
        assert torch.equal(value, every[2][name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["same input", "another input in each pass"])
def test_outputs_gradients_and_statistics_are_those_of_computing_it_in_every_pass(dropout):
    torch.manual_seed(0)
    quantized, x = placed(Net(dropout))
    assert quantized.stem == (quantized.model.first, quantized.model.norm)
    once, every = step(quantized, x, stem=True), step(quantized, x, stem=False)
    assert once[3] == dict.fromkeys(["Conv2d", "BatchNorm2d"], 3 if dropout else 1)
    assert every[3] == dict.fromkeys(["Conv2d", "BatchNorm2d"], 3)
    assert any(name.startswith("first") for name in once[1])
    assert_same(once, every)


class Pooled(Net):
    """As ResNet begins: several layers read what the pooling gives, and its quantizer has 8 bits."""

    def __init__(self, inplace=True):
        super().__init__()
        self.relu, self.pool = nn.ReLU(inplace), nn.MaxPool2d(3, 2, 1)
        self.other = nn.Conv2d(8, 8, 1)

    def begin(self, x):
        return self.pool(self.relu(self.norm(self.first(x))))

    def forward(self, x):
        x = self.begin(x)
        y = self.other(self.middle(x).relu_())
        y += x
        return self.last(y.relu_().mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_the_stem_goes_on_to_the_first_bits_that_are_searched(inplace):
    torch.manual_seed(0)
    quantized, x = placed(Pooled(inplace))
    model = quantized.model
    assert quantized.stem == (model.first, model.norm, model.relu, model.pool)
    once, every = step(quantized, x, stem=True), step(quantized, x, stem=False)
    assert set(once[3].values()) == {1}
    assert_same(once, every)
    stored = next(name for name, q in model.named_modules() if q is next(iter(quantized.stored_quantizers.values())))
    assert f"{stored}.scales.8" in once[1]


class Twice(Pooled):
    def begin(self, x):
        return self.pool(self.relu(self.relu(self.norm(self.first(x)))))


class ReadTwice(Pooled):
    def begin(self, x):
        x = self.norm(self.first(x))
        return self.pool(self.relu(x)) + self.pool(x)


class ResultNotTaken(Pooled):
    def begin(self, x):
        x = self.norm(self.first(x))
        self.relu(x)
        return self.pool(x)


class InPlace(Pooled):
    def begin(self, x):
        return self.pool(nn.functional.hardtanh(self.norm(self.first(x)), -1, 1, inplace=True))


class View(Pooled):
    def begin(self, x):
        x = super().begin(x)
        return x.flatten(2).relu_().reshape(x.shape)


class Indices(Pooled):
    def __init__(self, inplace):
        super().__init__(inplace)
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def begin(self, x):
        return self.pool(self.relu(self.norm(self.first(x))))[0]


class InputReadTwice(Pooled):
    """As DnCNN and VDSR, which add to the input what they make of it."""

    def begin(self, x):
        return super().begin(x) + x.mean((1, 2, 3), keepdim=True)


class Listed(nn.Module):
    def __init__(self, *modules):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class SharedWithAList(Pooled):
    """Its ReLU is called a second time where NNCF names the operation after the list's owner."""

    def __init__(self):
        super().__init__(inplace=False)
        self.middle = Listed(nn.Conv2d(8, 8, 3, padding=1), self.relu)


class NoisyInTraining(Pooled):
    """The operations are those of evaluation mode: NNCF does not see this one."""

    def begin(self, x):
        x = self.first(x)
        return self.pool(self.relu(self.norm(x + torch.randn_like(x) if self.training else x)))


@pytest.mark.parametrize(
    ("network", "stem"),
    [
        (Twice(False), 2),
        (Twice(True), 1),
        (ReadTwice(False), 2),
        (ResultNotTaken(), 1),
        (InPlace(), 1),
        (View(False), 3),
        (Indices(False), 2),
        (InputReadTwice(), 0),
        (SharedWithAList(), 4),
        (NoisyInTraining(), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_changes_where_more_than_the_next_module_is_concerned(network, stem):
    torch.manual_seed(0)
    quantized, x = placed(network)
    assert len(quantized.stem) == stem
    assert_same(step(quantized, x, stem=True), step(quantized, x, stem=False))


class Features(Pooled):
    """Returns what NNCF does not count as an output, and keeps it."""

    def forward(self, x):
        self.kept = self.norm(self.first(x))
        x = self.pool(self.relu(self.kept))
        return {"output": self.last((self.other(self.middle(x).relu_()) + x).relu_().mean((2, 3))), "kept": self.kept}


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_outputs_on_the_way_can_be_read(share):
    torch.manual_seed(0)
    quantized, x = placed(Features(inplace=False))
    assert len(quantized.stem) == 4
    found = []
    for stem in (quantized.stem, ()):
        quantized.model.train().zero_grad(set_to_none=True)
        with quantized.several_passes(), computed_once(stem):
            for bits in (4, 2):
                quantized.select_uniform(bits)
                output = quantized.model(x)
                (output["output"].square().sum() + share * output["kept"].pow(3).sum()).backward()
                found.append(output["kept"].detach().clone())
        found.append(quantized.model.first.weight.grad.clone())
    for one, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_norm": "shared"},
        {"batch_norm": "frozen"},
        {"train_weights": False},
        {"label_free": True},
        {"distillation": 0.5},
        {"optimizer": "adam", "learning_rate": 1e-4},
    ],
    ids=str,
)
def test_joint_training_is_that_without_a_stem(options):
    torch.manual_seed(0)
    quantized, x = placed(Pooled())
    trained = []
    assert len(quantized.stem) == 4
    for original in (quantized, replace(quantized, stem=())):
        twin = copy.deepcopy(original)
        config = JointConfig(**{"epochs": 2, "data_fraction": 1.0, **options})
        train_jointly(twin, [(part, torch.zeros(4, dtype=torch.long)) for part in x.split(4)], config)
        trained.append({**dict(twin.model.named_parameters()), **dict(twin.model.named_buffers())})
    for name, value in trained[0].items():
        torch.testing.assert_close(
            value, trained[1][name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize(("mode", "updates"), [("shared", 4), ("switched", 1)])
def test_joint_training_moves_running_statistics_as_often_as_without(mode, updates):
    torch.manual_seed(0)
    quantized, x = placed(Net())
    config = JointConfig(epochs=1, data_fraction=1.0, batch_norm=mode)
    train_jointly(quantized, [(x, torch.zeros(8, dtype=torch.long))], config)
    assert quantized.model.norm.num_batches_tracked == updates


def test_the_layer_is_as_before_afterwards():
    layer = nn.Conv2d(3, 8, 3)
    with pytest.raises(RuntimeError, match="expected input"), computed_once((layer,)):
        layer(torch.randn(1, 2, 4, 4))
    assert "forward" not in vars(layer)


def test_only_a_fixed_first_layer():
    assert placed(Net(), fixed_bits={"last": 8})[0].stem == ()
    without_norm = Net()
    without_norm.norm = nn.Identity()
    quantized, _ = placed(without_norm)
    assert quantized.stem == (quantized.model.first,)


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
    assert placed(network)[0].stem == ()
    assert placed(Functional())[0].stem == ()


def test_a_forward_of_the_layers_own_and_other_calls_stay():
    layer = nn.Conv2d(3, 8, 3)
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1
    x = torch.randn(1, 3, 4, 4)
    expected = layer(x)
    with computed_once((layer,)):
        assert torch.equal(layer(x=x), expected)
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x), expected)
