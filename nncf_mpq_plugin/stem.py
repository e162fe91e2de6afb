"""
The passes of a joint step begin alike, and that part is computed once.

The first layer has fixed bits and reads the batch itself, so its output is the same in every pass of a step. Backward
passes are linear in the gradient: one through the layer, with the sum of the passes' gradients, does for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def computed_once(layer: nn.Module | None) -> Iterator[None]:
    """
    Around the passes of a step, or a decorator of a function that does them, backward passes included: ``layer`` runs
    in the first one, and its backward pass at the end.

    A pass in which its input is another one (dropout before it, say) computes it as usual.

    :param layer: a module from one tensor to another, whose output nothing changes in place; None changes nothing.
    """
    if layer is None:
        yield
        return
    forward, own = layer.forward, vars(layer).get("forward")
    kept: list[Tensor] = []  # input, output, and the output cut off from its graph

    def once(*inputs: Any, **others: Any) -> Tensor:
        if len(inputs) != 1 or others:
            return forward(*inputs, **others)
        (x,) = inputs
        with torch._C.DisableTorchFunction():  # NNCF's function hooks would take part
            if kept and torch.equal(kept[0], x):
                return kept[2]
        output: Tensor = forward(x)
        if kept:
            return output
        with torch._C.DisableTorchFunction():
            kept.extend([x.detach(), output, output.detach().requires_grad_(output.requires_grad)])
        return kept[2]

    layer.forward = once
    try:
        yield
        if kept and kept[2].grad is not None:
            kept[1].backward(kept[2].grad)
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own
