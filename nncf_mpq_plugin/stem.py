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
    in the first one, and their backward pass at the end. Batch norms among them give all passes' running statistics
    what the first one's became.

    A pass in which the first one's input is another one (dropout before it, say) computes them as usual.

    :param modules: from one tensor to another, called once a pass, in this order; each is the only reader of the one
        before, and nothing changes the output of the last one in place. None of them changes nothing.
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
        self._results: list[Tensor] = []  # of the modules, for later passes
        self._buffers: list[list[Tensor]] = []
        self._output: Tensor | None = None
        self._first = self._again = False

    def instead_of(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        def once(*inputs: Any, **others: Any) -> Any:
            if index == 0:
                self._begin_pass(inputs, others)
            if self._again:
                with torch.no_grad():
                    for buffer, value in zip(self._modules[index].buffers(), self._buffers[index], strict=True):
                        if buffer is not value:
                            buffer.copy_(value)
                return self._results[index]
            output = forward(*inputs, **others)
            return self._keep(index, output) if self._first else output

        return once

    def _begin_pass(self, inputs: tuple[Any, ...], others: dict[str, Any]) -> None:
        self._first = self._again = False
        if len(inputs) != 1 or others:
            return
        if self._input is None:
            self._first, self._input = True, inputs[0].detach()
        elif len(self._results) == len(self._modules):
            with torch._C.DisableTorchFunction():  # NNCF's function hooks would take part
                self._again = torch.equal(self._input, inputs[0])

    def _keep(self, index: int, output: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            self._buffers.append(list(self._modules[index].buffers()))
            if index < len(self._modules) - 1:
                self._results.append(output.new_empty(()).expand(output.shape))  # the next one does not look at it
                return output
            self._output = output
            self._results.append(output.detach().requires_grad_(output.requires_grad))  # cut off from its graph
            return self._results[-1]

    def backward(self) -> None:
        if self._output is not None and self._results[-1].grad is not None:
            self._output.backward(self._results[-1].grad)
