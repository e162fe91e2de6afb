"""Whole runs: what is written, what runs again and what does not, and that a killed run ends as an unkilled one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import tiny, write_tiny
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nncf_mpq_plugin import (
    Config,
    InfeasibleBudgetError,
    InputError,
    Listener,
    Pipeline,
    Policy,
    RunFolder,
    quantize,
    sources_of,
)
from nncf_mpq_plugin.batches import split_batch
from nncf_mpq_plugin.cli import main
from nncf_mpq_plugin.networks import digits_resnet
from nncf_mpq_plugin.pipeline import STAGES
from nncf_mpq_plugin.runfolder import _locks, locked
from nncf_mpq_plugin.types import ImportanceTable, LayerBits, read_json


def digests(folder: Path) -> dict[str, str]:
    """:return: what a run computed, file by file."""
    names = ["float/model.safetensors", "importance.json", "model/model.safetensors", "uniform/metrics.json"]
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    found["policy"] = json.dumps(read_json(folder / "policy.json")["policy"])
    return found


def pipeline_of(folder: Path, lines: list[str] | None = None, **changes: Any) -> Pipeline:
    config = Config.from_json(tiny(**changes))
    log = lines.append if lines is not None else (lambda text: None)
    return Pipeline(RunFolder.create(folder, config), sources_of(config), Listener(log=log))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    pipeline_of(folder).run()
    return folder


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_leaves_every_file_of_the_readme(finished: Path) -> None:
    for stage in STAGES.values():
        for name in stage.outputs:
            assert (finished / name).stat().st_size > 0
    for name in ("config.json", "versions.json", "log.txt", "uniform_policy.json"):
        assert (finished / name).stat().st_size > 0
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for entry in finished.iterdir():
        assert f"`{entry.name}{'/' if entry.is_dir() else ''}`" in readme or entry.name.startswith("."), entry.name


def test_the_summary_agrees_with_policy_table_and_budget(finished: Path) -> None:
    summary, policy = read_json(finished / "summary.json"), Policy.load(finished / "policy.json")
    table = ImportanceTable.load(finished / "importance.json")
    results = summary["results"]
    assert set(results) == {"float", "int8", "uniform", "mixed"}
    assert results["mixed"]["bitops"] <= results["uniform"]["bitops"] == 16 * sum(x.cost.macs for x in table.layers)
    assert results["float"]["compression_ratio"] == 1
    assert results["mixed"]["compression_ratio"] > 4
    assert sum(row["bitops_share"] for row in summary["layers"]) == pytest.approx(1)
    for row in summary["layers"]:
        bits = {**policy.layers, **policy.fixed_layers}[row["name"]]
        assert (row["weight"], row["activation"]) == (bits.weight, bits.activation)
    assert summary["verification"]["ok"] is True
    assert all(0.5 < row["accuracy"] <= 1 for row in results.values())


def test_the_model_is_the_one_that_was_measured_and_has_the_policy_s_bits(finished: Path) -> None:
    from nncf_mpq_plugin.adapters.base import native_quantizers

    pipeline = pipeline_of(finished)
    model = pipeline.frozen_model()
    metrics = read_json(finished / "model" / "metrics.json")
    hits = sum(int((model(inputs).argmax(1) == target).sum()) for inputs, target in pipeline.data.validation)
    assert hits / metrics["samples"] == metrics["accuracy"]
    policy = Policy.load(finished / "policy.json")
    weight_bits = {
        ".".join(name.removeprefix("pre_hooks.").split("/")[:-2]): quantizer.num_bits
        for name, quantizer in native_quantizers(model).items()
        if name.startswith("pre_hooks.") and name.endswith("__1.0")
    }
    for name, bits in policy.layers.items():
        assert weight_bits[name] == bits.weight


def test_a_finished_run_does_nothing_again(run_copy: Path) -> None:
    before = digests(run_copy)
    times = {name: (run_copy / name).stat().st_mtime_ns for stage in STAGES.values() for name in stage.outputs}
    lines: list[str] = []
    pipeline_of(run_copy, lines).run()
    assert [line.endswith("done already") for line in lines] == [True] * len(STAGES)
    assert digests(run_copy) == before
    assert times == {name: (run_copy / name).stat().st_mtime_ns for name in times}


def test_an_edited_policy_is_trained_exported_and_verified_anew(run_copy: Path) -> None:
    policy = Policy.load(run_copy / "policy.json")
    groups = {
        layer.cost.name: layer.cost.activation_group
        for layer in ImportanceTable.load(run_copy / "importance.json").layers
    }
    edited = Policy(dict.fromkeys(groups, LayerBits(8, 8)), policy.fixed_layers)
    edited.save(run_copy / "policy.json")
    before = digests(run_copy)
    lines: list[str] = []
    pipeline_of(run_copy, lines).run()
    done = {line.split(":")[0] for line in lines if line.endswith("done already")}
    assert done == {STAGES[name].title for name in ("float", "importance", "search", "uniform", "int8")}
    after = digests(run_copy)
    assert after["model/model.safetensors"] != before["model/model.safetensors"]
    assert after["float/model.safetensors"] == before["float/model.safetensors"]
    summary = read_json(run_copy / "summary.json")
    assert {row["weight"] for row in summary["layers"]} == {8}
    budget = summary["budgets"]["average_bits"]  # the policy's own entry still tells of the policy before the edit
    assert (budget["requested"], budget["achieved"]) == (16, 64)


def test_each_stage_can_be_done_again_from_the_files_before_it(run_copy: Path) -> None:
    before = digests(run_copy)
    for name in ("search", "finetune", "export", "verify"):
        (run_copy / "state" / f"{name}.done.json").unlink()
        for output in STAGES[name].outputs:
            (run_copy / output).unlink()
        shutil.rmtree(run_copy / "state" / name)
        assert pipeline_of(run_copy).run_stage(name) is True
    assert digests(run_copy) == before


@pytest.mark.parametrize("source", ["loss_change", "scale"])
def test_importance_can_come_from_another_source_and_be_refined(
    source: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = tiny()
    precision = value["compression"]["initializer"]["precision"]
    precision["importance"] = {"source": source, "samples": 64}
    precision["search"] = {"refine": {"evaluations": 8, "samples": 128}}
    (tmp_path / "tiny.json").write_text(json.dumps(value))
    folder = tmp_path / "run"
    RunFolder.create(folder, Config.load(tmp_path / "tiny.json"))
    shutil.copytree(finished / "float", folder / "float")
    assert main(["train-importance", str(folder)]) == 0
    assert read_json(folder / "importance.json")["unit"] == ("scale" if source == "scale" else "loss")
    assert read_json(folder / "joint" / "scales.json")["unit"] == "scale"
    assert main(["search", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert report["status"] == "refined"
    refinement = report["refinement"]
    assert set(refinement["losses"]) == {"program", "scale, alpha 0.5", "scale, alpha 1", "scale, alpha 2"}
    assert 4 <= refinement["evaluations"] <= 8
    assert refinement["loss"] <= min(refinement["losses"].values())
    budget = report["budgets"]["average_bits"]
    assert budget["achieved"] <= budget["requested"]
    assert main(["search", str(folder), "--refine-seconds", "0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "refined"
    assert main(["search", str(folder / "importance.json"), "--bitops-ratio", "0.5", "--refine-seconds", "1"]) == 2
    assert "needs a run's folder" in capsys.readouterr().err


def test_a_stage_without_its_input_names_the_command_to_run(tmp_path: Path) -> None:
    pipeline = pipeline_of(tmp_path / "run")
    with pytest.raises(InputError, match=r"needs importance\.json.*nncf-mpq train-importance"):
        pipeline.run_stage("search")


def test_another_config_is_refused_with_the_difference_shown(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny(tmp_path, fine_tuning={"epochs": 7})
    before = digests(run_copy)
    assert main(["run", str(other), "--output", str(run_copy)]) == 2
    error = capsys.readouterr().err
    assert "fine_tuning.epochs: 1 -> 7" in error
    assert "--restart" in error
    assert digests(run_copy) == before


def test_an_edited_config_of_a_run_is_noticed(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(run_copy)
    original = (run_copy / "config.json").read_text()
    value = read_json(run_copy / "config.json")
    value["fine_tuning"]["epochs"] = 7
    (run_copy / "config.json").write_text(json.dumps(value))
    for words in (
        ["explain", str(run_copy)],
        ["search", str(run_copy), "--bitops-ratio", "0.5"],
        ["run", str(run_copy)],
    ):
        assert main(words) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "fine_tuning.epochs: 1 -> 7" in error
    assert "If you edited its config.json" in error
    assert "--restart" in error
    assert digests(run_copy) == before
    assert RunFolder.create(run_copy, Config.from_json(tiny())).config.to_json() == json.loads(original)
    assert json.loads((run_copy / "config.json").read_text()) == json.loads(original), "made good"
    assert main(["export", str(run_copy)]) == 0


def test_a_damaged_exported_file_is_made_again(run_copy: Path) -> None:
    path = run_copy / "deploy" / "model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + b"xxxxx")
    lines: list[str] = []
    assert pipeline_of(run_copy, lines).run_stage("export") is True
    assert path.read_bytes() == whole
    assert pipeline_of(run_copy, lines).run_stage("export") is False


def test_restart_begins_anew_and_leaves_foreign_files(run_copy: Path) -> None:
    (run_copy / "notes.txt").write_text("mine")
    (run_copy / "latency.json").write_text("{}")
    config = Config.from_json(tiny(fine_tuning={"epochs": 7}))
    RunFolder.create(run_copy, config, restart=True)
    assert sorted(path.name for path in run_copy.iterdir() if not path.name.startswith(".")) == [
        "config.json",
        "notes.txt",
        "state",
        "versions.json",
    ]
    assert RunFolder.open(run_copy).config == config


def test_a_run_that_left_nothing_takes_the_corrected_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = write_tiny(tmp_path, checkpoint="missing.safetensors", data={"source": "imagefolder:missing"})
    assert main(["run", str(wrong), "--output", str(tmp_path / "run")]) == 2
    assert "missing" in capsys.readouterr().err
    corrected = Config.from_json(tiny())
    assert RunFolder.create(tmp_path / "run", corrected).config == corrected
    assert RunFolder.open(tmp_path / "run").config == corrected


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InputError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_the_lock_ends_while_a_child_that_has_just_begun_has_the_file_open(tmp_path: Path) -> None:
    with locked(tmp_path):
        (file,) = _locks
        copy = os.dup(file.fileno())
    try:
        with locked(tmp_path):
            pass
    finally:
        os.close(copy)


def test_a_child_that_outlives_its_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom nncf_mpq_plugin.runfolder import locked\nr, w = os.pipe()\n"
        "with locked(sys.argv[1]):\n    if os.fork() == 0:\n        os.write(w, b'forked')\n        time.sleep(60)\n"
        "    os.read(r, 6)\n    os._exit(0)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], start_new_session=True)
    child.wait()
    try:
        with locked(tmp_path):
            pass
    finally:
        os.killpg(child.pid, signal.SIGKILL)


def test_a_truncated_float_model_is_named(run_copy: Path) -> None:
    path = run_copy / "float" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"float/model\.safetensors"):
        pipeline_of(run_copy).run()


def test_a_checkpoint_takes_the_place_of_training(finished: Path, tmp_path: Path) -> None:
    source = finished / "float" / "model.safetensors"
    pipeline = pipeline_of(tmp_path / "run", checkpoint=str(source), training={"epochs": 100})
    pipeline.run_stage("float")
    assert read_json(tmp_path / "run" / "float" / "metrics.json") == read_json(finished / "float" / "metrics.json")


def test_a_budget_that_cannot_be_met_is_exit_code_3_and_the_table_is_kept(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    value = tiny()
    value["compression"]["initializer"]["precision"]["budgets"] = {"compression_ratio": 30}
    (tmp_path / "tiny.json").write_text(json.dumps(value))
    RunFolder.create(folder, Config.load(tmp_path / "tiny.json"))
    for name in ("float", "joint", "importance.json"):
        source = finished / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    assert main(["search", str(folder)]) == 3
    assert "nearest that exists" in " ".join(capsys.readouterr().err.split())
    assert main(["search", str(folder), "--compression-ratio", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "optimal"
    assert not (folder / "policy.json").exists()


@pytest.mark.parametrize(
    ("budgets", "error", "message"),
    [
        ({"compression_ratio": 30}, InfeasibleBudgetError, "nearest that exists"),
        ({"latency_ratio": 0.5}, InputError, "latency_ratio"),
    ],
    ids=["too small", "latency without a table"],
)
def test_a_budget_that_cannot_be_met_is_noticed_before_training(
    finished: Path, tmp_path: Path, budgets: dict[str, float], error: type[Exception], message: str
) -> None:
    value = tiny()
    value["compression"]["initializer"]["precision"]["budgets"] = budgets
    config = Config.from_json(value)
    pipeline = Pipeline(RunFolder.create(tmp_path / "run", config), sources_of(config))
    shutil.copytree(finished / "float", tmp_path / "run" / "float")
    with pytest.raises(error, match=message):
        pipeline.run_stage("importance")
    assert not list((tmp_path / "run" / "state").rglob("*.safetensors"))


def test_a_given_policy_takes_the_place_of_the_found_one(
    run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Policy.load(run_copy / "policy.json")
    given = tmp_path / "given.json"
    (run_copy / "policy.json").unlink()  # as if the search had not run yet
    Policy(dict.fromkeys(found.layers, LayerBits(3, 4))).save(given)
    assert main(["finetune", str(run_copy), "--policy", str(given)]) == 2
    assert "given.json, layer 'blocks.0.conv1': 3 weight bits" in " ".join(capsys.readouterr().err.split())
    assert Policy.load(run_copy / "policy.json").layers == found.layers
    Policy(dict.fromkeys(found.layers, LayerBits(4, 8))).save(given)
    assert main(["finetune", str(run_copy), "--policy", str(given)]) == 0
    lines: list[str] = []
    pipeline_of(run_copy, lines).run()
    assert "Search: done already" in lines
    assert set(Policy.load(run_copy / "policy.json").layers.values()) == {LayerBits(4, 8)}


@pytest.mark.parametrize(
    ("gone", "stage", "command"),
    [
        ("float/model.safetensors", "finetune", "nncf-mpq run"),
        ("joint/model.safetensors", "finetune", "nncf-mpq train-importance"),
        ("model/nncf_config.json", "verify", "nncf-mpq finetune"),
    ],
    ids=["float", "joint", "config"],
)
def test_a_stage_that_was_done_needs_its_inputs_all_the_same(
    run_copy: Path, gone: str, stage: str, command: str
) -> None:
    (run_copy / gone).unlink()
    with pytest.raises(InputError, match=f"needs {gone}.*{command}"):
        pipeline_of(run_copy).run_stage(stage)


def test_a_loss_that_is_not_a_number_is_refused(finished: Path, tmp_path: Path) -> None:
    pipeline = pipeline_of(tmp_path / "run", checkpoint=str(finished / "float" / "model.safetensors"))
    pipeline.sources = dataclasses.replace(pipeline.sources, loss=lambda output, target: output.sum() * torch.nan)
    with pytest.raises(InputError, match="validation data is nan"):
        pipeline.run_stage("float")
    assert not (tmp_path / "run" / "float").exists()


class Wrapped(nn.Module):
    """A user's model: another name for its layers, and no class count anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body = digits_resnet(width=4, blocks=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * 0.5


def test_quantize_takes_a_model_loaders_and_a_loss(finished: Path, tmp_path: Path) -> None:
    data = pipeline_of(finished).data
    model = Wrapped().eval()
    model.body.load_state_dict(pipeline_of(finished).float_model().state_dict())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    calls: list[int] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(len(target))
        return nn.functional.mse_loss(output.softmax(1), nn.functional.one_hot(target, 10).float())

    arguments: dict[str, Any] = {
        "budgets": {"average_bits": {"weight": 4, "activation": 4}},
        "bits": [2, 4, 8],
        "joint_training": {"epochs": 1, "data_fraction": 0.2},
        "fine_tuning": {"epochs": 1, "data_fraction": 0.2},
        "uniform_baseline": False,
        "precision": {"keep_weights": "trained"},
        "loss": loss,
        "output": tmp_path / "mine",
        "device": "cpu",
    }
    result = quantize(model, data.train, data.validation, **arguments)
    assert calls
    assert Config.load(result.folder / "config.json").keep_weights == "trained"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert set(result.policy.layers) >= {"body.blocks.0.conv1"}
    assert set(result.summary["results"]) == {"float", "int8", "uniform", "mixed"}
    assert (result.folder / "deploy" / "model.xml").exists()
    inputs = split_batch(next(iter(data.validation)))[0]
    assert result.model(inputs).shape == (len(inputs), 10)

    count = len(calls)
    again = quantize(model, data.train, data.validation, **arguments)
    assert len(calls) == count  # nothing was trained again
    assert torch.equal(again.model(inputs), result.model(inputs))
    with torch.no_grad():
        model.body.classifier.bias += 1
    with pytest.raises(InputError, match="another config"):
        quantize(model, data.train, data.validation, **arguments)
    with pytest.raises(InputError, match="same quantize"):
        sources_of(RunFolder.open(tmp_path / "mine").config)


def test_quantize_names_a_setting_that_is_wrong(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)), 2)
    with pytest.raises(InputError, match=r"unknown key 'epoch'; did you mean 'epochs'\?"):
        quantize(Wrapped(), loader, loader, budgets={"bitops": 1e6}, output=tmp_path / "x", fine_tuning={"epoch": 1})
    with pytest.raises(InputError, match="training loader is of type generator"):
        quantize(Wrapped(), (x for x in loader), loader, budgets={"bitops": 1e6}, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------------ interruption
LONGER: dict[str, Any] = {
    "training": {"epochs": 6},
    "fine_tuning": {"epochs": 6},
    "device": "cpu",
}


def start(config: Path, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nncf_mpq_plugin", "run", str(config), "--output", str(folder), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_training(folder: Path, process: subprocess.Popen[str], stage: str) -> None:
    while not (folder / "state" / stage / "state.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    config, kills = write_tiny(tmp_path, **LONGER), 0
    begin = time.monotonic()
    whole = start(config, tmp_path / "whole")
    _, error = whole.communicate()
    assert whole.returncode == 0, error
    seconds = time.monotonic() - begin  # on a busy machine it takes long until there is anything to kill
    generator, folders = random.Random(0), 0
    while kills < 20:
        folder = tmp_path / f"killed{folders}"
        folders += 1
        while True:
            process = start(config, folder)
            try:
                _, error = process.communicate(timeout=generator.uniform(0.2, 0.9) * seconds if kills < 20 else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0, error
            break
        assert digests(folder) == digests(tmp_path / "whole")
        assert not list(folder.rglob(".tmp-*"))


def wait_for_line(folder: Path, text: str, process: subprocess.Popen[str]) -> None:
    log = folder / "log.txt"
    while not log.exists() or text not in log.read_text():
        if process.poll() is not None:
            break
        time.sleep(0.02)


@pytest.mark.slow
def test_a_kill_in_each_stage_changes_nothing(tmp_path: Path) -> None:
    config, folder, generator = write_tiny(tmp_path), tmp_path / "killed", random.Random(1)
    whole = start(config, tmp_path / "whole")
    _, error = whole.communicate()
    assert whole.returncode == 0, error
    killed = []
    for name, stage in STAGES.items():
        process = start(config, folder)
        wait_for_line(folder, f"{stage.title} ...", process)
        time.sleep(generator.uniform(0, 0.3))
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed.append(name)
    assert len(killed) >= len(STAGES) - 1, "the last stage may be over before the kill"
    process = start(config, folder)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert digests(folder) == digests(tmp_path / "whole")
    assert not list(folder.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["float", "importance", "finetune"])
def test_ctrl_c_saves_and_says_how_to_go_on(stage: str, tmp_path: Path) -> None:
    many = {"epochs": 400}
    value = tiny(**({"training": many} if stage == "float" else {"fine_tuning": many} if stage == "finetune" else {}))
    if stage == "importance":
        value["compression"]["initializer"]["precision"]["joint_training"] = many
    config, folder = tmp_path / "tiny.json", tmp_path / "run"
    config.write_text(json.dumps(value))
    process = start(config, folder)
    wait_for_training(folder, process, stage)
    wait_for_line(folder, " left", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    told = rf"{stage}: \d+ of \d+, loss [\d.]+, [\dhmins ]+ left"
    assert re.search(told, error), "without a terminal progress is told in lines"
    assert re.search(told, (folder / "log.txt").read_text())
    assert process.returncode == 130, error
    assert f"nncf-mpq run {folder}" in " ".join(error.split())
    assert "Traceback" not in error
    assert "interrupted" in (folder / "log.txt").read_text()
    assert (folder / "state" / stage / "state.safetensors").exists()
