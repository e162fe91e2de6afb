"""
What a frozen model of any NNCF has in common, and all that deployment knows of one.

A frozen model keeps its quantizers in one module, the *hook storage*, as NNCF 3 does: ``pre_hooks`` stand before an
operation's input, ``post_hooks`` behind an output, each named ``pre_hooks.layer1/0/conv1/conv2d/0__1.0`` (module path,
operation, how many times it was called before, port).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from nncf_mpq_plugin.errors import InputError

PRE_HOOKS, POST_HOOKS = "pre_hooks", "post_hooks"


@runtime_checkable
class FrozenQuantizer(Protocol):
    """
    A quantizer to integers ``level_low .. level_high``; its step size is ``scale / level_high``.

    ``scale`` has one element, or one for each output channel of a weight.
    """

    scale: Tensor
    level_low: int
    level_high: int


def native_quantizers(frozen: nn.Module) -> dict[str, FrozenQuantizer]:
    """:return: hook name -> quantizer of a frozen model, each name once (a quantizer may have several)."""
    hooks = _storage(frozen).named_modules(remove_duplicate=False)
    return {name: hook for name, hook in hooks if isinstance(hook, FrozenQuantizer)}


@contextlib.contextmanager
def replaced_quantizers(frozen: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """
    Use other modules in place of quantizers, for tracing.

    :param replacements: hook name -> module.
    """
    storage = _storage(frozen)
    originals = {name: storage.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            replace_hook(storage, name, module)
        yield
    finally:
        for name, module in originals.items():
            replace_hook(storage, name, module)


def replace_hook(storage: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the hook ``name``."""
    parent, _, key = name.rpartition(".")
    storage.get_submodule(parent)._modules[key] = module


def _storage(frozen: nn.Module) -> nn.Module:
    for module in frozen.modules():
        if PRE_HOOKS in module._modules and POST_HOOKS in module._modules:
            return module
    msg = f"{type(frozen).__name__} has no quantizers: pass what freeze or load_model returned."
    raise InputError(msg)
