"""Limits on the bit widths of single layers, by name pattern."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from nncf_mpq_plugin.errors import InputError

TENSORS = ("weight", "activation", "both")


@dataclass(frozen=True)
class BitsConstraint:
    """
    Limits on the bit widths of layers whose name fits a pattern (``*`` and ``?``).

    :param layers: the pattern.
    :param tensor: ``weight``, ``activation`` or ``both``.
    :param minimum: smallest bit width allowed.
    :param maximum: largest bit width allowed.
    :param pinned: the one bit width allowed.
    """

    layers: str
    tensor: str = "both"
    minimum: int | None = None
    maximum: int | None = None
    pinned: int | None = None

    def allows(self, bits: int) -> bool:
        """:return: whether a layer that fits may have this bit width."""
        if self.pinned is not None:
            return bits == self.pinned
        return (self.minimum is None or bits >= self.minimum) and (self.maximum is None or bits <= self.maximum)

    def concerns(self, layer: str, tensor: str) -> bool:
        """:return: whether the constraint is about this tensor (``weight`` or ``activation``) of this layer."""
        return self.tensor in (tensor, "both") and fnmatch.fnmatchcase(layer, self.layers)

    def __str__(self) -> str:
        limits = {"minimum": self.minimum, "maximum": self.maximum, "pinned": self.pinned}
        said = ", ".join(f"{name} {bits}" for name, bits in limits.items() if bits is not None)
        return f"{self.layers!r} ({self.tensor} {said})"


def check_constraints(names: Sequence[str], constraints: Sequence[BitsConstraint]) -> None:
    """:raises InputError: for an unknown tensor, a pattern that fits no layer, or a constraint that limits nothing."""
    for constraint in constraints:
        if constraint.tensor not in TENSORS:
            msg = (
                f"constraint {constraint.layers!r}: unknown tensor {constraint.tensor!r}; known: {', '.join(TENSORS)}."
            )
            raise InputError(msg)
        if constraint.minimum is constraint.maximum is constraint.pinned is None:
            msg = f"constraint {constraint.layers!r} limits nothing; give it a minimum, a maximum or pinned."
            raise InputError(msg)
        if not any(fnmatch.fnmatchcase(name, constraint.layers) for name in names):
            msg = f"constraint {constraint.layers!r} fits no searchable layer, e.g. {', '.join(names[:5])}."
            raise InputError(msg)
