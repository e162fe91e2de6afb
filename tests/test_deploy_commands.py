"""``nncf-mpq verify``, ``benchmark`` and ``latency`` on a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from damage import negate_weights
from runs import write_tiny

from nncf_mpq_plugin.cli import main
from nncf_mpq_plugin.types import Policy, read_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    assert main(["run", str(write_tiny(folder)), "--output", str(folder / "run")]) == 0
    return folder / "run"


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


def test_verify_measures_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "verify.json").stat().st_mtime_ns
    code, out, _ = command(capsys, "verify", finished, "--json")
    assert code == 0
    assert json.loads(out) == read_json(finished / "verify.json")
    assert json.loads(out)["ok"]
    assert (finished / "verify.json").stat().st_mtime_ns > before


def test_verify_of_another_file_leaves_the_run_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "verify.json").read_bytes()
    code, out, _ = command(capsys, "verify", finished, "--model", finished / "deploy" / "model.xml")
    assert code == 0
    assert "OpenVINO IR" in out
    assert "ONNX Runtime" not in out
    assert (finished / "verify.json").read_bytes() == before


def test_a_damaged_model_is_exit_code_4_and_its_layer_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = next(iter(read_json(finished / "policy.json")["policy"]))
    negate_weights(finished / "deploy" / "model.onnx", tmp_path / "damaged.onnx", layer)
    code, out, err = command(capsys, "verify", finished, "--model", tmp_path / "damaged.onnx")
    assert code == 4
    assert "fails" in out
    assert f"it first diverges in layer {layer} (tensor" in err
    assert "of the elements are off" in err
    assert "Write it again with nncf-mpq export;" in " ".join(err.split())
    code, out, _ = command(capsys, "verify", finished, "--model", tmp_path / "damaged.onnx", "--json")
    assert code == 4
    failure = json.loads(out)
    assert failure["error"] == "VerificationError"
    runtimes = {runtime["name"]: runtime for runtime in failure["report"]["runtimes"]}
    assert runtimes["ONNX Runtime"]["divergence"]["layers"] == [layer]


def test_benchmark_prints_and_writes_what_it_measured(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "benchmark", finished, "--seconds", 0.05, "--threads", 1, "--json")
    assert code == 0
    report = json.loads(out)
    assert report == read_json(finished / "benchmark.json")
    names = ["FP32", "INT8", "naive", "mixed", "mixed (any batch)", "mixed (ORT)"]
    assert [model["name"] for model in report["models"]] == names
    assert report["models"][3]["integer_share"] == 1


def test_measured_times_of_layers_are_a_budget(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "latency", finished, "--seconds", 0.05, "--threads", 1)
    assert code == 0
    table = read_json(finished / "latency.json")
    policy = read_json(finished / "policy.json")["policy"]
    assert set(table["nanoseconds"]) == set(policy)
    for layer, times in table["nanoseconds"].items():
        assert layer in out
        assert times["8x8"] > 0
        assert times["32x4"] == times["8x32"] == times["32x32"] > 0
    given = ("--latency-ratio", 1, "--latency-table", finished / "latency.json", "--json")
    code, out, _ = command(capsys, "search", finished, *given)
    assert code == 0
    assert json.loads(out)["budgets"]["latency_ratio"]["achieved"] == 1  # all bits of this run have 8-bit carriers
    code, _, err = command(capsys, "search", finished, *given[:-1], "--latency-ratio", 0.9)
    assert code == 3
    assert "nearest that exists is 1x" in err


def test_a_weight_only_policy_from_search_to_verified_files(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, policy = tmp_path / "run", tmp_path / "policy.json"
    shutil.copytree(finished, run)
    code, _, _ = command(capsys, "search", run, "--weight-only", "--average-weight-bits", 4, "--output", policy)
    assert code == 0
    assert command(capsys, "finetune", run, "--policy", policy)[0] == 0
    assert command(capsys, "run", run)[0] == 0
    assert {bits.activation for bits in Policy.load(run / "policy.json").layers.values()} == {32}
    assert read_json(run / "verify.json")["ok"]
    assert read_json(run / "summary.json")["results"]["mixed"]["average_bits"]["activation"] == 32
    model = onnx.load(run / "deploy" / "model.onnx")
    fixed = {layer["name"]: layer for layer in read_json(run / "summary.json")["layers"] if not layer["searched"]}
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == len(fixed)
    code, out, _ = command(capsys, "benchmark", run, "--seconds", 0.05, "--threads", 1)
    assert code == 0
    assert "/ 32" in out


@pytest.mark.parametrize("option", [("--threads", 0), ("--seconds", -1)], ids=["threads", "seconds"])
def test_a_benchmark_of_nothing_is_exit_code_2(
    finished: Path, option: tuple[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(capsys, "benchmark", finished, *option)
    assert code == 2
    assert "at least 1" in err


@pytest.mark.slow
def test_a_run_for_onnxruntime_is_verified_there(tmp_path: Path) -> None:
    config = write_tiny(tmp_path, deploy={"target": "onnxruntime", "verify_samples": 64})
    assert main(["run", str(config), "--output", str(tmp_path / "run")]) == 0
    runtimes = read_json(tmp_path / "run" / "verify.json")["runtimes"]
    assert [runtime["name"] for runtime in runtimes if runtime["required"]] == ["ONNX Runtime"]
