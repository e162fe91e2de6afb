import math

import pytest
import torch
from small_net import data, small_model
from torch import nn

from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.training import (
    BatchNormStatistics,
    cross_entropy,
    evaluate,
    floating_point_copy,
    main_output,
    named_quantizers,
    output_distance,
    quantizers_off,
    reestimate_batch_norm,
    set_weights,
    weights_of,
)


class WithLogits:
    logits = torch.ones(2, 3)


@pytest.mark.parametrize(
    "output",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3), torch.zeros(1)),
        {"logits": torch.ones(2, 3), "hidden": torch.zeros(1)},
        {"out": torch.ones(2, 3), "aux": torch.zeros(1)},
        {"anything": torch.ones(2, 3)},
        WithLogits(),
    ],
    ids=["tensor", "tuple", "logits", "out", "one tensor", "attribute"],
)
def test_main_output(output):
    assert torch.equal(main_output(output), torch.ones(2, 3))


@pytest.mark.parametrize("output", [None, (), {"a": torch.ones(1), "b": torch.ones(1)}, "x"], ids=str)
def test_main_output_refuses_what_is_ambiguous(output):
    with pytest.raises(InputError, match="no single output tensor"):
        main_output(output)


def test_cross_entropy_checks_targets():
    loss = cross_entropy()
    assert loss(torch.zeros(2, 4), torch.tensor([0, 3])).item() == pytest.approx(math.log(4))
    with pytest.raises(InputError, match="from 0 to 4, but the model has 4 outputs"):
        loss(torch.zeros(2, 4), torch.tensor([0, 4]))
    with pytest.raises(InputError, match="no targets"):
        loss(torch.zeros(2, 4), None)


def test_output_distance_is_a_divergence():
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    other = logits + 0.3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    assert output_distance(logits, logits).item() == pytest.approx(0, abs=1e-6)
    p, q = logits.softmax(1), other.softmax(1)
    assert output_distance(other, logits).item() == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    image = torch.randn(2, 3, 4, 4)
    assert output_distance(image * 0 + image.mean(), image).item() == pytest.approx(1, rel=1e-4)


def test_evaluate_weighs_batches_by_size_and_keeps_the_mode():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.eye(2)
    model.train()
    inputs = torch.tensor([[3.0, 0], [0, 3], [3, 0]])
    targets = torch.tensor([0, 1, 1])
    result = evaluate(model, [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])])
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.samples == 3
    assert result.loss == pytest.approx(nn.functional.cross_entropy(model(inputs), targets).item(), rel=1e-6)
    assert model.training
    with pytest.raises(InputError, match="empty"):
        evaluate(model, [])


def test_named_quantizers_names_each_once():
    quantized = small_model()
    names = named_quantizers(quantized)
    assert list(names) == [
        *(f"{n}.weight" for n in ("stem", "depthwise", "pointwise", "left", "right", "head")),
        *(f"{n}.activation" for n in ("stem", "depthwise", "pointwise", "left", "head")),
        "stored.stored",
    ]
    assert len({id(quantizer) for quantizer in names.values()}) == len(names)


def test_quantizers_off_is_floating_point():
    quantized = small_model()
    x = next(iter(data()))[0]
    with_them = quantized.model(x)
    with quantizers_off(quantized.model):
        without = quantized.model(x)
    assert not torch.allclose(with_them, without)
    assert torch.equal(floating_point_copy(quantized.model)(x), without)
    assert torch.equal(quantized.model(x), with_them)


def test_weights_can_be_put_back_without_touching_scales():
    quantized = small_model()
    before = weights_of(quantized.model)
    assert not any("scales" in name for name in before)
    with torch.no_grad():
        for parameter in quantized.model.parameters():
            parameter.add_(1)
    set_weights(quantized.model, before)
    after = weights_of(quantized.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert quantized.model.q_head.scale().item() > 1


def test_batch_norm_sets_are_apart():
    model = nn.Sequential(nn.BatchNorm1d(2))
    statistics = BatchNormStatistics(model, ["a", "b"])
    own = model[0].running_mean
    statistics.use("b")
    model.train()(torch.full((4, 2), 10.0) + torch.randn(4, 2))
    assert model[0].running_mean.mean() > 0.5
    statistics.use("a")
    assert model[0].running_mean is own
    assert torch.equal(own, torch.zeros(2))
    assert set(statistics.tensors()) == {
        f"{key}/0/{name}" for key in "ab" for name in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_reestimated_statistics_are_the_averages():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9)).eval()
    batches = [torch.randn(50, 3, generator=torch.Generator().manual_seed(i)) * 2 + 5 for i in range(4)]
    reestimate_batch_norm(model, batches)
    torch.testing.assert_close(model[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert model[0].momentum == 0.1
    assert not model[0].training
    reestimate_batch_norm(model, [batches[0], batches[1][:10]])
    expected = (50 * batches[0].mean(0) + 10 * batches[1][:10].mean(0)) / 60
    torch.testing.assert_close(model[0].running_mean, expected)


def test_statistics_stay_where_no_batch_comes_or_something_is_raised():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.never = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.never.running_mean.fill_(2.0)

        def forward(self, x):
            if len(x) == 7:
                raise KeyboardInterrupt
            return self.always(x)

    model = Sometimes()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(KeyboardInterrupt):
        reestimate_batch_norm(model, [torch.rand(8, 3), torch.rand(7, 3)])
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    reestimate_batch_norm(model, [torch.rand(8, 3)])
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(before[name], buffer)}
    assert changed == {"always.running_mean", "always.running_var", "always.num_batches_tracked"}
    assert model.training
