"""Deployment: a frozen model as OpenVINO IR and ONNX, verified against the torch model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nncf_mpq_plugin.costs import LatencyTable
    from nncf_mpq_plugin.deploy.measurement import BenchmarkReport
    from nncf_mpq_plugin.deploy.verification import VerifyReport

__all__ = ["ExportResult", "benchmark", "compile", "export", "measure_latency", "verify"]


@dataclass(frozen=True)
class ExportResult:
    """
    The exported files.

    :param onnx: for ONNX Runtime and for OpenVINO.
    :param xml: OpenVINO IR; its weights lie in the ``.bin`` file beside it.
    """

    onnx: Path
    xml: Path

    @property
    def bin(self) -> Path:
        """The IR's weights."""
        return self.xml.with_suffix(".bin")


def export(frozen: nn.Module, example_input: Tensor, directory: str | Path) -> ExportResult:
    """
    Write ``model.onnx``, ``model.xml`` and ``model.bin``.

    :param frozen: a model with NNCF's own quantizers, from ``freeze`` or ``load_model``.
    :param example_input: one batch ``[N, ...]``; the batch dimension becomes dynamic.
    :param directory: created if missing.
    :raises UnsupportedModelError: if an operation cannot be exported.
    """
    from nncf_mpq_plugin.deploy.graph import marked_graph
    from nncf_mpq_plugin.deploy.onnx import save_onnx, to_standard_operators
    from nncf_mpq_plugin.deploy.openvino import save_ir, to_openvino

    result = ExportResult(Path(directory) / "model.onnx", Path(directory) / "model.xml")
    save_onnx(to_standard_operators(marked_graph(frozen, example_input)), result.onnx)
    save_ir(to_openvino(result.onnx), result.xml)
    return result


def verify(
    frozen: nn.Module, path: str | Path, samples: Any, limit: int = 256, target: str = "openvino"
) -> VerifyReport:
    """Compare exported files with the frozen model; see :func:`nncf_mpq_plugin.deploy.verification.verify`."""
    from nncf_mpq_plugin.deploy.verification import verify as run

    return run(frozen, path, samples, limit, target)


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
    """Measure beside FP32, INT8 and a naive export; see :func:`nncf_mpq_plugin.deploy.measurement.benchmark`."""
    from nncf_mpq_plugin.deploy.measurement import benchmark as run

    return run(floating, frozen, directory, calibration, bits, seconds=seconds, threads=threads)


def measure_latency(
    floating: nn.Module,
    calibration: Sequence[Tensor],
    layers: Sequence[str],
    *,
    seconds: float = 3.0,
    threads: int = 2,
) -> LatencyTable:
    """Measure single layers in INT8 and FP32; see :func:`nncf_mpq_plugin.deploy.latency.measure_latency`."""
    from nncf_mpq_plugin.deploy.latency import measure_latency as run

    return run(floating, calibration, layers, seconds=seconds, threads=threads)


def compile(path: str | Path, batch_size: int | None = None, **properties: Any) -> Any:
    """
    Compile an exported model for the CPU with the properties that keep its results exact.

    :param path: ``.xml`` or ``.onnx``.
    :param batch_size: samples in a batch, if it is always the same, which OpenVINO has faster kernels for; None: any.
        A file that has a size of its own keeps it.
    :param properties: further OpenVINO properties, e.g. ``INFERENCE_NUM_THREADS=2``.
    :return: ``openvino.CompiledModel``.
    """
    from nncf_mpq_plugin.deploy.compiling import compile_exactly

    return compile_exactly(path, batch_size, **properties)
