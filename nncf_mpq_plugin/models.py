"""
From the names in a config to objects: a model, its floating-point weights, or a callable of the user's.

A config that names ``package.module:callable`` runs that code. So a callable outside torchvision and
:mod:`nncf_mpq_plugin.networks` is imported only where the user has allowed it.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nncf_mpq_plugin.errors import ConfigError, InputError, UnsupportedModelError
from nncf_mpq_plugin.schema import nearest

TRUSTED_MODULE = "nncf_mpq_plugin.networks"


def build_model(spec: str, arguments: Mapping[str, Any], *, allow_code: bool = False) -> nn.Module:
    """
    Make the model that a config names.

    :param spec: ``torchvision:NAME`` or ``package.module:callable``.
    :param arguments: keyword arguments for it.
    :param allow_code: whether callables outside torchvision and this package may be imported.
    :raises ConfigError: if it cannot be found, is not allowed, does not take the arguments, or returns no module.
    """
    if spec.startswith("torchvision:"):
        build = _torchvision_model(spec.removeprefix("torchvision:"))
    else:
        build = import_callable(spec, "model", allow_code=allow_code)
    model = call(build, arguments, f"model {spec!r}")
    if not isinstance(model, nn.Module):
        msg = f"model: {spec!r} returned {type(model).__name__}, expected a torch.nn.Module."
        raise ConfigError(msg)
    return model


def is_foreign(spec: str) -> bool:
    """:return: whether ``spec`` names code outside torchvision and this package."""
    return not spec.startswith("torchvision:") and spec.partition(":")[0] != TRUSTED_MODULE


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models()


def _torchvision_model(name: str) -> Callable[..., Any]:
    from torchvision import models

    known = _torchvision_names()
    if name not in known:
        close = nearest(name, known)
        hint = f"Did you mean 'torchvision:{close}'?" if close else "See torchvision.models.list_models()."
        msg = f"model: torchvision has no model {name!r}. {hint}"
        raise ConfigError(msg)
    build: Callable[..., Any] = models.get_model_builder(name)
    return build


def split_callable(spec: str, key: str) -> tuple[str, str]:
    """
    :param spec: ``package.module:callable``.
    :param key: the config key it stands at, for messages.
    :return: module and name.
    :raises ConfigError: if it is not of that form.
    """
    module, colon, name = spec.partition(":")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        known = nearest(spec, _torchvision_names()) if key == "model" and not colon else None
        hint = f" Did you mean 'torchvision:{known}'?" if known else ""
        msg = f"{key}: {spec!r} is not of the form 'package.module:callable' (or 'torchvision:NAME' for a model).{hint}"
        raise ConfigError(msg)
    return module, name


def import_callable(spec: str, key: str, *, allow_code: bool) -> Callable[..., Any]:
    """
    Import ``package.module:callable``.

    :param spec: the name.
    :param key: the config key it stands at, for messages.
    :param allow_code: see :func:`build_model`.
    :raises ConfigError: if it cannot be found or is not allowed; the message names the nearest name in the module.
    """
    module_name, name = split_callable(spec, key)
    if module_name != TRUSTED_MODULE and not allow_code:
        msg = (
            f"{key}: {spec!r} would import and run code from outside this package. If you trust it, say so with "
            "--allow-code (in Python: allow_code=True)."
        )
        raise ConfigError(msg)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        msg = f"{key}: the module {module_name!r} of {spec!r} cannot be imported ({error}). Is it on the Python path?"
        raise ConfigError(msg) from error
    except (Exception, SystemExit) as error:
        msg = f"{key}: importing {module_name!r} raised {type(error).__name__}: {error}"
        raise ConfigError(msg) from error
    found = getattr(module, name, None)
    if module_name == TRUSTED_MODULE and getattr(found, "__module__", None) != TRUSTED_MODULE:
        found = None
    if not callable(found):
        names = [other for other in dir(module) if callable(getattr(module, other)) and not other.startswith("_")]
        close = nearest(name, names)
        hint = f"Did you mean '{module_name}:{close}'?" if close else f"It has {', '.join(names[:8]) or 'none'}."
        msg = f"{key}: {module_name!r} has no callable {name!r}. {hint}"
        raise ConfigError(msg)
    result: Callable[..., Any] = found
    return result


def call(function: Callable[..., Any], arguments: Mapping[str, Any], place: str) -> Any:
    """
    Call a callable that a config names.

    :raises ConfigError: if it does not take the arguments, or raises.
    """
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        msg = f"{place}: does not take these arguments ({error}). Its signature is {inspect.signature(function)}."
        raise ConfigError(msg) from error
    except ValueError:
        pass  # a builtin without a signature: the call itself will tell
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
        msg = f"{place}: raised {type(error).__name__}: {error}"
        raise ConfigError(msg) from error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """
    Read a state dict.

    :param path: ``.safetensors``, or a file that ``torch.load`` reads with ``weights_only=True``; a state dict below
        the key ``state_dict`` or ``model`` and names that begin with ``module.`` are understood.
    :return: parameter name -> tensor, on the CPU.
    :raises InputError: if the file is missing, truncated, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"{path}: there is no such checkpoint file. Check the path (it is relative to the config file)."
        raise InputError(msg)
    try:
        if path.suffix == ".safetensors":
            value: Any = load_file(path)
        else:
            value = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        msg = f"{path}: not a whole safetensors file ({error}). Make, copy or download it again."
        raise InputError(msg) from error
    except pickle.UnpicklingError as error:
        msg = (
            f"{path}: not a plain state dict; it is truncated or holds Python objects, which are not loaded because "
            "they could run code. Save `model.state_dict()` alone, best as safetensors."
        )
        raise InputError(msg) from error
    except Exception as error:  # a damaged file makes torch's reader raise nearly anything
        msg = f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {str(error)[:200]})."
        raise InputError(msg) from error
    for key in ("state_dict", "model"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
            break
    if (
        not isinstance(value, Mapping)
        or not value
        or not all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items())
    ):
        msg = f"{path}: expected parameter names with tensors. Save `model.state_dict()`."
        raise InputError(msg)
    return {name.removeprefix("module."): item for name, item in value.items()}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """
    Load a checkpoint into ``model``; every parameter and buffer must be there with its shape.

    :raises InputError: naming what is missing, unknown, of another shape or not finite. The model is unchanged then.
    """
    state, own = read_state(path), model.state_dict()
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or unknown:
        msg = (
            f"{path}: does not fit the model {type(model).__name__}: {len(missing)} missing "
            f"({', '.join(missing[:4])}), {len(unknown)} unknown ({', '.join(unknown[:4])}). "
            "Is it of another architecture?"
        )
        raise InputError(msg)
    for name, value in state.items():
        if value.shape != own[name].shape:
            msg = (
                f"{path}: {name!r} has the shape {list(value.shape)}, the model needs {list(own[name].shape)}. "
                "Check model_arguments (e.g. num_classes)."
            )
            raise InputError(msg)
        if not torch.isfinite(value).all():
            msg = f"{path}: {name!r} holds NaN or an infinity; that training had diverged. Take an earlier checkpoint."
            raise InputError(msg)
    model.load_state_dict(state)


def check_model(model: nn.Module, example_input: Tensor) -> int:
    """
    Run the model once.

    :param example_input: ``[N, ...]``.
    :return: the number of outputs of a sample (classes).
    :raises UnsupportedModelError: if it fails, or returns anything but one tensor ``[N, classes]``.
    """
    if type(model) is nn.Sequential:
        msg = (
            "The model is a bare torch.nn.Sequential, which would call NNCF's quantizers as if they were layers. Wrap "
            "it in a module of your own whose forward calls it."
        )
        raise UnsupportedModelError(msg)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(example_input)
    except Exception as error:
        msg = (
            f"The model failed on an input of shape {list(example_input.shape)}: {type(error).__name__}: {error}. "
            "Check input_info.sample_size."
        )
        raise UnsupportedModelError(msg) from error
    finally:
        model.train(was_training)
    if not isinstance(output, Tensor):
        msg = (
            f"The model returned {type(output).__name__}, expected one tensor. Wrap it in a module whose forward "
            "returns the logits alone."
        )
        raise UnsupportedModelError(msg)
    if output.dim() < 2 or output.shape[0] != example_input.shape[0]:
        msg = f"The model returned the shape {list(output.shape)} for {len(example_input)} samples, expected [N, ...]."
        raise UnsupportedModelError(msg)
    return output.shape[1]
