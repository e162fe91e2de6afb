"""The search against brute force, the published policy, and impossible budgets."""

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nncf_mpq_plugin import comparison
from nncf_mpq_plugin.allocation import BitsConstraint, achieved_by, objective_of, search
from nncf_mpq_plugin.costs import limits_of
from nncf_mpq_plugin.errors import InfeasibleBudgetError, InputError
from nncf_mpq_plugin.types import (
    AverageBits,
    Budget,
    FixedLayer,
    ImportanceTable,
    LayerBits,
    LayerCost,
    LayerImportance,
)

DATA = Path(os.environ.get("MPQ_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
BITS = (2, 3, 4)


def make_table(layers, groups=None, fixed=()):
    """:param layers: (macs, weights, weight importances, activation importances) by layer."""
    entries = []
    for index, (macs, weights, weight, activation) in enumerate(layers):
        group = f"l{groups[index]}" if groups else f"l{index}"
        cost = LayerCost(f"l{index}", macs, weights, group)
        entries.append(
            LayerImportance(cost, dict(zip(BITS, weight, strict=True)), dict(zip(BITS, activation, strict=True)))
        )
    return ImportanceTable(BITS, tuple(entries), tuple(fixed))


def policies(table, allowed=lambda name, tensor, bits: True):
    """Every assignment of a small table."""
    names = [layer.cost.name for layer in table.layers]
    groups = {layer.cost.name: layer.cost.activation_group for layer in table.layers}
    distinct = list(dict.fromkeys(groups.values()))
    for weights in itertools.product(table.bits, repeat=len(names)):
        for activations in itertools.product(table.bits, repeat=len(distinct)):
            chosen = dict(zip(distinct, activations, strict=True))
            bits = {n: LayerBits(w, chosen[groups[n]]) for n, w in zip(names, weights, strict=True)}
            if all(allowed(n, "weight", b.weight) and allowed(n, "activation", b.activation) for n, b in bits.items()):
                yield bits


def within(table, limits, bits):
    sums = achieved_by(table, limits, bits)
    return all(sums[limit.name] <= limit.bound for limit in limits)


falling = st.lists(st.integers(0, 1000), min_size=3, max_size=3).map(
    lambda v: [x / 97 for x in sorted(v, reverse=True)]
)
layer = st.tuples(st.integers(1, 500), st.integers(1, 300), falling, falling)


@st.composite
def instances(draw):
    layers = draw(st.lists(layer, min_size=1, max_size=4))
    groups = []
    for index in range(len(layers)):
        groups.append(draw(st.sampled_from([*sorted(set(groups)), index])))
    budget = Budget(
        average_bits=draw(st.sampled_from([AverageBits(2.5, 3), AverageBits(3, 3.5), AverageBits(weight=3), None])),
        compression_ratio=draw(st.sampled_from([9.5, 11.0, 13.0])),
    )
    pins = draw(st.sampled_from([(), (BitsConstraint("l0", "weight", pinned=3),), (BitsConstraint("*", minimum=3),)]))
    alpha = draw(st.sampled_from([0.5, 1.0, 2.0]))
    return make_table(layers, groups), budget, pins, alpha


@given(instances())
@settings(max_examples=60, deadline=None)
def test_search_agrees_with_brute_force(instance):
    table, budget, pins, alpha = instance
    limits = limits_of(table, budget)

    def allowed(name, tensor, bits):
        return all(pin.allows(bits) for pin in pins if pin.tensor in (tensor, "both") and pin.layers in (name, "*"))

    objectives = [objective_of(table, bits, alpha) for bits in policies(table, allowed) if within(table, limits, bits)]
    if not objectives:
        with pytest.raises(InfeasibleBudgetError):
            search(table, budget, alpha=alpha, constraints=pins)
        return
    solution = search(table, budget, alpha=alpha, constraints=pins)
    assert solution.objective == pytest.approx(min(objectives), rel=1e-9, abs=1e-12)
    assert within(table, limits, solution.policy.layers)
    assert all(
        allowed(name, "weight", bits.weight) and allowed(name, "activation", bits.activation)
        for name, bits in solution.policy.layers.items()
    )


@pytest.mark.parametrize(
    ("name", "objective"),
    [("resnet50_importance_published_counts.json", 4.617439), ("resnet50_importance.json", 4.630866)],
)
def test_published_table_gives_the_published_objective(name, objective):
    if not (DATA / name).exists():
        pytest.skip(f"the published table {name} is not part of this clone")
    table = ImportanceTable.load(DATA / name)
    solution = search(table, Budget(average_bits=AverageBits(3, 4), compression_ratio=12.2), alpha=2.0)
    assert solution.status == "optimal"
    assert solution.objective == pytest.approx(objective, abs=5e-7)
    assert len(solution.corrections) == 2
    assert solution.budgets["compression_ratio"]["achieved"] >= 12.2


SIMPLE = [(100, 50, (4.0, 2.0, 1.0), (3.0, 2.0, 1.0)), (200, 80, (5.0, 1.0, 0.5), (2.0, 1.5, 1.0))]


def test_same_call_same_policy():
    table = make_table([(10, 10, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))] * 4)
    first, second = (search(table, Budget(average_bits=AverageBits(3, 3))).policy.layers for _ in range(2))
    assert first == second


def test_group_shares_its_activation_bits():
    table = make_table(SIMPLE, groups=[0, 0])
    layers = search(table, Budget(average_bits=AverageBits(3, 3))).policy.layers
    assert layers["l0"].activation == layers["l1"].activation


def test_impossible_budget_names_the_nearest_value():
    with pytest.raises(InfeasibleBudgetError, match=r"compression_ratio = 17.*nearest that exists is 16") as caught:
        search(make_table(SIMPLE), Budget(compression_ratio=17))
    assert caught.value.exit_code == 3
    assert caught.value.achievable == pytest.approx(16)


def test_impossible_pin_is_named():
    with pytest.raises(InfeasibleBudgetError, match="'l0'"):
        search(make_table(SIMPLE), Budget(compression_ratio=15), constraints=[BitsConstraint("l0", "weight", pinned=4)])


def test_budgets_possible_alone_but_not_together():
    table = make_table([(100, 1, (2.0, 1.0, 0.5), (2.0, 1.0, 0.5)), (1, 100, (2.0, 1.0, 0.5), (2.0, 1.0, 0.5))])
    pins = [BitsConstraint("l0", "weight", minimum=3), BitsConstraint("l1", "weight", minimum=2)]
    assert search(table, Budget(bitops=700, compression_ratio=15.9), constraints=pins).status == "optimal"
    with pytest.raises(InfeasibleBudgetError):
        search(table, Budget(bitops=500, compression_ratio=15.9), constraints=pins)


def test_pattern_that_fits_nothing_is_refused():
    with pytest.raises(InputError, match="'nope'"):
        search(make_table(SIMPLE), Budget(compression_ratio=10), constraints=[BitsConstraint("nope", pinned=2)])


@pytest.mark.parametrize("alpha", [float("nan"), -1.0])
def test_senseless_alpha_is_refused(alpha):
    with pytest.raises(InputError, match="alpha"):
        search(make_table(SIMPLE), Budget(compression_ratio=10), alpha=alpha)


def test_latency_needs_a_table():
    with pytest.raises(InputError, match="latency"):
        search(make_table(SIMPLE), Budget(latency_ratio=0.5))


def test_fixed_layers_count_in_the_compression_ratio_only():
    fixed = FixedLayer(LayerCost("first", 1000, 100, "first"), LayerBits(8, 8))
    solution = search(make_table(SIMPLE, fixed=[fixed]), Budget(bitops=300 * 16))
    assert solution.bitops <= 300 * 16
    expected = 100 * 8 + sum(
        weights * solution.policy.layers[name].weight for name, weights in (("l0", 50), ("l1", 80))
    )
    assert solution.weight_bits == expected
    assert solution.compression_ratio == pytest.approx(32 * 230 / expected)


def test_each_budget_is_reported_in_its_own_unit():
    solution = search(make_table(SIMPLE), Budget(bitops_ratio=0.2, compression_ratio=8.0, model_size_bytes=60))
    achieved = {name: budget["achieved"] for name, budget in solution.budgets.items()}
    assert achieved["bitops_ratio"] == solution.bitops / (300 * 64) <= 0.2
    assert achieved["compression_ratio"] == solution.compression_ratio >= 8
    assert achieved["model_size_bytes"] == solution.weight_bits / 8 <= 60


@pytest.mark.parametrize(("rule", "used"), [("ban", None), ("isotonic", 2.5), ("keep", 3.0)])
def test_importance_out_of_order_is_listed(rule, used):
    table = make_table([(100, 50, (2.0, 3.0, 1.0), (3.0, 2.0, 1.0))])
    solution = search(table, Budget(average_bits=AverageBits(3, 4)), out_of_order=rule)
    assert [(c.layer, c.tensor, c.bits, c.importance, c.used) for c in solution.corrections] == [
        ("l0", "weight", 3, 3.0, used)
    ]
    if rule == "ban":
        assert solution.policy.layers["l0"].weight != 3


def test_unknown_rule_is_refused():
    with pytest.raises(InputError, match="isotonic"):
        search(make_table(SIMPLE), Budget(compression_ratio=10), out_of_order="smooth")


def test_comparison_policies_keep_the_budget():
    table, budget = make_table(SIMPLE), Budget(average_bits=AverageBits(3, 3))
    limits = limits_of(table, budget)
    found = [comparison.uniform(table, budget), *(comparison.random(table, budget, seed) for seed in range(10))]
    assert all(within(table, limits, policy.layers) for policy in found)
    assert set(found[0].layers.values()) == {LayerBits(3, 3)}
    assert len({str(policy.layers) for policy in found[1:]}) > 1
    learned = search(table, budget)
    assert all(learned.objective <= objective_of(table, policy.layers, 2.0) + 1e-12 for policy in found)


def test_reversed_importance_swaps_by_rank():
    swapped = comparison.reversed_importance(make_table(SIMPLE))
    assert swapped.layers[0].weight == dict(zip(BITS, SIMPLE[1][2], strict=True))
    assert swapped.layers[1].activation == dict(zip(BITS, SIMPLE[0][3], strict=True))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "at least one budget"),
        ({"bitop": 3}, "'bitops'"),
        ({"bitops": "many"}, "expected a number"),
        ({"bitops": 0}, "above 0"),
        ({"average_bits": {"weights": 3}}, "'weight'"),
        ([], "expected a JSON object"),
    ],
)
def test_senseless_budget_is_refused(value, message):
    with pytest.raises(InputError, match=message):
        Budget.from_json(value)


def test_budget_round_trip():
    budget = Budget(bitops=5.0, average_bits=AverageBits(3, None), compression_ratio=12.0)
    assert Budget.from_json(budget.to_json()) == budget
