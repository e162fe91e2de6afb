"""The search against every assignment of small instances: objective, tie rule and infeasibility agree exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nncf_mpq_plugin.allocation import BitsConstraint, search
from nncf_mpq_plugin.allocation.bounds import Problem, relax
from nncf_mpq_plugin.allocation.program import solve, solve_by_cbc
from nncf_mpq_plugin.allocation.states import Digits, States, undominated
from nncf_mpq_plugin.costs import FLOAT_BITS, LatencyTable, limits_of
from nncf_mpq_plugin.errors import InfeasibleBudgetError
from nncf_mpq_plugin.types import (
    AverageBits,
    Budget,
    FixedLayer,
    ImportanceTable,
    LayerBits,
    LayerCost,
    LayerImportance,
)


@dataclass(frozen=True)
class Instance:
    table: ImportanceTable
    budget: Budget
    constraints: tuple[BitsConstraint, ...]
    alpha: float
    weight_only: bool
    latency: LatencyTable


def _falling(draw: st.DrawFn, bits: tuple[int, ...], highest: int) -> dict[int, float]:
    values = draw(st.lists(st.integers(0, highest), min_size=len(bits), max_size=len(bits)))
    return {b: value / 64 for b, value in zip(bits, sorted(values, reverse=True), strict=True)}


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    bits = draw(st.sampled_from([(2, 3), (2, 4, 8), (3, 4, 5)]))
    count = draw(st.integers(1, 4 if len(bits) == 2 else 3))
    highest = draw(st.sampled_from([3, 1000]))  # few values make many ties
    layers = []
    for index in range(count):
        group = draw(st.sampled_from([f"g{i}" for i in range(index + 1)]))
        cost = LayerCost(f"l{index}", draw(st.integers(1, 60)), draw(st.integers(1, 40)), group)
        layers.append(LayerImportance(cost, _falling(draw, bits, highest), _falling(draw, bits, highest)))
    fixed = draw(st.sampled_from([(), (FixedLayer(LayerCost("first", 9, 5, "first"), LayerBits(8, 8)),)]))
    times = {
        layer.cost.name: {(w, a): draw(st.integers(1, 30)) for w in (*bits, 8) for a in (*bits, 8)} for layer in layers
    }
    low, high = bits[0], bits[-1]
    share = st.floats(0, 1)
    limits = {
        "average_bits": AverageBits(low + (high - low) * draw(share), low + (high - low) * draw(share)),
        "compression_ratio": 32 / (low + (high - low) * draw(share)),
        "bitops": float(sum(layer.cost.macs for layer in layers) * (low + (high - low) * draw(share)) ** 2),
        "bitops_ratio": (low + (high - low) * draw(share)) ** 2 / 64,
        "model_size_bytes": sum(layer.cost.weights for layer in layers) * (low + (high - low) * draw(share)) / 8 + 5,
        "latency_ratio": 0.3 + draw(share),
    }
    wanted = draw(st.sets(st.sampled_from(sorted(limits)), min_size=1, max_size=6))
    limit = st.builds(
        BitsConstraint,
        layers=st.sampled_from(["*", "l0", "l[01]"]),
        tensor=st.sampled_from(["weight", "activation", "both"]),
        **draw(
            st.sampled_from(
                [
                    {"pinned": st.sampled_from(bits)},
                    {"minimum": st.sampled_from(bits)},
                    {"maximum": st.sampled_from(bits)},
                ]
            )
        ),
    )
    return Instance(
        ImportanceTable(bits, tuple(layers), fixed),
        Budget(**{name: value for name, value in limits.items() if name in wanted}),
        tuple(draw(st.lists(limit, max_size=2))),
        draw(st.sampled_from([0.0, 0.5, 2.0])),
        draw(st.booleans()) and "latency_ratio" not in wanted,
        LatencyTable(times),
    )


def assignments(instance: Instance) -> Iterator[tuple[tuple[Fraction, tuple[int, ...]], dict[str, LayerBits]]]:
    """Every policy that the constraints and budgets allow, with its objective and place among equals."""
    layers = [layer.cost for layer in instance.table.layers]
    groups = list(dict.fromkeys(layer.activation_group for layer in layers))
    limits = limits_of(instance.table, instance.budget, instance.latency)
    candidates = (FLOAT_BITS,) if instance.weight_only else instance.table.bits

    def allowed(name: str, tensor: str, bits: int) -> bool:
        return all(c.allows(bits) for c in instance.constraints if c.concerns(name, tensor))

    for weights in itertools.product(instance.table.bits, repeat=len(layers)):
        for shared in itertools.product(candidates, repeat=len(groups)):
            activation = dict(zip(groups, shared, strict=True))
            bits = {
                layer.name: LayerBits(w, activation[layer.activation_group])
                for layer, w in zip(layers, weights, strict=True)
            }
            if not all(allowed(name, "weight", b.weight) for name, b in bits.items()):
                continue
            if not instance.weight_only and not all(allowed(n, "activation", b.activation) for n, b in bits.items()):
                continue
            sums = [
                sum(limit.cost(x, bits[x.name].weight, bits[x.name].activation) for x in layers) for limit in limits
            ]
            if any(used > limit.bound for used, limit in zip(sums, limits, strict=True)):
                continue
            objective = Fraction(0)
            for layer in instance.table.layers:
                chosen = bits[layer.cost.name]
                objective += Fraction(instance.alpha) * Fraction(layer.weight[chosen.weight])
                objective += 0 if instance.weight_only else Fraction(layer.activation[chosen.activation])
            place: list[int] = []
            for group in groups:
                members = [bits[layer.name] for layer in layers if layer.activation_group == group]
                place += [members[0].activation, *(b.weight for b in members)]
            yield (objective, tuple(place)), bits


@given(instances())
@settings(max_examples=250, deadline=None)
def test_search_returns_the_first_of_the_best_policies(instance: Instance) -> None:
    found = min(assignments(instance), key=lambda pair: pair[0], default=None)
    arguments = {
        "alpha": instance.alpha,
        "constraints": instance.constraints,
        "weight_only": instance.weight_only,
        "latency": instance.latency,
    }
    if found is None:
        with pytest.raises(InfeasibleBudgetError):
            search(instance.table, instance.budget, **arguments)
        return
    solution = search(instance.table, instance.budget, **arguments)
    assert (solution.status, solution.gap, solution.solver) == ("optimal", 0.0, "enumeration")
    assert Fraction(solution.objective) == found[0][0]
    assert solution.policy.layers == found[1]


@pytest.mark.parametrize(("splits", "solver"), [(100, "enumeration"), (0, "cbc")])
@given(instance=instances())
@settings(max_examples=60, deadline=None)
def test_what_does_not_fit_into_lists_is_split_or_left_to_cbc(splits: int, solver: str, instance: Instance) -> None:
    found = min(assignments(instance), key=lambda pair: pair[0], default=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nncf_mpq_plugin.allocation.program.MOST_STATES", (1, 1))
        patch.setattr("nncf_mpq_plugin.allocation.program.MOST_SPLITS", splits)
        try:
            solution = search(
                instance.table,
                instance.budget,
                alpha=instance.alpha,
                constraints=instance.constraints,
                weight_only=instance.weight_only,
                latency=instance.latency,
            )
        except InfeasibleBudgetError:
            assert found is None
            return
    assert found is not None
    assert solution.solver in ("enumeration", solver)
    assert solution.objective == pytest.approx(float(found[0][0]), rel=1e-9, abs=1e-12)
    if solution.solver == "enumeration":
        assert solution.policy.layers == found[1]


def test_a_tie_in_a_part_whose_bound_is_rounded_up_is_found() -> None:
    """Splitting comes to a part whose bound lies an ulp above the optimum."""
    costs = [
        [[13, 7, 6], [13, 7, 6]],
        [[14, np.inf, np.inf], [9, np.inf, np.inf]],
        [[8, 7, 6], [4, 3, 2]],
        [[15, 11, 9], [9, 5, 3]],
        [[11, 8, 6], [9, 6, 4]],
        [[8, 8, 5], [8, 8, 5]],
        [[8, 5, 5], [8, 5, 5]],
    ]
    resources = [
        [
            [[39, 11, 10], [44, 41, 41]],
            [[49, 12, 49], [35, 16, 31]],
            [[29, 47, 35], [26, 17, 19]],
            [[16, 11, 26], [47, 19, 17]],
            [[33, 33, 27], [44, 10, 10]],
            [[37, 19, 21], [4, 9, 27]],
            [[21, 38, 2], [5, 35, 32]],
        ],
        [
            [[6, 46, 36], [22, 46, 19]],
            [[28, 15, 27], [8, 43, 12]],
            [[46, 25, 8], [3, 37, 14]],
            [[14, 35, 31], [9, 29, 41]],
            [[30, 18, 38], [44, 40, 41]],
            [[4, 16, 14], [48, 32, 46]],
            [[50, 36, 13], [21, 23, 22]],
        ],
        [
            [[33, 41, 30], [18, 38, 1]],
            [[36, 47, 9], [24, 38, 42]],
            [[8, 44, 12], [48, 43, 39]],
            [[50, 35, 19], [34, 16, 30]],
            [[28, 29, 24], [7, 42, 34]],
            [[7, 50, 17], [23, 50, 32]],
            [[44, 35, 21], [47, 21, 11]],
        ],
    ]
    problem = Problem(np.array(costs) / 64, np.array(resources), np.array([266, 139, 281]), np.arange(7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nncf_mpq_plugin.allocation.program.MOST_STATES", (1, 1))
        patch.setattr("nncf_mpq_plugin.allocation.program.MOST_SPLITS", 1000)
        optimum = solve(problem)
    assert optimum is not None
    weight, activation = optimum.choice
    assert weight.tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert activation.tolist() == [2, 0, 0, 2, 2, 2, 2]


def random_problem(seed: int, layers: int, budgets: int, grouped: bool) -> Problem:
    """A problem of arrays, with costs that fall and resources that rise with the bits."""
    generator = np.random.default_rng(seed)
    costs = (
        np.sort(generator.random((layers, 4, 1)), 1)[:, ::-1] + np.sort(generator.random((layers, 1, 4)), 2)[..., ::-1]
    )
    bits = np.array([2, 3, 4, 6])
    sizes = generator.integers(1, 1000, (budgets, layers, 1, 1))
    resources = sizes * np.where((np.arange(budgets) % 2)[:, None, None, None], 1, bits) * bits[:, None]
    resources = np.broadcast_to(resources, (budgets, layers, 4, 4)).astype(np.int64)
    lowest, highest = resources.min((2, 3)).sum(1), resources.max((2, 3)).sum(1)
    bounds = (lowest + (highest - lowest) * generator.uniform(0.15, 0.6, budgets)).astype(np.int64)
    _, groups = np.unique(np.sort(generator.integers(0, layers, layers)), return_inverse=True)
    return Problem(costs, resources, bounds, groups if grouped else np.arange(layers))


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize("budgets", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_no_worse_than_cbc_and_no_better_than_the_bound(seed: int, budgets: int, grouped: bool) -> None:
    problem = random_problem(seed, 14, budgets, grouped)
    optimum = solve(problem)
    choice, _ = solve_by_cbc(problem, np.isfinite(problem.costs))
    assert optimum is not None
    assert choice is not None
    assert problem.feasible(*optimum.choice)
    assert problem.objective(optimum.choice) <= problem.objective(choice) + 1e-12
    assert problem.objective(optimum.choice) >= relax(problem).bound - 1e-9


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_hundreds_of_layers_need_neither_splits_nor_cbc(budgets: int, grouped: bool) -> None:
    problem = random_problem(0, 200, budgets, grouped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nncf_mpq_plugin.allocation.program.MOST_SPLITS", 0)
        optimum = solve(problem)
    assert optimum is not None
    assert (optimum.solver, optimum.gap) == ("enumeration", 0.0)
    assert problem.feasible(*optimum.choice)
    assert problem.objective(optimum.choice) >= relax(problem).bound - 1e-9


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_keys_say_what_was_chosen_and_order_as_the_choices_do(counts: list[int], seed: int) -> None:
    digits = Digits(counts)
    generator = np.random.default_rng(seed)
    chosen = [tuple(int(generator.integers(count)) for count in counts) for _ in range(2)]
    if len(counts) > 1:
        chosen.append((*chosen[0][:-1], chosen[1][-1]))
    keys = [sum(digits.keys(i, counts[i])[:, option] for i, option in enumerate(options)) for options in chosen]
    for key, options in zip(keys, chosen, strict=True):
        assert tuple(int(digits.option(i, key)) for i in range(len(counts))) == options
    assert sorted(range(len(chosen)), key=lambda i: tuple(keys[i])) == sorted(
        range(len(chosen)), key=chosen.__getitem__
    )


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=300),
    st.sampled_from([1, 2]),
)
@settings(max_examples=60, deadline=None)
def test_only_dominated_states_are_left_out(rows: list[tuple[int, int, int]], budgets: int) -> None:
    values = np.array(rows, dtype=np.int64).T
    states = States(np.zeros(len(rows)), values[0], values[1 : 1 + budgets], np.arange(len(rows))[None])
    kept = undominated(states)
    for dropped in np.flatnonzero(~kept):
        no_worse = (states.cost <= states.cost[dropped]) & (states.use <= states.use[:, [dropped]]).all(0)
        earlier = (states.cost < states.cost[dropped]) | (np.arange(len(rows)) < dropped)
        assert (kept & no_worse & earlier).any()
