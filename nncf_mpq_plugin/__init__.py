"""
Mixed-precision quantization of PyTorch models by learned layer importance, for NNCF and OpenVINO.

The names below are the public interface. Each is imported when it is first used, so that ``import nncf_mpq_plugin``
loads neither torch, nncf nor openvino.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nncf_mpq_plugin.adapters.nncf3 import freeze, load_model, place, save_model
    from nncf_mpq_plugin.allocation import BitsConstraint, Solution, explain, pareto, search, what_if
    from nncf_mpq_plugin.api import Quantized, quantize
    from nncf_mpq_plugin.comparison import policy_by_name
    from nncf_mpq_plugin.config import Config
    from nncf_mpq_plugin.costs import LatencyTable
    from nncf_mpq_plugin.deploy import compile, export, verify
    from nncf_mpq_plugin.errors import (
        ConfigError,
        InfeasibleBudgetError,
        InputError,
        InterruptedRun,
        MPQError,
        StorageError,
        TrainingError,
        UnsupportedModelError,
        UnsupportedVersionError,
        VerificationError,
    )
    from nncf_mpq_plugin.finetune import FinetuneConfig
    from nncf_mpq_plugin.finetune import finetune as fine_tune
    from nncf_mpq_plugin.importance import importance_from_scales
    from nncf_mpq_plugin.joint import JointConfig, train_jointly
    from nncf_mpq_plugin.pipeline import Listener, Pipeline, sources_of
    from nncf_mpq_plugin.runfolder import RunFolder
    from nncf_mpq_plugin.training import evaluate
    from nncf_mpq_plugin.types import AverageBits, Budget, ImportanceTable, LayerBits, Policy

_HOMES = {
    "adapters.nncf3": ("freeze", "load_model", "place", "save_model"),
    "allocation": ("BitsConstraint", "Solution", "explain", "pareto", "search", "what_if"),
    "comparison": ("policy_by_name",),
    "costs": ("LatencyTable",),
    "api": ("Quantized", "quantize"),
    "config": ("Config",),
    "deploy": ("compile", "export", "verify"),
    "errors": (
        "ConfigError",
        "InfeasibleBudgetError",
        "InputError",
        "InterruptedRun",
        "MPQError",
        "StorageError",
        "TrainingError",
        "UnsupportedModelError",
        "UnsupportedVersionError",
        "VerificationError",
    ),
    "finetune": ("FinetuneConfig", "fine_tune"),
    "importance": ("importance_from_scales",),
    "joint": ("JointConfig", "train_jointly"),
    "pipeline": ("Listener", "Pipeline", "sources_of"),
    "runfolder": ("RunFolder",),
    "training": ("evaluate",),
    "types": ("AverageBits", "Budget", "ImportanceTable", "LayerBits", "Policy"),
}
_ORIGINAL = {"fine_tune": "finetune"}  # the package's attribute "finetune" is the module
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AverageBits",
    "BitsConstraint",
    "Budget",
    "Config",
    "ConfigError",
    "FinetuneConfig",
    "ImportanceTable",
    "InfeasibleBudgetError",
    "InputError",
    "InterruptedRun",
    "JointConfig",
    "LatencyTable",
    "LayerBits",
    "Listener",
    "MPQError",
    "Pipeline",
    "Policy",
    "Quantized",
    "RunFolder",
    "Solution",
    "StorageError",
    "TrainingError",
    "UnsupportedModelError",
    "UnsupportedVersionError",
    "VerificationError",
    "compile",
    "evaluate",
    "explain",
    "export",
    "fine_tune",
    "freeze",
    "importance_from_scales",
    "load_model",
    "pareto",
    "place",
    "policy_by_name",
    "quantize",
    "save_model",
    "search",
    "sources_of",
    "train_jointly",
    "verify",
    "what_if",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), _ORIGINAL.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)
