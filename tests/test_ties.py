"""Steps without rounding ties, on hand-made graphs, by exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nncf_mpq_plugin.adapters.plan import ADD, CONCAT, OTHER, WEIGHTED, Op, Position
from nncf_mpq_plugin.adapters.ties import TOLERANCE, Steps, Term, read_sums, short, tie_free

HALF = Fraction(1, 2)


def op(name, kind, *inputs, **properties):
    return Op(name, kind, {port: (source, 0) for port, source in enumerate(inputs)}, **properties)


def behind(*names):
    return {Position("post", name, 0): name for name in names}


OPS = [
    op("x", OTHER),
    op("first", WEIGHTED, "x"),
    op("stored", OTHER, "first", averaged=1),
    op("branch", WEIGHTED, "stored"),
    op("sum", ADD, "branch", "stored"),
    op("narrow", OTHER, "sum", averaged=1),
    op("pool", OTHER, "narrow", averaged=64),
    op("last", WEIGHTED, "pool"),
]
POSITIONS = behind("x", "stored", "narrow", "pool")
HIGHEST = dict.fromkeys(POSITIONS.values(), 255)


def test_sums_follow_the_graph():
    reads = read_sums(OPS, POSITIONS)
    assert reads.sums == {
        "x": None,
        "stored": [(Term("first"),)],
        "narrow": [(Term("branch"), Term("stored"))],
        "pool": [(Term("narrow", 64),)],
    }
    assert reads.inputs == {"first": ("x",), "branch": ("stored",), "last": ("pool",)}


def test_a_function_that_makes_other_values_ends_the_sum():
    ops = [*OPS[:3], op("gelu", OTHER, "stored"), op("after", WEIGHTED, "gelu")]
    assert read_sums(ops, behind("x", "stored", "gelu")).sums["gelu"] is None
    assert read_sums([*OPS[:2], op("second", WEIGHTED, "first")], behind("x", "second")).sums["second"] is None


def test_a_clipped_value_and_each_part_of_a_concatenation_are_sums_of_their_own():
    ops = [
        op("x", OTHER),
        op("left", WEIGHTED, "x"),
        op("right", WEIGHTED, "x"),
        op("relu6", OTHER, "right", averaged=1, bounds=(0.0, 6.0)),
        op("cat", CONCAT, "left", "relu6"),
        op("mean", OTHER, "relu6", averaged=4),
    ]
    found = read_sums(ops, behind("x", "cat", "mean")).sums
    assert found["cat"] == [(Term("left"),), (Term("right"),), (Term("", 1, 6.0),)]
    assert found["mean"] == [(Term("right", 4), Term("", 4, 6.0))]


def test_a_quantizer_in_several_places_reads_the_sums_of_all():
    ops = [op("x", OTHER), op("left", WEIGHTED, "x"), op("right", WEIGHTED, "x"), op("cat", CONCAT, "left", "right")]
    positions = {Position("post", name, 0): name for name in ("x",)}
    positions |= dict.fromkeys([Position("post", "left", 0), Position("pre", "cat", 1)], "unified")
    reads = read_sums([*ops, op("after", WEIGHTED, "cat")], positions)
    assert reads.sums["unified"] == [(Term("left"),), (Term("right"),)]
    assert reads.inputs["after"] == ("unified",)
    assert read_sums([*ops[:2], op("right", OTHER, "x"), ops[3]], positions).sums["unified"] is None


def test_a_quantizer_that_reads_one_tensor_for_several_layers_is_ordered_by_the_first():
    ops = [op("x", OTHER), op("one", WEIGHTED, "x"), op("relu", OTHER, "one", averaged=1), op("two", WEIGHTED, "x")]
    positions = behind("x", "relu") | {Position("pre", name, 0): "reader" for name in ("one", "two")}
    assert list(read_sums(ops, positions).sums) == ["x", "reader", "relu"]


def fraction(value, largest=2**18):
    result = Fraction(value).limit_denominator(largest)
    assert float(result) == pytest.approx(value, rel=1e-9)
    return result


positive = st.floats(1e-3, 1.0)


@given(steps=st.tuples(positive, positive, positive, positive), weights=st.lists(st.floats(1e-4, 0.1), min_size=3))
@settings(max_examples=60, deadline=None)
def test_no_sum_of_integers_lies_on_a_tie(steps, weights):
    x, stored, narrow, pool = steps
    before = Steps(
        {"x": x, "stored": stored, "narrow": stored * (0.5 + narrow), "pool": stored / 8 * (0.5 + pool)},
        {name: np.array(weights) * scale for name, scale in [("first", 1.0), ("branch", 0.7), ("last", 1.3)]},
    )
    after = tie_free(read_sums(OPS, POSITIONS), before, HIGHEST)
    assert after.quantizers["x"] == short(x)
    for name, step in before.quantizers.items():
        assert abs(after.quantizers[name] / step - 1) <= 1.01 * TOLERANCE
    assert np.array_equal(after.weights["last"], before.weights["last"])  # nothing rounds its output
    q = after.quantizers
    identity, mean = fraction(q["stored"] / q["narrow"]), fraction(q["narrow"] / (64 * q["pool"]))
    assert identity.denominator % 2 == mean.denominator % 2 == 1
    for channel in range(len(weights)):
        for layer, source, target in [("first", "x", "stored"), ("branch", "stored", "narrow")]:
            old = before.weights[layer][channel] * before.quantizers[source] / before.quantizers[target]
            ratio = after.weights[layer][channel] * q[source] / q[target]
            if ratio * 2**17 < 300:
                continue  # too small a unit for the largest denominator
            assert ratio == pytest.approx(old, rel=4 * TOLERANCE)
            unit = fraction(ratio)
            assert unit.denominator % 2
            for k in range(-40, 40, 7):
                total = unit * k + (identity * (k % 5) if layer == "branch" else 0)
                assert (total - HALF).denominator != 1
                assert abs(total - HALF - round(total - HALF)) >= Fraction(1, 2**18)


def test_two_layers_that_are_added_share_a_denominator():
    ops = [
        op("x", OTHER),
        op("one", WEIGHTED, "x"),
        op("two", WEIGHTED, "x"),
        op("sum", ADD, "one", "two"),
    ]
    before = Steps({"x": 0.02, "sum": 0.05}, {"one": np.array([0.01, 0.3]), "two": np.array([0.02, 0.007])})
    after = tie_free(read_sums(ops, behind("x", "sum")), before, {"x": 255, "sum": 255})
    ratio = after.quantizers["x"] / after.quantizers["sum"]
    for one, two in zip(after.weights["one"], after.weights["two"], strict=True):
        pair = [fraction(w * ratio) for w in (one, two)]
        assert np.lcm(*[p.denominator for p in pair]) % 2 == 1
        assert np.lcm(*[p.denominator for p in pair]) < 2**11


def test_a_quantized_branch_becomes_a_multiple_of_the_path_it_is_added_to():
    ops = [*OPS[:4], op("sum", ADD, "branch", "stored"), op("narrow", OTHER, "sum", averaged=1)]
    positions = behind("x", "stored", "branch", "narrow")
    before = Steps(
        {"x": 0.01, "stored": 0.0213, "branch": 0.0171, "narrow": 0.0317},
        {"first": np.array([0.01]), "branch": np.array([0.02])},
    )
    q = tie_free(read_sums(ops, positions), before, dict.fromkeys(positions.values(), 255)).quantizers
    common = np.lcm(*[fraction(q[name] / q["narrow"]).denominator for name in ("stored", "branch")])
    assert common % 2 == 1
    assert common < 2**11


def test_the_bound_of_relu6_lies_on_no_tie():
    ops = [op("x", OTHER), op("first", WEIGHTED, "x"), op("relu6", OTHER, "first", averaged=1, bounds=(0.0, 6.0))]
    before = Steps({"x": 0.02, "relu6": 6 / 10.5}, {"first": np.array([0.01])})
    sums = read_sums(ops, behind("x", "relu6"))
    after = tie_free(sums, before, {"x": 255, "relu6": 15})
    assert fraction(6 / after.quantizers["relu6"]).denominator % 2 == 1
    unbound = tie_free(sums, before, {"x": 255, "relu6": 7})  # 6 is above its range
    assert unbound.quantizers["relu6"] == short(before.quantizers["relu6"])


def test_a_batch_norm_behind_a_concatenation_is_placed_channel_by_channel():
    ops = [
        op("x", OTHER, channels=3),
        op("left", WEIGHTED, "x", channels=2),
        op("right", WEIGHTED, "x", channels=1),
        op("cat", CONCAT, "left", "right", channels=3),
        op("norm", OTHER, "cat", channels=3, scales_channels=True),
        op("relu", OTHER, "norm", averaged=1, channels=3),
    ]
    reads = read_sums(ops, behind("x", "left", "right", "relu"))
    assert reads.inputs["norm"] == ("left", "left", "right")
    assert reads.sums["relu"] == [(Term("norm"),)]
    before = Steps(
        {"x": 0.25, "left": 0.031, "right": 0.0171, "relu": 0.0513},
        {"left": np.array([0.01, 0.02]), "right": np.array([0.03]), "norm": np.array([0.37, 1.9, 0.008])},
    )
    after = tie_free(reads, before, dict.fromkeys(["x", "left", "right", "relu"], 255))
    for channel, source in enumerate(reads.inputs["norm"]):
        ratio = after.weights["norm"][channel] * after.quantizers[source] / after.quantizers["relu"]
        spacing = after.spacings["norm"][channel] / after.quantizers["relu"]
        assert after.weights["norm"][channel] == pytest.approx(before.weights["norm"][channel], rel=2 * TOLERANCE)
        assert fraction(ratio).denominator % 2 == fraction(spacing).denominator % 2 == 1
        assert (fraction(ratio) / fraction(spacing)).denominator == 1


@given(st.floats(2.0**-20, 2.0**10))
def test_a_free_step_gets_short_and_moves_little(step):
    found = short(step)
    assert abs(found / step - 1) < 0.001
    low, high = np.float32(-128 * found), np.float32(127 * found)
    assert (float(low), float(high)) == (-128 * found, 127 * found)  # so OpenVINO's limits are exact
    assert -low * (np.float32(255) / (high - low)) == 128  # and so is the zero point that it computes of them
