"""
The values that one stage hands to the next.

Each is a frozen dataclass keyed by layer name and bit width (never by position), with ``to_json`` and ``from_json``
and a ``schema_version``, so that it can be saved, read by a person and loaded again.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.files import written_atomically

SCHEMA_VERSION = 1
SUPPORTED_BITS = (2, 3, 4, 5, 6, 7, 8, 32)
MOST_DIGITS = 400  # of an integer in a file; Python refuses to print one of more than 4300


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write ``text`` to a temporary file beside ``path`` and rename it, so that the file appears only whole."""
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Save a JSON-serialisable value; NaN and infinities are refused."""
    write_text_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """
    Read a JSON file.

    :raises InputError: if the file is missing, unreadable, not JSON, names a key twice, or holds NaN, an infinity or a
        number that is too large to be one.
    """
    path = Path(path)

    def refuse(constant: str) -> NoReturn:
        msg = f"{path}: {constant} is not a valid number. Write a finite number in its place."
        raise InputError(msg)

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    def integer(text: str) -> int:
        return int(text) if len(text) <= MOST_DIGITS else refuse(f"{text[:10]}... ({len(text)} digits)")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            msg = f"{path}: the key {twice!r} appears twice in one object. Keep one of them."
            raise InputError(msg)
        return result

    try:
        return json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=refuse,
            parse_float=number,
            parse_int=integer,
            object_pairs_hook=unique,
        )
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror or error}). Check the path and its permissions."
        raise InputError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})."
        raise InputError(msg) from error
    except json.JSONDecodeError as error:
        msg = f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})."
        raise InputError(msg) from error
    except RecursionError as error:
        msg = f"{path}: nested too deeply to be read."
        raise InputError(msg) from error


class _Reader:
    """Typed access to a JSON object that knows its place in the file, for error messages."""

    def __init__(self, value: Any, place: str):
        if not isinstance(value, dict):
            msg = f"{place}: expected a JSON object, got {_describe(value)}."
            raise InputError(msg)
        self.value = value
        self.place = place

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        value: Any
        if key not in self.value:
            if default is ...:
                msg = f"{self.place}: the key {key!r} is missing."
                raise InputError(msg)
            return default
        value = self.value[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                value = float(value)
            except OverflowError:
                value = math.inf
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            msg = f"{self.place}.{key}: expected {_KINDS[kind]}, got {_describe(value)}."
            raise InputError(msg)
        if isinstance(value, float) and not math.isfinite(value):
            msg = f"{self.place}.{key}: expected a finite number, got {value}."
            raise InputError(msg)
        return value

    def count(self, key: str) -> int:
        value: int = self.get(key, int)
        if not 0 < value < 2**63:
            msg = f"{self.place}.{key}: expected a positive integer below 2^63, got {_describe(value)}."
            raise InputError(msg)
        return value

    def refuse_misspelt(self, known: Sequence[str]) -> None:
        """Keys of other programs are left alone; one that nearly is ``known`` would be ignored by mistake."""
        for key in self.value:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.8) if key not in known else []
            if near:
                msg = f"{self.place}: unknown key {key!r}; did you mean {near[0]!r}?"
                raise InputError(msg)

    def bits(self, key: str) -> int:
        value: int = self.get(key, int)
        check_bits(value, f"{self.place}.{key}")
        return value


_KINDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "true or false",
}


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{text[:40]}{'...' if len(text) > 40 else ''} ({type(value).__name__})"


def check_bits(bits: int, place: str) -> None:
    """:raises InputError: if ``bits`` is not a bit width the plugin knows (2..8, or 32 for floating point)."""
    if bits not in SUPPORTED_BITS:
        msg = f"{place}: unknown bit width {bits}; known are {', '.join(map(str, SUPPORTED_BITS))}."
        raise InputError(msg)


def _check_schema(reader: _Reader) -> None:
    version = reader.get("schema_version", int)
    if version != SCHEMA_VERSION:
        msg = (
            f"{reader.place}.schema_version: {version} is not supported, this version reads {SCHEMA_VERSION}. "
            "Make the file anew, or use the plugin version that wrote it."
        )
        raise InputError(msg)


@dataclass(frozen=True)
class LayerCost:
    """
    What a weighted layer costs whatever its bit widths are.

    :param name: module path, e.g. ``layer1.0.conv1``.
    :param macs: multiply-accumulate operations for one sample.
    :param weights: number of weight elements (biases are not quantized and not counted).
    :param activation_group: layers with the same group read one tensor through one quantizer and so share one
        activation bit width. A layer alone has its own name here.
    """

    name: str
    macs: int
    weights: int
    activation_group: str


@dataclass(frozen=True)
class LayerBits:
    """Weight and activation bit width of one layer; 32 stands for floating point."""

    weight: int
    activation: int


@dataclass(frozen=True)
class FixedLayer:
    """A layer whose bit widths are not searched."""

    cost: LayerCost
    bits: LayerBits


@dataclass(frozen=True)
class LayerImportance:
    """
    Importance of one searchable layer: what its tensors lose at each bit width (lower is better).

    :param cost: the layer's cost.
    :param weight: bit width -> importance.
    :param activation: bit width -> importance. For layers of one activation group the group's importance is the sum
        over its layers, so that a table may give each layer its own share.
    """

    cost: LayerCost
    weight: Mapping[int, float]
    activation: Mapping[int, float]


@dataclass(frozen=True)
class ImportanceTable:
    """
    Importance of every searchable layer at every candidate bit width, with the layers that stay fixed.

    :param bits: candidate bit widths, ascending.
    :param layers: searchable layers in the model's order.
    :param fixed_layers: layers at fixed bit widths (first and last, as a rule).
    :param unit: what the numbers are: ``scale`` (LSQ step size, the paper's indicator) or ``loss``.
    :param model: what was measured, for people.
    :param source: where the numbers come from, for people.
    """

    bits: tuple[int, ...]
    layers: tuple[LayerImportance, ...]
    fixed_layers: tuple[FixedLayer, ...] = ()
    unit: str = "scale"
    model: str = ""
    source: str = ""

    @property
    def default_alpha(self) -> float:
        """
        How much weight importance counts: 2 for learned scales (published), 0.25 for units of loss, since fine-tuning
        makes up for part of what rounded weights lose, and for less of what rounded activations lose.
        """
        return 2.0 if self.unit == "scale" else 0.25

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object; ``from_json`` gives back an equal table."""

        def cost(layer: LayerCost) -> dict[str, Any]:
            group = {} if layer.activation_group == layer.name else {"activation_group": layer.activation_group}
            return {"name": layer.name, "macs": layer.macs, "weights": layer.weights, **group}

        def by_bits(values: Mapping[int, float]) -> dict[str, float]:
            return {str(bits): values[bits] for bits in sorted(values)}

        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "source": self.source,
            "unit": self.unit,
            "bits": list(self.bits),
            "layers": [
                {
                    **cost(layer.cost),
                    "importance": {"weight": by_bits(layer.weight), "activation": by_bits(layer.activation)},
                }
                for layer in self.layers
            ],
            "fixed_layers": [
                {**cost(layer.cost), "weight_bits": layer.bits.weight, "activation_bits": layer.bits.activation}
                for layer in self.fixed_layers
            ],
        }

    @classmethod
    def from_json(cls, value: Any, place: str = "importance table") -> ImportanceTable:
        """
        Read and check a table.

        :param value: parsed JSON.
        :param place: how to call the value in messages (a file name, as a rule).
        :raises InputError: with the place in the file, for a missing or misnamed key, a NaN, negative or missing
            importance, an unknown bit width, a repeated layer, an empty table or another schema version.
        """
        reader = _Reader(value, place)
        _check_schema(reader)
        bits = reader.get("bits", list)
        for index, bit in enumerate(bits):
            if not isinstance(bit, int) or isinstance(bit, bool):
                msg = f"{place}.bits[{index}]: expected an integer, got {_describe(bit)}."
                raise InputError(msg)
            check_bits(bit, f"{place}.bits[{index}]")
        if not bits or len(set(bits)) != len(bits):
            msg = f"{place}.bits: expected at least one bit width and none twice, got {bits}."
            raise InputError(msg)
        bits = tuple(sorted(bits))

        reader.refuse_misspelt(_TABLE_KEYS)

        def read_cost(entry: _Reader) -> LayerCost:
            entry.refuse_misspelt(_LAYER_KEYS)
            name = entry.get("name", str)
            return LayerCost(
                name, entry.count("macs"), entry.count("weights"), entry.get("activation_group", str, name)
            )

        def read_importance(entry: _Reader, tensor: str) -> dict[int, float]:
            numbers = _Reader(entry.get(tensor, dict), f"{entry.place}.{tensor}")
            unknown = sorted(set(numbers.value) - {str(bit) for bit in bits})
            if unknown:
                msg = f"{numbers.place}: bit width {unknown[0]!r} is not among the table's bits {list(bits)}."
                raise InputError(msg)
            result = {}
            for bit in bits:
                number = numbers.get(str(bit), float)
                if number < 0:
                    msg = f"{numbers.place}.{bit}: importance must not be negative, got {number}."
                    raise InputError(msg)
                if number > LARGEST_IMPORTANCE:
                    msg = f"{numbers.place}.{bit}: importance must be at most {LARGEST_IMPORTANCE:g}, got {number}."
                    raise InputError(msg)
                result[bit] = number
            return result

        layers, fixed_layers = [], []
        for index, entry in enumerate(reader.get("layers", list)):
            layer = _Reader(entry, f"{place}.layers[{index}]")
            cost = read_cost(layer)
            importance = _Reader(layer.get("importance", dict), f"{layer.place} ({cost.name}).importance")
            importance.refuse_misspelt(("weight", "activation"))
            layers.append(
                LayerImportance(cost, read_importance(importance, "weight"), read_importance(importance, "activation"))
            )
        if not layers:
            msg = f"{place}.layers: the table is empty; at least one searchable layer is needed."
            raise InputError(msg)
        for index, entry in enumerate(reader.get("fixed_layers", list, [])):
            layer = _Reader(entry, f"{place}.fixed_layers[{index}]")
            fixed_bits = LayerBits(layer.bits("weight_bits"), layer.bits("activation_bits"))
            fixed_layers.append(FixedLayer(read_cost(layer), fixed_bits))
        seen: set[str] = set()
        for cost in [layer.cost for layer in layers] + [layer.cost for layer in fixed_layers]:
            if cost.name in seen:
                msg = f"{place}: the layer {cost.name!r} appears twice."
                raise InputError(msg)
            seen.add(cost.name)
        return cls(
            bits,
            tuple(layers),
            tuple(fixed_layers),
            reader.get("unit", str, "scale"),
            reader.get("model", str, ""),
            reader.get("source", str, ""),
        )

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; the file appears only whole."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> ImportanceTable:
        """:raises InputError: if the file cannot be read or is not a valid table."""
        return cls.from_json(read_json(path), str(path))


_TABLE_KEYS = ("schema_version", "unit", "model", "source", "bits", "layers", "fixed_layers")
LARGEST_IMPORTANCE = 1e100  # sums over layers stay finite
_LAYER_KEYS = ("name", "macs", "weights", "activation_group", "importance", "weight_bits", "activation_bits")


@dataclass(frozen=True)
class AverageBits:
    """Bit widths of a uniform reference policy; either may be missing."""

    weight: float | None = None
    activation: float | None = None


@dataclass(frozen=True)
class Budget:
    """
    What a policy may cost; at least one limit is set and all that are set hold together.

    :param bitops: BitOps (MACs x weight bits x activation bits) of the searchable layers.
    :param average_bits: with both numbers, the BitOps of that uniform policy over the searchable layers. With
        ``weight`` alone, the average bits of their weights; with ``activation`` alone, the average activation bits
        weighted by MACs.
    :param bitops_ratio: BitOps over those of uniform 8 bits, searchable layers.
    :param compression_ratio: 32 bits over the policy's average weight bits, all layers, fixed ones included.
    :param model_size_bytes: bytes of all weights, fixed layers included.
    :param latency_ratio: time over that of uniform 8 bits, by a measured table.
    """

    bitops: float | None = None
    average_bits: AverageBits | None = None
    bitops_ratio: float | None = None
    compression_ratio: float | None = None
    model_size_bytes: float | None = None
    latency_ratio: float | None = None

    def to_json(self) -> dict[str, Any]:
        """:return: the limits that are set."""
        result: dict[str, Any] = {}
        for name in BUDGETS:
            value = getattr(self, name)
            if value is not None:
                result[name] = value
        if self.average_bits is not None:
            pair = {"weight": self.average_bits.weight, "activation": self.average_bits.activation}
            result["average_bits"] = {tensor: bits for tensor, bits in pair.items() if bits is not None}
        return result

    @classmethod
    def from_json(cls, value: Any, place: str = "budgets") -> Budget:
        """
        Read and check the limits.

        :raises InputError: for an unknown name, a wrong type, a limit that is not positive, or no limit at all.
        """
        reader = _Reader(value, place)
        known = [*BUDGETS, "average_bits"]
        for key in reader.value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                msg = f"{place}: unknown budget {key!r}{hint} Known are {', '.join(known)}."
                raise InputError(msg)

        def positive(source: _Reader, key: str) -> float | None:
            if key not in source.value:
                return None
            number: float = source.get(key, float)
            if number <= 0:
                msg = f"{source.place}.{key}: must be above 0, got {number}."
                raise InputError(msg)
            return number

        average = None
        if "average_bits" in reader.value:
            pair = _Reader(reader.get("average_bits", dict), f"{place}.average_bits")
            unknown = sorted(set(pair.value) - {"weight", "activation"})
            if unknown or not pair.value:
                what = f"unknown key {unknown[0]!r}" if unknown else "empty"
                msg = f"{pair.place}: {what}; it takes 'weight', 'activation' or both."
                raise InputError(msg)
            average = AverageBits(positive(pair, "weight"), positive(pair, "activation"))
        limits = {key: positive(reader, key) for key in BUDGETS}
        if average is None and all(limit is None for limit in limits.values()):
            msg = f"{place}: at least one budget is needed: {', '.join(known)}."
            raise InputError(msg)
        return cls(average_bits=average, **limits)


BUDGETS = ("bitops", "bitops_ratio", "compression_ratio", "model_size_bytes", "latency_ratio")


@dataclass(frozen=True)
class Policy:
    """
    Bit widths of every layer, searchable and fixed.

    :param layers: searchable layer name -> bit widths.
    :param fixed_layers: fixed layer name -> bit widths.
    :param summary: what the search reports beside the bits (status, objective, budgets asked and reached); free-form
        and JSON-serialisable.
    """

    layers: Mapping[str, LayerBits]
    fixed_layers: Mapping[str, LayerBits] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def all_layers(self) -> dict[str, LayerBits]:
        """Bit widths of every layer by name."""
        return {**self.layers, **self.fixed_layers}

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object; ``from_json`` gives back an equal policy."""

        def by_name(layers: Mapping[str, LayerBits]) -> dict[str, Any]:
            return {name: {"weight": bits.weight, "activation": bits.activation} for name, bits in layers.items()}

        return {
            "schema_version": SCHEMA_VERSION,
            **self.summary,
            "policy": by_name(self.layers),
            "fixed_layers": by_name(self.fixed_layers),
        }

    @classmethod
    def from_json(cls, value: Any, place: str = "policy") -> Policy:
        """
        Read and check a policy; it may have been edited by hand.

        :raises InputError: with the place in the file, for a missing key, an unknown bit width or another schema
            version.
        """
        reader = _Reader(value, place)
        _check_schema(reader)

        def by_name(key: str, default: Any) -> dict[str, LayerBits]:
            layers = _Reader(reader.get(key, dict, default), f"{place}.{key}")
            result = {}
            for name in layers.value:
                entry = _Reader(layers.value[name], f"{layers.place}[{name!r}]")
                unknown = sorted(set(entry.value) - {"weight", "activation"})
                if unknown:
                    msg = f"{entry.place}: unknown key {unknown[0]!r}; known are 'weight' and 'activation'."
                    raise InputError(msg)
                result[name] = LayerBits(entry.bits("weight"), entry.bits("activation"))
            return result

        layers = by_name("policy", ...)
        if not layers:
            msg = f"{place}.policy: the policy names no layer."
            raise InputError(msg)
        fixed_layers = by_name("fixed_layers", {})
        both = sorted(set(layers) & set(fixed_layers))
        if both:
            msg = f"{place}: the layer {both[0]!r} is both searched and fixed."
            raise InputError(msg)
        known = {"schema_version", "policy", "fixed_layers"}
        summary = {key: item for key, item in reader.value.items() if key not in known}
        return cls(layers, fixed_layers, summary)

    def save(self, path: str | Path) -> None:
        """Write the policy as JSON; the file appears only whole."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """:raises InputError: if the file cannot be read or is not a valid policy."""
        return cls.from_json(read_json(path), str(path))
