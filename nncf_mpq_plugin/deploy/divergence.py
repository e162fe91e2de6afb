"""
Where does an exported model part from the trained one?

Every quantized tensor is compared between torch and the exported file, in the order of computation. Looking at a
tensor keeps a runtime from fusing across it, which can hide a defect of the fusion: where no tensor differs when all
are looked at together, they are looked at one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from nncf_mpq_plugin.adapters.base import native_quantizers, replaced_quantizers
from nncf_mpq_plugin.deploy.graph import is_marker, layer_nodes, marked_graph, quantized_tensors, tensor_name
from nncf_mpq_plugin.deploy.runtimes import BATCH, OUTPUT

Runner = Callable[[np.ndarray, Sequence[str]], Mapping[str, np.ndarray]]
"""(inputs, names of tensors to look at) -> the output and these tensors."""

OUTPUT_TOLERANCE = 1e-3  # of the output's standard deviation; other tensors have a step, of which half is allowed
LEAST_SHARE = 1e-3  # a tensor differs if more of its elements are off,
OWN_FACTOR = 3  # and more than this many times as many as torch's own float64


@dataclass(frozen=True)
class Divergence:
    """
    The first tensor that differs.

    :param tensor: its name in the exported file.
    :param layers: the weighted layers (or other operations) between the last tensors that agree and this one.
    :param share: share of its elements that are off by half a step or more (of the output: 1e-3 of its deviation).
    :param own_share: the same for torch in float64.
    :param largest: largest difference, in steps (of the output: in standard deviations).
    :param element: index of that element, the sample first.
    :param expected: its value in torch.
    :param got: its value in the exported model.
    """

    tensor: str
    layers: tuple[str, ...]
    share: float
    own_share: float
    largest: float
    element: tuple[int, ...]
    expected: float
    got: float

    def __str__(self) -> str:
        where = f"in layer {', '.join(self.layers)}" if self.layers else "in a quantizer"
        unit = "standard deviations" if self.tensor == OUTPUT else "steps"
        return (
            f"it first diverges {where} (tensor {self.tensor!r}): {self.share:.2%} of the elements are off, "
            f"{self.own_share:.2%} between torch's float32 and float64; the largest by {self.largest:.3g} {unit}, at "
            f"{list(self.element)}: expected {self.expected:.6g}, got {self.got:.6g}"
        )


class Trace:
    """
    What torch computes at every quantizer.

    :param frozen: the model that was exported.
    :param inputs: ``[N, ...]`` float32; a few samples, since every tensor is kept.
    """

    def __init__(self, frozen: nn.Module, inputs: Tensor):
        self.inputs = inputs.numpy()
        self.graph = marked_graph(frozen, inputs[:1])
        self.steps = {
            tensor_name(hook): float(quantizer.scale.detach().flatten()[0] / quantizer.level_high)
            for hook, quantizer in native_quantizers(frozen).items()
        }
        self.tensors = [*quantized_tensors(self.graph), OUTPUT]
        self.float32 = _record(frozen.float(), inputs, self.tensors)
        self.float64 = _record(frozen.double(), inputs.double(), self.tensors)
        frozen.float()

    def first_divergence(self, run: Runner) -> Divergence | None:
        """
        Find where a runtime differs.

        :param run: the runtime, on this trace's inputs.
        :return: the first tensor that clearly differs, or None if none does.
        """
        together = run(self.inputs, self.tensors[:-1])
        for name in self.tensors:
            if name in together and (found := self._compare(name, together[name])) is not None:
                return found
        for name in self.tensors[:-1]:
            alone = run(self.inputs, [name])
            if name in alone and (found := self._compare(name, alone[name])) is not None:
                return found
        return self._compare(OUTPUT, run(self.inputs, [])[OUTPUT])

    def _compare(self, name: str, got: np.ndarray) -> Divergence | None:
        expected = self.float32[name]
        if got.shape != expected.shape:
            got = got.reshape(expected.shape)
        unit = (float(expected.std()) or 1.0) if name == OUTPUT else self.steps[name]
        allowed = OUTPUT_TOLERANCE if name == OUTPUT else 0.5
        difference = np.nan_to_num(np.abs(got - expected) / unit, nan=np.inf)
        own = float((np.abs(self.float64[name] - expected) / unit >= allowed).mean())
        share = float((difference >= allowed).mean())
        if share <= max(LEAST_SHARE, OWN_FACTOR * own):
            return None
        element = np.unravel_index(int(difference.argmax()), difference.shape)
        return Divergence(
            name,
            tuple(self._layers_before(name)),
            share,
            own,
            float(difference.max()),
            tuple(int(index) for index in element),
            float(expected[element]),
            float(got[element]),
        )

    def _layers_before(self, tensor: str) -> Iterator[str]:
        """Weighted layers from which ``tensor`` is computed without another quantized activation between."""
        nodes = {output: node for node in self.graph.graph.node for output in node.output}
        layers = {node.output[0]: name for name, node in layer_nodes(self.graph).items()}
        start = self.graph.graph.output[0].name if tensor == OUTPUT else nodes[tensor].input[0]
        pending, seen = [start], set()
        while pending:
            name = pending.pop()
            node: onnx.NodeProto | None = nodes.get(name)
            if name in seen or node is None or (is_marker(node) and name in self.steps):
                continue
            seen.add(name)
            if name in layers:
                yield layers[name]
            else:
                pending += node.input


class _Recorder(nn.Module):
    def __init__(self, quantizer: Any):
        super().__init__()
        self.quantizer = quantizer
        self.values: list[np.ndarray] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.quantizer(x)
        self.values.append(y.detach().numpy().copy())
        return y


def _record(model: nn.Module, inputs: Tensor, tensors: Sequence[str]) -> dict[str, np.ndarray]:
    """:return: tensors and ``OUTPUT`` -> ``[N, ...]``."""
    quantizers = native_quantizers(model).items()
    recorders = {name: _Recorder(quantizer) for name, quantizer in quantizers if tensor_name(name) in tensors}
    outputs = []
    with replaced_quantizers(model, recorders), torch.no_grad():
        for batch in inputs.split(BATCH):
            outputs.append(model(batch).numpy())
    values = {tensor_name(name): np.concatenate(item.values) for name, item in recorders.items()}
    return {**values, OUTPUT: np.concatenate(outputs)}
