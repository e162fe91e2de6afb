"""Quantization-aware fine-tuning at a fixed policy: one scale per quantizer, as it will be deployed."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nncf_mpq_plugin import distributed
from nncf_mpq_plugin.batches import Batches, first_batches
from nncf_mpq_plugin.errors import ConfigError
from nncf_mpq_plugin.loop import History, Loop, make_optimizer
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.quantizer import MultiBitQuantizer, least_error_scale
from nncf_mpq_plugin.recompute import recomputed
from nncf_mpq_plugin.training import (
    LossFunction,
    Progress,
    batch_norms,
    cross_entropy,
    device_of,
    evaluation_mode,
    floating_point_copy,
    freeze_batch_norm,
    named_quantizers,
    observe,
    output_distance,
    reestimate_batch_norm,
    to_device,
)
from nncf_mpq_plugin.types import Policy

GRANULARITIES = ("channel", "tensor")
INITIALIZATIONS = ("statistics", "trained")
BATCH_NORM_MODES = ("reestimated", "trained", "frozen")
REESTIMATION_SAMPLES = 2048


@dataclass(frozen=True)
class FinetuneConfig:
    """
    How fine-tuning is done. "Published" means the authors' ``finetune_resnet50_w3a4...yaml``.

    :param epochs: passes over the data. Published: 90.
    :param learning_rate: top of the cosine. Published: 0.04 at batch 512.
    :param scale_learning_rate: the same for scales; None takes ``learning_rate`` (published).
    :param momentum: of SGD, or Adam's first beta. Published: 0.9.
    :param nesterov: see ``momentum``.
    :param weight_decay: of weights only. Published: 2.5e-5.
    :param gradient_clip: element by element; None for none (published).
    :param warmup_epochs: epochs of linear rise. Published: 5 of 90.
    :param optimizer: ``sgd`` or ``adam``.
    :param label_smoothing: of the cross entropy. Published: 0.1.
    :param batch_norm: ``trained`` (published): batches are normalized by their own statistics, which the running ones
        follow; ``reestimated``: in the end the running ones are those of some batches at the final weights, since
        weights at low bits that move between two values leave them behind (Nagel et al., "Overcoming Oscillations in
        Quantization-Aware Training", ICML 2022); ``frozen``: the model's own statistics are used and kept,
        for data too few or too unlike the model's. Scales and shifts are trained in all.
    :param distillation: share of the distance to the teacher's outputs in the loss.
    :param label_free: the loss is that distance alone; targets are not read.
    :param weight_granularity: ``channel``: one weight scale per output channel; ``tensor``: one per layer.
    :param scale_initialization: ``trained``: start from the scales of joint training; ``statistics``: from the step
        with the least squared error, of the weights and of the activations of ``calibration_samples`` samples.
    :param calibration_samples: see ``scale_initialization``.
    :param data_fraction: share of the training samples to use.
    :param seed: decides the data order.
    """

    epochs: int = 10
    learning_rate: float = 0.01
    scale_learning_rate: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 2.5e-5
    gradient_clip: float | None = 1.0
    warmup_epochs: float = 0.5
    optimizer: str = "sgd"
    label_smoothing: float = 0.0
    batch_norm: str = "reestimated"
    distillation: float = 0.0
    label_free: bool = False
    weight_granularity: str = "channel"
    scale_initialization: str = "trained"
    calibration_samples: int = 256
    data_fraction: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class FinetuneResult:
    """
    :param policy: the bit widths that the model now has.
    :param history: loss and scales over the training.
    :param steps: optimizer steps taken.
    :param seconds: how long this call took.
    """

    policy: Policy
    history: History
    steps: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object."""
        return {
            "policy": self.policy.to_json(),
            "history": self.history.to_json(),
            "steps": self.steps,
            "seconds": self.seconds,
        }


def reduce_to_policy(
    quantized: QuantizedModel,
    policy: Policy,
    calibration: Sequence[Tensor],
    *,
    weight_granularity: str = "channel",
    initialization: str = "trained",
) -> None:
    """
    Keep one scale per quantizer, in place, and turn on ``snap``.

    :param policy: bit widths of the searchable layers.
    :param calibration: input batches; the first one suffices for ``trained``.
    :param weight_granularity: ``channel`` or ``tensor``.
    :param initialization: ``statistics``: every scale is the step with the least squared error. ``trained``: the
        present scales are kept; where one becomes many, each channel's least-error step times what the trained scale
        was to the tensor's least-error step.
    :raises ConfigError: for an unknown granularity or initialization.
    :raises InputError: if the policy does not fit the model.
    """
    if weight_granularity not in GRANULARITIES:
        msg = f"weight_granularity: {weight_granularity!r} is not known; choose one of {', '.join(GRANULARITIES)}."
        raise ConfigError(msg)
    if initialization not in INITIALIZATIONS:
        msg = f"scale_initialization: {initialization!r} is not known; choose one of {', '.join(INITIALIZATIONS)}."
        raise ConfigError(msg)
    quantized.select(policy.layers)
    named = named_quantizers(quantized)
    for quantizer in named.values():
        quantizer.keep_only(quantizer.active)
        quantizer.snap = True
    _initialize_scales(quantized, list(named.values()), calibration, weight_granularity, initialization)


def with_fine_tuned_granularity(
    quantized: QuantizedModel,
    calibration: Sequence[Tensor],
    granularity: str = "channel",
    initialization: str = "trained",
) -> QuantizedModel:
    """
    The jointly trained model with weight scales of the shape that fine-tuning gives them, at every bit width: what a
    tensor loses is then measured as fine-tuning will start, not with the one scale per layer of joint training.

    :param calibration: input batches; one sample suffices for ``trained``.
    :param granularity: ``channel`` or ``tensor``.
    :param initialization: ``trained`` or ``statistics``.
    :return: a copy; scales as by :func:`reduce_to_policy`.
    """
    result = copy.deepcopy(quantized)
    _initialize_scales(result, list(named_quantizers(result).values()), calibration, granularity, initialization)
    return result


def _initialize_scales(
    quantized: QuantizedModel,
    quantizers: Sequence[MultiBitQuantizer],
    calibration: Sequence[Tensor],
    granularity: str,
    initialization: str,
) -> None:
    """See :func:`reduce_to_policy`; at every bit width that the quantizers have."""
    from_statistics = initialization == "statistics"
    observed = [quantizer for quantizer in quantizers if quantizer.weight or from_statistics]
    with evaluation_mode(quantized.model):
        observe(quantized.model, observed, calibration if from_statistics else calibration[:1])
    for quantizer in observed:
        trained = {bits: scale.detach().clone() for bits, scale in quantizer.scales.items()}
        values = quantizer.observed_values()
        if quantizer.weight:
            per_channel = granularity == "channel"
            quantizer.set_scale_shape((values.shape[0],) + (1,) * (values.dim() - 1) if per_channel else (1,))
        quantizer.initialize(values)
        if quantizer.weight and not from_statistics:
            for bits, before in trained.items():
                scale = quantizer.scales[bits].data
                if before.numel() == scale.numel():
                    scale.copy_(before.reshape(scale.shape))
                else:
                    scale *= before.mean() / least_error_scale(values, (1,), *quantizer.integer_range(int(bits)))


def finetune(
    quantized: QuantizedModel,
    policy: Policy,
    loader: Any,
    config: FinetuneConfig,
    *,
    loss_fn: LossFunction | None = None,
    teacher: nn.Module | None = None,
    state_dir: Path | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
    save_every: int = 50,
) -> FinetuneResult:
    """
    Train the model at a policy, in place; it is in evaluation mode afterwards and has one scale per quantizer.

    :param quantized: with the weights to start from.
    :param policy: bit widths of the searchable layers.
    :param loader: see :class:`Batches`.
    :param loss_fn: (output, target) -> loss; default: cross entropy with the config's label smoothing.
    :param teacher: model whose outputs ``distillation`` and ``label_free`` compare with; default: a copy of this model
        as it is at the start, quantizers off.
    :param state_dir: where the state is kept; the same call goes on from there and ends bit for bit the same on a CPU
        with the same number of threads.
    :param progress: called after each step.
    :param device: default: where the model is.
    :param save_every: steps between saves (one is made at the end of each epoch as well).
    :raises TrainingError: if training diverges.
    :raises InterruptedRun: on Ctrl-C, after saving.
    :raises InputError: for a policy, data or a saved state that cannot be used.
    :raises ConfigError: for an unknown optimizer, granularity, initialization or batch-norm mode.
    """
    if config.batch_norm not in BATCH_NORM_MODES:
        msg = f"batch_norm: {config.batch_norm!r} is not known; choose one of {', '.join(BATCH_NORM_MODES)}."
        raise ConfigError(msg)
    begin = time.perf_counter()
    model = quantized.model
    device = device_of(model) if device is None else torch.device(device)
    model.to(device)
    if teacher is not None:
        teacher = teacher.to(device).eval()
    elif config.label_free or config.distillation:
        teacher = floating_point_copy(model)
    reduce_to_policy(
        quantized,
        policy,
        first_batches(Batches(loader, seed=config.seed).epoch(0), config.calibration_samples),
        weight_granularity=config.weight_granularity,
        initialization=config.scale_initialization,
    )
    task_loss = loss_fn or cross_entropy(config.label_smoothing)

    replica = distributed.replicated(model, device)
    passes = quantized.several_passes()

    def compute_gradients(inputs: Any, target: Any, step: int) -> dict[str, Tensor]:
        with distributed.one_pass(replica):
            with passes, recomputed():
                output = replica(inputs)
            share = 1.0 if config.label_free else config.distillation
            loss = torch.zeros((), device=device)
            if share:
                assert teacher is not None
                with torch.no_grad():
                    reference = teacher(inputs)
                loss = loss + share * output_distance(output, reference)
            if share < 1:
                loss = loss + (1 - share) * task_loss(output, target)
            loss.backward()
        return {"train": loss}

    loop = Loop(
        quantized,
        Batches(loader, seed=config.seed, fraction=config.data_fraction, shared=True),
        make_optimizer(
            quantized,
            config.optimizer,
            learning_rate=config.learning_rate,
            scale_learning_rate=config.scale_learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        ),
        config.epochs,
        config.seed,
        device,
        fingerprint={"stage": "fine-tuning", **_trained_by(config), "policy": _bits_of(policy)},
        defaults=_trained_by(FinetuneConfig()),
        gradient_clip=config.gradient_clip,
        warmup_epochs=config.warmup_epochs,
        state_dir=state_dir,
        save_every=save_every,
        progress=progress,
    )
    model.train()
    if config.batch_norm == "frozen":
        freeze_batch_norm(model)
    followed = [module for module in batch_norms(model) if module.training and module.momentum != 0]
    try:
        history = loop.run(compute_gradients)
    finally:
        model.eval()
        loop.optimizer.zero_grad(set_to_none=True)
    if config.batch_norm == "reestimated":
        batches = Batches(loader, seed=config.seed, fraction=config.data_fraction)  # each process takes all of them
        inputs = (to_device(inputs, device) for inputs, _ in batches.first(REESTIMATION_SAMPLES))
        with passes:
            reestimate_batch_norm(model, inputs, followed)
    return FinetuneResult(quantized.policy(), history, history.steps[-1], time.perf_counter() - begin)


def _trained_by(config: FinetuneConfig) -> dict[str, Any]:
    """:return: the settings that decide the training's steps: statistics are estimated after the last one."""
    return {**asdict(config), "batch_norm": "frozen" if config.batch_norm == "frozen" else "trained"}


def _bits_of(policy: Policy) -> dict[str, list[int]]:
    return {name: [bits.weight, bits.activation] for name, bits in policy.layers.items()}
