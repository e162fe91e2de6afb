"""
LSQ fake quantization: ``y = s * round(clamp(x / s, Qn, Qp))`` with the gradients of Esser et al., "Learned Step Size
Quantization", ICLR 2020.

With ``v = x / s`` and inside meaning ``Qn < v < Qp``:

* y (eq. 1 and 2) = round(v) * s inside, Qn * s or Qp * s outside,
* dy/dx (eq. 5) = 1 inside, 0 outside,
* dy/ds (eq. 3) = round(v) - v inside, Qn or Qp outside; the gradient is multiplied by g = 1 / sqrt(N * Qp) (sec. 2.2).

An unsigned quantizer (Qn = 0) contains the ReLU before it, in values and gradients, and with a ``ceiling`` the ReLU6:
``x`` is cut off there first, and dy/dx is 0 at and above it.

On a CPU both directions are one pass over memory each, compiled from ``lsq.cpp`` at first use (kept for later runs in
torch's folder for extensions, ``TORCH_EXTENSIONS_DIR``). Without a compiler, on other devices, and for layouts and
types that it does not handle, the same function runs as tensor operations: outputs and gradients of the input are
equal bit for bit, gradients of the scale up to the order of summation.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("lsq.cpp")
SWITCH = "NNCF_MPQ_KERNEL"  # "python" in this environment variable keeps the tensor operations
FLAGS = ("-O3", "-fPIC", "-shared", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
COMPILE_SECONDS = 600

logger = logging.getLogger(__name__)
# told the output, and x, scale, low, high and ceiling that it was made from
listeners: list[Callable[[Tensor, Tensor, Tensor, int, int, float], None]] = []


def lsq_quantize(
    x: Tensor, scale: Tensor, low: int, high: int, factor: float = 1.0, ceiling: float = math.inf
) -> Tensor:
    """
    Quantize and dequantize ``x``.

    :param x: any shape.
    :param scale: step size, one element or broadcastable to ``x`` (per-channel: ``[out, 1, 1, 1]``).
    :param low: Qn as a (negative or zero) integer.
    :param high: Qp.
    :param factor: LSQ's gradient scale g = 1 / sqrt(N * Qp), applied to the gradient of ``scale`` only.
    :param ceiling: what ``x`` is cut off at first.
    :return: the shape of ``x``.
    """
    if _fits_kernel(x, scale):
        result: Tensor = torch.ops.nncf_mpq_plugin.lsq.default(x, scale, low, high, factor, ceiling)
    else:
        result = _LSQ.apply(x, scale, low, high, factor, ceiling)
    if result.requires_grad:
        for listener in listeners:
            listener(result, x, scale, low, high, ceiling)
    return result


def quantized_values(x: Tensor, scale: Tensor, low: int, high: int, ceiling: float = math.inf) -> Tensor:
    """:return: the output of :func:`lsq_quantize`, for tensors that carry no gradient."""
    if _fits_kernel(x, scale):
        values: Tensor = torch.ops.nncf_mpq_plugin.lsq.default(x, scale, low, high, 1.0, ceiling)
        return values
    return values_by_tensor_operations(x, scale, low, high, ceiling)


class _LSQ(torch.autograd.Function):
    """The same in tensor operations; keeps its input (which the layer before has kept as well) and no copy or mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, factor: float, ceiling: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.low, ctx.high, ctx.factor, ctx.ceiling = low, high, factor, ceiling
        return values_by_tensor_operations(x, scale, low, high, ceiling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        gradients = gradients_by_tensor_operations(grad, x, scale, ctx.low, ctx.high, ctx.factor, ctx.ceiling)
        return (*gradients, None, None, None, None)


def values_by_tensor_operations(x: Tensor, scale: Tensor, low: int, high: int, ceiling: float = math.inf) -> Tensor:
    """:return: the output of :func:`lsq_quantize`."""
    return (_cut(x, ceiling) / scale).round_().clamp_(low, high).mul_(scale)


def gradients_by_tensor_operations(
    grad: Tensor, x: Tensor, scale: Tensor, low: int, high: int, factor: float, ceiling: float = math.inf
) -> tuple[Tensor, Tensor]:
    """:return: gradients of ``x`` and of ``scale``, for the gradient ``grad`` of the output."""
    v = _cut(x, ceiling) / scale
    inside = (v > low) & (v < high)
    q = v.round().clamp_(low, high)
    slope = torch.where(inside, q - v, q).mul_(grad)
    passed = inside if ceiling == math.inf else inside & (x < ceiling)
    return grad * passed, slope.sum_to_size(scale.shape).mul_(factor)


def _cut(x: Tensor, ceiling: float) -> Tensor:
    return x if ceiling == math.inf else x.clamp_max(ceiling)


def _fits_kernel(x: Tensor, scale: Tensor) -> bool:
    """:return: whether the compiled kernel exists and ``x`` is rows of memory, one for each element of ``scale``."""
    if not x.is_cpu or x.dtype != scale.dtype or x.dtype not in (torch.float32, torch.float64) or not x.numel():
        return False
    count = scale.numel()
    if count > 1:
        rows = x.dim() and scale.dim() == x.dim() and scale.shape[0] == x.shape[0] == count
        if not (rows and x.stride(0) * count == x.numel() and scale.is_contiguous()):
            return False
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return dense and compiled()


@functools.cache
def compiled() -> bool:
    """:return: whether the compiled kernel can be used; compiles it at the first call, in about 20 seconds."""
    if os.environ.get(SWITCH) == "python":
        return False
    try:
        torch.ops.load_library(str(_library()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        logger.warning(
            "The quantizer's CPU kernel could not be compiled (%s). Training runs with tensor operations, slower but "
            "with the same results. Install a C++ compiler (g++), or set %s=python to silence this.",
            detail[0] if detail else type(error).__name__,
            SWITCH,
        )
        return False
    return True


def _library() -> Path:
    """
    :return: the compiled kernel, from the folder of extensions or compiled now.
    :raises OSError: if there is no compiler.
    :raises SubprocessError: if it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        msg = "there is no C++ compiler"
        raise OSError(msg)
    command = [compiler, f"-std=c++{20 if torch.__version__ >= '2.1' else 17}", *FLAGS, "-march=native"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    root = Path(torch.__file__).parent
    command += [f"-I{root / 'include'}", str(SOURCE), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    key = hashlib.sha256(repr((command, torch.__version__, _processor())).encode() + SOURCE.read_bytes()).hexdigest()
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    path = folder / "nncf_mpq_plugin" / f"lsq-{key[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:  # renamed when whole: no lock, nothing half done
        output = Path(temporary) / path.name
        subprocess.run(
            [*command, "-o", str(output)], check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS
        )
        output.replace(path)
    return path


def _processor() -> str:
    """:return: what the code was compiled for: a folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
