"""Importance in units of loss, against direct computation on whole forward passes."""

import pytest
import torch
import torch.nn.functional as F
from networks import Branches, Residual, prepared
from small_net import data, small_model

from nncf_mpq_plugin.adapters.nncf3 import place
from nncf_mpq_plugin.errors import InputError, TrainingError
from nncf_mpq_plugin.sensitivity import fisher_importance, loss_change_importance, unrepaired
from nncf_mpq_plugin.training import evaluate

BITS = (2, 4, 8)


def placed(network):
    torch.manual_seed(1)
    calibration = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    return place(prepared(network), calibration[0][:1], calibration, bits=BITS)


def batches(count=2, labels=True):
    generator = torch.Generator().manual_seed(5)
    shape = (12, 3, 16, 16)
    return [
        (torch.randn(shape, generator=generator), torch.randint(10, (12,), generator=generator) if labels else None)
        for _ in range(count)
    ]


def mean_loss(output, target):
    return F.cross_entropy(output, target)


def outputs_and_loss(quantized, batch):
    """:return: output of every layer's module by name, and the summed loss."""
    outputs = {}
    handles = [
        quantized.model.get_submodule(layer.cost.name).register_forward_hook(
            lambda module, args, output, name=layer.cost.name: outputs.__setitem__(name, output)
        )
        for layer in quantized.searchable
    ]
    loss = mean_loss(quantized.model(batch[0]), batch[1]) * len(batch[0])
    for handle in handles:
        handle.remove()
    return outputs, loss


def repaired(output, reference):
    """:return: each channel scaled and shifted to the reference by a least squares solver, ``[N, C, ...]``."""
    result = torch.empty_like(output)
    for channel in range(output.shape[1]):
        values = output[:, channel].reshape(-1, 1).double()
        columns = torch.cat([values, torch.ones_like(values)], 1)
        wanted = reference[:, channel].reshape(-1, 1).double()
        fit = torch.linalg.lstsq(columns, wanted, driver="gelsd").solution
        result[:, channel] = (columns @ fit).reshape(result[:, channel].shape)
    return result


@pytest.mark.parametrize("network", [Residual, Branches])
def test_fisher_is_the_weighted_output_error_of_each_tensor_alone(network):
    quantized, found = placed(network), {}
    table = fisher_importance(quantized, batches(), loss_fn=mean_loss)
    samples = sum(len(inputs) for inputs, _ in batches())
    assert table.unit == "loss"
    assert [layer.cost.name for layer in table.layers] == [layer.cost.name for layer in quantized.searchable]
    for batch in batches():
        quantized.select_uniform(8)
        base, loss = outputs_and_loss(quantized, batch)
        gradients = dict(zip(base, torch.autograd.grad(loss, list(base.values())), strict=True))
        for layer in quantized.searchable:
            name, group = layer.cost.name, layer.cost.activation_group
            tensors = {
                "weight": quantized.weight_quantizers[name],
                "activation": quantized.activation_quantizers[group],
            }
            for tensor, quantizer in tensors.items():
                for bits in BITS[:-1]:
                    quantizer.select(bits)
                    changed = outputs_and_loss(quantized, batch)[0][name]
                    quantizer.select(8)
                    left = repaired(changed, base[name]) - base[name]
                    term = (gradients[name] * left).sum(1).square().sum().item() / (2 * samples)
                    found[name, tensor, bits] = found.get((name, tensor, bits), 0.0) + term
    for layer in table.layers:
        for tensor, values in (("weight", layer.weight), ("activation", layer.activation)):
            assert values[8] == 0
            for bits in BITS[:-1]:
                expected = found[layer.cost.name, tensor, bits]
                assert expected > 0
                assert values[bits] == pytest.approx(expected, rel=1e-4), (layer.cost.name, tensor, bits)


def test_fisher_without_labels_repeats_by_seed_and_is_near_that_with_labels_of_the_model():
    quantized = small_model()
    inputs = [(images, None) for images, _ in data()]
    one, again, other = (fisher_importance(quantized, inputs, label_free=True, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert one == fisher_importance(quantized, inputs)
    assert one == fisher_importance(quantized, data(), loss_fn=F.cross_entropy, label_free=True)


def test_a_scale_and_a_shift_of_a_channel_are_repaired():
    torch.manual_seed(0)
    reference = torch.randn(4, 5, 6)
    assert unrepaired(reference * torch.rand(6) + torch.randn(6), reference).abs().max() < 1e-5
    noise = torch.randn(4, 5, 6)
    left = unrepaired(reference + noise, reference)
    assert 0 < left.square().sum() < noise.square().sum()
    few = torch.randn(7, 6)
    assert torch.equal(unrepaired(few + 1, few), (few + 1) - few)


def test_outputs_that_are_no_classes_need_a_loss_or_none():
    quantized = small_model()
    table = fisher_importance(
        quantized, data(), loss_fn=lambda output, target: F.mse_loss(output, F.one_hot(target, 4).float())
    )
    assert all(layer.weight[2] > 0 for layer in table.layers)


def test_loss_change_is_that_of_evaluation():
    quantized = small_model()
    table = loss_change_importance(quantized, data())
    quantized.select_uniform(4)
    base = evaluate(quantized.model, data()).loss
    for layer in table.layers:
        group = layer.cost.activation_group
        members = sum(other.cost.activation_group == group for other in table.layers)
        tensors = (
            (quantized.weight_quantizers[layer.cost.name], layer.weight, 1),
            (quantized.activation_quantizers[group], layer.activation, members),
        )
        for quantizer, values, share in tensors:
            for bits in (2, 3, 4):
                quantizer.select(bits)
                change = max(0.0, evaluate(quantized.model, data()).loss - base)
                assert values[bits] * share == pytest.approx(change, abs=1e-6)
                quantizer.select(4)
    assert any(value for layer in table.layers for value in layer.weight.values())


@pytest.mark.parametrize("measure", [fisher_importance, loss_change_importance])
def test_the_model_is_as_before(measure):
    quantized = small_model()
    quantized.select_uniform(3)
    quantized.model.train()
    before = {name: value.clone() for name, value in quantized.model.state_dict().items()}
    done = []
    measure(quantized, data(), progress=lambda *arguments: done.append(arguments[:2]))
    assert done
    assert done[-1][0] == done[-1][1]
    assert quantized.model.training
    assert {bits.weight for bits in quantized.policy().layers.values()} == {3}
    after = quantized.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in quantized.model.parameters())
    assert not any(hasattr(parameter, "_mpq_tag") for parameter in quantized.model.parameters())


@pytest.mark.parametrize("measure", [fisher_importance, loss_change_importance])
def test_no_data_is_an_error(measure):
    with pytest.raises(InputError, match="no batch"):
        measure(small_model(), [])


def test_a_value_that_is_not_finite_names_the_layer():
    quantized = small_model()
    quantized.weight_quantizers["left"].scales["2"].data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="'left' at 2 bits is nan"):
        fisher_importance(quantized, data())
