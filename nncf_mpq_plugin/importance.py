"""
From a jointly trained model to the :class:`ImportanceTable` that the search reads.

``scale`` is the paper's indicator: the learned LSQ step size of a tensor at a bit width (Tang et al., ECCV 2022,
section 3.3). A larger step means coarser levels, hence a larger loss of what the tensor carries.
"""

from __future__ import annotations

import math

from nncf_mpq_plugin.errors import InputError, TrainingError
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.quantizer import MultiBitQuantizer
from nncf_mpq_plugin.types import FixedLayer, ImportanceTable, LayerImportance


def importance_from_scales(quantized: QuantizedModel, model_name: str = "", source: str = "") -> ImportanceTable:
    """
    The paper's indicators.

    :param quantized: a jointly trained model.
    :param model_name: what was measured, for people.
    :param source: where the numbers come from, for people.
    :return: a table with unit ``scale``: per layer and bit width the weight quantizer's scale (the mean over channels
        where it has several) and the scale of the activation group's quantizer.
    :raises TrainingError: if a scale is not finite.
    :raises InputError: if no layer is searchable.
    """
    if not quantized.searchable:
        msg = "No layer of the model is searchable: there is no importance to read."
        raise InputError(msg)
    layers = tuple(
        LayerImportance(
            layer.cost,
            _scales(quantized.weight_quantizers[layer.cost.name], f"{layer.cost.name}.weight"),
            _scales(
                quantized.activation_quantizers[layer.cost.activation_group],
                f"{layer.cost.activation_group}.activation",
            ),
        )
        for layer in quantized.searchable
    )
    return ImportanceTable(
        quantized.bits, layers, fixed_layers_of(quantized), unit="scale", model=model_name, source=source
    )


def fixed_layers_of(quantized: QuantizedModel) -> tuple[FixedLayer, ...]:
    """:return: the layers that are not searched, with their bit widths."""
    return tuple(FixedLayer(layer.cost, layer.fixed) for layer in quantized.layers if layer.fixed is not None)


def _scales(quantizer: MultiBitQuantizer, name: str) -> dict[int, float]:
    result = {bits: quantizer.scale(bits).detach().mean().item() for bits in quantizer.bits}
    for bits, value in result.items():
        if not math.isfinite(value):
            msg = f"The {bits}-bit scale of {name!r} is {value}. Train again with a lower scale_learning_rate."
            raise TrainingError(msg)
    return result
