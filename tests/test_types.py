"""Reading JSON files: what is refused in any file, and in an importance table."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.types import ImportanceTable, read_json, write_json

LAYER = {
    "name": "a",
    "macs": 10,
    "weights": 5,
    "activation_group": "g",
    "importance": {"weight": {"2": 0.2, "4": 0.1}, "activation": {"2": 0.3, "4": 0.1}},
}
TABLE: dict[str, Any] = {
    "schema_version": 1,
    "bits": [2, 4],
    "layers": [LAYER, {**LAYER, "name": "b"}],
    "fixed_layers": [{"name": "c", "macs": 1, "weights": 1, "weight_bits": 8, "activation_bits": 8}],
}

REFUSED_FILES = {
    "two values for a key": ('{"a": {"b": 1, "b": 2}}', "the key 'b' appears twice"),
    "NaN": ('{"a": NaN}', "NaN is not a valid number"),
    "too large for a float": ('{"a": 1e999}', "1e999 is not a valid number"),
    "too many digits": (f"[{'1' * 5000}]", r"1111111111\.\.\. \(5000 digits\)"),
    "nested deeply": ("[" * 100_000, "nested too deeply"),
    "cut off": ('{"a": 1,', r"line 1, column 9: not valid JSON"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED_FILES.values(), ids=REFUSED_FILES.keys())
def test_a_file_that_cannot_be_meant_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=rf"x\.json.*{message}"):
        read_json(tmp_path / "x.json")


def test_a_value_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_table_is_read_back_equal() -> None:
    table = ImportanceTable.from_json(TABLE)
    assert ImportanceTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert [layer.cost.activation_group for layer in table.layers] == ["g", "g"]


def rename(old: str, new: str, *path: Any) -> Callable[[Any], None]:
    def change(table: Any) -> None:
        for step in path:
            table = table[step]
        table[new] = table.pop(old)

    return change


REFUSED_TABLES: dict[str, tuple[Callable[[Any], None], str]] = {
    "misspelt optional key": (rename("fixed_layers", "fixed_layer"), "did you mean 'fixed_layers'"),
    "misspelt group": (
        rename("activation_group", "activation_goup", "layers", 1),
        r"layers\[1\]: unknown key 'activation_goup'; did you mean 'activation_group'",
    ),
    "misspelt tensor": (
        lambda table: table["layers"][0]["importance"].update(weights={}),
        "unknown key 'weights'; did you mean 'weight'",
    ),
    "no MACs": (lambda table: table["layers"][0].update(macs=0), "positive integer below 2.63, got 0"),
    "impossible MACs": (lambda table: table["layers"][0].update(macs=10**400), "positive integer below 2.63, got 1000"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED_TABLES.values(), ids=REFUSED_TABLES.keys())
def test_a_table_with_a_mistake_is_refused(change: Callable[[Any], None], message: str) -> None:
    table = copy.deepcopy(TABLE)
    change(table)
    with pytest.raises(InputError, match=message):
        ImportanceTable.from_json(table)


def test_keys_of_other_programs_are_left_alone() -> None:
    table = copy.deepcopy(TABLE) | {"comment": "measured twice"}
    table["layers"][0]["kind"] = "depthwise"
    assert ImportanceTable.from_json(table) == ImportanceTable.from_json(TABLE)


def test_an_importance_beyond_what_sums_can_hold_is_refused():
    value = copy.deepcopy(TABLE)
    value["layers"][0]["importance"]["weight"]["2"] = 1e200
    with pytest.raises(InputError, match=r"at most 1e\+100, got 1e\+200"):
        ImportanceTable.from_json(value)
