"""``nncf-mpq verify``, ``benchmark`` and ``latency`` on a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from runs import write_tiny

from nncf_mpq_plugin.cli import main
from nncf_mpq_plugin.types import read_json


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


def damage(source: Path, target: Path, layer: str) -> None:
    model = onnx.load(source)
    node = next(node for node in model.graph.node if node.name == layer)
    dequantize = next(other for other in model.graph.node if other.output[0] == node.input[1])
    weight = next(item for item in model.graph.initializer if item.name == dequantize.input[0])
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, target)


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
    damage(finished / "deploy" / "model.onnx", tmp_path / "damaged.onnx", layer)
    code, out, err = command(capsys, "verify", finished, "--model", tmp_path / "damaged.onnx")
    assert code == 4
    assert "fails" in out
    assert f"it first diverges in layer {layer} (tensor" in err
    assert "of the elements are off" in err
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
    assert [model["name"] for model in report["models"]] == ["FP32", "INT8", "naive", "mixed", "mixed (ORT)"]
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


@pytest.mark.parametrize("option", [("--threads", 0), ("--seconds", -1)], ids=["threads", "seconds"])
def test_a_benchmark_of_nothing_is_exit_code_2(
    finished: Path, option: tuple[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(capsys, "benchmark", finished, *option)
    assert code == 2
    assert "at least 1" in err
