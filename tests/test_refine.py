"""Refinement: budgets hold at every step, the measured loss falls, and the answer is repeatable."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_net import data, small_model

from nncf_mpq_plugin.allocation import prepare, search
from nncf_mpq_plugin.comparison import fits
from nncf_mpq_plugin.costs import limits_of
from nncf_mpq_plugin.importance import importance_from_scales
from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.refine import JointLoss, refine
from nncf_mpq_plugin.training import evaluate, reestimate_batch_norm
from nncf_mpq_plugin.types import AverageBits, Budget, LayerBits

BUDGET = Budget(average_bits=AverageBits(3, 3))


def table():
    return importance_from_scales(small_model())


def true_loss(weights):
    """:return: a loss unlike the importances: each tensor's own slope over its bits, and the bits it was asked for."""
    asked = []

    def measure(bits):
        asked.append(bits)
        return sum(
            slope * (8 - bits[name].weight) + other * (8 - bits[name].activation)
            for (name, (slope, other)) in weights.items()
        )

    return measure, asked


slopes = st.tuples(st.floats(0, 10), st.floats(0, 10))


@given(st.fixed_dictionaries(dict.fromkeys(("depthwise", "pointwise", "left", "right"), slopes)))
@settings(deadline=None)
def test_every_measured_policy_keeps_the_budget_and_the_loss_falls(weights):
    importance = table()
    measure, asked = true_loss(weights)
    result = refine(prepare(importance, BUDGET), measure)
    limits = limits_of(importance, BUDGET)
    assert all(fits(importance, limits, bits) for bits in asked)
    assert len(asked) == result.evaluations
    losses = [result.losses["program"], *(swap.loss for swap in result.swaps)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)
    assert result.loss == losses[-1] == measure(result.solution.policy.layers)
    assert result.solution.policy.summary["status"] == "refined"
    assert result.solution.policy.summary["refinement"]["loss"] == result.loss
    assert fits(importance, limits, result.solution.policy.layers)
    again = refine(prepare(importance, BUDGET), true_loss(weights)[0])
    assert again.solution.policy.layers == result.solution.policy.layers


def test_swaps_find_what_the_importances_have_wrong():
    importance = table()
    measure, _ = true_loss({"depthwise": (9, 0), "pointwise": (0, 0), "left": (0, 0), "right": (0, 0)})
    program = search(importance, BUDGET).policy.layers
    bits = refine(prepare(importance, BUDGET), measure).solution.policy.layers
    assert bits["depthwise"].weight == 4
    assert program != bits or program["depthwise"].weight == 4


def test_the_best_candidate_is_the_start_and_evaluations_are_limited():
    importance = table()
    low = {layer.cost.name: LayerBits(2, 2) for layer in importance.layers}
    better = {**low, "left": LayerBits(3, 2)}

    def measure(bits):
        return 0.0 if bits == better else 1.0

    result = refine(prepare(importance, BUDGET), measure, candidates={"low": low, "better": better}, evaluations=5)
    assert result.losses == {"program": 1.0, "low": 1.0, "better": 0.0}
    assert (result.start, result.swaps, result.evaluations) == ("better", (), 5)
    assert refine(prepare(importance, BUDGET), measure, candidates={"low": low}, evaluations=1).losses.keys() == {
        "program"
    }
    assert refine(prepare(importance, BUDGET), measure, candidates={"low": low}, seconds=0.0).evaluations == 1


@pytest.mark.parametrize("label_free", [False, True])
def test_the_joint_loss_is_that_of_evaluation_after_reestimation(label_free):
    quantized = small_model()
    train_jointly(quantized, data(), JointConfig(epochs=2, data_fraction=1.0))
    inputs = [images for images, _ in data()]
    measure = JointLoss(quantized, inputs, list(data(seed=2)), label_free=label_free)
    names = [layer.cost.name for layer in quantized.searchable]
    low, high = ({name: LayerBits(bits, bits) for name in names} for bits in (2, 4))
    assert measure(low) > measure(high)
    assert measure(high) == measure(high)
    if not label_free:
        quantized.select(low)
        reestimate_batch_norm(quantized.model, inputs)
        assert measure(low) == pytest.approx(evaluate(quantized.model, data(seed=2)).loss, rel=1e-6)


def test_without_estimation_the_models_own_statistics_stay():
    quantized = small_model()
    before = quantized.model.bn2.running_var.clone()
    bits = {layer.cost.name: LayerBits(3, 3) for layer in quantized.searchable}
    loss = JointLoss(quantized, [], list(data(seed=2)))(bits)
    assert torch.equal(quantized.model.bn2.running_var, before)
    assert loss == pytest.approx(evaluate(quantized.model, data(seed=2)).loss, rel=1e-6)
