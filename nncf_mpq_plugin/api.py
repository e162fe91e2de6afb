"""One call for the whole way, on a model, loaders and a loss of one's own."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nncf_mpq_plugin import distributed
from nncf_mpq_plugin.adapters.nncf3 import quiet
from nncf_mpq_plugin.batches import split_batch
from nncf_mpq_plugin.config import Config
from nncf_mpq_plugin.data import Data, first_batch
from nncf_mpq_plugin.pipeline import Listener, Pipeline, Sources
from nncf_mpq_plugin.runfolder import taken
from nncf_mpq_plugin.training import LossFunction
from nncf_mpq_plugin.types import Policy


@dataclass(frozen=True)
class Quantized:
    """
    What :func:`quantize` made.

    :param model: the deployable model, with NNCF's own quantizers at the chosen bits.
    :param policy: the bit widths of every layer.
    :param summary: accuracies, BitOps and sizes against floating point and uniform bits, as in summary.json.
    :param folder: the run's folder; ``deploy/`` in it has the OpenVINO and ONNX files.
    """

    model: nn.Module
    policy: Policy
    summary: Mapping[str, Any]
    folder: Path


def quantize(
    model: nn.Module,
    train_loader: Any,
    validation_loader: Any,
    *,
    budgets: Mapping[str, Any],
    output: str | Path,
    loss: LossFunction | None = None,
    bits: Sequence[int] | None = None,
    fixed_bits: Mapping[str, int] | None = None,
    ignored_scopes: Sequence[str] | None = None,
    alpha: float | None = None,
    precision: Mapping[str, Any] | None = None,
    joint_training: Mapping[str, Any] | None = None,
    fine_tuning: Mapping[str, Any] | None = None,
    deploy: Mapping[str, Any] | None = None,
    uniform_baseline: bool | None = None,
    seed: int | None = None,
    device: str | None = None,
    restart: bool = False,
    listener: Listener | None = None,
) -> Quantized:
    """
    Find and train a mixed-precision version of ``model`` within budgets, export and verify it.

    An interrupted call goes on where it stopped when it is made again with the same ``output``. In a script that
    torchrun starts, all processes train together (docs/distributed.md). What is None has the default of the config
    reference (docs/config.md), whose checks apply.

    :param model: a trained floating-point model that takes and returns one tensor; it is not changed.
    :param train_loader: yields ``(input [N, ...], target)``; a ``DataLoader``, or anything with a length.
    :param validation_loader: likewise.
    :param budgets: e.g. ``{"average_bits": {"weight": 3, "activation": 4}, "compression_ratio": 10}``.
    :param output: the run's folder.
    :param loss: (output, target) -> scalar; None is cross entropy.
    :param bits: candidate bit widths.
    :param fixed_bits: layers that are not searched, e.g. ``{"first": 8, "last": 8}``.
    :param ignored_scopes: layers to keep in floating point.
    :param alpha: weight importance counts alpha times.
    :param precision: further keys of the config's ``compression.initializer.precision``, e.g.
        ``{"keep_weights": "trained"}``.
    :param joint_training: keys of the config's section of that name, e.g. ``{"epochs": 2}``.
    :param fine_tuning: likewise.
    :param deploy: likewise.
    :param uniform_baseline: also train the best uniform policy within the budgets, and measure post-training INT8.
    :param seed: seed of everything random.
    :param device: ``auto``, ``cpu`` or ``cuda``.
    :param restart: remove what an earlier run left in ``output``.
    :param listener: gets log lines and progress.
    :raises InputError: for a model, loader or setting that cannot be used, or a folder of another run.
    :raises InfeasibleBudgetError: if no policy meets the budgets.
    :raises TrainingError: if training diverges.
    :raises VerificationError: if the exported files do not agree with the model.
    """
    first_batch(train_loader, "training")
    first = first_batch(validation_loader, "validation")
    value = _given(
        model=f"python:{type(model).__name__}#{_digest(model)}",
        input_info={"sample_size": [1, *split_batch(first)[0].shape[1:]]},
        data={"source": "python:loaders", "arguments": _identity(train_loader, validation_loader, loss)},
        compression=_given(
            ignored_scopes=None if ignored_scopes is None else list(ignored_scopes),
            initializer={
                "precision": dict(precision or {})
                | _given(
                    bits=None if bits is None else list(bits),
                    fixed_bits=None if fixed_bits is None else dict(fixed_bits),
                    joint_training=joint_training,
                    alpha=alpha,
                    budgets=dict(budgets),
                    seed=seed,
                )
            },
        ),
        fine_tuning=fine_tuning,
        deploy=deploy,
        uniform_baseline=uniform_baseline,
        device=device,
    )
    config = Config.from_json(value, "quantize()")
    sources = Sources(
        build=lambda: copy.deepcopy(model).cpu(),
        load_data=lambda: Data(train_loader, validation_loader),
        loss=loss,
        classification=loss is None,
    )
    with distributed.joined(config.device), taken(output, config, restart=restart) as folder, quiet():
        pipeline = Pipeline(folder, sources, listener or Listener())
        summary = pipeline.run()
        return Quantized(pipeline.frozen_model(), Policy.load(folder.file("policy.json")), summary, folder.path)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _identity(train_loader: Any, validation_loader: Any, loss: LossFunction | None) -> dict[str, Any]:
    """:return: what can be told of loaders and loss, so that a folder is not continued with others."""
    name = (
        "cross entropy"
        if loss is None
        else f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"
    )
    return {"train_batches": len(train_loader), "validation_batches": len(validation_loader), "loss": name}


def _digest(model: nn.Module) -> str:
    """:return: a short digest of the model's weights, so that a folder is not continued with others."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
