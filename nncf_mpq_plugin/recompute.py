"""
Quantized tensors are computed again for the backward pass instead of being kept for it.

A convolution keeps its input and weight for its gradients, and the quantizer before it keeps *its* input: without care
every quantized tensor is in memory twice. The quantized one follows from the other in one pass over memory, bit for bit
the same, so inside :func:`recomputed` only the unquantized one is kept, which the layer before has kept anyway.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nncf_mpq_plugin import lsq


@dataclass(frozen=True)
class _Recipe:
    """How a quantized tensor is made: from ``x``, or from what a recipe gives for it."""

    x: Tensor | _Recipe
    scale: Tensor
    low: int
    high: int
    ceiling: float

    def values(self) -> Tensor:
        x = self.x.values() if isinstance(self.x, _Recipe) else self.x
        return lsq.quantized_values(x, self.scale, self.low, self.high, self.ceiling)


@dataclass(frozen=True)
class _View:
    """A kept tensor that is a view of a quantized one (a linear layer keeps its weight transposed)."""

    recipe: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Recipes:
    """Recipes of the quantized tensors that are alive, by their address."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, _Recipe]] = {}

    def add(self, output: Tensor, x: Tensor, scale: Tensor, low: int, high: int, ceiling: float) -> None:
        x = x.detach()
        recipe = _Recipe(self._recipe(x) or x, scale.detach(), low, high, ceiling)
        self._known[output.data_ptr()] = (weakref.ref(output), output._version, recipe)

    def clear(self) -> None:
        """Every tensor kept through :meth:`pack` refers to this object: it must not hold the whole pass as long."""
        self._known.clear()

    def _recipe(self, tensor: Tensor) -> _Recipe | None:
        """:return: the recipe of ``tensor``, if it is (a view of all of) a quantized tensor that is as it was made."""
        known = self._known.get(tensor.data_ptr())
        if known is None:
            return None
        reference, version, recipe = known
        output = reference()
        if output is None or output._version != version or output.numel() != tensor.numel():
            return None
        return recipe

    def pack(self, tensor: Tensor) -> Tensor | _View:
        with torch._C.DisableTorchFunction():  # NNCF's function hooks would intercept each look at the tensor
            recipe = self._recipe(tensor)
            if recipe is None:
                return tensor
            return _View(recipe, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, _View):
            return kept.recipe.values().as_strided(kept.size, kept.stride, kept.offset)
        tensor: Tensor = kept
        return tensor


@contextlib.contextmanager
def recomputed() -> Iterator[None]:
    """
    For forward passes: what is kept of quantized tensors for the backward pass is how to compute them again.

    Gradients are the same bit for bit. Neither the scales nor what was quantized may change before the backward pass.
    """
    recipes = _Recipes()
    lsq.listeners.append(recipes.add)
    try:
        with torch.autograd.graph.saved_tensors_hooks(recipes.pack, recipes.unpack):
            yield
    finally:
        lsq.listeners.remove(recipes.add)
        recipes.clear()
