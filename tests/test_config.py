"""The config: what is valid, what is refused and how, and that schema, reference and defaults agree."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nncf_mpq_plugin.config import Config, differences
from nncf_mpq_plugin.config_keys import SCHEMA
from nncf_mpq_plugin.errors import ConfigError, InputError, MPQError
from nncf_mpq_plugin.schema import REQUIRED, json_schema, nearest, reference

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.json"))
PRECISION = "compression.initializer.precision"


def minimal() -> dict[str, Any]:
    return {
        "model": "torchvision:resnet18",
        "input_info": {"sample_size": [1, 3, 224, 224]},
        "compression": {"initializer": {"precision": {"budgets": {"average_bits": {"weight": 3, "activation": 4}}}}},
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    """:return: a minimal config with the value at ``path`` set, or removed where it is ``...``."""
    config = minimal()
    *parents, last = path.split(".")
    target = config
    for name in parents:
        target = target.setdefault(name, {})
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return config


def test_a_minimal_config_gets_the_defaults() -> None:
    config = Config.from_json(minimal())
    assert config.bits == (2, 3, 4, 5, 6)
    assert config.fixed_bits == {"first": 8, "last": 8}
    assert (config.alpha, config.seed, config.target, config.data.source) == (None, 0, "openvino", "digits")
    assert config.budget.average_bits is not None
    assert (config.budget.average_bits.weight, config.budget.average_bits.activation) == (3, 4)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_is_valid(path: Path) -> None:
    Config.load(path)
    jsonschema.validate(json.loads(path.read_text()), json_schema(SCHEMA))


def test_there_are_configs_to_check() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {"digits_resnet", "imagenet_resnet18", "imagenet_resnet50", "imagenet_mobilenet_v2"}


def test_a_complete_config_is_its_own_source() -> None:
    config = Config.from_json(minimal())
    again = Config.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert differences(config.to_json(), again.to_json()) == []


def test_paths_are_relative_to_the_config(tmp_path: Path) -> None:
    value = minimal() | {"checkpoint": "weights.safetensors", "data": {"source": "imagefolder:images"}}
    (tmp_path / "config.json").write_text(json.dumps(value))
    config = Config.load(tmp_path / "config.json")
    assert config.checkpoint == str(tmp_path / "weights.safetensors")
    assert config.data.source == f"imagefolder:{tmp_path / 'images'}"


REFUSED = {
    "misspelt key": (f"{PRECISION}.aplha", 1, [f"{PRECISION}: unknown key 'aplha'", "'alpha'"]),
    "misspelt top-level key": ("modle", "x", ["unknown key 'modle'", "'model'"]),
    "key at the wrong place": ("alpha", 1, ["unknown key 'alpha'", f"belongs at '{PRECISION}.alpha'"]),
    "misspelt and at the wrong place": ("fixed_bit", {}, ["unknown key 'fixed_bit'", f"'{PRECISION}.fixed_bits'"]),
    "key nobody knows": ("zzz", 1, ["unknown key 'zzz'", "known here are checkpoint, compression"]),
    "missing model": ("model", ..., ["the key 'model' is missing"]),
    "missing section": ("input_info", ..., ["the key 'input_info' is missing"]),
    "number as text": (f"{PRECISION}.alpha", "2", [f"{PRECISION}.alpha: expected a number", '"2"', "Write 2"]),
    "fraction for an integer": ("data.batch_size", 64.5, ["data.batch_size: expected an integer, got 64.5"]),
    "boolean for an integer": ("data.batch_size", True, ["expected an integer, got true"]),
    "word for a boolean": ("uniform_baseline", "no", ['expected true or false, got "no"', "Write false"]),
    "number for a list": (f"{PRECISION}.bits", 4, [f"{PRECISION}.bits: expected a list, got 4", "Write [4]"]),
    "list for an object": ("data", [], ["data: expected an object"]),
    "null": ("model", None, ["model: expected a string, got null"]),
    "impossible bit width": (f"{PRECISION}.bits", [2, 9], [f"{PRECISION}.bits[1]: 9 is not one of", "nearest is 8"]),
    "bit width 1": (f"{PRECISION}.fixed_bits", {"first": 1}, ["fixed_bits.first: 1 is not one of", "nearest is 2"]),
    "no path": ("checkpoint", "a\0b", ["my.json: checkpoint:", "is no path"]),
    "home of nobody": ("data.source", "imagefolder:~nobody-here/x", ["my.json: data.source:", "is no path"]),
    "argument that is no JSON": ("model_arguments", {"width": float("inf")}, ["model_arguments: cannot be saved"]),
    "bit width twice": (f"{PRECISION}.bits", [4, 4], ["4 appears twice"]),
    "no bit widths": (f"{PRECISION}.bits", [], ["at least 1"]),
    "misspelt choice": ("deploy.target", "openvio", ['"openvio" is not one of', 'Did you mean "openvino"?']),
    "unknown method": (f"{PRECISION}.type", "hawq", ['"hawq" is not one of "learned_importance"']),
    "too small": ("data.batch_size", 0, ["data.batch_size: must be at least 1, got 0"]),
    "not positive": (f"{PRECISION}.joint_training.learning_rate", 0, ["must be greater than 0, got 0"]),
    "too large": (f"{PRECISION}.joint_training.data_fraction", 1.5, ["must be at most 1, got 1.5"]),
    "infinite": (f"{PRECISION}.alpha", float("inf"), ["finite number"]),
    "huge": (f"{PRECISION}.alpha", 10**400, ["finite number"]),
    "no budget": (f"{PRECISION}.budgets", {}, [f"{PRECISION}.budgets", "at least one budget"]),
    "negative budget": (f"{PRECISION}.budgets", {"bitops": -1}, ["budgets.bitops: must be greater than 0, got -1"]),
    "empty average": (f"{PRECISION}.budgets", {"average_bits": {}}, ["average_bits", "'weight', 'activation'"]),
}


@pytest.mark.parametrize(("path", "value", "parts"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_named_with_place_value_and_remedy(path: str, value: Any, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        Config.from_json(changed(path, value), "my.json")
    message = str(caught.value)
    assert message.startswith("my.json")
    for part in parts:
        assert part in message
    assert caught.value.exit_code == 2


def test_all_problems_are_reported_at_once() -> None:
    value = changed("data.batch_size", 0) | {"modle": "x"}
    with pytest.raises(ConfigError, match="2 problems") as caught:
        Config.from_json(value)
    assert "batch_size" in str(caught.value)
    assert "modle" in str(caught.value)


def test_a_wrong_item_is_reported_once_and_not_as_a_repetition() -> None:
    with pytest.raises(ConfigError, match="2 problems") as caught:
        Config.from_json(changed(f"{PRECISION}.bits", ["2", "4"]))
    assert "twice" not in str(caught.value)


def test_the_home_directory_is_understood() -> None:
    config = Config.from_json(minimal() | {"checkpoint": "~/weights.safetensors"}, folder="/somewhere")
    assert config.checkpoint == str(Path.home() / "weights.safetensors")


@pytest.mark.parametrize("value", [[], "text", 3, None], ids=repr)
def test_a_file_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="expected an object"):
        Config.from_json(value)


def test_differences_name_the_key_and_both_values() -> None:
    old, new = Config.from_json(minimal()), Config.from_json(changed(f"{PRECISION}.alpha", 1))
    assert differences(old.to_json(), new.to_json()) == [f"{PRECISION}.alpha: null -> 1.0"]


def test_the_schema_is_valid_and_refuses_unknown_keys() -> None:
    schema = json_schema(SCHEMA)
    jsonschema.Draft202012Validator.check_schema(schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(minimal() | {"modle": 1}, schema)


def test_the_reference_is_the_generated_one_and_names_every_key() -> None:
    text = (ROOT / "docs" / "config.md").read_text()
    assert reference(SCHEMA) in text, "run: make docs"

    def names(key: Any) -> list[str]:
        return list(key.keys) + [name for inner in key.keys.values() for name in names(inner)]

    for name in names(SCHEMA):
        assert f"| `{name}` |" in text


@pytest.mark.parametrize(
    ("section", "config_class"),
    [
        ("joint_training", "nncf_mpq_plugin.joint.JointConfig"),
        ("fine_tuning", "nncf_mpq_plugin.finetune.FinetuneConfig"),
        ("training", "nncf_mpq_plugin.floating.FloatConfig"),
    ],
    ids=["joint", "finetune", "float"],
)
def test_training_sections_have_the_names_and_defaults_of_their_dataclasses(section: str, config_class: str) -> None:
    import importlib

    module, name = config_class.rsplit(".", 1)
    fields = {f.name: f.default for f in dataclasses.fields(getattr(importlib.import_module(module), name))}
    del fields["seed"]  # one seed for the whole run
    precision = SCHEMA.keys["compression"].keys["initializer"].keys["precision"]
    key = SCHEMA.keys[section] if section in SCHEMA.keys else precision.keys[section]
    assert {name: inner.default for name, inner in key.keys.items()} == fields


def test_nearest_finds_what_was_meant_or_nothing() -> None:
    assert nearest("Learning-Rate", ["learning_rate", "alpha"]) == "learning_rate"
    assert nearest("qqqq", ["learning_rate", "alpha"]) is None


# ---------------------------------------------------------------------------------------------------------- mutations
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """:return: a complete config with a few values replaced, keys renamed, or entries removed."""
    value = copy.deepcopy(Config.from_json(minimal()).to_json())
    for _ in range(draw(st.integers(1, 3))):
        target: Any = value
        while isinstance(target, dict) and target:
            name = draw(st.sampled_from(sorted(target)))
            if not isinstance(target[name], dict) or not target[name] or draw(st.integers(0, 3)) == 0:
                action = draw(st.sampled_from(["replace", "remove", "rename"]))
                old = target.pop(name)
                if action == "replace":
                    target[name] = draw(ANYTHING)
                elif action == "rename":
                    target[name + draw(st.text(max_size=2))] = old
                break
            target = target[name]
    return value


def _parse(value: Any) -> None:
    try:
        config = Config.from_json(value)
    except MPQError:
        return
    assert Config.from_json(config.to_json()) == config


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_mutated_configs_parse_or_raise_our_errors(value: Any) -> None:
    _parse(value)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(mutated() | ANYTHING)
def test_ten_thousand_mutated_configs_parse_or_raise_our_errors(value: Any) -> None:
    _parse(value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_the_json_schema_accepts_what_the_parser_accepts(value: Any) -> None:
    try:
        Config.from_json(value)
    except MPQError:
        return
    jsonschema.validate(value, json_schema(SCHEMA))


def test_every_key_has_a_sentence_and_required_keys_are_few() -> None:
    def walk(key: Any, place: str) -> None:
        for name, inner in key.keys.items():
            assert inner.doc.rstrip().endswith("."), f"{place}{name}"
            walk(inner, f"{place}{name}.")

    walk(SCHEMA, "")
    assert SCHEMA.keys["model"].default is REQUIRED
