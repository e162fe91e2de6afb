"""What `config check` finds out about the things that a config names, and that it runs nobody's code for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import tiny
from safetensors.torch import save_file

from nncf_mpq_plugin.cli import main
from nncf_mpq_plugin.networks import digits_resnet

IMAGES = {"sample_size": [1, 3, 32, 32]}


def check(folder: Path, capsys: pytest.CaptureFixture[str], *words: str, **changes: Any) -> tuple[int, str]:
    path = folder / "c.json"
    path.write_text(json.dumps(tiny(**changes)))
    code = main(["config", "check", str(path), *words])
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


def no_classes(folder: Path) -> None:
    (folder / "images" / "train" / "cat").mkdir(parents=True)
    (folder / "images" / "val").mkdir()


def other_weights(folder: Path) -> None:
    save_file(digits_resnet(width=8, blocks=1).state_dict(), folder / "w.safetensors")


WRONG = {
    "torchvision name": ({"model": "torchvision:resnet81"}, "Did you mean 'torchvision:resnet18'?", None),
    "no callable": ({"model": "resnet18", "model_arguments": {}}, "Did you mean 'torchvision:resnet18'?", None),
    "callable": ({"model": "nncf_mpq_plugin.networks:digit_resnet"}, "Did you mean", None),
    "arguments": ({"model_arguments": {"widht": 4}}, "does not take these arguments", None),
    "sample size": ({"input_info": {"sample_size": [1, 3, 8, 8]}}, "Check input_info.sample_size", None),
    "no checkpoint": ({"checkpoint": "w.pth"}, "w.pth: there is no such checkpoint file", None),
    "other checkpoint": ({"checkpoint": "w.safetensors"}, "has the shape", other_weights),
    "no images": ({"data": {"source": "imagefolder:images"}}, "images/train: no images by class", None),
    "no classes": ({"data": {"source": "imagefolder:images"}}, "images/val: no images by class", no_classes),
    "source": ({"data": {"source": "digit"}}, "Did you mean 'digits'?", None),
}


@pytest.mark.parametrize(("changes", "message", "prepare"), WRONG.values(), ids=WRONG.keys())
def test_what_is_missing_or_does_not_fit_is_found(
    changes: dict[str, Any], message: str, prepare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if prepare is not None:
        prepare(tmp_path)
    code, text = check(tmp_path, capsys, **changes)
    assert code == 2
    assert message in text
    assert {path.name for path in tmp_path.iterdir()} <= {"c.json", "images", "w.safetensors"}


def test_a_complete_config_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_file(digits_resnet(width=4, blocks=1).state_dict(), tmp_path / "w.safetensors")
    code, text = check(tmp_path, capsys, checkpoint="w.safetensors")
    assert code == 0
    assert "is valid" in text
    assert "Not looked at" not in text


def test_foreign_code_is_run_only_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stranger.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    foreign = {"model": "stranger:make", "data": {"source": "stranger:loaders"}, "model_arguments": {}}
    code, text = check(tmp_path, capsys, **foreign)
    assert code == 0
    assert "Not looked at without --allow-code, which would run it: model stranger:make" in text
    assert "data stranger:loaders" in text
    code, text = check(tmp_path, capsys, "--allow-code", **foreign)
    assert code == 2
    assert "importing 'stranger' raised SystemError: imported" in text
