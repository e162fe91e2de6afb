"""Every row of docs/errors.md, done to a real run: the exit code, the message, and nothing half-written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bad_models
import pytest
import torch
from runs import tiny
from safetensors.torch import save_file
from small_net import small_model

from nncf_mpq_plugin.cli import main
from nncf_mpq_plugin.errors import TrainingError, UnsupportedVersionError
from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.networks import digits_resnet
from nncf_mpq_plugin.pipeline import STAGES
from nncf_mpq_plugin.requirements import SUPPORTED, check_versions
from nncf_mpq_plugin.types import read_json

ROOT = Path(__file__).parent.parent


def small(model: str = "Net", problem: str = "", **changes: Any) -> dict[str, Any]:
    """:return: a config of a model and of loaders in bad_models.py, quick to run."""
    source = {"source": "bad_models:loaders", "batch_size": 16, "arguments": {"problem": problem}}
    base = {"model": f"bad_models:{model}", "model_arguments": {}, "training": {"epochs": 0}, "data": source}
    value = tiny(**{**base, **changes})
    precision = value["compression"]["initializer"]["precision"]
    precision["importance"] = {"samples": 16}
    value["compression"]["initializer"]["range"] = {"num_init_samples": 64}
    return value


def with_budget(**budget: Any) -> dict[str, Any]:
    value = small()
    value["compression"]["initializer"]["precision"]["budgets"] = budget
    return value


def text_of(value: dict[str, Any], old: str, new: str) -> str:
    text = json.dumps(value)
    assert old in text
    return text.replace(old, new)


def saved_weights(folder: Path, *, name: str, width: int = 4, change: Callable[[Any], None] | None = None) -> None:
    torch.manual_seed(0)
    state = digits_resnet(width=width, blocks=1).state_dict()
    if change is not None:
        change(state)
    save_file(state, folder / name) if name.endswith("safetensors") else torch.save(state, folder / name)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def truncated(name: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        saved_weights(folder, name=name)
        cut(folder / name)

    return prepare


def not_finite(folder: Path) -> None:
    saved_weights(folder, name="w.safetensors", change=lambda state: state["classifier.weight"].fill_(float("nan")))


@dataclass(frozen=True)
class Case:
    """
    :param row: the row of docs/errors.md.
    :param config: the config, or the text of its file.
    :param code: the exit code.
    :param message: what the message says, a regular expression; blanks stand for any white space.
    :param prepare: makes files in the config's folder.
    :param reached: stages that may be done before the error; what they wrote stays.
    """

    row: str
    config: dict[str, Any] | str
    code: int
    message: str
    prepare: Callable[[Path], None] = field(default=lambda folder: None)
    reached: tuple[str, ...] = ()


FLOAT = ("float",)
CASES = {
    "misspelt key": Case("config: typo", tiny(modle="x"), 2, r"c\.json: .*unknown key 'modle'; did you mean 'model'"),
    "type": Case(
        "config: type", tiny(data={"source": "digits", "batch_size": "8"}), 2, r"data\.batch_size: expected an integer"
    ),
    "not JSON": Case("config: not JSON", '{"model": ', 2, r"c\.json, line 1, column 11: not valid JSON"),
    "NaN": Case("JSON with NaN", text_of(tiny(), '"epochs": 2', '"epochs": NaN'), 2, r"NaN is not a valid number"),
    "no config": Case("missing file", "", 2, r"c\.json: cannot be read", prepare=lambda f: (f / "c.json").unlink()),
    "no checkpoint": Case("missing file", tiny(checkpoint="w.pth"), 2, r"w\.pth: there is no such checkpoint file"),
    "no images": Case(
        "missing file",
        tiny(data={"source": "imagefolder:x"}, input_info={"sample_size": [1, 3, 8, 8]}),
        2,
        r"x/train: no images by class",
    ),
    "truncated safetensors": Case(
        "unreadable or truncated checkpoint",
        tiny(checkpoint="w.safetensors"),
        2,
        r"w\.safetensors: not a whole safetensors file",
        truncated("w.safetensors"),
    ),
    "truncated pth": Case(
        "unreadable or truncated checkpoint",
        tiny(checkpoint="w.pth"),
        2,
        r"w\.pth: (cannot be read|not a plain)",
        truncated("w.pth"),
    ),
    "no checkpoint but text": Case(
        "unreadable or truncated checkpoint",
        tiny(checkpoint="w.pth"),
        2,
        r"w\.pth: (cannot be read|not a plain)",
        lambda folder: (folder / "w.pth").write_text("weights"),
    ),
    "no safetensors but text": Case(
        "unreadable or truncated checkpoint",
        tiny(checkpoint="w.safetensors"),
        2,
        r"w\.safetensors: not a whole safetensors file",
        lambda folder: (folder / "w.safetensors").write_text("weights"),
    ),
    "other architecture": Case(
        "checkpoint of another model",
        tiny(checkpoint="w.pth"),
        2,
        r"w\.pth: .*has the shape .*, the model needs",
        lambda folder: saved_weights(folder, name="w.pth", width=8),
    ),
    "NaN in a checkpoint": Case(
        "NaN in a checkpoint", tiny(checkpoint="w.safetensors"), 2, r"'classifier\.weight' holds NaN", not_finite
    ),
    "empty data": Case("empty data set", small(problem="empty"), 2, r"validation loader gives no batch"),
    "shape": Case("data of a wrong shape", small(problem="shape"), 2, r"inputs are .*\[16, 3, 8, 8\].*'N', 1, 8, 8"),
    "shape later on": Case(
        "data of a wrong shape", small(problem="late shape"), 2, r"inputs are .*\[1, 3, 8, 8\]", reached=FLOAT
    ),
    "NaN in data": Case("NaN in the data", small(problem="late NaN"), 2, r"an input holds NaN", reached=FLOAT),
    "label": Case("label out of range", small(problem="label"), 2, r"label 10 is outside 0\.\.9"),
    "label later on": Case(
        "label out of range",
        small(problem="late label"),
        2,
        r"Targets range from 0 to 10, but the model has 10 outputs",
        reached=("float", "importance", "search"),
    ),
    "no layer": Case("no layer to quantize", small("WithoutLayers"), 2, r"finds no layer to quantize", reached=FLOAT),
    "dict": Case("model returns a dict or tuple", small("ReturnsDict"), 2, r"returned dict.*Wrap it"),
    "tuple": Case("model returns a dict or tuple", small("ReturnsTuple"), 2, r"returned tuple.*Wrap it"),
    "branch": Case(
        "control flow that depends on data",
        small("Dynamic"),
        2,
        r"operations depend on the data.*torch\.where",
        reached=FLOAT,
    ),
    "loop": Case(
        "control flow that depends on data", small("DynamicLoop"), 2, r"operations depend on the data", reached=FLOAT
    ),
    "tied weights": Case(
        "tied weights", small("TiedWeights"), 2, r"weight 'conv1' is used by another.*ignored_scopes", reached=FLOAT
    ),
    "layer used twice": Case(
        "tied weights", small("TiedLayer"), 2, r"weight 'conv1' is used by another.*ignored_scopes", reached=FLOAT
    ),
    "impossible budget": Case(
        "impossible budget",
        with_budget(compression_ratio=30),
        3,
        r"compression_ratio = 30.*nearest that exists",
        reached=FLOAT,
    ),
    "no CUDA": Case("no CUDA device", tiny(device="cuda"), 2, r"device: 'cuda' is asked for.*Use 'auto' or 'cpu'"),
}
if torch.cuda.is_available():
    del CASES["no CUDA"]


def run(capsys: pytest.CaptureFixture[str], config: Path, folder: Path, *more: str) -> tuple[int, str]:
    code = main(["run", str(config), "--output", str(folder), "--allow-code", *more])
    return code, " ".join(capsys.readouterr().err.split())


def assert_whole(folder: Path) -> None:
    """Every file of a stage can be read, none is unfinished, and only finished stages are marked."""
    from safetensors import safe_open

    assert not list(folder.rglob(".tmp-*"))
    for path in folder.rglob("*.json"):
        read_json(path)
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.keys()
    for name, stage in STAGES.items():
        if (folder / "state" / f"{name}.done.json").exists():
            assert all((folder / output).exists() for output in stage.outputs), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input_says_what_where_and_what_to_do(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = tmp_path / "c.json", tmp_path / "run"
    config.write_text(case.config if isinstance(case.config, str) else json.dumps(case.config))
    case.prepare(tmp_path)
    code, error = run(capsys, config, folder)
    assert code == case.code, error
    assert re.search(f"error: .*{case.message}", error), error
    assert "Traceback" not in error
    if folder.exists():
        assert_whole(folder)
        done = [path.name.removesuffix(".done.json") for path in (folder / "state").glob("*.done.json")]
        assert sorted(done) == sorted(case.reached)


ACCEPTED = {"frozen layers": "Frozen", "names with gaps": "Gaps", "names with separators": "OddNames"}


@pytest.mark.parametrize("model", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_unusual_models_that_are_none_of_these_go_through(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(json.dumps(small(model)))
    code, error = run(capsys, tmp_path / "c.json", tmp_path / "run")
    assert code == 0, error
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["verification"]["ok"]
    layers = [name for name, module in getattr(bad_models, model)().named_modules() if hasattr(module, "weight")]
    assert sorted(row["name"] for row in summary["layers"]) == sorted(layers)


def test_a_frozen_layer_keeps_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nncf_mpq_plugin.checkpoint import load_state

    value = small("Frozen")
    (tmp_path / "c.json").write_text(json.dumps(value))
    code = main(["train-importance", str(tmp_path / "c.json"), "--output", str(tmp_path / "run"), "--allow-code"])
    assert code == 0, capsys.readouterr().err
    before = load_state(tmp_path / "run" / "float" / "model.safetensors")[0]
    after = load_state(tmp_path / "run" / "joint" / "model.safetensors")[0]
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert not torch.equal(before["conv2.weight"], after["conv2.weight"])


def test_an_input_that_is_not_finite_is_blamed_when_training_meets_it() -> None:
    inputs = torch.randn(8, 3, 8, 8)
    inputs[5, 0, 0, 0] = float("nan")
    batches = [(inputs, torch.zeros(8, dtype=torch.int64))]
    with pytest.raises(TrainingError, match="an input of the batch holds NaN or an infinity: check the data"):
        train_jointly(small_model(), batches, JointConfig(epochs=1))


# ------------------------------------------------------------------------------------------------------------- disks
@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory; only root may make one."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("a tmpfs can be mounted by root only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, beside its config."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "c.json").write_text(json.dumps(small()))
    assert main(["run", str(folder / "c.json"), "--output", str(folder / "run"), "--allow-code"]) == 0
    return folder / "run"


def forget(folder: Path, first: str) -> None:
    """Take a stage and all that follow it out of a run."""
    names = list(STAGES)
    for name in names[names.index(first) :]:
        for output in STAGES[name].outputs:
            (folder / output).unlink(missing_ok=True)
        (folder / "state" / f"{name}.done.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "state" / name, ignore_errors=True)


QUICK = ("finetune", "the end of export")


@pytest.mark.parametrize(
    "stage", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in STAGES if name not in QUICK)]
)
def test_a_full_disk_ends_a_stage_with_whole_files_and_it_goes_on_when_there_is_room(
    stage: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finished.parent / "c.json"
    pages = 2  # for the marker of the stage, so that its own files are what does not fit
    first = stage
    if stage == "the end of export":
        first, pages = "export", 2 + (finished / "deploy" / "model.onnx").stat().st_size // 4096 + 1
    with mounted(tmp_path / "disk", "size=2m") as disk:
        shutil.copytree(finished, disk / "run")
        forget(disk / "run", first)
        (disk / "filler").write_bytes(b"0" * (shutil.disk_usage(disk).free - 4096 * pages))
        code, error = run(capsys, config, disk / "run")
        assert code == 1, error
        assert re.search(rf"error: {disk}/run/\S+: could not be written \(.*MiB free\).* Make room there", error), error
        assert "Traceback" not in error
        assert_whole(disk / "run")
        assert not (disk / "run" / "state" / f"{first}.done.json").exists()
        (disk / "filler").unlink()
        code, error = run(capsys, config, disk / "run")
        assert code == 0, error
        for name in ("importance.json", "model/model.safetensors", "uniform/metrics.json", "deploy/model.onnx"):
            assert (disk / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_full_disk_at_the_start_is_exit_code_1(finished: Path, tmp_path: Path, capsys: Any) -> None:
    with mounted(tmp_path / "disk", "size=1m") as disk:
        (disk / "filler").write_bytes(b"0" * shutil.disk_usage(disk).free)
        code, error = run(capsys, finished.parent / "c.json", disk / "run")
        assert code == 1, error
        assert re.search(r"No space left on device; 0\.0 MiB free", error)
        assert_whole(disk / "run")


def test_a_read_only_place_is_refused(finished: Path, tmp_path: Path, capsys: Any) -> None:
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        code, error = run(capsys, finished.parent / "c.json", disk / "run")
        assert code == 2, error
        assert re.search(rf"{disk}/run: cannot be written \(Read-only file system\)\. Choose another --output", error)
        table = str(finished / "importance.json")
        assert main(["search", table, "--bitops-ratio", "0.5", "--output", str(disk / "p.json")]) == 2
        assert "p.json: cannot be written (Read-only file system)" in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------------------------------------------------- versions
@pytest.mark.parametrize(
    ("package", "version"), [("nncf", "2.19.0"), ("nncf", "3.5.1"), ("openvino", "2025.1.0"), ("torch", "2.14.0+cpu")]
)
def test_another_version_is_refused_before_anything_is_done(
    package: str, version: str, finished: Path, tmp_path: Path
) -> None:
    """The package's metadata says another version; the process is a real one."""
    metadata = tmp_path / "site" / f"{package}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    words = ["run", str(finished.parent / "c.json"), "--output", str(tmp_path / "run"), "--allow-code"]
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-m", "nncf_mpq_plugin", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    error = " ".join(result.stderr.split())
    assert result.returncode == 2, error
    oldest, limit = SUPPORTED[package]
    assert f"{package} {version} is installed" in error
    assert f'pip install "{package}>={oldest},<{limit}"' in error
    assert "Traceback" not in error
    assert not list((tmp_path / "run").glob("float/*"))


def test_a_missing_package_is_named() -> None:
    with pytest.raises(UnsupportedVersionError, match=r'no-such-package is not installed.*"no-such-package>=1,<2"'):
        check_versions({"no-such-package": ("1", "2")})
    check_versions()


def test_the_supported_versions_are_those_of_pyproject() -> None:
    import tomllib

    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, (oldest, limit) in SUPPORTED.items():
        assert f"{package}>={oldest},<{limit}" in stated


# ------------------------------------------------------------------------------------------------------------- table
ELSEWHERE = {
    *("disk full", "read-only folder", "unsupported versions", "folder of another config", "damaged exported file"),
    *("edited `config.json` of a run", "link out of a run's folder", "batch that processes cannot share"),
    *("a process of several dies", "training that diverged", *ACCEPTED),
}


def test_the_table_in_the_docs_has_a_row_for_each_case_and_no_other() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+?) \| (\d) \|", text, re.MULTILINE))
    assert set(rows) == {case.row for case in CASES.values()} | ELSEWHERE | {"no CUDA device"}
    for case in CASES.values():
        assert rows[case.row] == str(case.code), case.row
