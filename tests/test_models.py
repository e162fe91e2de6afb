"""Models by name and their weights: what is imported, what is refused, and that nothing runs unasked."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from nncf_mpq_plugin.errors import ConfigError, InputError, MPQError, UnsupportedModelError
from nncf_mpq_plugin.models import build_model, check_model, load_weights, read_state
from nncf_mpq_plugin.networks import digits_mobilenet, digits_resnet

RESNET = "nncf_mpq_plugin.networks:digits_resnet"


@pytest.mark.parametrize("make", [digits_resnet, digits_mobilenet], ids=["resnet", "mobilenet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_small_networks_give_one_output_a_class(make: type, channels: int) -> None:
    model = make(num_classes=7, channels=channels, width=4)
    assert check_model(model, torch.zeros(2, channels, 16, 16)) == 7
    assert model.training


def test_the_mobilenet_has_depthwise_layers() -> None:
    convolutions = [module for module in digits_mobilenet().modules() if isinstance(module, nn.Conv2d)]
    assert sum(module.groups == module.in_channels > 1 for module in convolutions) == 6


def test_models_by_name() -> None:
    assert isinstance(build_model("torchvision:squeezenet1_1", {"num_classes": 3}), nn.Module)
    assert build_model(RESNET, {"num_classes": 3}).classifier.out_features == 3


REFUSED = {
    "misspelt torchvision": ("torchvision:resnet81", {}, "Did you mean 'torchvision:resnet18'"),
    "no torchvision model": ("torchvision:load", {}, "no model 'load'"),
    "misspelt own": (
        "nncf_mpq_plugin.networks:digit_resnet",
        {},
        "Did you mean 'nncf_mpq_plugin.networks:digits_resnet'",
    ),
    "wrong argument": (RESNET, {"classes": 3}, "does not take these arguments"),
    "impossible argument": (RESNET, {"width": "wide"}, "raised TypeError"),
    "foreign code": ("os:system", {"command": "true"}, "--allow-code"),
    "own module that is not for models": ("nncf_mpq_plugin.cli:main", {}, "--allow-code"),
    "what a module has imported": ("nncf_mpq_plugin.networks:nn", {}, "no callable 'nn'"),
    "class of torch in it": ("nncf_mpq_plugin.networks:Tensor", {}, "no callable 'Tensor'"),
    "dotted attribute": ("nncf_mpq_plugin.networks:torch.load", {}, "not of the form"),
    "no colon": ("resnet18", {}, "not of the form.* Did you mean 'torchvision:resnet18'"),
    "no colon, no name": ("qqqq", {}, r"not of the form.*for a model\)\.$"),
}


@pytest.mark.parametrize(("spec", "arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_model_that_cannot_be_made_says_why(spec: str, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(spec, arguments)


def test_foreign_code_is_imported_only_where_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_model.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
        "from torch import nn\ndef make():\n    return nn.Linear(2, 2)\ndef nothing():\n    return 1\n"
        "def leaves():\n    raise SystemExit(3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="--allow-code"):
        build_model("foreign_model:make", {})
    assert not (tmp_path / "ran").exists()
    assert isinstance(build_model("foreign_model:make", {}, allow_code=True), nn.Linear)
    with pytest.raises(ConfigError, match="returned int"):
        build_model("foreign_model:nothing", {}, allow_code=True)
    with pytest.raises(ConfigError, match="raised SystemExit: 3"):
        build_model("foreign_model:leaves", {}, allow_code=True)
    with pytest.raises(ConfigError, match="'no_such_module' of"):
        build_model("no_such_module:make", {}, allow_code=True)


@pytest.mark.parametrize("form", ["safetensors", "state dict", "below state_dict", "data parallel"])
def test_checkpoints_are_read(form: str, tmp_path: Path) -> None:
    source, model = digits_resnet(width=4), digits_resnet(width=4)
    state = source.state_dict()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "below state_dict":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif form == "data parallel":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    load_weights(model, path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Malicious:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("it-ran"),))


def test_bad_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = digits_resnet(width=4).state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    torch.save(state, tmp_path / "whole.pth")
    for name in ("whole.safetensors", "whole.pth"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"half-{name}").write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match=f"half-{name}"):
            read_state(tmp_path / f"half-{name}")
    with pytest.raises(InputError, match="no such checkpoint"):
        read_state("missing.pth")
    torch.save({"weights": Malicious()}, "objects.pth")
    with pytest.raises(InputError, match="could run code"):
        read_state("objects.pth")
    Path("plain.pkl").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match=r"plain\.pkl"):
        read_state("plain.pkl")
    assert not Path("it-ran").exists()
    for value in ([1, 2], {}, {1: torch.zeros(2)}, {"epoch": 3}):
        torch.save(value, "other.pth")
        with pytest.raises(InputError, match="expected parameter names"):
            read_state("other.pth")


def test_weights_of_another_model_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    model = digits_resnet(width=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(digits_mobilenet(width=4).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"missing .* unknown"):
        load_weights(model, tmp_path / "other.safetensors")
    save_file(digits_resnet(width=4, num_classes=3).state_dict(), tmp_path / "classes.safetensors")
    with pytest.raises(InputError, match=r"'classifier.*' has the shape \[3.*needs \[10"):
        load_weights(model, tmp_path / "classes.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_checkpoints_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["safetensors", "pth"]))
    path = tmp_path / f"weights.{kind}"
    state = {"a": torch.arange(4.0), "b": torch.zeros(2, 2)}
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        read_state(path)
    except MPQError as error:
        assert str(path) in str(error)  # noqa: PT017


class Returns(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> object:
        flat = x.flatten(1)
        return {"dict": {"out": flat}, "tuple": (flat,), "scalar": flat.sum(), "none": None}[self.kind]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Returns("dict"), "returned dict"),
        (Returns("tuple"), "returned tuple"),
        (Returns("none"), "returned NoneType"),
        (Returns("scalar"), r"returned the shape \[\]"),
        (nn.Linear(3, 3), r"failed on an input of shape \[2, 1, 8, 8\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "bare torch.nn.Sequential"),
    ],
    ids=["dict", "tuple", "none", "scalar", "wrong input", "bare sequential"],
)
def test_a_model_that_cannot_be_used_says_why(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        check_model(model, torch.zeros(2, 1, 8, 8))
