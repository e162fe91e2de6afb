"""
NNCF 2.19: ``learned_importance`` as a type of precision initialisation, beside ``hawq``, ``autoq`` and ``manual``.

NNCF 2.19 is the last one with JSON configs and precision initialisers. It has no registry for them, so
:func:`register` extends the five places that know the types, and :func:`unregister` puts them back::

    from nncf_mpq_plugin.adapters import nncf2

    nncf2.register()  # before NNCFConfig.from_dict or from_json

A script that cannot be edited runs under ``python -m nncf_mpq_plugin.adapters.nncf2 script.py arguments...``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nncf_mpq_plugin.errors import InputError, MPQError

if TYPE_CHECKING:
    from torch import nn

# NNCF compiles a CPU extension on first use and gives up after 60 s, which a busy machine exceeds
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "900")

TYPE = "learned_importance"
VERSION = "2.19"
TRACING_VARIABLE = "NNCF_TORCH_LEGACY_TRACING"
DESCRIPTION = (
    "Trains one scale per candidate bit width of each quantizer together (LIMPQ), measures what each tensor loses at "
    "each bit width, and finds the best bit widths within the budgets by integer linear programming. Weights are "
    "restored; the quantizers keep the learned scales."
)
PRIVATE_NAMES = (
    "nncf.config.schemata.algo.quantization.PRECISION_INIT_TYPES_VS_DESCRIPTION",
    "nncf.config.schemata.algo.quantization.PRECISION_INITIALIZER_SCHEMA",
    "nncf.torch.quantization.init_precision.PrecisionInitializerFactory.create",
    "nncf.torch.quantization.algo.QuantizationBuilder._parse_precision_init_params",
    "nncf.torch.quantization.algo.QuantizationBuilder.initialize",
)


@dataclass(frozen=True)
class _Extension:
    """One thing that was changed: where, what was there, what is there now."""

    holder: Any
    name: str
    before: Any
    after: Any

    def is_in_place(self) -> bool:
        return self.holder.__dict__.get(self.name) is self.after


_extensions: list[_Extension] = []
_keys: tuple[str, ...] = ()


def is_registered() -> bool:
    """:return: whether NNCF knows the type."""
    return bool(_extensions)


def register() -> None:
    """
    Make NNCF 2.19 accept and run ``"initializer": {"precision": {"type": "learned_importance", ...}}``.

    A second call changes nothing. ``create_compressed_model`` needs the data and the loss from
    ``nncf.torch.register_default_init_args(config, loader, criterion=...)``, as for ``hawq``.

    :raises InputError: if NNCF is missing, of another version, was imported without its legacy tracing, or is not what
        this module expects; the message says what to do.
    """
    global _keys
    if is_registered():
        return
    descriptions, schema, factory, builder = _checked_nncf()
    from nncf_mpq_plugin.adapters.nncf2_init import LearnedImportanceInitializer, LearnedImportanceParams
    from nncf_mpq_plugin.adapters.nncf2_keys import schema_properties

    create: Callable = factory.__dict__["create"].__func__
    parse: Callable = builder.__dict__["_parse_precision_init_params"]
    initialize: Callable = builder.__dict__["initialize"]

    def create_with_learned_importance(init_type: str) -> Any:
        return LearnedImportanceInitializer if init_type == TYPE else create(init_type)

    def parse_with_learned_importance(self: Any, initializer_config: Mapping[str, Any]) -> tuple[Any, Any]:
        precision = initializer_config.get("precision") or {}
        if precision.get("type") != TYPE:
            result: tuple[Any, Any] = parse(self, initializer_config)
            return result
        return TYPE, LearnedImportanceParams.from_config(self.config, initializer_config)

    def initialize_with_learned_scales(self: Any, model: Any) -> None:
        if isinstance(self._precision_init_params, LearnedImportanceParams):
            self._precision_init_params.carry_scales(self._weight_quantizers, self._non_weight_quantizers)
        initialize(self, model)

    replacements = (
        (factory, "create", staticmethod(create_with_learned_importance)),
        (builder, "_parse_precision_init_params", parse_with_learned_importance),
        (builder, "initialize", initialize_with_learned_scales),
    )
    for holder, name, after in replacements:
        _extensions.append(_Extension(holder, name, holder.__dict__[name], after))
        setattr(holder, name, after)
    descriptions[TYPE] = DESCRIPTION
    schema["properties"]["type"]["oneOf"].append({"const": TYPE, "title": TYPE, "description": DESCRIPTION})
    new = {name: value for name, value in schema_properties().items() if name not in schema["properties"]}
    schema["properties"].update(new)
    _keys = tuple(new)


def unregister() -> None:
    """
    Put everything back as it was; models made in the meantime stay as they are.

    :raises MPQError: if something else has changed the same places since; nothing is changed then.
    """
    global _keys
    if not is_registered():
        return
    for extension in _extensions:
        if not extension.is_in_place():
            msg = (
                f"{extension.holder.__name__}.{extension.name} was changed by something else after register(). "
                "Undo that first: putting back what was there before would undo it as well."
            )
            raise MPQError(msg)
    algo = importlib.import_module("nncf.config.schemata.algo.quantization")
    types = algo.PRECISION_INITIALIZER_SCHEMA["properties"]["type"]["oneOf"]
    for extension in _extensions:
        setattr(extension.holder, extension.name, extension.before)
    algo.PRECISION_INIT_TYPES_VS_DESCRIPTION.pop(TYPE, None)
    types[:] = [entry for entry in types if entry["const"] != TYPE]
    for key in _keys:
        algo.PRECISION_INITIALIZER_SCHEMA["properties"].pop(key, None)
    _extensions.clear()
    _keys = ()


def freeze(controller: Any) -> nn.Module:
    """
    Make the model that ``deploy.export`` takes; see :func:`nncf_mpq_plugin.adapters.nncf2_freeze.freeze`.

    :param controller: what ``create_compressed_model`` returned beside the model; of any precision initialisation.
    """
    from nncf_mpq_plugin.adapters.nncf2_freeze import freeze as run

    return run(controller)


def _checked_nncf() -> tuple[dict[str, str], dict[str, Any], Any, Any]:
    """:return: NNCF's descriptions of types, its schema, its factory of initialisers, its quantization builder."""
    try:
        version = importlib.metadata.version("nncf")
    except importlib.metadata.PackageNotFoundError as error:
        msg = f"NNCF is not installed. Install nncf=={VERSION}.* for JSON configs with precision initialisers."
        raise InputError(msg) from error
    if version.split(".")[:2] != VERSION.split("."):
        newer = int(version.split(".")[0]) >= 3
        hint = (
            "It has no precision initialisers; use nncf_mpq_plugin.quantize(...) or `nncf-mpq run CONFIG` instead."
            if newer
            else f"Install nncf=={VERSION}.*."
        )
        msg = f"NNCF {version} is installed, and {TYPE!r} can be registered in NNCF {VERSION} only. {hint}"
        raise InputError(msg)
    from nncf.torch.dynamic_graph.patch_pytorch_state import PATCHING_STATE

    if not PATCHING_STATE.operators_are_wrapped:
        msg = (
            f"NNCF {version} was imported without its legacy tracing, which create_compressed_model needs. Set "
            f"{TRACING_VARIABLE}=1 in the environment before Python starts, or run the script with "
            "`python -m nncf_mpq_plugin.adapters.nncf2 script.py`."
        )
        raise InputError(msg)
    schemata = importlib.import_module("nncf.config.schemata.algo.quantization")
    factory = importlib.import_module("nncf.torch.quantization.init_precision")
    algo = importlib.import_module("nncf.torch.quantization.algo")
    try:
        descriptions = schemata.PRECISION_INIT_TYPES_VS_DESCRIPTION
        schema = schemata.PRECISION_INITIALIZER_SCHEMA
        known = {entry["const"] for entry in schema["properties"]["type"]["oneOf"]}
        expected = (
            isinstance(factory.PrecisionInitializerFactory.__dict__["create"], staticmethod)
            and callable(algo.QuantizationBuilder.__dict__["_parse_precision_init_params"])
            and callable(algo.QuantizationBuilder.__dict__["initialize"])
            and algo.PRECISION_INIT_TYPES_VS_DESCRIPTION is descriptions
            and known == set(descriptions)
        )
    except (AttributeError, KeyError, TypeError) as error:
        msg = f"NNCF {version} is not as expected ({type(error).__name__}: {error}). Install it anew, unpatched."
        raise InputError(msg) from error
    if not expected or TYPE in known:
        msg = (
            f"NNCF {version} is not as expected: one of {', '.join(PRIVATE_NAMES)} was changed by something else. "
            "Call register() before other extensions, or install NNCF anew."
        )
        raise InputError(msg)
    return descriptions, schema, factory.PrecisionInitializerFactory, algo.QuantizationBuilder


def run_script(arguments: Sequence[str]) -> None:
    """
    Run a script as ``python script.py arguments...`` would, with the type registered before it begins.

    :param arguments: path of the script and its arguments, or ``-m``, a module's name and its arguments.
    :raises InputError: if there is no script, or as :func:`register`.
    """
    is_module = bool(arguments) and arguments[0] == "-m"
    rest = list(arguments[1:] if is_module else arguments)
    if not rest or rest[0].startswith("-"):
        msg = "Name a script: python -m nncf_mpq_plugin.adapters.nncf2 script.py arguments...  (or -m module)"
        raise InputError(msg)
    if not is_module and not Path(rest[0]).is_file():
        msg = f"{rest[0]}: no such file."
        raise InputError(msg)
    os.environ.setdefault(TRACING_VARIABLE, "1")
    # as __main__ this file is another module than the one that everyone else imports
    importlib.import_module("nncf_mpq_plugin.adapters.nncf2").register()
    sys.argv = rest
    if is_module:
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(rest[0]).resolve().parent)
        runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    try:
        run_script(sys.argv[1:])
    except MPQError as error:
        msg = f"error: {error}"
        raise SystemExit(msg) from error
