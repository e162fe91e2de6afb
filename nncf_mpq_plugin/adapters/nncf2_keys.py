"""
The keys of ``"precision": {"type": "learned_importance", ...}`` in NNCF 2.19's configs.

They are those of this package's own config (docs/config.md), so that one ``compression`` entry serves both, and three
that users of HAWQ know: ``compression_ratio``, ``dump_init_precision_data`` and ``bitwidth_assignment_mode``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nncf_mpq_plugin.config_keys import SCHEMA
from nncf_mpq_plugin.errors import ConfigError
from nncf_mpq_plugin.schema import Key, check

HAWQ_COMPRESSION_RATIO = 1.5  # HAWQ's default, for a config that sets neither this key nor budgets
STRICT, LIBERAL = "strict", "liberal"
_OTHERS = {
    "hawq": ("num_data_points", "iter_number", "tolerance", "traces_per_layer_path"),
    "autoq": ("eval_subset_ratio", "warmup_iter_number"),
    "manual": ("bitwidth_per_scope",),
}
_PRECISION = SCHEMA.keys["compression"].keys["initializer"].keys["precision"]
_KEYS = Key(
    "object",
    _PRECISION.doc,
    keys={
        **_PRECISION.keys,
        "bits": replace(_PRECISION.keys["bits"], default=None, nullable=True),
        "compression_ratio": Key(
            "number",
            "Complexity of uniform INT8 over that of the mixed model, at least; FLOPs x max(weight, activation bits).",
            default=None,
            nullable=True,
            above=0,
        ),
        "dump_init_precision_data": Key("boolean", "Write tables, curves and plots to log_dir.", default=False),
        "bitwidth_assignment_mode": Key(
            "string",
            "strict: quantizers that feed one operation, its weights included, share one bit width.",
            default=LIBERAL,
            choices=(STRICT, LIBERAL),
        ),
    },
)


def schema_properties() -> dict[str, Any]:
    """
    :return: JSON Schema of the keys. Only the types of values are checked there: NNCF reports violations as "not valid
        under any of the given schemas", :func:`checked` names the key, the value and the nearest valid choice.
    """
    types: dict[str, list[str]] = {"map": ["object"], "free": ["object"], "list": ["array"]}
    return {
        name: {"description": key.doc, "type": [*types.get(key.kind, [key.kind]), "null"]}
        for name, key in _KEYS.keys.items()
    }


def checked(precision: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param precision: the config's entry.
    :return: every key, defaults filled in. Where no budget is set, ``compression_ratio`` is HAWQ's default.
    :raises ConfigError: listing every problem with the nearest valid choice.
    """
    for other, keys in _OTHERS.items():
        for key in keys:
            if key in precision:
                msg = f"initializer.precision: {key!r} belongs to the type {other!r}; 'learned_importance' has none."
                raise ConfigError(msg)
    values: dict[str, Any] = check(dict(precision), _KEYS, "initializer.precision")
    values["budgets"] = _given(values["budgets"])
    if not values["budgets"] and values["compression_ratio"] is None:
        values["compression_ratio"] = HAWQ_COMPRESSION_RATIO
    return values


def _given(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _given(item) if isinstance(item, Mapping) else item for key, item in value.items() if item is not None}
