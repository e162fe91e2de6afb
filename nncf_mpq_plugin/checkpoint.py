"""
The state of a training loop on disk: one safetensors file with the other values as JSON in its header.

One file, written beside its place and renamed, so that a killed process leaves either the state before or the state
after, never half of one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.files import written_atomically

STATE_FILE = "state.safetensors"
CHECKSUM_DIGITS = 8  # of a CRC-32, in front of the values


def save_state(path: str | Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """
    Write tensors and JSON-serialisable values; the file appears only whole.

    :param path: file to write; its folder is made.
    :param tensors: name -> tensor of any shape and type; names may share memory.
    :param values: JSON-serialisable; NaN and infinities are refused.
    :raises InputError: if there can be no such file.
    :raises StorageError: if the disk is full or fails.
    """
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.numel() * value.element_size():
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        separate[name] = value
    text = json.dumps(values, allow_nan=False)
    # one entry: safetensors writes several in an arbitrary order, and equal states shall be equal files
    metadata = {"state": _checksum(separate, text) + text}
    with written_atomically(path) as temporary:
        save_file(separate, temporary, metadata=metadata)


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """
    :return: what :func:`save_state` was given.
    :raises InputError: if the file cannot be read or was not written by :func:`save_state`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = (file.metadata() or {})["state"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = state[CHECKSUM_DIGITS:]
        if state[:CHECKSUM_DIGITS] != _checksum(tensors, text):
            raise ValueError("the checksum differs: the file is damaged")  # noqa: EM101
        return tensors, json.loads(text)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        msg = f"{path}: not a readable training state ({error}). Delete it to begin this stage anew."
        raise InputError(msg) from error


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:0{CHECKSUM_DIGITS}x}"


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """:return: parameters and buffers by name, those that are not saved by ``state_dict`` included."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: value.detach() for name, value in named}


def restore_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """
    Copy saved values into a model's parameters and buffers, in place.

    :param tensors: what :func:`model_tensors` gave.
    :raises InputError: if names or shapes differ.
    """
    own = model_tensors(model)
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        msg = (
            f"The saved training state does not fit this model: {len(wrong)} of {len(own)} tensors differ in name or "
            f"shape, the first is {wrong[0]!r}. It belongs to another model or configuration; delete it to begin anew."
        )
        raise InputError(msg)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """:return: the optimizer's state (momentum and so on): ``<parameter index>/<key>`` -> tensor."""
    result = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                result[f"{index}/{key}"] = torch.as_tensor(value)
    return result


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """:param tensors: what :func:`optimizer_tensors` gave for an optimizer over the same parameters."""
    parameters = _parameters(optimizer)
    for name, value in tensors.items():
        index, key = name.split("/", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape and value.dtype == parameter.dtype and key != "step":
            value = torch.empty_like(parameter, requires_grad=False).copy_(value)
        optimizer.state[parameter][key] = value


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
