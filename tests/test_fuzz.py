"""
Every reader of files, on mutated files: an error of ours or success, never another exception.

Quick runs take some hundred cases; the slow ones 10,000 in all (:data:`SHARES`).
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import tiny
from safetensors.torch import save_file
from test_types import TABLE

from nncf_mpq_plugin.allocation import search
from nncf_mpq_plugin.checkpoint import load_state, restore_tensors, save_state
from nncf_mpq_plugin.config import Config
from nncf_mpq_plugin.costs import LatencyTable
from nncf_mpq_plugin.errors import MPQError
from nncf_mpq_plugin.models import load_weights, read_state
from nncf_mpq_plugin.networks import digits_resnet
from nncf_mpq_plugin.pipeline import STAGES
from nncf_mpq_plugin.runfolder import RunFolder
from nncf_mpq_plugin.types import AverageBits, Budget, ImportanceTable, Policy

POLICY = {
    "schema_version": 1,
    "status": "optimal",
    "policy": {"a": {"weight": 2, "activation": 4}, "b": {"weight": 4, "activation": 4}},
    "fixed_layers": {"c": {"weight": 8, "activation": 8}},
}
LATENCY = {"schema_version": 1, "device": "cpu", "nanoseconds": {"a": {"8x8": 10}, "b": {"8x8": 20, "32x32": 70}}}

SHARES = {"config": 4000, "table": 1500, "policy": 1000, "latency": 1000, "state": 1000, "weights": 1000, "folder": 500}
QUICK = 20  # a quick test takes one case in so many


# ----------------------------------------------------------------------------------------------------------- mutations
STRANGE = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *("", " ", "\0", "a\nb", "é", "\ud800", "NaN", "1", "x" * 5000, "/", "..", "~", "{re}(", "*", "digits", "a:b"),
    *([], {}, [[]], [None], {"": None}, {"weight": None}),
)
# copies, since later mutations change what was put in
VALUES = (st.sampled_from(STRANGE) | st.integers() | st.floats() | st.text(max_size=6)).map(copy.deepcopy)


@st.composite
def mutated(draw: st.DrawFn, source: Any) -> Any:
    """:return: a JSON value with one to four places replaced, removed, renamed, repeated or swapped with another's."""
    value = copy.deepcopy(source)
    for _ in range(draw(st.integers(1, 4))):
        places = [(holder, key) for holder in containers(value) for key in keys(holder)]
        if not places:
            return draw(VALUES)
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename", "swap", "extend"]))
        if action == "replace":
            holder[key] = draw(VALUES)
        elif action == "remove":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[key + draw(st.sampled_from(["s", " ", "_", "\0", "é"]))] = holder.pop(key)
        elif action == "swap":
            other, name = draw(st.sampled_from(places))
            if keys(holder).count(key) and keys(other).count(name):
                holder[key] = copy.deepcopy(other[name])
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[draw(st.text(max_size=4))] = draw(VALUES)
    return value


def containers(value: Any) -> list[Any]:
    """:return: every object and list in a JSON value."""
    if not isinstance(value, dict | list):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(found for item in inner for found in containers(item))]


def keys(holder: Any) -> list[Any]:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))


def as_text(draw: st.DrawFn, value: Any) -> bytes:
    """:return: the bytes of a JSON file, sometimes damaged; NaN and lone surrogates are written as Python does."""
    content = json.dumps(value).encode()
    if draw(st.integers(0, 3)) == 0:
        content = damaged(draw, content)
    return content


def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """:return: bytes with some changed, put in, left out, or the end cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        if not changed:
            break
        place = draw(st.integers(0, len(changed) - 1))
        action = draw(st.sampled_from(["change", "insert", "drop", "cut"]))
        if action == "change":
            changed[place] = draw(st.integers(0, 255))
        elif action == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=4))
        elif action == "drop":
            del changed[place]
        else:
            del changed[place:]
    return bytes(changed)


@st.composite
def files(draw: st.DrawFn, source: Any) -> bytes:
    return as_text(draw, draw(mutated(source)))


@st.composite
def binaries(draw: st.DrawFn, content: bytes) -> bytes:
    """Safetensors: the first bytes are the header's length, then the header; most damage goes there."""
    if draw(st.booleans()):
        return damaged(draw, content)
    cut = min(len(content), draw(st.sampled_from([8, 64, 400])))
    return damaged(draw, content[:cut]) + content[cut:]


def fuzz(name: str, strategy: Any, check: Callable[[Path, Any], None]) -> Callable[..., None]:
    """:return: a test that draws cases and runs ``check``, once quick and once slow."""

    @pytest.mark.parametrize("cases", [SHARES[name] // QUICK, pytest.param(SHARES[name], marks=pytest.mark.slow)])
    def test(cases: int, tmp_path: Path) -> None:
        tried = []

        @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(strategy)
        def run(case: Any) -> None:
            tried.append(1)
            try:
                check(tmp_path, case)
            except MPQError as error:
                assert str(error)  # noqa: PT017

        run()
        assert len(tried) >= cases

    return test


# ------------------------------------------------------------------------------------------------------------- readers
def read_config(folder: Path, content: bytes) -> None:
    (folder / "c.json").write_bytes(content)
    config = Config.load(folder / "c.json")
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def read_table(folder: Path, content: bytes) -> None:
    (folder / "t.json").write_bytes(content)
    table = ImportanceTable.load(folder / "t.json")
    assert ImportanceTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    search(table, Budget(average_bits=AverageBits(3, 3)))


def read_policy(folder: Path, content: bytes) -> None:
    (folder / "p.json").write_bytes(content)
    policy = Policy.load(folder / "p.json")
    policy.save(folder / "again.json")
    assert Policy.load(folder / "again.json") == policy


def read_latency(folder: Path, content: bytes) -> None:
    (folder / "l.json").write_bytes(content)
    table = LatencyTable.load(folder / "l.json")
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    search(ImportanceTable.from_json(TABLE), Budget(latency_ratio=1.0), latency=table)


def read_training_state(folder: Path, content: bytes) -> None:
    (folder / "s.safetensors").write_bytes(content)
    restore_tensors(torch.nn.Linear(3, 2), load_state(folder / "s.safetensors")[0])


def read_weights(folder: Path, case: tuple[str, bytes]) -> None:
    path = folder / f"w.{case[0]}"
    path.write_bytes(case[1])
    read_state(path)
    load_weights(torch.nn.Linear(3, 2), path)


@functools.cache
def contents(kind: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x.{kind}"
        state = torch.nn.Linear(3, 2).state_dict()
        if kind == "state":
            save_state(path, state, {"step": 3, "history": {"steps": [0]}})
        elif kind == "safetensors":
            save_file(state, path)
        else:
            torch.save(state, path)
        return path.read_bytes()


test_configs = fuzz("config", files(tiny()), read_config)
test_importance_tables = fuzz("table", files(TABLE), read_table)
test_policies = fuzz("policy", files(POLICY), read_policy)
test_latency_tables = fuzz("latency", files(LATENCY), read_latency)
test_training_states = fuzz("state", st.deferred(lambda: binaries(contents("state"))), read_training_state)
test_weights = fuzz(
    "weights",
    st.sampled_from(["safetensors", "pth"]).flatmap(lambda kind: st.tuples(st.just(kind), binaries(contents(kind)))),
    read_weights,
)


# --------------------------------------------------------------------------------------------------------- run folders
def make_run(folder: Path) -> Path:
    """:return: a folder as a run leaves it, with small files of the right kinds."""
    from safetensors.torch import save

    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    made = RunFolder.create(run, Config.from_json(tiny()))
    weights = digits_resnet(width=4, blocks=1).state_dict()
    values: dict[str, Any] = {"importance.json": TABLE, "policy.json": POLICY, "uniform_policy.json": POLICY}
    for name, stage in STAGES.items():
        for output in stage.outputs:
            path = made.file(output)
            path.parent.mkdir(exist_ok=True)
            binary = save(weights) if path.suffix == ".safetensors" else b"x"
            path.write_bytes(json.dumps(values.get(output, {})).encode() if path.suffix == ".json" else binary)
        inputs = [*stage.inputs, *(file for file in stage.optional if made.file(file).exists())]
        made.begin(name, inputs, needed_by="")
        made.finish(name, inputs)
    return run


def read_run(folder: Path, case: tuple[str, bytes | None]) -> None:
    name, content = case
    run = make_run(folder)
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)  # a folder where a file should be
    else:
        path.write_bytes(content)
    opened = RunFolder.open(run)
    RunFolder.create(run, opened.config)
    for name, stage in STAGES.items():
        if not opened.is_done(name, stage.inputs, stage.outputs):
            opened.begin(name, stage.inputs, needed_by="")
    ImportanceTable.load(run / "importance.json")
    Policy.load(run / "policy.json")


RUN_FILES = (
    *("config.json", "versions.json", "importance.json", "policy.json", "state/search.done.json"),
    *("state/finetune/inputs.json", "state/float.done.json", "float/model.safetensors", "log.txt"),
)
test_run_folders = fuzz(
    "folder",
    st.tuples(
        st.sampled_from(RUN_FILES),
        st.none() | st.binary(max_size=40) | files(tiny()) | files(POLICY) | files({"policy.json": "0" * 64}),
    ),
    read_run,
)


def test_there_are_ten_thousand_cases() -> None:
    assert sum(SHARES.values()) == 10_000
