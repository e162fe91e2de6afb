"""
What an adapter hands to training: a model with quantizers in place, and the map from layers to them.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nncf_mpq_plugin.costs import FLOAT_BITS
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.quantizer import MultiBitQuantizer
from nncf_mpq_plugin.types import LayerBits, LayerCost, Policy


@dataclass(frozen=True)
class PlacedLayer:
    """
    A weighted layer with quantizers on its weight and its input.

    :param cost: name, MACs, weights and activation group.
    :param fixed: its bit widths where they are not searched, otherwise None.
    """

    cost: LayerCost
    fixed: LayerBits | None = None


@dataclass(frozen=True)
class QuantizedModel:
    """
    A model whose quantizers are :class:`MultiBitQuantizer` modules inside it.

    :param model: called like the user's model; the quantizers are its submodules and train with it.
    :param layers: every weighted layer in the model's order, searchable and fixed.
    :param weight_quantizers: layer name -> quantizer of its weight.
    :param activation_quantizers: activation group -> quantizer that its layers read their input through.
    :param positive: batch norm weights behind quantized layers; folding them must not change a weight's sign.
    :param stored_quantizers: hook name -> 8-bit quantizer of a tensor that several operations read. Never searched.
    :param stem: the modules that the model begins with whose outputs are the same whatever bits are selected, as
        :func:`nncf_mpq_plugin.stem.computed_once` takes them inside :meth:`several_passes`.
    """

    model: nn.Module
    layers: tuple[PlacedLayer, ...]
    weight_quantizers: Mapping[str, MultiBitQuantizer]
    activation_quantizers: Mapping[str, MultiBitQuantizer]
    stored_quantizers: Mapping[str, MultiBitQuantizer]
    positive: tuple[nn.Parameter, ...] = ()
    stem: tuple[nn.Module, ...] = ()

    def several_passes(self) -> contextlib.AbstractContextManager[None]:
        """
        :return: to be put around several forward passes, as often as one likes, while no quantizer comes or goes: what
            is the same in all passes is done once.
        """
        return contextlib.nullcontext()

    def after_step(self) -> None:
        """Keep the parameters in ``positive`` at or above 1e-4; called after each optimizer step."""
        with torch.no_grad():
            for parameter in self.positive:
                parameter.clamp_(min=1e-4)

    @property
    def searchable(self) -> tuple[PlacedLayer, ...]:
        """Layers whose bit widths are searched."""
        return tuple(layer for layer in self.layers if layer.fixed is None)

    @property
    def searchable_groups(self) -> tuple[str, ...]:
        """Activation groups of the searchable layers, in order, each once."""
        return tuple(dict.fromkeys(layer.cost.activation_group for layer in self.searchable))

    @property
    def bits(self) -> tuple[int, ...]:
        """Candidate bit widths, ascending."""
        return tuple(sorted({b for layer in self.searchable for b in self.weight_quantizers[layer.cost.name].bits}))

    def select(self, policy: Mapping[str, LayerBits]) -> None:
        """
        Set the active bit width of every searchable layer.

        :param policy: searchable layer name -> bit widths; layers of one activation group must agree. Activations at
            32 bits stay in floating point; where all of them do, so do the stored tensors that only they read.
        :raises InputError: if layers are missing or unknown, or a group's layers disagree.
        """
        names = {layer.cost.name for layer in self.searchable}
        if set(policy) != names:
            missing, unknown = sorted(names - set(policy)), sorted(set(policy) - names)
            msg = f"The policy does not fit the model: layers missing {missing[:5]}, unknown {unknown[:5]}."
            raise InputError(msg)
        chosen: dict[str, int] = {}
        for layer in self.searchable:
            bits, group = policy[layer.cost.name], layer.cost.activation_group
            if chosen.setdefault(group, bits.activation) != bits.activation:
                msg = (
                    f"Layer {layer.cost.name!r} asks for {bits.activation} activation bits, but another layer that "
                    f"reads the same tensor (activation group {group!r}) asks for {chosen[group]}. Give them one width."
                )
                raise InputError(msg)
            self.weight_quantizers[layer.cost.name].select(bits.weight)
            activation = self.activation_quantizers[group]
            activation.enabled = bits.activation != FLOAT_BITS
            if activation.enabled:
                activation.select(bits.activation)
        self._enable_stored_quantizers()

    def _enable_stored_quantizers(self) -> None:
        searched = [self.activation_quantizers[group] for group in self.searchable_groups]
        any_quantized = any(quantizer.enabled for quantizer in searched)
        fixed = [self.activation_quantizers[layer.cost.activation_group] for layer in self.layers if layer.fixed]
        for stored in self.stored_quantizers.values():
            read = any(quantizer is stored or quantizer.behind is stored for quantizer in fixed)
            stored.enabled = any_quantized or read

    def select_uniform(self, bits: int) -> None:
        """Set weights and activations of every searchable layer to ``bits``."""
        self.select({layer.cost.name: LayerBits(bits, bits) for layer in self.searchable})

    def policy(self) -> Policy:
        """:return: the active bit widths of every layer."""
        chosen = {}
        for layer in self.layers:
            activation = self.activation_quantizers[layer.cost.activation_group]
            chosen[layer.cost.name] = LayerBits(
                self.weight_quantizers[layer.cost.name].active, activation.active if activation.enabled else FLOAT_BITS
            )
        fixed = {layer.cost.name for layer in self.layers if layer.fixed is not None}
        return Policy(
            {name: bits for name, bits in chosen.items() if name not in fixed},
            {name: bits for name, bits in chosen.items() if name in fixed},
        )


def resolve_fixed(names: Sequence[str], fixed_bits: Mapping[str, int]) -> dict[str, int]:
    """
    Which layers are not searched.

    :param names: the layers in the model's order.
    :param fixed_bits: ``first``, ``last``, a layer's name or a pattern (``*`` and ``?``) -> bit width.
    :return: layer name -> fixed bit width.
    :raises InputError: if a pattern fits no layer.
    """
    fixed: dict[str, int] = {}
    for pattern, width in fixed_bits.items():
        if pattern in ("first", "last"):
            matching = [names[0 if pattern == "first" else -1]] if names else []
        else:
            matching = fnmatch.filter(names, pattern)
        if not matching:
            msg = f"fixed_bits: {pattern!r} fits no layer. The layers are {', '.join(names[:8]) or 'none'}, ..."
            raise InputError(msg)
        fixed.update(dict.fromkeys(matching, width))
    return fixed
