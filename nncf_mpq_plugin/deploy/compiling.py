"""Exported models in OpenVINO: read, compiled exactly, and which kernels they got."""

from __future__ import annotations

import functools
import numbers
from pathlib import Path
from typing import Any

import openvino as ov

from nncf_mpq_plugin.errors import InputError

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""
Compile-time properties for exact results: new CPUs would run what is not INT8 in bfloat16, and linear layers with
compressed weights would round their activations to 8 bits.
"""


def compile_exactly(path: str | Path, batch_size: int | None = None, **properties: Any) -> ov.CompiledModel:
    """
    Compile an exported model for the CPU with the properties that keep its results exact.

    :param path: ``.xml`` or ``.onnx``.
    :param batch_size: samples in a batch, if it is always the same, which OpenVINO has faster kernels for; None: any.
        A file that has a size of its own keeps it.
    :param properties: further properties, e.g. ``INFERENCE_NUM_THREADS=2``.
    :raises InputError: if the file is missing or cannot be read, or the batch size is no whole number from 1 up.
    """
    if batch_size is not None and (not isinstance(batch_size, numbers.Integral) or batch_size < 1):
        msg = f"batch_size is {batch_size!r}; it takes a whole number from 1 up, or None for batches of any size."
        raise InputError(msg)
    check_file(path)
    try:
        return shared_core().compile_model(read_model(path, batch_size), "CPU", {**EXACT, **properties})
    except RuntimeError as error:
        msg = f"{path}: OpenVINO cannot compile it ({error})."
        raise InputError(msg) from error


def check_file(path: str | Path) -> None:
    """:raises InputError: if there is no such file."""
    if not Path(path).is_file():
        msg = f"{path}: no such file. Run the export first."
        raise InputError(msg)


@functools.cache
def shared_core() -> ov.Core:
    """
    :return: the one Core of this process, which is never released. Releasing several in the order of their making
        leaves a thread unmapped memory for its signals' stack: the next one, such as Ctrl-C, ends the process or
        overwrites what lies there by then (docs/upstream.md).
    """
    return ov.Core()


def read_model(path: str | Path, batch_size: int | None) -> ov.Model:
    """
    :param batch_size: to fix, where the file leaves it free; None leaves it free.
    :raises RuntimeError: OpenVINO's own, for what it cannot read.
    """
    model = shared_core().read_model(str(path))
    free = [port for port in model.inputs if port.partial_shape[0].is_dynamic]
    if batch_size is not None and free:
        model.reshape({port: [int(batch_size), *list(port.partial_shape)[1:]] for port in free})
    return model


def own_batch_size(path: str | Path) -> int | None:
    """
    :return: the size of a batch that the file has; None if it is free.
    :raises RuntimeError: OpenVINO's own, for what it cannot read.
    """
    size = shared_core().read_model(str(path)).input(0).partial_shape[0]
    return size.get_length() if size.is_static else None


def kernels(compiled: ov.CompiledModel) -> list[dict[str, str]]:
    """:return: for each executed node its name, type, precision, kernel and the names of the model's nodes in it."""
    keys = {
        "type": "layerType",
        "precision": "runtimePrecision",
        "kernel": "primitiveType",
        "originals": "originalLayersNames",
    }
    result = []
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        values = {key: str(info[name].astype(str)) for key, name in keys.items() if name in info}
        result.append({"name": op.get_friendly_name(), **values})
    return result
