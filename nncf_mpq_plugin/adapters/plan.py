"""
Where quantizers go: NNCF's placement, changed for deployment.

NNCF decides which tensors are quantized. This module keeps that decision and changes the positions so that a CPU
runtime computes exactly what was trained, in INT8 kernels:

* a tensor that one activation group alone reads gets the group's quantizer, directly;
* a tensor that other operations read as well is *stored* at 8 bits, and each group below 8 bits reads it through a
  quantizer of its own in front of its layers;
* a concatenation that a weighted layer reads is quantized once, behind it, instead of once per branch;
* for OpenVINO there is no quantizer between a branch's last layer and its residual addition: the fused kernel would
  drop its rounding;
* normalisations, attention products and constants of unweighted operations stay in floating point: integers there
  neither speed up a CPU nor feed a weighted layer.

Pure functions on a small graph; the adapter translates NNCF's graph into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Tensor = tuple[str, int]
"""A tensor: the operation that makes it and its output port."""

WEIGHTED, TRANSPARENT, CONCAT, ADD, FLOAT, OTHER = "weighted", "transparent", "concat", "add", "float", "other"
ADD_FUNCTIONS = ("add", "add_", "__add__", "__iadd__", "__radd__")


@dataclass(frozen=True)
class Op:
    """
    One operation of the model.

    :param name: NNCF's name, ``module/path/function/call``.
    :param kind: ``weighted``; ``transparent`` (moves or selects values: reshape, max pooling, ...); ``concat``;
        ``add`` (of two activations); ``float`` (normalisation or attention: reads floating point); ``other``.
    :param inputs: input port -> tensor, activations only.
    :param linear_output: whether its output is a weighted layer's, possibly through batch norm and ReLU.
    :param averaged: number of values that each of its outputs is the average of; 1 where it moves, selects or clips
        values (or is a batch norm that is folded); None where it computes something else.
    :param bounds: values that it clips at.
    :param channels: size of the second dimension of its output.
    :param scales_channels: whether it is a batch norm that no layer takes in: a factor and an offset by channel.
    """

    name: str
    kind: str
    inputs: Mapping[int, Tensor]
    linear_output: bool = False
    averaged: int | None = None
    bounds: tuple[float, ...] = ()
    channels: int = 0
    scales_channels: bool = False


@dataclass(frozen=True, order=True)
class Position:
    """A place for a hook: before (``pre``) input ``port`` or behind (``post``) output ``port`` of an operation."""

    side: str
    op: str
    port: int


@dataclass(frozen=True)
class StoredTensor:
    """An 8-bit quantizer of a tensor that several operations read."""

    position: Position
    signed: bool


@dataclass(frozen=True)
class Reader:
    """
    The quantizer of one activation group.

    :param layers: operations of the weighted layers that read through it.
    :param positions: where it stands: at the tensor, or before each layer.
    :param signed: whether its integers are signed.
    :param bits: the fixed bit width, None where it is searched.
    :param stored: the stored tensor that it reads, if any. A group that reads a stored tensor at 8 bits has no
        position of its own.
    """

    layers: tuple[str, ...]
    positions: tuple[Position, ...]
    signed: bool
    bits: int | None
    stored: Position | None


@dataclass(frozen=True)
class Plan:
    """All activation quantizers, and the positions of NNCF's that were dropped."""

    stored: tuple[StoredTensor, ...]
    readers: tuple[Reader, ...]
    dropped: tuple[Position, ...]


def consumers_of(ops: Iterable[Op]) -> dict[Tensor, list[tuple[str, int]]]:
    """:return: tensor -> operations that read it, and at which port."""
    consumers: dict[Tensor, list[tuple[str, int]]] = {}
    for op in ops:
        for port, tensor in op.inputs.items():
            consumers.setdefault(tensor, []).append((op.name, port))
    return consumers


@dataclass
class _Graph:
    ops: Mapping[str, Op]
    quantized: Mapping[Position, bool]
    consumers: Mapping[Tensor, list[tuple[str, int]]] = field(init=False)

    def __post_init__(self) -> None:
        self.consumers = consumers_of(self.ops.values())

    def source(self, op: str, port: int) -> Position | None:
        """Where the value at an input is quantized: walk back to NNCF's quantizer, or to a quantized concatenation."""
        while True:
            before = Position("pre", op, port)
            if before in self.quantized:
                return before
            tensor = self.ops[op].inputs.get(port)
            if tensor is None:
                return None
            behind = Position("post", *tensor)
            if behind in self.quantized:
                return behind
            producer = self.ops.get(tensor[0])
            if producer is None:
                return None
            if producer.kind == CONCAT:
                covered = producer.inputs and all(self.source(producer.name, p) for p in producer.inputs)
                return behind if covered else None
            if producer.kind != TRANSPARENT or len(producer.inputs) != 1:
                return None
            op, port = producer.name, next(iter(producer.inputs))

    def readers(self, position: Position) -> Iterator[tuple[str, int]]:
        """Inputs that the value at a position reaches through transparent operations."""
        if position.side == "pre":
            pending = [(position.op, position.port)]
        else:
            pending = list(self.consumers.get((position.op, position.port), []))
        seen = set()
        while pending:
            op, port = pending.pop(0)
            if (op, port) in seen:
                continue
            seen.add((op, port))
            if self.ops[op].kind == TRANSPARENT:
                for tensor, consumers in self.consumers.items():
                    if tensor[0] == op:
                        pending.extend(consumers)
            else:
                yield op, port

    def signed(self, position: Position) -> bool:
        """Signed if NNCF's quantizer is, or, behind a concatenation, if any of its branches' is."""
        if position in self.quantized:
            return self.quantized[position]
        branches = (self.source(position.op, port) for port in self.ops[position.op].inputs)
        return any(self.signed(branch) for branch in branches if branch is not None)


def make_plan(
    ops: Sequence[Op], quantized: Mapping[Position, bool], fixed: Mapping[str, int], target: str = "openvino"
) -> Plan:
    """
    Decide the positions of all activation quantizers.

    :param ops: the model's operations in topological order.
    :param quantized: positions of NNCF's activation quantizers -> whether they are signed.
    :param fixed: weighted operation -> activation bit width, for layers that are not searched.
    :param target: ``openvino`` or ``onnxruntime``; they want opposite things before a residual addition.
    :return: the plan. Weighted operations whose input NNCF does not quantize appear in no reader.
    """
    graph = _Graph({op.name: op for op in ops}, quantized)
    sources: dict[Position, list[str]] = {}
    for op in ops:
        if op.kind == WEIGHTED and (source := graph.source(op.name, 0)) is not None:
            sources.setdefault(source, []).append(op.name)
    stored, readers = [], []
    for position, layers in sources.items():
        signed = graph.signed(position)
        groups: dict[int | None, list[str]] = {}
        for layer in layers:
            groups.setdefault(fixed.get(layer), []).append(layer)
        others = [reader for reader in graph.readers(position) if reader[1] != 0 or reader[0] not in layers]
        if len(groups) == 1 and not others:
            bits = next(iter(groups))
            readers.append(Reader(tuple(layers), (position,), signed, bits, None))
            continue
        stored.append(StoredTensor(position, signed))
        for bits, members in groups.items():
            before = () if bits == 8 else tuple(Position("pre", layer, 0) for layer in members)
            readers.append(Reader(tuple(members), before, signed, bits, position))
    dropped = []
    for position in quantized:
        if position in sources:
            continue
        if _wanted(graph, position, sources, target):
            stored.append(StoredTensor(position, quantized[position]))
        else:
            dropped.append(position)
    return Plan(tuple(stored), tuple(readers), tuple(dropped))


def before_additions(ops: Sequence[Op], quantized: Mapping[Position, bool]) -> tuple[Position, ...]:
    """
    Find the quantizers whose rounding OpenVINO's fused residual additions lose.

    :param ops: as for :func:`make_plan`.
    :param quantized: likewise.
    :return: positions between a weighted layer and an addition, which nothing else reads.
    """
    graph = _Graph({op.name: op for op in ops}, quantized)
    return tuple(position for position in quantized if _is_before_addition(graph, position))


def input_grids(ops: Sequence[Op], quantized: Mapping[Position, bool]) -> dict[str, tuple[Position, ...]]:
    """
    Find the quantizers whose grids weighted layers read.

    :param ops: as for :func:`make_plan`.
    :param quantized: likewise.
    :return: weighted operation -> positions of the quantizers that its input comes from: one, or behind a concatenation
        those of its branches. Layers with an input in floating point are left out.
    """
    graph = _Graph({op.name: op for op in ops}, quantized)
    grids = {op.name: _grids(graph, graph.source(op.name, 0)) for op in ops if op.kind == WEIGHTED}
    return {name: positions for name, positions in grids.items() if positions}


def reads_input(position: Position, ops: Sequence[Op]) -> bool:
    """:return: whether a quantizer reads the network's input itself."""
    by_name = {op.name: op for op in ops}
    producer: str | None = position.op
    if position.side == "pre":
        producer = by_name[position.op].inputs.get(position.port, (None, 0))[0]
    while producer is not None and by_name[producer].kind == TRANSPARENT and by_name[producer].inputs:
        producer = next(iter(by_name[producer].inputs.values()))[0]
    return producer is not None and not by_name[producer].inputs and by_name[producer].kind == OTHER


def _grids(graph: _Graph, source: Position | None) -> tuple[Position, ...]:
    if source is None or source in graph.quantized:
        return () if source is None else (source,)
    branches = graph.ops[source.op].inputs
    return tuple(position for port in branches for position in _grids(graph, graph.source(source.op, port)))


def _wanted(graph: _Graph, position: Position, sources: Mapping[Position, list[str]], target: str) -> bool:
    """Whether a quantizer of NNCF's that no weighted layer reads stays, at 8 bits."""
    if position.side == "pre" and position.port not in graph.ops[position.op].inputs:
        return False  # a constant of an unweighted operation
    readers = [(graph.ops[op], port) for op, port in graph.readers(position)]
    if not readers or any(op.kind == FLOAT for op, _ in readers):
        return False
    if all(op.kind == CONCAT and Position("post", op.name, 0) in sources for op, _ in readers):
        return False
    return not (target == "openvino" and _is_before_addition(graph, position))


def _is_before_addition(graph: _Graph, position: Position) -> bool:
    """Whether a quantizer stands between a weighted layer and additions, and nothing else reads it."""
    if position.side == "pre" and position.port not in graph.ops[position.op].inputs:
        return False
    readers = [graph.ops[op] for op, _ in graph.readers(position)]
    producer = position.op if position.side == "post" else graph.ops[position.op].inputs[position.port][0]
    while graph.ops[producer].kind == TRANSPARENT and graph.ops[producer].inputs:
        producer = next(iter(graph.ops[producer].inputs.values()))[0]
    return bool(readers) and all(op.kind == ADD for op in readers) and graph.ops[producer].linear_output
