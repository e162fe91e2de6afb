"""
Importance in units of loss, from the jointly trained model: what the loss gains when one tensor has fewer bits.

The jointly trained model has scales for every bit width, so each question needs a forward pass and no training.

``fisher``: a second-order estimate for all tensors at once. With ``g`` the gradient of one sample's loss by the output
``y`` of a layer and ``dy`` what ``y`` changes by when the layer's weight or input goes from the highest to ``b`` bits,
the importance is ``1/2 sum over positions of (sum over channels of g dy)^2``, averaged over samples: the Fisher matrix,
block-diagonal over positions, in place of the Hessian. Of ``dy`` only what no scale and shift of a channel repairs is
counted, since batch norm and fine-tuning repair the rest. Weighing output errors by gradients is known from allocation
in NVIDIA ModelOpt's ``auto_quantize`` and Intel AutoRound's ``AutoScheme``; here the quantizers have been trained at
every bit width.

``loss_change``: the measured change of the loss with one tensor alone at ``b`` bits.

Unless a loss is given, ``fisher`` draws targets from the model's own outputs, which makes it the Fisher matrix proper
(Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR 2020, section 9.1) and needs no labels;
without labels ``loss_change`` measures the distance to the outputs at the highest bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nncf_mpq_plugin.errors import InputError, TrainingError
from nncf_mpq_plugin.importance import fixed_layers_of
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.quantizer import MultiBitQuantizer
from nncf_mpq_plugin.training import (
    LossFunction,
    Progress,
    cross_entropy,
    device_of,
    evaluation_mode,
    main_output,
    output_distance,
    to_device,
)
from nncf_mpq_plugin.types import ImportanceTable, LayerImportance

LOSS = "loss"
FEWEST = 8  # values of a channel that a scale and a shift are fitted to
Changes = dict[tuple[str, int], Tensor]  # (layer or activation group, bit width) -> sum over samples


def fisher_importance(
    quantized: QuantizedModel,
    batches: Iterable[tuple[Any, Any]],
    *,
    loss_fn: LossFunction | None = None,
    label_free: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    model_name: str = "",
) -> ImportanceTable:
    """
    Gradient-weighted output errors of every layer, tensor and bit width; see the module's text.

    :param quantized: a jointly trained model; it is as before afterwards.
    :param batches: (input, target); a few hundred samples suffice. Memory is that of one training step on a batch.
    :param loss_fn: (output, target) -> mean over the batch; None draws targets from the outputs, ``batches`` need none.
    :param label_free: draw targets even if there is a loss.
    :param seed: of these targets.
    :param device: default: where the model is.
    :param progress: called after each batch.
    :return: a table with unit ``loss``; 0 at the highest bit width.
    :raises InputError: if there is no batch or no searchable layer.
    :raises TrainingError: if a value is not finite.
    """
    device = device_of(quantized.model) if device is None else torch.device(device)
    quantized.model.to(device)
    batches = _listed(quantized, batches)
    generator = torch.Generator(device).manual_seed(seed)
    weights: Changes = {}
    activations: Changes = {}
    samples = 0
    with evaluation_mode(quantized.model), _as_before(quantized), _tagging(quantized):
        quantized.select_uniform(max(quantized.bits))
        for index, batch in enumerate(batches):
            inputs, target = to_device(batch, device)
            with _LayerChanges(quantized, weights, activations):
                output = quantized.model(inputs)
            drawn = label_free or loss_fn is None
            loss = _drawn_loss(output, generator) if drawn else loss_fn(output, target) * len(inputs)  # type: ignore[misc]
            loss.backward()
            quantized.model.zero_grad(set_to_none=True)
            samples += len(inputs)
            if progress:
                progress(index + 1, len(batches), {"loss": loss.item() / len(inputs)})
    halves = 0.5 / samples
    layers = []
    for layer in quantized.searchable:
        name = layer.cost.name
        if not any(key[0] == name for key in weights):
            msg = f"Layer {name!r} was not met in a forward pass. Use importance.source 'loss_change' or 'scale'."
            raise InputError(msg)
        pair = (_finite(name, changes, halves, quantized.bits) for changes in (weights, activations))
        layers.append(LayerImportance(layer.cost, *pair))
    return _table(quantized, layers, model_name, f"fisher on {samples} samples")


def loss_change_importance(
    quantized: QuantizedModel,
    batches: Iterable[tuple[Any, Any]],
    *,
    loss_fn: LossFunction | None = None,
    label_free: bool = False,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    model_name: str = "",
) -> ImportanceTable:
    """
    Measured loss of one tensor alone at each bit width, all others at the highest; see the module's text.

    Layers of an activation group share one quantizer, and each gets an equal part of its change. A change below 0 (the
    noise of a measurement) counts as 0. Parameters and errors as :func:`fisher_importance`.
    """
    device = device_of(quantized.model) if device is None else torch.device(device)
    quantized.model.to(device)
    listed = [to_device(batch, device) for batch in _listed(quantized, batches)]
    highest = max(quantized.bits)
    groups = quantized.searchable_groups
    tensors = {
        ("weight", layer.cost.name): quantized.weight_quantizers[layer.cost.name] for layer in quantized.searchable
    }
    tensors |= {("activation", group): quantized.activation_quantizers[group] for group in groups}
    changes: dict[tuple[str, str], dict[int, float]] = {}
    total = sum(len(quantizer.bits) - 1 for quantizer in tensors.values())
    with evaluation_mode(quantized.model), _as_before(quantized), torch.no_grad(), quantized.several_passes():
        quantized.select_uniform(highest)
        references = [quantized.model(inputs) for inputs, _ in listed] if label_free else None
        measure = _loss_measure(quantized, listed, loss_fn or cross_entropy(), references)
        base, done = measure(), 0
        for key, quantizer in tensors.items():
            changes[key] = {quantizer.active: 0.0}
            for bits in quantizer.bits[:-1]:
                quantizer.select(bits)
                changes[key][bits] = max(0.0, measure() - base)
                done += 1
                if progress:
                    progress(done, total, {"loss": base + changes[key][bits]})
            quantizer.select(highest)
    sizes = {group: sum(layer.cost.activation_group == group for layer in quantized.searchable) for group in groups}
    layers = []
    for layer in quantized.searchable:
        group = layer.cost.activation_group
        shared = {bits: change / sizes[group] for bits, change in changes["activation", group].items()}
        layers.append(LayerImportance(layer.cost, dict(sorted(changes["weight", layer.cost.name].items())), shared))
    samples = sum(len(inputs) for inputs, _ in listed)
    return _table(quantized, layers, model_name, f"loss change on {samples} samples")


class _LayerChanges(TorchFunctionMode):
    """
    Meets every operation of a forward pass; where a tagged weight is used, the backward pass adds that layer's terms.

    What stands between an activation quantizer and the layer that reads it (a reshape, say) is remembered and done
    again on the input at other bits.
    """

    def __init__(self, quantized: QuantizedModel, weights: Changes, activations: Changes):
        super().__init__()
        self.weights, self.activations = weights, activations
        self.searched = {layer.cost.name for layer in quantized.searchable}

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation as it is, and look at the tags of what it reads."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        weight = next((value for value in values if isinstance(_tag(value), _Weight)), None)
        read = next((value for value in values if isinstance(_tag(value), _Input)), None)
        if not isinstance(output, Tensor) or (weight is None and read is None):
            return output

        def again(new_weight: Tensor | None, new_input: Tensor | None) -> Tensor:
            def swap(value: Any) -> Any:
                if value is weight:
                    return new_weight
                return new_input if value is read else value

            result: Tensor = func(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})
            return result

        if weight is None:
            assert read is not None
            tag: _Input = _tag(read)
            if not isinstance(_tag(output), _Input):
                _set_tag(output, _Input(tag.quantizer, tag.raw, lambda x: again(None, tag.replay(x))))
            return output
        if _tag(weight).layer in self.searched and output.requires_grad:
            axis = -1 if func is F.linear else 1
            output.register_hook(lambda gradient: self._add(gradient.movedim(axis, -1), axis, weight, read, again))
        return output

    def _add(self, gradient: Tensor, axis: int, weight: Tensor, read: Tensor | None, again: Callable) -> None:
        """
        Add the terms of one layer for every lower bit width of its weight and its input.

        :param gradient: ``[N, ..., channels]``.
        :param axis: where the layer's output has its channels.
        """
        on_weight: _Weight = _tag(weight)
        with torch.no_grad():
            base = again(weight, read).movedim(axis, -1)

            def add(changes: Changes, bits: int, output: Tensor) -> None:
                left = unrepaired(output.movedim(axis, -1), base)
                term = (left * gradient).sum(-1, dtype=torch.float64).square().sum()
                key = (on_weight.layer, bits)
                changes[key] = changes[key] + term if key in changes else term

            for bits in on_weight.quantizer.bits[:-1]:
                add(self.weights, bits, again(_at(on_weight.quantizer, on_weight.raw, bits), read))
            if read is not None:
                on_input: _Input = _tag(read)
                for bits in on_input.quantizer.bits[:-1]:
                    add(
                        self.activations,
                        bits,
                        again(weight, on_input.replay(_at(on_input.quantizer, on_input.raw, bits))),
                    )


def unrepaired(output: Tensor, reference: Tensor) -> Tensor:
    """
    What remains of a change when each channel may be scaled and shifted (least squares over all its values).

    :param output: ``[..., channels]``.
    :param reference: ``[..., channels]``.
    :return: the best scaled and shifted ``output`` - ``reference``; the plain difference where a channel has fewer than
        :data:`FEWEST` values, too few to tell.
    """
    if reference.numel() // reference.shape[-1] < FEWEST:
        return output - reference
    dims = tuple(range(reference.dim() - 1))
    centred, target = output - output.mean(dims), reference - reference.mean(dims)
    slope = (centred * target).mean(dims) / centred.square().mean(dims).clamp_min(1e-20)
    return centred * slope - target


@dataclass(frozen=True)
class _Weight:
    """A weight that left its quantizer."""

    layer: str
    quantizer: MultiBitQuantizer
    raw: Tensor


@dataclass(frozen=True)
class _Input:
    """A tensor that left an activation quantizer, and what was done to it since."""

    quantizer: MultiBitQuantizer
    raw: Tensor
    replay: Callable[[Tensor], Tensor] = lambda x: x


def _tag(tensor: Tensor) -> Any:
    return getattr(tensor, "_mpq_tag", None)


def _set_tag(tensor: Tensor, tag: _Weight | _Input) -> None:
    tensor._mpq_tag = tag  # type: ignore[attr-defined]


@contextmanager
def _tagging(quantized: QuantizedModel) -> Iterator[None]:
    """Inside, what leaves the quantizers of searchable layers says where it comes from."""
    with ExitStack() as stack:
        for layer in quantized.searchable:
            name = layer.cost.name

            def tag_weight(module: Any, args: Any, output: Tensor, name: str = name) -> None:
                _set_tag(output, _Weight(name, module, args[0].detach()))

            stack.enter_context(_hook(quantized.weight_quantizers[name], tag_weight))
        for group in quantized.searchable_groups:

            def tag_input(module: Any, args: Any, output: Tensor) -> None:
                _set_tag(output, _Input(module, args[0].detach()))

            stack.enter_context(_hook(quantized.activation_quantizers[group], tag_input))
        yield


@contextmanager
def _hook(module: MultiBitQuantizer, function: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _as_before(quantized: QuantizedModel) -> Iterator[None]:
    """The active bit widths and gradients of before, afterwards."""
    before = quantized.policy().layers
    try:
        yield
    finally:
        quantized.select(before)
        quantized.model.zero_grad(set_to_none=True)


def _at(quantizer: MultiBitQuantizer, raw: Tensor, bits: int) -> Tensor:
    """:return: a tensor quantized at ``bits``; the quantizer's active bit width stays."""
    active = quantizer.active
    quantizer.select(bits)
    try:
        return quantizer(raw)
    finally:
        quantizer.select(active)


def _drawn_loss(output: Any, generator: torch.Generator) -> Tensor:
    """:return: summed loss at targets drawn from the distribution that the outputs stand for."""
    output = main_output(output)
    with torch.no_grad():
        if output.dim() == 2 and output.shape[1] > 1:
            target = torch.multinomial(output.softmax(1), 1, generator=generator)[:, 0]
        else:
            variance = output.var(correction=0).clamp_min(1e-12)
            noise = torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
            target = output + noise * variance.sqrt()
    if output.dim() == 2 and output.shape[1] > 1:
        return F.cross_entropy(output, target, reduction="sum")
    return (output - target).square().sum() / (2 * variance)


def _loss_measure(
    quantized: QuantizedModel, batches: Sequence[tuple[Any, Any]], loss_fn: LossFunction, references: list[Any] | None
) -> Callable[[], float]:
    samples = sum(len(inputs) for inputs, _ in batches)

    def measure() -> float:
        total = 0.0
        for index, (inputs, target) in enumerate(batches):
            output = quantized.model(inputs)
            loss = loss_fn(output, target) if references is None else output_distance(output, references[index])
            total += loss.item() * len(inputs)
        return total / samples

    return measure


def _listed(quantized: QuantizedModel, batches: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    if not quantized.searchable:
        msg = "No layer of the model is searchable: there is no importance to measure."
        raise InputError(msg)
    listed = list(batches)
    if not listed:
        msg = "There is no batch to measure importance on: the data is empty."
        raise InputError(msg)
    return listed


def _finite(layer: str, changes: Changes, factor: float, candidates: Sequence[int]) -> dict[int, float]:
    values = {bits: changes[layer, bits].item() * factor if (layer, bits) in changes else 0.0 for bits in candidates}
    for bits, value in values.items():
        if not value < float("inf"):
            msg = f"The importance of {layer!r} at {bits} bits is {value}. Train again with a lower learning rate."
            raise TrainingError(msg)
    return values


def _table(
    quantized: QuantizedModel, layers: Sequence[LayerImportance], model_name: str, source: str
) -> ImportanceTable:
    return ImportanceTable(
        quantized.bits, tuple(layers), fixed_layers_of(quantized), unit=LOSS, model=model_name, source=source
    )
