"""docs/security.md: files from strangers run nothing and write nowhere but where they should."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import tiny, write_tiny

from nncf_mpq_plugin import Config, InputError, RunFolder
from nncf_mpq_plugin.checkpoint import load_state
from nncf_mpq_plugin.cli import main
from nncf_mpq_plugin.models import read_state

NAMES = ["../../outside", "/tmp/outside", "a/../../outside", "..", "a/b", "C:\\outside", "x\n../y"]


class Harmful:
    """What a pickle can hold: a call of any function."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def table(names: list[str]) -> dict[str, Any]:
    layers = [
        {
            "name": name,
            "macs": 1000,
            "weights": 100,
            "importance": {"weight": {"2": 0.4, "8": 0.1}, "activation": {"2": 0.5, "8": 0.05}},
        }
        for name in names
    ]
    return {"schema_version": 1, "bits": [2, 8], "layers": layers, "fixed_layers": []}


@pytest.mark.parametrize("kind", ["torch", "zip", "plain"])
def test_a_checkpoint_that_holds_code_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "w.pth"
    if kind == "torch":
        torch.save({"weight": torch.zeros(2), "more": Harmful(marker)}, path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../../outside", "x")
            archive.writestr("archive/data.pkl", pickle.dumps(Harmful(marker)))
            archive.writestr("archive/version", "3\n")
    else:
        path.write_bytes(pickle.dumps(Harmful(marker)))
    with pytest.raises(InputError, match=r"w\.pth"):
        read_state(path)
    assert not marker.exists()
    assert everything(tmp_path) == {path}


def test_a_training_state_that_is_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "state.safetensors"
    path.write_bytes(pickle.dumps(Harmful(marker)))
    with pytest.raises(InputError, match="not a readable training state"):
        load_state(path)
    assert not marker.exists()


def test_names_in_artefacts_are_never_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers called like paths, through search, policy, sweep and report: nothing appears outside."""
    run = tmp_path / "deep" / "er" / "run"
    RunFolder.create(run, Config.from_json(tiny()))
    (run / "importance.json").write_text(json.dumps(table(NAMES)))
    before = everything(tmp_path)
    assert main(["search", str(run), "--bitops-ratio", "0.5", "--output", str(run / "policy.json"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["policy"]) == set(NAMES)
    assert main(["pareto", str(run), "--points", "3", "--output", str(run / "sweep.json")]) == 0
    assert main(["report", str(run)]) == 0
    new = everything(tmp_path) - before
    assert new == {run / "policy.json", run / "sweep.json", run / "report.html"}
    assert not Path("/tmp/outside").exists()


def test_layers_called_like_paths_are_states_that_can_be_saved(tmp_path: Path) -> None:
    from nncf_mpq_plugin.checkpoint import save_state

    tensors = {name: torch.full((2,), float(index)) for index, name in enumerate(NAMES)}
    save_state(tmp_path / "s.safetensors", tensors, {})
    assert everything(tmp_path) == {tmp_path / "s.safetensors"}
    assert {name: value[0].item() for name, value in load_state(tmp_path / "s.safetensors")[0].items()} == {
        name: float(index) for index, name in enumerate(NAMES)
    }


@pytest.mark.parametrize("entry", ["deploy", "log.txt", "state/float", "model/model.safetensors"])
def test_a_link_out_of_a_run_is_refused(entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run, outside = write_tiny(tmp_path), tmp_path / "run", tmp_path / "outside"
    RunFolder.create(run, Config.load(config))
    outside.mkdir()
    (run / entry).parent.mkdir(parents=True, exist_ok=True)
    (run / entry).unlink(missing_ok=True)
    (run / entry).symlink_to(outside / "x" if "." in entry else outside)
    for words in (["run", str(config), "--output", str(run)], ["run", str(run)], ["report", str(run)]):
        assert main(words) == 2
        assert f"{run / entry} is a link to" in capsys.readouterr().err.replace("\n", " ")
    assert not everything(outside)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = write_tiny(tmp_path), tmp_path / "run"
    (tmp_path / "mine.txt").write_text("mine")
    run.mkdir()
    (run / ".lock").symlink_to(tmp_path / "mine.txt")
    assert main(["run", str(config), "--output", str(run)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_links_inside_a_run_and_to_the_whole_run_are_fine(tmp_path: Path) -> None:
    config = Config.from_json(tiny())
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    folder = RunFolder.create(tmp_path / "run", config)
    (folder.path / "mine").symlink_to("config.json")
    assert RunFolder.open(tmp_path / "run").config == config


def test_restart_removes_links_and_not_what_they_lead_to(tmp_path: Path) -> None:
    config, run, outside = Config.from_json(tiny()), tmp_path / "run", tmp_path / "outside"
    RunFolder.create(run, config)
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    (run / "deploy").symlink_to(outside)
    RunFolder.create(run, config, restart=True)
    assert not (run / "deploy").exists()
    assert (outside / "mine.txt").read_text() == "mine"


def test_restart_keeps_the_latency_table_that_the_new_config_names(tmp_path: Path) -> None:
    run, value = tmp_path / "run", tiny()
    RunFolder.create(run, Config.from_json(value))
    (run / "latency.json").write_text("{}")
    value["compression"]["initializer"]["precision"]["search"] = {"latency_table": str(run / "latency.json")}
    RunFolder.create(run, Config.from_json(value), restart=True)
    assert (run / "latency.json").exists()
    RunFolder.create(run, Config.from_json(tiny()), restart=True)
    assert not (run / "latency.json").exists()


def test_restart_removes_nothing_from_a_run_that_it_refuses(tmp_path: Path) -> None:
    config, run = Config.from_json(tiny()), tmp_path / "run"
    RunFolder.create(run, config)
    (run / "policy.json").write_text("{}")
    (run / "mine").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is a link to"):
        RunFolder.create(run, config, restart=True)
    assert (run / "policy.json").exists()


def test_a_file_is_written_in_place_of_a_link_not_through_it(tmp_path: Path) -> None:
    from nncf_mpq_plugin.files import written_atomically

    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with written_atomically(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "target").read_text() == "mine"
    assert (tmp_path / "link").read_text() == "new"


def test_a_saved_model_s_config_imports_modules_of_nncf_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's nncf_config.json names the classes of its quantizers by module."""
    from networks import Residual, prepared
    from safetensors.torch import save_file

    from nncf_mpq_plugin.adapters.nncf3 import load_model

    marker = tmp_path / "ran"
    (tmp_path / "stranger.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Quantizer: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    command = {
        "hook_names_in_model": ["post_hooks.x__0.0"],
        "module_path": "stranger",
        "module_cls_name": "Quantizer",
        "module_config": {},
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "nncf_config.json").write_text(json.dumps({"compression_state": [command]}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match="does not fit this model"):
        load_model(tmp_path / "model", prepared(Residual))
    assert not marker.exists()


def test_nothing_of_a_config_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"
    code = f"__import__('os').mkdir({str(marker)!r})"
    for changes in ({"model": code}, {"model": f"os:{code}"}, {"data": {"source": code}}, {"checkpoint": code}):
        config = write_tiny(tmp_path, **changes)
        assert main(["config", "check", str(config)]) == 2
        capsys.readouterr()
    assert not marker.exists()
