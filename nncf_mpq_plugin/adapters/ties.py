"""
Steps without rounding ties: what makes a deployed network agree with the trained one by construction.

What reaches a quantizer of step ``s`` in a network of weighted layers, additions, ReLU and pooling is a sum of integers
times units: an accumulator times (weight step x input step) for a layer, an integer times the step of an earlier
quantizer for a residual path, either divided by n behind an average of n values. Rounding falls differently in two
runtimes where such a value lies next to a tie, ``(m + 1/2) s``. If every unit is ``p/q s`` with one *odd* q, a tie
would mean ``2 (p_1 k_1 + p_2 k_2 + ...) = q (2m + 1)``, even on one side and odd on the other. So none exists, and the
nearest value is ``s / 2q`` away: with q of a few hundred, a hundred times the error of floating-point arithmetic.

:func:`tie_free` moves steps by at most :data:`TOLERANCE` to such fractions, with the smallest q. Integers stay as they
are.

Pure functions on the graph of :mod:`nncf_mpq_plugin.adapters.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from nncf_mpq_plugin.adapters.plan import ADD, CONCAT, WEIGHTED, Op, Position
from nncf_mpq_plugin.adapters.plan import Tensor as TensorName

TOLERANCE = 2.0**-8
"""Largest relative change of a step: at 8 bits, it moves the largest value by one step."""
LARGEST_DENOMINATOR = 2**17
"""Of a fraction: a margin of 2^-18 steps, about the error of float32 at 2 bits."""
FIRST_SEARCH = 2**11
"""Denominators that are tried before all others; most fractions are among them."""


@dataclass(frozen=True)
class Term:
    """
    One summand of what a quantizer reads.

    :param source: a quantizer's name, a weighted operation, or empty for the bound that an activation clips at.
    :param divisor: number of values that it is averaged over.
    :param bound: the clipping bound.
    """

    source: str
    divisor: int = 1
    bound: float = 0.0


Sums = list[tuple[Term, ...]]
"""What a tensor can hold: one of these sums (by channel, behind a concatenation)."""


@dataclass(frozen=True)
class Steps:
    """
    :param quantizers: activation quantizer -> step.
    :param weights: weighted operation -> weight steps ``[out]``; batch norm that no layer takes in -> factors ``[C]``.
    :param spacings: the same operations -> spacing of the lattice that their outputs were placed on, 0 where on none.
    """

    quantizers: Mapping[str, float]
    weights: Mapping[str, np.ndarray]
    spacings: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Reads:
    """
    :param sums: quantizer -> what it reads, in topological order; None where an operation makes values of no unit.
    :param inputs: operation whose steps can move (weighted layer or batch norm) -> quantizers of its input channels, or
        the one quantizer of all.
    """

    sums: Mapping[str, Sums | None]
    inputs: Mapping[str, tuple[str, ...]]


def read_sums(ops: Sequence[Op], positions: Mapping[Position, str]) -> Reads:
    """
    What each quantizer reads.

    :param ops: the model's operations in topological order.
    :param positions: where the quantizers stand -> their names.
    """
    made: dict[TensorName, Sums | None] = {}
    layouts: dict[TensorName, tuple[str, ...]] = {}  # quantizer of each channel, where all are quantized
    channels = {op.name: op.channels for op in ops}
    ports: dict[str, set[int]] = {op.name: {0} for op in ops}
    for name, port in (tensor for op in ops for tensor in op.inputs.values()):
        ports[name].add(port)
    found: dict[str, Sums | None] = {}
    inputs: dict[str, tuple[str, ...]] = {}
    for op in ops:
        arrived: list[Sums | None] = []
        parts = []
        for port, tensor in op.inputs.items():
            before, behind = positions.get(Position("pre", op.name, port)), positions.get(Position("post", *tensor))
            sums: Sums | None = [(Term(behind),)] if behind else made.get(tensor)
            if before:
                _read(found, before, sums)
                sums = [(Term(before),)]
            quantizer = before or behind
            arrived.append(sums)
            parts.append((quantizer,) * channels[tensor[0]] if quantizer else layouts.get(tensor, ()))
        layout = tuple(name for part in parts for name in part) if all(parts) else ()
        if op.kind == WEIGHTED:
            read = arrived[0] if arrived else None
            if read is not None and len(read) == 1 and len(read[0]) == 1 and read[0][0].source in positions.values():
                inputs[op.name] = (read[0][0].source,)
        elif op.scales_channels and layout and len(layout) == op.channels:
            inputs[op.name] = layout
        result: Sums | None = [(Term(op.name),)] if op.name in inputs else _made(op, arrived)
        for port in ports[op.name]:
            made[op.name, port] = result
            if op.kind == CONCAT or (op.averaged == 1 and len(layout) == op.channels):
                layouts[op.name, port] = layout
            if (behind := positions.get(Position("post", op.name, port))) is not None:
                _read(found, behind, result)
    return Reads(found, inputs)


def _read(found: dict[str, Sums | None], quantizer: str, sums: Sums | None) -> None:
    """Add what a quantizer reads. One that reads something else in a later place is ordered by that."""
    if quantizer in found:
        before = found[quantizer]
        sums = None if before is None or sums is None else list(dict.fromkeys([*before, *sums]))
        if sums == before:
            return
        del found[quantizer]
    found[quantizer] = sums


def _made(op: Op, arrived: Sequence[Sums | None]) -> Sums | None:
    """:return: the sums that an operation without steps of its own makes of those that arrive."""
    if op.kind == WEIGHTED or not arrived or any(sums is None for sums in arrived):
        return None
    known = [sums for sums in arrived if sums is not None]
    if op.kind == ADD:
        return [one + other for one in known[0] for other in known[1]]
    if op.kind == CONCAT:
        return list(dict.fromkeys(total for sums in known for total in sums))
    if op.averaged is None or len(known) != 1:
        return None
    sums = known[0]
    if op.averaged > 1:  # values that were clipped and others meet in one average
        bounds = tuple(term for total in sums for term in total if not term.source)
        plain = [total for total in sums if any(term.source for term in total)] or [()]
        sums = [
            tuple(
                Term(term.source, term.divisor * op.averaged, term.bound) for term in dict.fromkeys((*total, *bounds))
            )
            for total in plain
        ]
    return sums + [(Term("", 1, abs(bound)),) for bound in op.bounds if bound]


def tie_free(reads: Reads, steps: Steps, highest: Mapping[str, int]) -> Steps:
    """
    Move steps so that no rounding tie can be reached.

    :param reads: what :func:`read_sums` found.
    :param steps: as trained.
    :param highest: quantizer -> its largest integer; clipping above it decides nothing.
    :return: steps, each within :data:`TOLERANCE` of the trained one (weights' steps: relative to those of the tensors
        around them). What cannot be placed keeps its step.
    """
    quantizers = dict(steps.quantizers)
    weights = {name: np.array(step, np.float64) for name, step in steps.weights.items()}
    spacings = {name: np.zeros(len(step)) for name, step in weights.items()}
    exact: dict[str, tuple[str, Fraction]] = {}  # quantizer -> what its step is an exact multiple of, and the multiple
    bases: dict[str, float] = {}
    placed: set[str] = set()
    for name, read in reads.sums.items():
        read = read or []
        together = {term: None for total in read for term in total if term.source in exact}
        fixed = list(together)
        bound = next((t for total in read for t in total if _matters(t, quantizers[name], highest[name])), None)
        if not fixed and bound is not None:
            base = f"bound {bound.bound}"
            bases[base] = bound.bound
            fraction = _nearest_step([Fraction(1, bound.divisor)], bound.bound, quantizers[name])
        elif fixed:
            base = exact[fixed[0].source][0]
            multiples = [
                multiple / term.divisor for term in fixed for of, multiple in [exact[term.source]] if of == base
            ]
            fraction = _nearest_step(multiples, bases[base], quantizers[name])
        else:
            base, fraction = _beside(name, reads.sums, quantizers, exact, bases)
        if fraction is not None:
            quantizers[name] = bases[base] * float(fraction)
            exact[name] = (base, fraction)
        else:
            bases[name] = quantizers[name] = short(quantizers[name])
            exact[name] = (name, Fraction(1))
        for total in read:
            free = [term for term in total if term.source in weights and term.source not in placed]
            sources = [
                np.array([quantizers[source] for source in reads.inputs[term.source]]) / term.divisor for term in free
            ]
            common = _common_denominator(total, name, exact, bases)
            for term, unit, spacing in _place(free, sources, weights, quantizers[name], common):
                weights[term.source], spacings[term.source] = unit, spacing
                placed.add(term.source)
    return Steps(quantizers, weights, spacings)


def short(step: float) -> float:
    """
    :return: the nearest number of at most 12 binary digits with which OpenVINO's float32 arithmetic is exact: it
        computes the reciprocal of a step, and a zero point that it adds before it rounds, from the limits of the range.
        It is less than 0.1% away; steps out of float32's range stay.
    """
    unit = 2.0 ** (math.frexp(step)[1] - 12)
    digits = round(step / unit)
    with np.errstate(all="ignore"):
        for candidate in sorted(range(digits - 8, digits + 9), key=lambda other: abs(other - digits)):
            low, high = (np.float32(limit * candidate * unit) for limit in (-128, 127))
            if -low * (np.float32(255) / (high - low)) == 128:
                return candidate * unit
    return step


def _matters(term: Term, step: float, highest: int) -> bool:
    return not term.source and (term.divisor > 1 or term.bound < (highest + 1) * step)


def _beside(
    name: str,
    sums: Mapping[str, Sums | None],
    quantizers: Mapping[str, float],
    exact: Mapping[str, tuple[str, Fraction]],
    bases: Mapping[str, float],
) -> tuple[str, Fraction | None]:
    """A quantizer that reads layers only: where it is added to another later, its step is a multiple of that one's."""
    for read in sums.values():
        for total in read or []:
            own = next((term for term in total if term.source == name), None)
            other = next((term for term in total if term.source in exact), None)
            if own is not None and other is not None:
                base, multiple = exact[other.source]
                unit = multiple * own.divisor / other.divisor
                for p, q in _fractions(quantizers[name] / (bases[base] * float(unit))):
                    if p % 2:
                        return base, unit * Fraction(p, q)
    return name, None


def _fractions(ratio: float) -> Iterator[tuple[int, int]]:
    """:return: p, q with q odd and p/q within the tolerance of ``ratio``, smallest q first."""
    for q in range(1, LARGEST_DENOMINATOR, 2):
        p = round(ratio * q)
        if p and abs(p / q / ratio - 1) <= TOLERANCE:
            yield p, q


def _nearest_step(multiples: Sequence[Fraction], base: float, step: float) -> Fraction | None:
    """:return: the step, in units of ``base``, of which all multiples are fractions with odd denominators."""
    for p, q in _fractions(base * float(multiples[0]) / step):
        candidate = multiples[0] * Fraction(q, p)
        if all((multiple / candidate).denominator % 2 for multiple in multiples):
            return candidate
    return None


def _common_denominator(
    total: Sequence[Term], name: str, exact: Mapping[str, tuple[str, Fraction]], bases: Mapping[str, float]
) -> int:
    base, own = exact[name]
    denominators = [1]
    for term in total:
        if term.source in exact and exact[term.source][0] == base:
            denominators.append((exact[term.source][1] / term.divisor / own).denominator)
        elif not term.source and bases[base] == term.bound:
            denominators.append((Fraction(1, term.divisor) / own).denominator)
    return math.lcm(*denominators)


def _place(
    terms: Sequence[Term],
    sources: Sequence[np.ndarray],
    weights: Mapping[str, np.ndarray],
    step: float,
    common: int,
) -> Iterator[tuple[Term, np.ndarray, np.ndarray]]:
    """
    Move the steps of operations that are summed, channel by channel, to fractions with one odd denominator.

    :param sources: of each term, the steps of its input over its divisor.
    :return: term, its new steps, and the spacing of the lattice.
    """
    units = [weights[term.source] * source / step for term, source in zip(terms, sources, strict=True)]
    if not terms or len({len(unit) for unit in units}) > 1:
        return
    placed, spacing = np.array(units), np.zeros(len(units[0]))
    for channel in range(len(spacing)):
        ratios = placed[:, channel] * common
        found = _common_fraction(ratios, FIRST_SEARCH // common) or _common_fraction(
            ratios, LARGEST_DENOMINATOR // common
        )
        if found is not None:
            numerators, q = found
            placed[:, channel] = numerators / (q * common)
            spacing[channel] = step / (q * common)
    for term, source, unit in zip(terms, sources, placed, strict=True):
        yield term, unit * step / source, spacing


def _common_fraction(ratios: np.ndarray, largest: int) -> tuple[np.ndarray, int] | None:
    """:return: numerators and the smallest odd denominator of fractions within the tolerance of all ratios."""
    odd = np.arange(1, largest + 1, 2)
    numerators = np.rint(np.outer(ratios, odd))
    fits = (np.abs(numerators / odd - ratios[:, None]) <= TOLERANCE * ratios[:, None]).all(0) & (numerators > 0).all(0)
    if not fits.any():
        return None
    first = int(fits.argmax())
    return numerators[:, first], int(odd[first])
