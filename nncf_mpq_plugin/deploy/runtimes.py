"""Run an exported file on samples, with a look at tensors inside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from nncf_mpq_plugin.deploy.compiling import EXACT, check_file, read_model, shared_core
from nncf_mpq_plugin.errors import InputError

OUTPUT = "output"
"""Name of the result in what the functions return."""
BATCH = 32
_CONSTANT = re.compile(r'offset="(\d{1,18})" size="(\d{1,18})"')


def run_openvino(
    path: str | Path,
    inputs: np.ndarray,
    taps: Sequence[str] = (),
    properties: Mapping[str, Any] = EXACT,
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """
    :param path: ``.xml`` or ``.onnx``.
    :param inputs: ``[N, ...]`` float32.
    :param taps: names of tensors to return as well; those that the file does not have are left out.
    :param properties: compile-time properties.
    :param batch_size: to compile the model for; None leaves it free. A file that has a size of its own keeps it. The
        last sample is repeated where N is no multiple of it.
    :return: ``OUTPUT`` and taps -> ``[N, ...]``.
    :raises InputError: if the file is missing, or cannot be read, compiled or run on these inputs.
    """
    check_file(path)
    _check_weights(Path(path))
    try:
        model = read_model(path, batch_size)
        present = {name for op in model.get_ops() for port in op.outputs() for name in port.get_names()}
        taps = [name for name in taps if name in present]
        if taps:
            model.add_outputs(taps)
        compiled = shared_core().compile_model(model, "CPU", dict(properties))
        ports = {OUTPUT: compiled.output(0), **{name: compiled.output(name) for name in taps}}
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ports}
        size = compiled.input(0).partial_shape[0]
        length = BATCH if size.is_dynamic else size.get_length()
        filled = 0 if size.is_dynamic else -len(inputs) % length
        for batch in _batches(np.concatenate([inputs, np.repeat(inputs[-1:], filled, 0)]), length):
            results = compiled({0: batch})
            for name, port in ports.items():
                parts[name].append(np.array(results[port], ndmin=1))
    except RuntimeError as error:
        msg = (
            f"{path}: OpenVINO cannot use it ({str(error)[:500]}). Check that it is this network's file, or export the "
            "model again."
        )
        raise InputError(msg) from error
    found = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    if not filled:
        return found
    return {name: array[: len(array) * len(inputs) // (len(inputs) + filled)] for name, array in found.items()}


def run_onnxruntime(path: str | Path, inputs: np.ndarray, taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """As :func:`run_openvino`, for ``.onnx`` in ONNX Runtime's CPU provider."""
    check_file(path)
    try:
        model = onnx.load(path)
        present = {name for node in model.graph.node for name in node.output}
        taps = [name for name in taps if name in present]
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in taps
        )
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [session.get_outputs()[0].name, *taps]
        feed = session.get_inputs()[0].name
        results = [session.run(names, {feed: batch}) for batch in _batches(inputs, BATCH)]
    except Exception as error:
        msg = (
            f"{path}: ONNX Runtime cannot use it ({str(error)[:500]}). Check that it is this network's file, or export "
            "the model again."
        )
        raise InputError(msg) from error
    return {name: np.concatenate([result[index] for result in results]) for index, name in enumerate([OUTPUT, *taps])}


def _batches(inputs: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(inputs, range(size, len(inputs), size))


def _check_weights(path: Path) -> None:
    """:raises InputError: if the ``.bin`` beside an ``.xml`` is missing or too short; OpenVINO names the ``.xml``."""
    if path.suffix != ".xml":
        return
    weights = path.with_suffix(".bin")
    check_file(weights)
    ends = (
        int(start) + int(size) for start, size in _CONSTANT.findall(path.read_text(encoding="utf-8", errors="replace"))
    )
    needed, found = max(ends, default=0), weights.stat().st_size
    if found < needed:
        msg = f"{weights}: has {found} bytes of the {needed} that {path.name} refers to. Export the model again."
        raise InputError(msg)
