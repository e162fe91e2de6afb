"""
From a frozen torch model to an ONNX graph in which every quantizer is one marker node ``mpq::Quantize``.

torch writes the operations; :mod:`nncf_mpq_plugin.deploy.onnx` turns the markers into standard operators. Names follow
the torch model, so that what a runtime reports can be read: a weighted layer's node has the layer's name, and a
quantized activation the name that :func:`tensor_name` gives it.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from nncf_mpq_plugin.adapters.base import native_quantizers, replaced_quantizers
from nncf_mpq_plugin.errors import UnsupportedModelError

OPSET = 20  # the newest that torch's exporter by tracing writes
MARKER_DOMAIN = "mpq"
MARKER = "Quantize"


class _Mark(torch.autograd.Function):
    """Identity that appears in the ONNX graph as a marker with the quantizer's step and integer range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, name: str) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, step: Any, low: int, high: int, name: str) -> Any:
        return g.op(f"{MARKER_DOMAIN}::{MARKER}", x, step, low_i=low, high_i=high, name_s=name).setType(x.type())


class _Marker(nn.Module):
    def __init__(self, name: str, quantizer: Any):
        super().__init__()
        self.name = name
        self.register_buffer("step", quantizer.scale.detach().flatten() / quantizer.level_high)
        self.low, self.high = quantizer.level_low, quantizer.level_high

    def forward(self, x: Tensor) -> Tensor:
        return _Mark.apply(x, self.step, self.low, self.high, self.name)


def tensor_name(hook: str) -> str:
    """
    :param hook: a quantizer's hook name, e.g. ``post_hooks.layer1/0/relu/relu_/0__0.0``.
    :return: the name of the tensor that it quantizes, e.g. ``layer1/0/relu/relu_/0.quantized``, or ``....input`` where
        it stands before the operation.
    """
    side, _, key = hook.partition("_hooks.")
    op, _, place = key.rpartition("__")
    port = place.partition(".")[0]
    kind = "quantized" if side == "post" else "input"
    return f"{op}.{kind}" if port == "0" else f"{op}.{kind}{port}"


def marked_graph(frozen: nn.Module, example_input: Tensor) -> onnx.ModelProto:
    """
    Trace a frozen model.

    :param frozen: what ``freeze`` or ``load_model`` returned.
    :param example_input: one batch; its first dimension becomes dynamic.
    :return: an ONNX model with marker nodes: input, step, and attributes ``low`` and ``high``.
    :raises UnsupportedModelError: if torch cannot export an operation.
    """
    markers = {name: _Marker(name, quantizer) for name, quantizer in native_quantizers(frozen).items()}
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
            model = onnx.load(path)
    except Exception as error:
        msg = f"The model cannot be exported to ONNX ({type(error).__name__}: {str(error)[:500]})."
        raise UnsupportedModelError(msg) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    _use_names_of_torch(model)
    return model


def is_marker(node: onnx.NodeProto) -> bool:
    """:return: whether a node stands for a quantizer."""
    return bool(node.op_type == MARKER and node.domain == MARKER_DOMAIN)


def layer_nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """:return: name of the weighted layer -> the node that computes it; ``model`` has markers."""
    parameters = _parameters(model)
    layers: dict[str, onnx.NodeProto] = {}
    weight_of: dict[str, str] = {}
    for node in model.graph.node:
        if is_marker(node) and node.input[0] in parameters:
            weight_of[node.output[0]] = node.input[0].removesuffix(".weight")
        elif node.op_type == "Transpose" and node.input[0] in weight_of:
            weight_of[node.output[0]] = weight_of[node.input[0]]
        elif len(node.input) > 1 and node.input[1] in weight_of:
            layers[weight_of[node.input[1]]] = node
    return layers


def quantized_tensors(model: onnx.ModelProto) -> list[str]:
    """:return: names of the quantized activations in the order of computation; ``model`` has markers."""
    parameters = _parameters(model)
    return [node.output[0] for node in model.graph.node if is_marker(node) and node.input[0] not in parameters]


def _parameters(model: onnx.ModelProto) -> set[str]:
    parameters = {item.name for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in parameters:
            parameters.add(node.output[0])  # torch writes equal parameters once
    return parameters


def _use_names_of_torch(model: onnx.ModelProto) -> None:
    for name, node in layer_nodes(model).items():
        node.name = name
    names = {}
    activations = set(quantized_tensors(model)) - {item.name for item in model.graph.output}
    for node in model.graph.node:
        if is_marker(node) and node.output[0] in activations:
            hook = next(a.s.decode() for a in node.attribute if a.name == "name")
            names[node.output[0]] = tensor_name(hook)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
