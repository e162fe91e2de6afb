"""The command line: output, exit codes, and messages that say what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import write_tiny

from nncf_mpq_plugin.cli import main
from nncf_mpq_plugin.types import ImportanceTable, Policy, read_json

ROOT = Path(__file__).parent.parent
TABLE: dict[str, Any] = {
    "schema_version": 1,
    "bits": [2, 4, 8],
    "layers": [
        {
            "name": name,
            "macs": macs,
            "weights": weights,
            "importance": {
                "weight": {"2": 0.4 * size, "4": 0.2 * size, "8": 0.1 * size},
                "activation": {"2": 0.5, "4": 0.2, "8": 0.05},
            },
        }
        for name, macs, weights, size in (("a", 1000, 100, 1.0), ("b", 4000, 50, 3.0), ("c", 500, 900, 0.5))
    ],
    "fixed_layers": [{"name": "stem", "macs": 100, "weights": 10, "weight_bits": 8, "activation_bits": 8}],
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """:return: exit code, stdout and stderr of the command."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


def test_search_prints_one_json_object(table: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    budget = ("--average-weight-bits", 4, "--average-activation-bits", 4, "--alpha", 1)
    code, out, _ = run(capsys, "search", table, *budget, "--json", "--output", tmp_path / "p.json")
    report = json.loads(out)
    assert code == 0
    assert report["status"] == "optimal"
    assert report["bitops"] <= 16 * 5500
    assert {"objective", "weight_bits", "compression_ratio", "seconds"} <= set(report)
    assert set(report["policy"]) == {"a", "b", "c"}
    saved = Policy.load(tmp_path / "p.json")
    assert {name: vars(bits) for name, bits in saved.layers.items()} == report["policy"]


def test_search_prints_a_table_for_people(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "search", table, "--compression-ratio", 8)
    assert code == 0
    assert all(text in out for text in ("layer", "stem", "fixed", "optimal", "budget compression_ratio: asked 8"))


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_budget_that_cannot_be_met_is_exit_code_3(
    table: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    code, out, err = run(capsys, "search", table, "--compression-ratio", 20, *(["--json"] if as_json else []))
    assert code == 3
    assert "compression_ratio = 20" in err
    assert "nearest that exists is" in err
    if as_json:
        report = json.loads(out)
        assert (report["status"], report["budget"], report["requested"]) == ("infeasible", "compression_ratio", 20)
        code, _, _ = run(capsys, "search", table, "--compression-ratio", report["achievable"])
        assert code == 0
    else:
        assert out == ""


BAD_INPUT = {
    "no budget": (["search", "TABLE"], "No budget is given"),
    "missing table": (["search", "nowhere.json", "--bitops", "1e9"], "nowhere.json: cannot be read"),
    "negative budget": (["search", "TABLE", "--bitops", "-1"], "must be above 0, got -1"),
    "not a number": (["search", "TABLE", "--bitops", "nan"], "finite number"),
    "missing config": (["run", "nowhere.json"], "nowhere.json: cannot be read"),
    "a run that is none": (["export", "."], "there is no run"),
    "missing config to check": (["config", "check", "nowhere.json"], "cannot be read"),
    "output beside a run": (["run", ".", "--output", "x"], "--output goes with a config file"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_exit_code_2(
    arguments: list[str],
    message: str,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = run(capsys, *[str(table) if argument == "TABLE" else argument for argument in arguments])
    assert code == 2
    assert message in err
    assert out == ""
    assert not list(Path().iterdir()), "something was written"


@pytest.mark.parametrize(
    "arguments", [["serach"], ["search"], ["run", "x", "--bits", "3"], ["search", "x", "--bitops", "many"], []], ids=str
)
def test_a_command_line_that_is_wrong_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: nncf-mpq" in capsys.readouterr().err


def commands() -> list[str]:
    from nncf_mpq_plugin.cli import _parser

    actions = [action for action in _parser()._actions if action.choices]
    return sorted(actions[0].choices)


CONFIG_ACTIONS = [["config", action] for action in ("check", "schema", "docs")]


@pytest.mark.parametrize(
    "command", [[], *([name] for name in commands()), *CONFIG_ACTIONS], ids=lambda words: " ".join(words) or "all"
)
def test_help_reads_well(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: nncf-mpq")
    assert "None" not in out
    description = out.split("\n\n")[1]
    assert description[0].isupper(), out
    assert description.endswith("."), out
    assert "exit codes" in out or command
    assert max(len(line) for line in out.splitlines()) <= 80


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    for name in commands():
        assert f"nncf-mpq {name}" in text


def test_config_check_schema_and_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "config", "check", write_tiny(tmp_path))
    assert code == 0
    assert "is valid" in out
    code, _, err = run(capsys, "config", "check", write_tiny(tmp_path, devise="cpu"))
    assert code == 2
    assert "unknown key 'devise'; did you mean 'device'?" in err
    code, out, _ = run(capsys, "config", "schema")
    assert json.loads(out)["properties"]["model"]["type"] == "string"
    code, out, _ = run(capsys, "config", "docs")
    assert out == (ROOT / "docs" / "config.md").read_text(), "run: make docs"


def test_a_config_error_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "run", write_tiny(tmp_path, modle="x"))
    assert code == 2
    assert "modle" in err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_foreign_code_needs_to_be_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "foreign.py").write_text("raise SystemError('imported')")
    config = write_tiny(tmp_path, model="foreign:make", model_arguments={})
    code, _, err = run(capsys, "run", config, "--output", tmp_path / "run")
    assert code == 2
    assert "--allow-code" in err
    assert "imported" not in err


def test_a_read_only_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny(tmp_path)
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "run", config, "--output", tmp_path / "file" / "run")
    assert code == 2
    assert "cannot be written" in err
    assert "--output" in err


def test_a_damaged_config_of_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("[]")
    code, _, err = run(capsys, "run", write_tiny(tmp_path), "--output", tmp_path / "run")
    assert code == 2
    assert "config.json: the file: expected an object" in err


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("")
    code, _, err = run(capsys, "run", write_tiny(tmp_path), "--output", tmp_path / "photos", "--restart")
    assert code == 2
    assert "is not empty and holds no run" in err
    assert (tmp_path / "photos" / "me.jpg").exists()


def test_a_closed_pipe_is_no_traceback(table: Path) -> None:
    command = f"{sys.executable} -m nncf_mpq_plugin config schema | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("{")
    assert result.stderr == ""


PUBLISHED = Path(os.environ.get("MPQ_SHARED_DATA", ROOT.parent / "shared" / "data"))


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published tables are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "objective"),
    [("resnet50_importance_published_counts.json", 4.617439), ("resnet50_importance.json", 4.630866)],
    ids=["published counts", "exact counts"],
)
def test_the_published_table_gives_the_published_optimum(
    name: str, objective: float, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = ("--average-weight-bits", 3, "--average-activation-bits", 4, "--compression-ratio", 12.2)
    code, out, _ = run(capsys, "search", PUBLISHED / name, *budgets, "--alpha", 2, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["status"] == "optimal"
    assert report["objective"] == pytest.approx(objective, abs=1e-6)
    assert ImportanceTable.load(PUBLISHED / name).bits == (2, 3, 4, 5, 6)


@pytest.mark.slow
def test_each_stage_runs_alone_in_a_process_of_its_own(tmp_path: Path) -> None:
    config, folder = write_tiny(tmp_path), tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "nncf_mpq_plugin", *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    early = command("finetune", folder)
    assert early.returncode == 2
    assert command("train-importance", config, "--output", folder).returncode == 0
    missing = command("finetune", folder)
    assert missing.returncode == 2
    assert f"nncf-mpq search {folder}" in " ".join(missing.stderr.split())
    for stage, made in (
        ("search", "policy.json"),
        ("finetune", "model/model.safetensors"),
        ("export", "deploy/model.xml"),
        ("verify", "verify.json"),
    ):
        assert not (folder / made).exists()
        result = command(stage, folder)
        assert result.returncode == 0, result.stderr
        assert (folder / made).exists()
    result = command("run", folder, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == read_json(folder / "summary.json")
