"""Training of the floating-point model that everything starts from, for models that come without a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nncf_mpq_plugin import distributed
from nncf_mpq_plugin.batches import Batches
from nncf_mpq_plugin.loop import History, Loop, make_optimizer
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.training import LossFunction, Progress, cross_entropy, device_of


@dataclass(frozen=True)
class FloatConfig:
    """
    How the floating-point model is trained: SGD with Nesterov momentum 0.9.

    :param epochs: passes over the data.
    :param learning_rate: top of the cosine.
    :param warmup_epochs: epochs of linear rise.
    :param weight_decay: of weights only.
    :param label_smoothing: of the cross entropy.
    :param seed: decides the data order.
    """

    epochs: int = 0
    learning_rate: float = 0.1
    warmup_epochs: float = 1.0
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    seed: int = 0


def train_float(
    model: nn.Module,
    loader: Any,
    config: FloatConfig,
    *,
    loss_fn: LossFunction | None = None,
    state_dir: Path | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> History:
    """
    Train ``model`` in place; it is in evaluation mode afterwards.

    :param loader: see :class:`Batches`.
    :param loss_fn: (output, target) -> loss; default: cross entropy.
    :param state_dir: where the state is kept; the same call goes on from there.
    :param progress: called after each step.
    :param device: default: where the model is.
    :raises TrainingError: if training diverges.
    :raises InterruptedRun: on Ctrl-C, after saving.
    """
    device = device_of(model) if device is None else torch.device(device)
    model.to(device).train()
    loss_fn = loss_fn or cross_entropy(config.label_smoothing)
    replica = distributed.replicated(model, device)
    without_quantizers = QuantizedModel(model, (), {}, {}, {})
    optimizer = make_optimizer(
        without_quantizers,
        "sgd",
        learning_rate=config.learning_rate,
        scale_learning_rate=None,
        momentum=0.9,
        weight_decay=config.weight_decay,
        nesterov=True,
    )

    def compute_gradients(inputs: Any, target: Any, step: int) -> dict[str, Tensor]:
        with distributed.one_pass(replica):
            loss = loss_fn(replica(inputs), target)
            loss.backward()
        return {"float": loss}

    loop = Loop(
        without_quantizers,
        Batches(loader, seed=config.seed, shared=True),
        optimizer,
        config.epochs,
        config.seed,
        device,
        fingerprint={"stage": "floating-point training", **asdict(config)},
        defaults=asdict(FloatConfig()),
        gradient_clip=None,
        warmup_epochs=config.warmup_epochs,
        state_dir=state_dir,
        progress=progress,
    )
    try:
        return loop.run(compute_gradients)
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()
