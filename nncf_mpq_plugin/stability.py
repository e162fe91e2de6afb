"""
Was joint training long enough? Ranks of the indicators over the training, and between two trainings.

The search compares layers with each other, so what has to be stable is the order of the indicators among the layers.
Correlations are Spearman's, within one bit width and kind of tensor: between bit widths scales differ by so much that a
correlation over all of them together is near 1 whatever the layers do.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nncf_mpq_plugin.errors import InputError

KINDS = ("weight", "activation")
LOOK_BACK = 0.2  # early stop compares with the indicators this share of the planned training ago

Scales = Mapping[str, Mapping[str, Sequence[float]]]
"""Quantizer name (``<layer>.weight`` or ``<group>.activation``) -> bit width -> one scale a record."""
Indicators = Mapping[str, Mapping[int, float]]
"""Quantizer name -> bit width -> scale, of the searched quantizers."""


@dataclass(frozen=True)
class RankAgreement:
    """
    Spearman's correlation between two sets of indicators.

    :param by_kind: ``weight`` and ``activation`` -> bit width -> correlation over the layers.
    :param mean: of all of them.
    :param least: the smallest of them.
    """

    by_kind: Mapping[str, Mapping[int, float]]
    mean: float
    least: float

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object."""
        return asdict(self)


@dataclass(frozen=True)
class StabilityReport:
    """
    How the indicators of one joint training converged.

    :param steps: steps of the records.
    :param with_final: mean correlation of each record's indicators with the last one's.
    :param settled_at: the step from which on that stays at or above 0.95.
    :param first_epoch: agreement of the indicators after the first epoch with the last ones; None for a training of
        no more than that.
    :param indicators: number of indicators.
    :param out_of_order: ``<quantizer> at <bits> bits`` whose scale is above that of the next lower bit width.
    :param change: largest relative change of an indicator over the last tenth of the training.
    """

    steps: tuple[int, ...]
    with_final: tuple[float, ...]
    settled_at: int
    first_epoch: RankAgreement | None
    indicators: int
    out_of_order: tuple[str, ...]
    change: float

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object."""
        return asdict(self)


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """
    Rank correlation; equal values share their mean rank.

    :param one: at least two values.
    :param other: as many.
    :return: -1 to 1; 1.0 where both are constant or hold one value, 0.0 where one of them is constant.
    """
    first, second = _ranks(one), _ranks(other)
    mean = (len(first) - 1) / 2
    products = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    squares = [sum((rank - mean) ** 2 for rank in ranks) for ranks in (first, second)]
    if not all(squares):
        return 1.0 if not any(squares) else 0.0
    return float(products / (squares[0] * squares[1]) ** 0.5)


def indicators_at(scales: Scales, record: int = -1) -> dict[str, dict[int, float]]:
    """
    :param scales: :attr:`nncf_mpq_plugin.loop.History.scales`.
    :param record: which record.
    :return: the indicators of the searched quantizers, which have more than one bit width.
    """
    return {
        name: {int(bits): values[record] for bits, values in curves.items()}
        for name, curves in scales.items()
        if len(curves) > 1
    }


def rank_agreement(one: Indicators, other: Indicators) -> RankAgreement:
    """
    :return: how far two sets of indicators put the layers in the same order.
    :raises InputError: if they are not of the same quantizers and bit widths, or there are none.
    """
    if one.keys() != other.keys() or any(one[name].keys() != other[name].keys() for name in one):
        differing = sorted(one.keys() ^ other.keys())[:3]
        msg = (
            f"The two trainings are of different models or bit widths{f' ({differing} in one only)' * bool(differing)}."
        )
        raise InputError(msg)
    by_kind: dict[str, dict[int, float]] = {}
    for kind in KINDS:
        names = [name for name in one if name.endswith(f".{kind}")]
        for bits in sorted({bits for name in names for bits in one[name]}):
            having = [name for name in names if bits in one[name]]
            correlation = spearman([one[name][bits] for name in having], [other[name][bits] for name in having])
            by_kind.setdefault(kind, {})[bits] = correlation
    values = [value for kind in by_kind.values() for value in kind.values()]
    if not values:
        msg = "The training has no searched quantizer, so there are no indicators to compare."
        raise InputError(msg)
    return RankAgreement(by_kind, sum(values) / len(values), min(values))


def stability(steps: Sequence[int], scales: Scales, steps_per_epoch: int = 0) -> StabilityReport:
    """
    The report of one training.

    :param steps: :attr:`nncf_mpq_plugin.loop.History.steps`.
    :param scales: :attr:`nncf_mpq_plugin.loop.History.scales`.
    :param steps_per_epoch: steps of one epoch; 0 where it is not known.
    :raises InputError: if no quantizer was searched.
    """
    records = [indicators_at(scales, index) for index in range(len(steps))]
    final = records[-1]
    with_final = tuple(rank_agreement(record, final).mean for record in records)
    settled = len(steps) - 1
    while settled and with_final[settled - 1] >= 0.95:
        settled -= 1
    first = min(range(len(steps)), key=lambda index: abs(steps[index] - steps_per_epoch))
    before = records[max(index for index, step in enumerate(steps) if step <= 0.9 * steps[-1])]
    return StabilityReport(
        tuple(steps),
        with_final,
        steps[settled],
        rank_agreement(records[first], final) if 0 < steps_per_epoch < steps[-1] else None,
        sum(len(values) for values in final.values()),
        out_of_order(final),
        max(abs(value / before[name][bits] - 1) for name, values in final.items() for bits, value in values.items()),
    )


def out_of_order(indicators: Indicators) -> tuple[str, ...]:
    """:return: ``<quantizer> at <bits> bits`` for each scale above that of the next lower bit width."""
    found = []
    for name, values in indicators.items():
        for lower, higher in itertools.pairwise(sorted(values)):
            if values[higher] > values[lower]:
                found.append(f"{name} at {higher} bits")
    return tuple(found)


def settled_agreement(scales: Scales, records: int) -> float | None:
    """
    What early stop looks at.

    :param records: records that the whole training would have.
    :return: mean correlation of the last record's indicators with those :data:`LOOK_BACK` of the training earlier; None
        as long as there is no such record.
    """
    back = max(1, round(LOOK_BACK * records))
    recorded = min((len(values) for curves in scales.values() for values in curves.values()), default=0)
    if recorded <= back:
        return None
    return rank_agreement(indicators_at(scales, -1 - back), indicators_at(scales)).mean


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    begin = 0
    while begin < len(order):
        end = begin
        while end + 1 < len(order) and values[order[end + 1]] == values[order[begin]]:
            end += 1
        for index in order[begin : end + 1]:
            ranks[index] = (begin + end) / 2
        begin = end + 1
    return ranks
