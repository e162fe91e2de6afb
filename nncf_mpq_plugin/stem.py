"""
The passes of a joint step begin alike, and that part is computed once.

The first layer has fixed bits and reads the batch itself, so its output is the same in every pass of a step, and so is
what follows up to the first quantizer whose bits are searched. Backward passes are linear in the gradient: one through
these modules, with the sum of the passes' gradients, does for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def computed_once(modules: Sequence[nn.Module]) -> Iterator[None]:
    """
    Around the passes of a step, or a decorator of a function that does them, backward passes included: ``modules`` run
    in the first one, and their backward passes at the end. Batch norms among them give all passes' running statistics
    what the first one's became.

    A module runs as usual where its input is not what the module before gave, or, for the first one, has other values
    than in the first pass (dropout before it, say). Without modules nothing changes.

    :param modules: from one tensor to another, each of which reads what the one before gives, called once a pass.
        Others may read that as well, but nothing may change it in place.
    """
    once = _Once(modules)
    before = [(module, module.forward, vars(module).get("forward")) for module in modules]
    try:
        for index, (module, forward, _) in enumerate(before):
            module.forward = once.instead_of(forward, index)
        yield
        once.backward()
    finally:
        for module, _, own in before:
            del module.forward
            if own is not None:
                module.forward = own


class _Once:
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []
        self._cut: list[Tensor] = []  # the outputs, cut off from their graphs
        self._buffers: list[list[Tensor]] = []

    def instead_of(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        def once(*inputs: Any, **others: Any) -> Any:
            is_next = len(inputs) == 1 and not others and self._continues(index, inputs[0])
            if is_next and index < len(self._cut):
                return self._again(index)
            output = forward(*inputs, **others)
            return self._keep(index, output) if is_next and index == len(self._cut) else output

        return once

    def _continues(self, index: int, x: Tensor) -> bool:
        if index > 0:
            return index <= len(self._cut) and x is self._cut[index - 1]
        with torch._C.DisableTorchFunction():  # NNCF's function hooks would take part
            if self._input is None:
                self._input = x.detach()
                return True
            return torch.equal(self._input, x)

    def _again(self, index: int) -> Tensor:
        with torch.no_grad():
            for buffer, value in zip(self._modules[index].buffers(), self._buffers[index], strict=True):
                if buffer is not value:
                    buffer.copy_(value)
        return self._cut[index]

    def _keep(self, index: int, output: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            self._outputs.append(output)
            self._cut.append(output.detach().requires_grad_(output.requires_grad))
        self._buffers.append(list(self._modules[index].buffers()))
        return self._cut[index]

    def backward(self) -> None:
        """From the last module to the first, with the sum of the gradients of all that read its output."""
        while self._cut:
            output, cut = self._outputs.pop(), self._cut.pop()
            if cut.grad is not None:
                output.backward(cut.grad)
