import contextlib

import pytest
import torch
from small_net import data, small_model
from torch.multiprocessing.reductions import StorageWeakRef

from nncf_mpq_plugin import lsq
from nncf_mpq_plugin.lsq import lsq_quantize
from nncf_mpq_plugin.recompute import recomputed


def gradients(forward, parameters, save=True):
    for parameter in parameters:
        parameter.grad = None
    if save:
        with recomputed():
            output = forward()
    else:
        output = forward()
    output.square().sum().backward()
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


def test_gradients_of_a_network_are_the_same_bit_for_bit():
    quantized = small_model()
    inputs = next(iter(data()))[0]
    parameters = list(quantized.model.parameters())
    quantized.model.train()
    for bits in (4, 2):
        quantized.select_uniform(bits)
        one = gradients(lambda: quantized.model(inputs), parameters)
        other = gradients(lambda: quantized.model(inputs), parameters, save=False)
        assert len(one) == len(other) > 10
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_linear_layers_on_three_dimensions_and_two_level_quantizers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 8, generator=generator).requires_grad_()
    weight = torch.randn(6, 8, generator=generator).requires_grad_()
    s8, s4 = torch.tensor([0.02]).requires_grad_(), torch.tensor([0.3]).requires_grad_()
    channel = torch.full((6, 1), 0.3).requires_grad_()

    def forward():
        stored = lsq_quantize(x * 1.0, s8, -128, 127)
        return (
            torch.nn.functional.linear(lsq_quantize(stored, s4, -8, 7), lsq_quantize(weight, channel, -8, 7))
            + stored.sum(2, keepdim=True).relu()
        )

    parameters = [x, weight, s8, s4, channel]
    one, other = gradients(forward, parameters), gradients(forward, parameters, save=False)
    assert len(one) == 5
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_quantized_tensor_that_was_changed_in_place_is_kept():
    x = torch.linspace(-1, 1, 20).requires_grad_()
    scale = torch.tensor([0.3]).requires_grad_()

    def forward():
        y = lsq_quantize(x, scale, -4, 3)
        y += 1
        return y.square()

    one, other = gradients(forward, [x, scale]), gradients(forward, [x, scale], save=False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_address_that_is_used_again_is_another_tensor():
    """Temporaries of the same size often get the memory of one that is gone."""
    x = torch.linspace(-1, 1, 4096).requires_grad_()
    scale = torch.tensor([0.3]).requires_grad_()

    def forward():
        total = torch.zeros(())
        for index in range(8):
            total = total + lsq_quantize(x * (index + 1), scale, -4, 3).sum()
            z = x * (0.5 + index)
            total = total + (z * z).sum()
        return total

    one, other = gradients(forward, [x, scale]), gradients(forward, [x, scale], save=False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("save", [True, False], ids=["recomputed", "kept"])
def test_quantized_tensors_are_not_kept_for_the_backward_pass(save, monkeypatch):
    storages = []
    monkeypatch.setattr(
        lsq, "listeners", [lambda output, *_: storages.append(StorageWeakRef(output.untyped_storage()))]
    )
    quantized = small_model()
    quantized.model.train()
    with recomputed() if save else contextlib.nullcontext():
        output = quantized.model(next(iter(data()))[0])
    assert len(storages) == 12
    assert sum(not storage.expired() for storage in storages) == (0 if save else 12)
    output.sum().backward()


def test_a_tensor_that_is_kept_longer_does_not_keep_the_others():
    """As a joint step keeps the first layer's output over all its passes."""
    x, scale = torch.randn(8, 8, requires_grad=True), torch.tensor([0.3], requires_grad=True)
    with recomputed():
        early = lsq_quantize(x, scale, -4, 3).square()
        late = early * 2
        storage = StorageWeakRef(late.untyped_storage())
        loss = lsq_quantize(late, scale, -4, 3).square().sum()
    loss.backward(retain_graph=True)
    assert not storage.expired()
    del late, loss
    assert storage.expired()
    early.sum().backward()
