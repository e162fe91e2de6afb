import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nncf_mpq_plugin.checkpoint import (
    load_state,
    model_tensors,
    optimizer_tensors,
    restore_optimizer,
    restore_tensors,
    save_state,
)
from nncf_mpq_plugin.errors import InputError, StorageError


def test_round_trip_of_shared_strided_and_scalar_tensors(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "base": base,
        "same memory": base,
        "transposed": base.transpose(0, 2),
        "part": base[0, :2],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    save_state(tmp_path / "deep" / "s.safetensors", tensors, {"step": 3, "nested": {"a": [1.5, None]}})
    loaded, values = load_state(tmp_path / "deep" / "s.safetensors")
    assert values == {"step": 3, "nested": {"a": [1.5, None]}}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert os.listdir(tmp_path / "deep") == ["s.safetensors"]


def test_equal_states_are_equal_files(tmp_path):
    def saved(index: int) -> bytes:
        path = tmp_path / f"{index}.safetensors"
        save_state(path, {"a": torch.ones(2), "b": torch.zeros(3)}, {"step": 1, "done": False})
        return path.read_bytes()

    assert len({saved(index) for index in range(20)}) == 1


def test_a_failed_save_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    save_state(path, {"a": torch.ones(2)}, {"step": 1})

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nncf_mpq_plugin.files.os.replace", full_disk)
    with pytest.raises(StorageError, match="No space"):
        save_state(path, {"a": torch.zeros(2)}, {"step": 2})
    assert load_state(path)[1] == {"step": 1}
    assert os.listdir(tmp_path) == ["s.safetensors"]
    with pytest.raises(ValueError, match="JSON"):
        save_state(path, {}, {"loss": float("nan")})


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_files_are_input_errors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "s.safetensors"
    save_state(path, {"a": torch.ones(8)}, {"step": 1})
    content = bytearray(path.read_bytes())
    cut = data.draw(st.integers(0, len(content) - 1))
    damaged = (
        content[:cut] if data.draw(st.booleans()) else bytes([*content[:cut], content[cut] ^ 0x55, *content[cut + 1 :]])
    )
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="not a readable training state"):
        load_state(path)


def test_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="not a readable training state"):
        load_state(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_restored_optimizer_goes_on_identically(kind):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
        parameters = model.parameters()
        if kind == "sgd":
            return model, torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True)
        return model, torch.optim.Adam(parameters, lr=0.1, foreach=True)

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    whole, optimizer = make()
    step(whole, optimizer, 1)
    saved = {name: value.clone() for name, value in model_tensors(whole).items()}
    state = {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
    step(whole, optimizer, 2)
    resumed, second = make()
    restore_tensors(resumed, saved)
    restore_optimizer(second, state)
    step(resumed, second, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_state_of_another_model_is_refused():
    with pytest.raises(InputError, match=r"the first is 'weight'"):
        restore_tensors(nn.Linear(3, 2), model_tensors(nn.Linear(4, 2)))
