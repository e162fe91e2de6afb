"""Training in two processes (gloo, started by torchrun) is training in one; a process that dies ends the run."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from distributed_worker import SCENARIOS
from runs import tiny, write_tiny
from torch import Tensor

from nncf_mpq_plugin import distributed
from nncf_mpq_plugin.checkpoint import load_state
from nncf_mpq_plugin.cli import main
from nncf_mpq_plugin.pipeline import STAGES
from nncf_mpq_plugin.runfolder import locked
from nncf_mpq_plugin.types import read_json

HERE = Path(__file__).parent
TOLERANCE = 1e-10  # of a tensor's largest value, in float64
PATIENCE = 900  # seconds, for processes that end by themselves; much more than slow machines need


def torchrun(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, words)]
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """:return: the largest difference of two values, relative to the largest value of their tensor."""
    assert one.keys() == two.keys()
    return max(
        float((one[name].double() - two[name].double()).abs().max() / one[name].double().abs().max().clamp_min(1e-6))
        for name in one
        if one[name].numel()
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    process = torchrun(HERE / "distributed_worker.py", folder)
    _, error = process.communicate()
    assert process.returncode == 0, error
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(name: str, results: Path) -> None:
    first, second = (load_state(results / f"{name}.{rank}.safetensors")[0] for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first), "the two differ from each other"
    found = difference(SCENARIOS[name](), first)
    logging.info("%s: %.1e", name, found)
    assert found < TOLERANCE


@pytest.mark.parametrize("words", [["search", "x"], ["config", "docs"], ["verify", "x"]], ids=lambda words: words[0])
def test_other_commands_are_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(words) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("process 1: error: Under torchrun the commands are run, train-importance, finetune")


def run(config: Path, folder: Path) -> subprocess.Popen[str]:
    return torchrun("-m", "nncf_mpq_plugin", "run", config, "--output", folder, "--json")


@pytest.mark.slow
def test_a_run_in_two_processes_ends_like_a_run_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """
    The weights are compared in float64 above: in float32 one ReLU whose input crosses zero, or one value on a rounding
    tie, leads the training elsewhere, as it does from one thread to two.
    """
    config = write_tiny(tmp_path)
    assert main(["run", str(config), "--output", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    process = run(config, tmp_path / "two")
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert json.loads(output) == read_json(tmp_path / "two" / "summary.json"), "one process prints, and once"
    accuracies = [read_json(tmp_path / name / "model" / "metrics.json")["accuracy"] for name in ("one", "two")]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.05)
    for stage in STAGES.values():
        log = (tmp_path / "two" / "log.txt").read_text()
        assert log.count(f"{stage.title}: done in") == 1


def ranks(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """:return: rank -> the process that torchrun started for it."""
    return {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def longer(stage: str) -> dict[str, Any]:
    """:return: the tiny config with enough steps in a stage to be stopped there."""
    value = tiny(uniform_baseline=False)
    if stage == "float":
        value["training"] = {"epochs": 12}
    else:
        value["compression"]["initializer"]["precision"]["joint_training"] = {"epochs": 12}
    return value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "victim", "processes"), [("float", 1, 2), ("importance", 0, 2), ("importance", 1, 1)]
)
def test_a_killed_process_ends_the_run_and_its_state_goes_on(
    stage: str, victim: int, processes: int, tmp_path: Path
) -> None:
    """Stopped by a kill -9, then continued by ``processes``: with as many as before, bit for bit as if undisturbed."""
    config, folder = tmp_path / "tiny.json", tmp_path / "run"
    config.write_text(json.dumps(longer(stage)))
    process = run(config, folder)
    wait_for(folder / "state" / stage / "state.safetensors", process)
    ranks(process)[victim].send_signal(signal.SIGKILL)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    told = re.search("error: Another process of this run has ended.*What was saved is kept", " ".join(error.split()))
    assert told or "closing signal SIGTERM" in error, error  # the latter where torchrun has seen it first
    assert not (folder / "state" / f"{stage}.done.json").exists()
    if processes == 2:
        process = run(config, folder)
        whole = run(config, tmp_path / "whole")
        for each in (process, whole):
            _, error = each.communicate()
            assert each.returncode == 0, error
        for name in ("float/model.safetensors", "importance.json", "model/model.safetensors"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    else:
        assert main(["run", str(config), "--output", str(folder)]) == 0
    assert read_json(folder / "summary.json")["verification"]["ok"]


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_and_saves(tmp_path: Path) -> None:
    config, folder = tmp_path / "tiny.json", tmp_path / "run"
    config.write_text(json.dumps(tiny(training={"epochs": 400})))
    process = run(config, folder)
    wait_for(folder / "state" / "float" / "state.safetensors", process)
    before = load_state(folder / "state" / "float" / "state.safetensors")[1]["step"]
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert f"torchrun --nproc_per_node=2 -m nncf_mpq_plugin run {folder}" in " ".join(error.split())
    assert load_state(folder / "state" / "float" / "state.safetensors")[1]["step"] > before


@pytest.mark.slow
def test_a_folder_that_another_process_works_in_is_refused_in_all_processes(tmp_path: Path) -> None:
    config, folder = write_tiny(tmp_path), tmp_path / "run"
    with locked(folder):
        process = run(config, folder)
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    error = " ".join(error.split())
    assert "another process is working on this run" in error
    assert "process 1: error: The first process ended with InputError" in error


def test_what_cannot_be_told_to_the_others_is_an_error_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(distributed._messages, "store", store)
    monkeypatch.setattr(distributed._messages, "count", 0)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with pytest.raises(TypeError):
        distributed.on_main(object)
    assert json.loads(store.get("on_main/1")) == {"error": "TypeError"}


QUANTIZE = """
import os, sys, torch
from pathlib import Path
from nncf_mpq_plugin import quantize
from nncf_mpq_plugin.data import digits
from nncf_mpq_plugin.networks import digits_resnet

torch.manual_seed(0)
data, folder, short = digits([1, 1, 8, 8], 64), Path(sys.argv[1]), {"epochs": 1, "data_fraction": 0.2}
result = quantize(
    digits_resnet(width=4, blocks=1), data.train, data.validation, budgets={"bitops_ratio": 0.3}, bits=[2, 4, 8],
    joint_training=short, fine_tuning=short, uniform_baseline=False, output=folder, device="cpu",
)
output = result.model(next(iter(data.validation))[0]).sum().item()
(folder.parent / os.environ["RANK"]).write_text(repr(output))
"""


@pytest.mark.slow
def test_a_script_of_ones_own_trains_in_two_processes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(QUANTIZE)
    process = torchrun(tmp_path / "script.py", tmp_path / "run")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
    assert read_json(tmp_path / "run" / "summary.json")["verification"]["ok"]
