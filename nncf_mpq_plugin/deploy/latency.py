"""
Each layer's time in floating point and in INT8, as OpenVINO's profiler counts it: the table for ``latency_ratio``.

Low bits run on 8-bit carriers, so that a layer has two times only: that of its INT8 kernel, wherever weights and
activations take 8 bits or less, and that of its floating-point kernel, wherever either stays in floating point.
Conversions between the two, and what is no convolution or linear layer, are not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import openvino as ov
from torch import Tensor, nn

from nncf_mpq_plugin.costs import FLOAT_BITS, INT8, LatencyTable
from nncf_mpq_plugin.deploy.compiling import EXACT, kernels, read_model, shared_core
from nncf_mpq_plugin.deploy.measurement import WEIGHTED_TYPES, floating_and_int8, layer_of, take_turns
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.types import SUPPORTED_BITS


def measure_latency(
    floating: nn.Module,
    calibration: Sequence[Tensor],
    layers: Sequence[str],
    *,
    seconds: float = 3.0,
    threads: int = 2,
) -> LatencyTable:
    """
    Measure every layer at 8 weight and 8 activation bits, and in floating point.

    :param floating: the floating-point network.
    :param calibration: batches ``[N, ...]`` for the INT8 model; the first sample is what is timed.
    :param layers: names of the layers that the table is about.
    :param seconds: measuring time of each of the two models, which take turns.
    :param threads: number of threads.
    :return: times in nanoseconds.
    :raises InputError: naming a layer that OpenVINO's profiler does not show.
    """
    sample = calibration[0][:1].cpu().float()
    core = shared_core()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True, **EXACT}
    with tempfile.TemporaryDirectory() as folder:
        profilers = {}
        for name, path in floating_and_int8(floating, calibration, Path(folder)).items():
            compiled = core.compile_model(read_model(path, 1), "CPU", options)
            profilers[name] = _Profiler(compiled, sample, layers)
        take_turns({name: profiler.run for name, profiler in profilers.items()}, seconds)
        float_times, int8_times = (profiler.nanoseconds() for profiler in profilers.values())
    pairs = [(FLOAT_BITS, bits) for bits in SUPPORTED_BITS] + [(bits, FLOAT_BITS) for bits in SUPPORTED_BITS]
    times = {layer: {(INT8, INT8): int8_times[layer], **dict.fromkeys(pairs, float_times[layer])} for layer in layers}
    return LatencyTable(times, f"{str(core.get_property('CPU', 'FULL_DEVICE_NAME')).strip()}, {threads} threads")


class _Profiler:
    """Inferences of one model, with the time of each layer in each of them."""

    def __init__(self, compiled: ov.CompiledModel, sample: Tensor, layers: Sequence[str]):
        self._request = compiled.create_infer_request()
        self._request.set_input_tensor(0, ov.Tensor(sample.numpy().copy()))
        self._layers = {node: layer for node, layer in _nodes(compiled) if layer in set(layers)}
        self._times: dict[str, list[float]] = {layer: [] for layer in layers}
        missing = [layer for layer in layers if layer not in self._layers.values()]
        if missing:
            msg = f"latency: OpenVINO shows no time for layer {missing[0]!r}; it may have been merged with another."
            raise InputError(msg)

    def run(self) -> None:
        """One inference."""
        self._request.infer()
        times = dict.fromkeys(self._times, 0.0)
        for info in self._request.get_profiling_info():
            if info.node_name in self._layers:
                times[self._layers[info.node_name]] += info.real_time.total_seconds()
        for layer, time in times.items():
            self._times[layer].append(time)

    def nanoseconds(self) -> Mapping[str, int]:
        """:return: the mean of each layer's middle half of times (the profiler counts in microseconds)."""
        result = {}
        for layer, times in self._times.items():
            ordered = np.sort(times)
            middle = ordered[len(ordered) // 4 : len(ordered) - len(ordered) // 4]
            result[layer] = max(1, round(1e9 * float(middle.mean())))
        return result


def _nodes(compiled: ov.CompiledModel) -> Iterable[tuple[str, str]]:
    """:return: names of executed convolutions and linear layers, each with the torch layer that it computes."""
    for kernel in kernels(compiled):
        if kernel["type"] in WEIGHTED_TYPES:
            for original in (kernel["name"], *kernel["originals"].split(",")):
                yield kernel["name"], layer_of(original)
