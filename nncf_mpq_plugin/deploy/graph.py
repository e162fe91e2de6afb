"""
From a frozen torch model to an ONNX graph in which every quantizer is one marker node ``mpq::Quantize``.

torch writes the operations; :mod:`nncf_mpq_plugin.deploy.onnx` turns the markers into standard operators.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from nncf_mpq_plugin.adapters.nncf3 import native_quantizers, replaced_quantizers
from nncf_mpq_plugin.errors import UnsupportedModelError

OPSET = 17
MARKER_DOMAIN = "mpq"
MARKER = "Quantize"


class _Mark(torch.autograd.Function):
    """Identity that appears in the ONNX graph as a marker with the quantizer's step and integer range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, step: Any, low: int, high: int) -> Any:
        return g.op(f"{MARKER_DOMAIN}::{MARKER}", x, step, low_i=low, high_i=high).setType(x.type())


class _Marker(nn.Module):
    def __init__(self, step: Tensor, low: int, high: int):
        super().__init__()
        self.register_buffer("step", step)
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return _Mark.apply(x, self.step, self.low, self.high)


def marked_graph(frozen: nn.Module, example_input: Tensor) -> onnx.ModelProto:
    """
    Trace a frozen model.

    :param frozen: what ``freeze`` or ``load_model`` returned.
    :param example_input: one batch; its first dimension becomes dynamic.
    :return: an ONNX model with marker nodes: input, step, and attributes ``low`` and ``high``.
    :raises UnsupportedModelError: if torch cannot export an operation.
    """
    markers: dict[str, nn.Module] = {}
    made: dict[int, nn.Module] = {}
    for name, quantizer in native_quantizers(frozen).items():
        step = quantizer.scale.detach().flatten() / quantizer.level_high
        markers[name] = made.setdefault(id(quantizer), _Marker(step, quantizer.level_low, quantizer.level_high))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            replaced_quantizers(frozen, markers),
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            torch.no_grad(),
        ):
            path = Path(folder) / "marked.onnx"
            warnings.simplefilter("ignore")  # tracer and deprecation warnings of torch's exporter itself
            torch.onnx.export(
                frozen.eval(),
                (example_input,),
                path,
                dynamo=False,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
                custom_opsets={MARKER_DOMAIN: 1},
            )
            return onnx.load(path)
    except Exception as error:
        msg = f"The model cannot be exported to ONNX ({type(error).__name__}: {str(error)[:500]})."
        raise UnsupportedModelError(msg) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
