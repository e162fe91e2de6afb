"""
What a mixed-precision model costs to run, beside FP32, uniform INT8 and a naive export, all measured in one run.

* FP32 is the floating-point network converted as it is.
* INT8 is NNCF's post-training quantization of that network at its defaults.
* Naive is the frozen mixed-precision network converted as it is, with a ``FakeQuantize`` of ``2^b`` levels for every
  quantizer.
* Mixed are the exported files, in OpenVINO and in ONNX Runtime (ORT).

The models take turns, a slice of the time each, so that a change of the machine's speed meets all of them.
"""

from __future__ import annotations

import copy
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino as ov
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nncf_mpq_plugin.adapters.nncf3 import quantize_to_int8
from nncf_mpq_plugin.deploy.compiling import EXACT, check_file, kernels, read_model, shared_core
from nncf_mpq_plugin.deploy.footprint import Footprint, footprint
from nncf_mpq_plugin.deploy.openvino import save_ir

FP32, INT8, NAIVE, MIXED = "FP32", "INT8", "naive", "mixed"
ANY_BATCH, ONNX_RUNTIME = "mixed (any batch)", "mixed (ORT)"
WEIGHTED_TYPES = ("Convolution", "FullyConnected")
TURNS = 30


@dataclass(frozen=True)
class Latency:
    """
    Milliseconds of one inference: median and quartiles over ``runs`` inferences.

    :param turns: the median of each turn, as many of all models that took turns.
    """

    median: float
    low: float
    high: float
    runs: int
    turns: tuple[float, ...]

    def relative_to(self, other: Latency) -> float:
        """:return: median of the ratios in each turn, which a machine's slow and fast minutes do not change."""
        return float(np.median(np.divide(self.turns, other.turns)))


@dataclass(frozen=True)
class ModelFigures:
    """
    What one model costs.

    :param name: one of this module's constants. ``ANY_BATCH`` is compiled for batches of any size, as files come.
    :param file_bytes: of all its files.
    :param weight_bytes: of the file that holds the weights.
    :param latency: with ``INFERENCE_PRECISION_HINT=f32``.
    :param default_latency: with the runtime's default properties (bf16 on new CPUs).
    :param footprint: load time and memory.
    :param integer_share: share of convolutions and linear layers in 8-bit integer kernels.
    :param kernels: layer -> precision and kernel, as OpenVINO's runtime model reports them.

    Of ``ANY_BATCH`` and ONNX Runtime only the latency is measured: what follows it is None, and ``kernels`` is empty.
    """

    name: str
    file_bytes: int
    weight_bytes: int
    latency: Latency
    default_latency: Latency | None
    footprint: Footprint | None
    integer_share: float | None
    kernels: Mapping[str, str]


@dataclass(frozen=True)
class BenchmarkReport:
    """
    Models side by side.

    :param cpu: as OpenVINO names it.
    :param capabilities: instruction sets and precisions of the CPU.
    :param threads: number of threads of each inference.
    :param shape: of the input.
    :param bits: layer -> weight and activation bits of the mixed model.
    :param models: in the order FP32, INT8, naive, mixed, any batch, ONNX Runtime; what cannot be made is left out.
    :param left_out: name -> why.
    """

    cpu: str
    capabilities: tuple[str, ...]
    threads: int
    shape: tuple[int, ...]
    bits: Mapping[str, tuple[int, int]]
    models: tuple[ModelFigures, ...]
    left_out: Mapping[str, str]

    def model(self, name: str) -> ModelFigures:
        """:raises KeyError: if it was left out."""
        found = {model.name: model for model in self.models}
        return found[name]

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object; ``relative_latency`` is that of INT8 = 1."""
        reference = self.model(INT8).latency
        models = [{**asdict(m), "relative_latency": m.latency.relative_to(reference)} for m in self.models]
        return {"schema_version": 1, **asdict(self), "models": models}


def benchmark(
    floating: nn.Module,
    frozen: nn.Module,
    directory: str | Path,
    calibration: Sequence[Tensor],
    bits: Mapping[str, tuple[int, int]],
    *,
    seconds: float = 3.0,
    threads: int = 2,
) -> BenchmarkReport:
    """
    Measure the exported model beside FP32, INT8 and a naive export of the same network.

    :param floating: the floating-point network.
    :param frozen: the model that was exported.
    :param directory: holds ``model.xml``, ``model.bin`` and ``model.onnx``.
    :param calibration: batches ``[N, ...]`` for the INT8 model; the first sample is what is timed.
    :param bits: layer -> weight and activation bits.
    :param seconds: measuring time of each model.
    :param threads: number of threads.
    :raises InputError: if a file is missing.
    """
    _exported(directory)  # before the work for the others
    sample = calibration[0][:1].cpu().float()
    with tempfile.TemporaryDirectory() as folder:
        baselines, left_out = make_baselines(floating, frozen, calibration, folder)
        return measure(directory, baselines, sample, bits, left_out, seconds=seconds, threads=threads)


def make_baselines(
    floating: nn.Module, frozen: nn.Module, calibration: Sequence[Tensor], folder: str | Path
) -> tuple[dict[str, Path], dict[str, str]]:
    """
    Write what the exported model is compared with; parameters as for :func:`benchmark`.

    :param folder: gets ``fp32.xml``, ``int8.xml`` and ``naive.xml``.
    :return: name -> file, and name -> why it could not be made.
    """
    folder, sample = Path(folder), calibration[0][:1].cpu().float()
    files, left_out = floating_and_int8(floating, calibration, folder), {}
    try:
        save_ir(_convert(_without_batch_norm(frozen, sample), sample), folder / "naive.xml")
        files[NAIVE] = folder / "naive.xml"
    except Exception as error:  # whatever the converter meets: the other models are still worth measuring
        left_out[NAIVE] = f"{type(error).__name__}: {str(error)[:300]}"
    return files, left_out


def measure(
    directory: str | Path,
    baselines: Mapping[str, Path],
    sample: Tensor,
    bits: Mapping[str, tuple[int, int]],
    left_out: Mapping[str, str],
    *,
    seconds: float,
    threads: int,
) -> BenchmarkReport:
    """
    Measure exported files beside others; parameters as for :func:`benchmark`.

    :param baselines: what :func:`make_baselines` returned first.
    :param sample: the input, ``[1, ...]``.
    :param left_out: what :func:`make_baselines` returned second.
    :raises InputError: if a file is missing.
    """
    mixed, onnx = _exported(directory)
    files = {**baselines, MIXED: mixed}
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}

    def compiled(path: Path, batch_size: int | None, properties: Mapping[str, Any]) -> ov.CompiledModel:
        return shared_core().compile_model(read_model(path, batch_size), "CPU", {**options, **properties})

    exact = {name: compiled(path, 1, EXACT) for name, path in files.items()}
    default = {name: compiled(path, 1, {}) for name, path in files.items()}
    runners = {name: _openvino_runner(model, sample) for name, model in exact.items()}
    runners[ANY_BATCH] = _openvino_runner(compiled(mixed, None, EXACT), sample)
    runners[ONNX_RUNTIME] = _onnxruntime_runner(onnx, sample, threads)
    default_runners = {f"{name}/default": _openvino_runner(model, sample) for name, model in default.items()}
    latencies = take_turns({**runners, **default_runners}, seconds)
    models = [
        ModelFigures(
            name,
            path.stat().st_size + path.with_suffix(".bin").stat().st_size,
            path.with_suffix(".bin").stat().st_size,
            latencies[name],
            latencies[f"{name}/default"],
            footprint(path, sample.shape, {**options, **EXACT}),
            integer_share(exact[name]),
            layer_kernels(exact[name], bits),
        )
        for name, path in files.items()
    ]
    *_, ir = models
    models.append(ModelFigures(ANY_BATCH, ir.file_bytes, ir.weight_bytes, latencies[ANY_BATCH], None, None, None, {}))
    size = onnx.stat().st_size
    models.append(ModelFigures(ONNX_RUNTIME, size, size, latencies[ONNX_RUNTIME], None, None, None, {}))
    cpu = str(shared_core().get_property("CPU", "FULL_DEVICE_NAME")).strip()
    capabilities = tuple(shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return BenchmarkReport(cpu, capabilities, threads, tuple(sample.shape), dict(bits), tuple(models), left_out)


def integer_share(compiled: ov.CompiledModel) -> float:
    """:return: share of convolutions and linear layers that run in 8-bit integer kernels."""
    precisions = [kernel["precision"] for kernel in kernels(compiled) if kernel["type"] in WEIGHTED_TYPES]
    return sum(precision in ("u8", "i8") for precision in precisions) / max(1, len(precisions))


def layer_kernels(compiled: ov.CompiledModel, layers: Iterable[str]) -> dict[str, str]:
    """
    :param compiled: an exported model, or the conversion of a torch model.
    :param layers: names of the torch model's layers.
    :return: layer -> precision and kernel, e.g. ``u8 brgconv_avx512_I8``, in the order of ``layers``.
    """
    found: dict[str, str] = {}
    for kernel in kernels(compiled):
        if kernel["type"] in WEIGHTED_TYPES:
            for original in (kernel["name"], *kernel["originals"].split(",")):
                found.setdefault(layer_of(original), f"{kernel['precision']} {kernel['kernel']}")
    return {layer: found[layer] for layer in layers if layer in found}


def take_turns(runners: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Latency]:
    """
    Time functions side by side.

    :param runners: name -> a function without arguments, which is one inference.
    :param seconds: measuring time of each.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in runners}
    for run in runners.values():
        run()
    for _ in range(TURNS):
        for name, run in runners.items():
            run()  # takes the caches back from the model before
            turn: list[float] = []
            end = time.perf_counter() + seconds / TURNS
            while not turn or time.perf_counter() < end:
                begin = time.perf_counter()
                run()
                turn.append(1000 * (time.perf_counter() - begin))
            times[name].append(turn)
    result = {}
    for name, turns in times.items():
        values = np.concatenate(turns)
        low, middle, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
        result[name] = Latency(middle, low, high, len(values), tuple(float(np.median(turn)) for turn in turns))
    return result


def _exported(directory: str | Path) -> tuple[Path, Path]:
    paths = Path(directory) / "model.xml", Path(directory) / "model.onnx"
    for path in paths:
        check_file(path)
    return paths


def floating_and_int8(floating: nn.Module, calibration: Sequence[Tensor], folder: Path) -> dict[str, Path]:
    """:return: files of the network in FP32 and, after NNCF's post-training quantization, in INT8."""
    sample = calibration[0][:1].cpu().float()
    model = _convert(_without_batch_norm(floating, sample), sample)
    files = {FP32: folder / "fp32.xml", INT8: folder / "int8.xml"}
    save_ir(model, files[FP32])
    save_ir(quantize_to_int8(model, [x.cpu().float().numpy() for x in calibration]), files[INT8])
    return files


def _without_batch_norm(model: nn.Module, sample: Tensor) -> nn.Module:
    """Fold batch norm into the layers before it, as OpenVINO does as well, which then forgets the layers' names."""
    model = copy.deepcopy(model).cpu().eval()
    made_by: dict[int, str] = {}
    pairs, alive = [], []

    def remember(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            alive.append(output)  # a freed tensor's id may come again
            if isinstance(module, _BatchNorm) and id(inputs[0]) in made_by:
                pairs.append((made_by.pop(id(inputs[0])), name))
            elif isinstance(module, _ConvNd):
                made_by[id(output)] = name

        return hook

    handles = [
        module.register_forward_hook(remember(name))
        for name, module in model.named_modules()
        if isinstance(module, (_ConvNd, _BatchNorm))
    ]
    with torch.no_grad():
        model(sample)
    for handle in handles:
        handle.remove()
    for layer, norm in pairs:
        conv: Any = model.get_submodule(layer)
        batch_norm: Any = model.get_submodule(norm)
        model.set_submodule(layer, fuse_conv_bn_eval(conv, batch_norm))
        model.set_submodule(norm, nn.Identity())
    return model


def _convert(model: nn.Module, sample: Tensor) -> ov.Model:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracer itself
        return ov.convert_model(copy.deepcopy(model).cpu().eval(), example_input=sample, input=[-1, *sample.shape[1:]])


def _openvino_runner(compiled: ov.CompiledModel, sample: Tensor) -> Callable[[], Any]:
    request = compiled.create_infer_request()
    request.set_input_tensor(0, ov.Tensor(sample.numpy().copy()))
    return request.infer


def _onnxruntime_runner(path: Path, sample: Tensor, threads: int) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: sample.numpy()}
    return lambda: session.run(None, inputs)


def layer_of(node: str) -> str:
    """:return: the torch layer: ``a.b`` of ``a.b/WithoutBiases`` and of ``__module.a.b/aten::linear/MatMul``."""
    return re.sub(r"/(aten::|WithoutBiases|DequantizationMultiply).*", "", node.removeprefix("__module."))
