"""Policies written by hand: what does not belong to the model is refused, and the message says where and what to do."""

from __future__ import annotations

import pytest

from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.policies import check_policy
from nncf_mpq_plugin.types import FixedLayer, ImportanceTable, LayerBits, LayerCost, LayerImportance, Policy

FALLING = {2: 0.3, 4: 0.2, 8: 0.1}
TABLE = ImportanceTable(
    (2, 4, 8),
    tuple(
        LayerImportance(LayerCost(name, 10, 5, group), FALLING, FALLING)
        for name, group in (("block.conv1", "in"), ("block.shortcut", "in"), ("block.conv2", "block.conv2"))
    ),
    (FixedLayer(LayerCost("stem", 10, 5, "stem"), LayerBits(8, 8)),),
)
GOOD = {"block.conv1": LayerBits(2, 4), "block.shortcut": LayerBits(8, 4), "block.conv2": LayerBits(4, 2)}


@pytest.mark.parametrize("fixed", [{}, {"stem": LayerBits(8, 8)}], ids=["not named", "named"])
def test_a_policy_that_fits_is_accepted(fixed: dict[str, LayerBits]) -> None:
    check_policy(TABLE, Policy(GOOD, fixed), "p.json")


def test_activations_may_stay_in_floating_point() -> None:
    check_policy(TABLE, Policy({name: LayerBits(4, 32) for name in GOOD}), "p.json")
    check_policy(TABLE, Policy(GOOD | {"block.conv2": LayerBits(4, 32)}), "p.json")


REFUSED = {
    "bits not trained": (
        {"block.conv2": LayerBits(5, 2)},
        {},
        r"layer 'block.conv2': 5 weight bits are not among the candidates 2, 4, 8 .* nearest is 4",
    ),
    "weights in floating point": (
        {"block.conv2": LayerBits(32, 4)},
        {},
        r"32 weight bits are not among .* nearest is 8",
    ),
    "activations neither trained nor in floating point": (
        {"block.conv2": LayerBits(4, 16)},
        {},
        r"16 activation bits are not among .* \(32 leaves them in floating point\)\. The nearest is 8",
    ),
    "misspelt": ({"block.conv3": LayerBits(4, 4)}, {}, r"no layer 'block.conv3'\. Did you mean 'block.conv[12]'"),
    "unknown": ({"qqq": LayerBits(4, 4)}, {}, r"no layer 'qqq'\.$"),
    "group": (
        {"block.shortcut": LayerBits(8, 8)},
        {},
        r"'block.conv1' and 'block.shortcut' read one tensor .* 4 and 8",
    ),
    "fixed layer with other bits": ({}, {"stem": LayerBits(4, 8)}, r"'stem' is fixed at 8 weight .* fixed_bits"),
    "fixed layer among the searched": ({"stem": LayerBits(4, 4)}, {}, r"'stem' is fixed at 8 weight"),
}


@pytest.mark.parametrize(("changes", "fixed", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_policy_that_does_not_fit_says_why(
    changes: dict[str, LayerBits], fixed: dict[str, LayerBits], message: str
) -> None:
    with pytest.raises(InputError, match=rf"^p\.json.*{message}"):
        check_policy(TABLE, Policy(GOOD | changes, fixed), "p.json")


@pytest.mark.parametrize(
    ("kept", "message"),
    [(2, "layer 'block.conv2' is missing"), (1, r"2 layers \('block.shortcut', 'block.conv2'\) are missing")],
    ids=["one", "two"],
)
def test_missing_layers_are_named(kept: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_policy(TABLE, Policy(dict(list(GOOD.items())[:kept])), "p.json")
