"""
Joint training of one LSQ scale per candidate bit width: the importance indicators of LIMPQ.

Each step sends a batch through the model n + 1 times: with all searchable layers at one bit width, from the highest to
the lowest, then with random bit widths per layer. Gradients are summed and one optimizer step is taken (Tang et al.,
"Mixed-Precision Neural Network Quantization via Learned Layer-wise Importance", ECCV 2022, section 3.4 and algorithm 1;
the published code's ``indicators_pretraining/process.py``).
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nncf_mpq_plugin import distributed
from nncf_mpq_plugin.batches import Batches, derived_seed
from nncf_mpq_plugin.errors import ConfigError
from nncf_mpq_plugin.loop import History, Loop, make_optimizer, quantizers_by_scale
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.recompute import recomputed
from nncf_mpq_plugin.stability import settled_agreement
from nncf_mpq_plugin.stem import computed_once
from nncf_mpq_plugin.training import (
    BatchNormStatistics,
    LossFunction,
    Progress,
    batch_norms,
    cross_entropy,
    device_of,
    floating_point_copy,
    freeze_batch_norm,
    output_distance,
)

RANDOM = "random"
BATCH_NORM_MODES = ("switched", "shared", "frozen")


@dataclass(frozen=True)
class JointConfig:
    """
    How joint training is done. "Published" means the authors' code and its ``config_resnet18.yaml``.

    :param epochs: passes over the data used. Published: 5 (ResNet-18), 3 (ResNet-50); the paper: 3 to 10.
    :param data_fraction: share of the training samples to use. The paper: half of the data is enough.
    :param learning_rate: start of the cosine. Published: 0.01 at batch 256.
    :param scale_learning_rate: the same for scales; None takes ``learning_rate`` (published).
    :param scale_bit_decay: factor on the scales' rate for each bit less than the highest; 1 is published, Double
        Rounding (arXiv 2502.01199) uses 0.1 for every 2 bits, that is 0.316.
    :param momentum: of SGD, or Adam's first beta. Published: 0.9, Nesterov (timm's ``sgd``).
    :param nesterov: see ``momentum``.
    :param weight_decay: of weights only, never of scales, biases and batch norm. Published: 2.5e-5.
    :param gradient_clip: gradients are clipped to [-clip, clip] element by element; None for none. Published: 1.
    :param optimizer: ``sgd`` (published) or ``adam``.
    :param label_smoothing: of the cross entropy. Published: 0.1.
    :param batch_norm: ``switched``: running statistics per bit width, and a set for the random pass (published:
        switched modules); ``shared``: one set; ``frozen``: the model's own statistics are used and kept.
    :param distillation: share of the distance to the teacher's outputs in the loss of every pass but the first. The
        teacher is the highest-bit pass of the same batch unless one is given. Published: coded, and switched off.
    :param label_free: the loss of every pass is the distance to the floating-point model's outputs; targets are not
        read.
    :param train_weights: False keeps weights as they are and trains scales, biases and batch norm (published option
        ``freeze_weights``). Published: True.
    :param early_stop: the training ends when the mean rank correlation of the indicators with those a fifth of the
        planned training earlier reaches this; None trains to the end (published). See stability.py.
    :param seed: decides the data order, the samples used and the random bit widths.
    """

    epochs: int = 5
    data_fraction: float = 0.5
    learning_rate: float = 0.01
    scale_learning_rate: float | None = None
    scale_bit_decay: float = 1.0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 2.5e-5
    gradient_clip: float | None = 1.0
    optimizer: str = "sgd"
    label_smoothing: float = 0.1
    batch_norm: str = "switched"
    distillation: float = 0.0
    label_free: bool = False
    train_weights: bool = True
    early_stop: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class JointResult:
    """
    :param history: losses per pass and scales per bit width over the training.
    :param steps: optimizer steps taken.
    :param seconds: how long this call took (less than the whole training after a resume).
    :param steps_per_epoch: steps of one epoch; 0 in files of earlier versions.
    """

    history: History
    steps: int
    seconds: float
    steps_per_epoch: int = 0

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object."""
        return {
            "history": self.history.to_json(),
            "steps": self.steps,
            "seconds": self.seconds,
            "steps_per_epoch": self.steps_per_epoch,
        }

    @classmethod
    def from_json(cls, value: Any) -> JointResult:
        """:param value: what :meth:`to_json` gave."""
        return cls(
            History.from_json(value["history"]), value["steps"], value["seconds"], value.get("steps_per_epoch", 0)
        )


def train_jointly(
    quantized: QuantizedModel,
    loader: Any,
    config: JointConfig,
    *,
    loss_fn: LossFunction | None = None,
    teacher: nn.Module | None = None,
    state_dir: Path | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
    save_every: int = 50,
) -> JointResult:
    """
    Train the scales of all candidate bit widths together, in place.

    Afterwards the highest bit width is active, batch-norm statistics are those of the highest bit width, and the
    model is in evaluation mode.

    :param quantized: its scales have been initialised by statistics.
    :param loader: see :class:`Batches`.
    :param loss_fn: (output, target) -> loss; default: cross entropy with the config's label smoothing.
    :param teacher: model whose outputs ``distillation`` and ``label_free`` compare with; default: see the config
        (for ``label_free`` a copy of this model, quantizers off).
    :param state_dir: where the state is kept; the same call goes on from there and ends bit for bit the same on a CPU
        with the same number of threads.
    :param progress: called after each step.
    :param device: default: where the model is.
    :param save_every: steps between saves (one is made at the end of each epoch as well).
    :raises TrainingError: if training diverges.
    :raises InterruptedRun: on Ctrl-C, after saving.
    :raises InputError: for data or a saved state that cannot be used.
    :raises ConfigError: for an unknown batch-norm mode or optimizer.
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
    elif config.label_free:
        teacher = floating_point_copy(model)
    passes = [*sorted(quantized.bits, reverse=True), RANDOM]
    keys = passes if config.batch_norm == "switched" else passes[:1]
    statistics = BatchNormStatistics(model, keys)
    task_loss = loss_fn or cross_entropy(config.label_smoothing)
    batches = Batches(loader, seed=config.seed, fraction=config.data_fraction, shared=True)

    def select(name: str, step: int) -> None:
        if name == RANDOM:
            select_random(quantized, derived_seed(config.seed, 1, step))
        else:
            quantized.select_uniform(int(name))
        if len(keys) > 1:
            statistics.use(name if name == RANDOM else int(name))

    several_passes = quantized.several_passes()
    stem = quantized.stem if distributed.size() == 1 else ()  # replicas exchange in the last pass
    if config.batch_norm == "shared":  # statistics that each pass moves
        norms = batch_norms(model)
        stem = tuple(itertools.takewhile(lambda module: module not in norms, stem))

    def compute_gradients(inputs: Any, target: Any, step: int) -> dict[str, Tensor]:
        with several_passes, computed_once(stem):
            return all_passes(inputs, target, step)

    def all_passes(inputs: Any, target: Any, step: int) -> dict[str, Tensor]:
        reference = None
        if teacher is not None:
            with torch.no_grad():
                reference = teacher(inputs)
        losses: dict[str, Tensor] = {}
        for index, bits in enumerate(passes):
            select(str(bits), step)
            with distributed.one_pass(replica, last=bits == RANDOM):
                with recomputed():
                    output = replica(inputs)
                if config.label_free:
                    loss = output_distance(output, reference)
                elif index == 0 or not config.distillation:
                    loss = task_loss(output, target)
                    if index == 0 and config.distillation and reference is None:
                        reference = output.detach()
                else:
                    share = config.distillation
                    loss = share * output_distance(output, reference)
                    if share < 1:
                        loss = loss + (1 - share) * task_loss(output, target)
                loss.backward()
            losses[str(bits)] = loss.detach()
        return losses

    def settled(history: History) -> bool:
        if config.early_stop is None:
            return False
        planned = min(Loop.records, config.epochs * len(batches))
        agreement = settled_agreement(history.scales, planned)
        if agreement is None:
            return False
        history.scores.setdefault("rank_correlation", []).append(agreement)
        return agreement >= config.early_stop

    with _training_mode(quantized, config):
        replica = distributed.replicated(model, device)
        optimizer = make_optimizer(
            quantized,
            config.optimizer,
            learning_rate=config.learning_rate,
            scale_learning_rate=config.scale_learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            scale_bit_decay=config.scale_bit_decay,
        )
        loop = Loop(
            quantized,
            batches,
            optimizer,
            config.epochs,
            config.seed,
            device,
            fingerprint={"stage": "joint training", **asdict(config), "bits": list(quantized.bits)},
            defaults=asdict(JointConfig()),
            gradient_clip=config.gradient_clip,
            extra=statistics.tensors(),
            state_dir=state_dir,
            save_every=save_every,
            progress=progress,
            settled=settled,
            select=select,
        )
        try:
            history = loop.run(compute_gradients)
        finally:
            select(str(passes[0]), 0)
            optimizer.zero_grad(set_to_none=True)
    return JointResult(history, history.steps[-1], time.perf_counter() - begin, len(batches))


def select_random(quantized: QuantizedModel, seed: int) -> None:
    """Give each searchable layer's weight and each activation group a bit width of its own, uniformly by ``seed``."""
    generator = random.Random(seed)
    for layer in quantized.searchable:
        quantizer = quantized.weight_quantizers[layer.cost.name]
        quantizer.select(generator.choice(quantizer.bits))
    for group in quantized.searchable_groups:
        quantizer = quantized.activation_quantizers[group]
        quantizer.select(generator.choice(quantizer.bits))


@contextlib.contextmanager
def _training_mode(quantized: QuantizedModel, config: JointConfig) -> Iterator[None]:
    """Training mode with the config's frozen parts; evaluation mode and every gradient flag as before afterwards."""
    model = quantized.model
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.train()
    if config.batch_norm == "frozen":
        freeze_batch_norm(model)
    if not config.train_weights:
        scales = quantizers_by_scale(quantized)
        for parameter in flags:
            if id(parameter) not in scales and parameter.dim() > 1:
                parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.eval()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
