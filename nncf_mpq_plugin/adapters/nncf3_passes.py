"""
NNCF's hooks without what every forward pass does anew.

NNCF builds a new mode for each call of a model: it lists all parameters and wraps all modules, and at each operation it
looks for a hook at each argument. On networks with many small layers that is a tenth of a pass. Many passes can share
the mode, and which operations have a quantizer is known beforehand.

A ReLU or ReLU6 whose output goes to an unsigned quantizer is left out: the quantizer cuts off at 0 itself, and at 6
when told so (lsq.py), and one pass over memory less each way is a tenth of a pass as well.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode, OpMeta
from torch import Tensor, nn

from nncf_mpq_plugin.adapters.plan import ADD, CONCAT, WEIGHTED, Op, consumers_of
from nncf_mpq_plugin.convolution import conv2d
from nncf_mpq_plugin.quantizer import MultiBitQuantizer

Ports = Mapping[str, list[tuple[int, list[nn.Module]]]]
"""NNCF's name of an operation -> port and hooks there."""

IN_PLACE_ADDITIONS = ("add_", "__iadd__")


class _SharedMode(FunctionHookMode):
    """Calls quantizers where there are some, and leaves every other operation alone."""

    def __init__(self, model: nn.Module, ceilings: Mapping[str, float]) -> None:
        storage = get_hook_storage(model)
        super().__init__(model, storage)
        self._before, self._behind = _ports(storage.pre_hooks), _ports(storage.post_hooks)
        self._names: dict[tuple[int, ...], str] = {}
        self._ceilings = left_out(self._before, self._behind, ceilings)
        self._functions = set(map(function_of, self._ceilings))

    @property
    def hooked(self) -> Collection[str]:
        """What hooks stand behind: operations, or parameters by name."""
        return self._behind.keys()

    def get_current_relative_name(self) -> str:
        stack = tuple(map(id, self.module_call_stack))
        name = self._names.get(stack)
        if name is None:
            name = self._names[stack] = super().get_current_relative_name()
        return name

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: list[type[Any]],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d:
            func = conv2d
        # as NNCF does it, whose own way would count a name twice; what torch.nn.functional.relu calls has the name
        if func.__name__ not in self._functions or func is nn.functional.relu or not self.enabled:
            return super().__torch_function__(func, types, args, kwargs)
        name = self.get_next_op_call_name(func.__name__)
        if name in self._ceilings and args:
            (quantizer,) = self._behind[name][0][1]
            if quantizer.quantizes:
                return quantizer(args[0], self._ceilings[name])
        operation = OpMeta(name, func)
        args, kwargs = self.execute_pre_hooks(args, kwargs or {}, operation)
        return self.execute_post_hooks(func(*args, **kwargs), operation)

    def execute_pre_hooks(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], op_meta: OpMeta
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ports = self._before.get(op_meta.op_name)
        if ports is None:
            return args, kwargs
        if ports[-1][0] >= len(args) or any(isinstance(value, (list, tuple)) and _tensors(value) for value in args):
            return super().execute_pre_hooks(args, kwargs, op_meta)  # where ports are no positions
        values = list(args)
        for port, hooks in ports:
            for hook in hooks:
                values[port] = hook(values[port])
        return tuple(values), kwargs

    def execute_post_hooks(self, output: Any, op_meta: OpMeta) -> Any:
        ports = self._behind.get(op_meta.op_name)
        if ports is None:
            return output
        if not isinstance(output, Tensor):
            return super().execute_post_hooks(output, op_meta)
        for hook in ports[0][1]:
            output = hook(output)
        return output


class SharedPasses:
    """
    A context around several forward passes, to be entered as often as one likes.

    Between its making and its last use no hook may come or go, and nothing may copy the model inside.

    :param model: with :class:`MultiBitQuantizer` as its only hooks, each before or behind an operation or the model.
    :param ceilings: ReLUs and their like, whose input and output nothing but the quantizer may read -> what they cut
        off at, above 0.
    """

    def __init__(self, model: nn.Module, ceilings: Mapping[str, float]) -> None:
        self._model, self._mode = model, _SharedMode(model, ceilings)
        tensors = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        assert tensors.isdisjoint(self._mode.hooked), "hooks on parameters themselves would be passed over"
        quantizers = {part for q in model.modules() if isinstance(q, MultiBitQuantizer) for part in q.modules()}
        self._modules = [module for module in model.modules() if module is not model and module not in quantizers]

    def __enter__(self) -> None:
        mode = self._mode
        forward: Any = self._model.forward

        @functools.wraps(forward)
        def one_pass(*args: Any, **kwargs: Any) -> Any:
            mode.op_calls.clear()
            with mode:
                args, kwargs = mode.process_model_inputs(args, kwargs)
                return mode.process_model_outputs(forward.orig_forward(*args, **kwargs))

        for module in self._modules:
            vars(module)["_call_impl"] = types.MethodType(mode._get_wrapped_call(module._call_impl), module)
        mode.module_call_stack[:] = [self._model]
        mode.nested_enter_count = 1  # so that entering it does none of this again
        self._forward, self._model.forward = forward, one_pass

    def __exit__(self, *exception: object) -> None:
        self._model.forward = self._forward
        for module in self._modules:
            del vars(module)["_call_impl"]


_STEM = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.ReLU,
    nn.ReLU6,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
)
_READING_FUNCTIONS = ("batch_norm", "relu", "max_pool1d", "max_pool2d", "max_pool3d")


def stem_of(model: nn.Module, first: str, ops: Sequence[Op], ceilings: Mapping[str, float]) -> tuple[nn.Module, ...]:
    """
    From the first layer to the first quantizer whose bits are searched, as far as it is a chain of modules and nothing
    changes their outputs in place.

    :param first: operation of the first layer, at fixed bits.
    :param ops: of the model, in order.
    :param ceilings: see :class:`SharedPasses`.
    :return: :attr:`nncf_mpq_plugin.placement.QuantizedModel.stem`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {op.name: modules.get(".".join(op.name.split("/")[:-2])) for op in ops}
    calls = Counter(map(id, owners.values()))
    storage = get_hook_storage(model)
    sides = _ports(storage.pre_hooks), _ports(storage.post_hooks)
    contained = left_out(*sides, ceilings)
    by_name, consumers = {op.name: op for op in ops}, consumers_of(ops)

    def readers(name: str) -> list[tuple[str, int]]:
        return [reader for tensor, found in consumers.items() if tensor[0] == name for reader in found]

    before = [first]
    while before:  # the backward pass of another branch would free what the stem's goes through later
        producers = {producer for producer, _ in by_name[before.pop()].inputs.values()}
        if any(len(readers(producer)) > 1 for producer in producers):
            return ()
        before += producers

    def is_same_in_every_pass(name: str) -> bool:
        hooks = [hook for side in sides for _, group in side.get(name, []) for hook in group]
        fixed = all(isinstance(hook, MultiBitQuantizer) and len(hook.bits) == 1 for hook in hooks)
        return type(owners[name]) in _STEM and calls[id(owners[name])] == 1 and fixed

    def leaves_its_input(name: str, port: int) -> bool:
        kind, function = by_name[name].kind, function_of(name)
        if kind == ADD:
            return port > 0 or function not in IN_PLACE_ADDITIONS
        return kind in (WEIGHTED, CONCAT) or name in contained or function in _READING_FUNCTIONS

    stem: list[nn.Module] = []
    following = [(first, 0)]
    while len(following) == 1:
        ((name, _),) = following
        module, following = owners[name], readers(name)
        if module is None or not is_same_in_every_pass(name) or not all(leaves_its_input(*r) for r in following):
            break
        stem.append(module)
    return tuple(stem)


def left_out(before: Ports, behind: Ports, ceilings: Mapping[str, float]) -> dict[str, float]:
    """:return: those of ``ceilings`` whose only hook is an unsigned quantizer, which stands for them."""

    def contained(operation: str) -> bool:
        hooks = [hook for _, group in behind.get(operation, []) for hook in group]
        unsigned = [isinstance(hook, MultiBitQuantizer) and not hook.signed for hook in hooks]
        return operation not in before and unsigned == [True]

    return {operation: ceiling for operation, ceiling in ceilings.items() if contained(operation)}


def function_of(operation: str) -> str:
    """:return: the function in NNCF's name of an operation, ``module/path/function/call``; empty for an input."""
    return operation.split("/")[-2] if "/" in operation else ""


def _ports(hooks: nn.ModuleDict) -> Ports:
    found: dict[str, list[tuple[int, list[nn.Module]]]] = {}
    for key, group in hooks.items():
        assert isinstance(group, nn.ModuleDict)
        operation, _, port = key.rpartition("__")
        found.setdefault(operation.replace(":", "."), []).append((int(port), list(group.values())))
    return {operation: sorted(ports, key=lambda item: item[0]) for operation, ports in found.items()}


def _tensors(values: list[Any] | tuple[Any, ...]) -> bool:
    return all(isinstance(value, Tensor) for value in values)
