"""A run that is small enough for quick tests."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "model": "nncf_mpq_plugin.networks:digits_resnet",
    "model_arguments": {"width": 4, "blocks": 1},
    "input_info": {"sample_size": [1, 1, 8, 8]},
    "data": {"source": "digits", "batch_size": 64},
    "training": {"epochs": 2},
    "compression": {
        "initializer": {
            "range": {"num_init_samples": 64},
            "precision": {
                "bits": [2, 4, 8],
                "joint_training": {"epochs": 1},
                "budgets": {"average_bits": {"weight": 4, "activation": 4}},
            },
        }
    },
    "fine_tuning": {"epochs": 1},
    "deploy": {"verify_samples": 64},
    "device": "cpu",
}


def tiny(**changes: Any) -> dict[str, Any]:
    """:return: the tiny config with top-level keys replaced."""
    return copy.deepcopy(TINY) | changes


def write_tiny(folder: Path, **changes: Any) -> Path:
    """:return: the path of a tiny config in ``folder``."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(tiny(**changes)))
    return path
