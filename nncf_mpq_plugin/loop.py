"""
The loop around an optimizer step: data order, learning rates, safeguards, saving and resuming.

Joint training and fine-tuning only say how a batch becomes gradients. Everything random in a step derives from (seed,
step), so a run that was stopped anywhere ends as if it had not been.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nncf_mpq_plugin import distributed
from nncf_mpq_plugin.batches import Batches, derived_seed
from nncf_mpq_plugin.checkpoint import (
    STATE_FILE,
    load_state,
    model_tensors,
    optimizer_tensors,
    restore_optimizer,
    restore_tensors,
    save_state,
)
from nncf_mpq_plugin.errors import ConfigError, InputError, InterruptedRun, TrainingError
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.quantizer import SMALLEST_SCALE, MultiBitQuantizer
from nncf_mpq_plugin.training import Progress, named_quantizers, to_device

EXPLODED = 1e3  # a scale this many times its value at the start has exploded
LARGEST_CHANGE = 0.1  # of a scale in one optimizer step, relative; a small scale would fall to the floor in one step
ADVICE = "Lower the learning rate of the scales (scale_learning_rate) or of the weights, or leave out the lowest bits."


@dataclass
class History:
    """
    What a training leaves for the convergence report, recorded about :data:`Loop.records` times.

    :param steps: steps done at each record; losses are means since the record before, and the first record (step 0)
        has none.
    :param losses: pass -> one mean loss a record, from the second record on.
    :param scales: quantizer name -> bit width -> one scale a record (the mean over channels).
    :param scores: further numbers by name and step (validation, early stop).
    """

    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    scales: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object."""
        return {"steps": self.steps, "losses": self.losses, "scales": self.scales, "scores": self.scores}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> History:
        """:param value: what :meth:`to_json` gave."""
        return cls(value["steps"], value["losses"], value["scales"], value["scores"])


@dataclass
class Loop:
    """
    :param quantized: what is trained.
    :param batches: where the data comes from.
    :param optimizer: each parameter group carries ``initial_lr``.
    :param epochs: passes over the batches.
    :param seed: decides everything random in a step.
    :param fingerprint: JSON-serialisable values that a saved state must share to be continued.
    :param defaults: what those have that a state does not name, as it was saved before there were such settings: that
        which was done then.
    :param gradient_clip: gradients are clipped to [-clip, clip] element by element; None for no clipping.
    :param warmup_epochs: epochs over which the learning rate rises linearly.
    :param final_rate: share of the learning rate that the cosine ends in.
    :param extra: tensors saved with the model's, restored by copying into them.
    :param state_dir: folder of the saved state; None saves nothing.
    :param save_every: steps between saves.
    :param records: about how many records the history gets.
    :param settled: called at each record with the history; True ends the training early.
    :param select: (pass, step) -> sets that pass's bit widths again, to find where a loss went wrong.
    """

    quantized: QuantizedModel
    batches: Batches
    optimizer: Optimizer
    epochs: int
    seed: int
    device: torch.device
    fingerprint: Mapping[str, Any]
    gradient_clip: float | None = 1.0
    warmup_epochs: float = 0.0
    final_rate: float = 0.0
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    state_dir: Path | None = None
    save_every: int = 50
    records: int = 50
    progress: Progress | None = None
    settled: Callable[[History], bool] | None = None
    select: Callable[[str, int], None] | None = None

    def run(self, compute_gradients: Callable[[Any, Any, int], dict[str, Tensor]]) -> History:
        """
        Train to the end, from the saved state where there is one.

        :param compute_gradients: (input, target, step) -> the losses by pass, after ``backward`` was called on them.
        :raises TrainingError: if a loss, gradient or scale is no longer finite, or a scale explodes. The saved state
            is a good one; after a loss or gradient that is not finite, parameters are as they were before that step.
        :raises InterruptedRun: on Ctrl-C, after saving.
        :raises InputError: if the saved state belongs to another model, configuration or amount of data.
        """
        per_epoch = len(self.batches)
        total = self.epochs * per_epoch
        interval = max(1, math.ceil(total / self.records))
        quantizers = named_quantizers(self.quantized)
        initial = {id(p): p.detach().abs().amax().item() for q in quantizers.values() for p in q.parameters()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = _describe_parameters(self.quantized.model, quantizers)
        scales: list[Tensor] = [p for q in quantizers.values() for p in q.parameters()]
        step, sums, history, done = self._resume()
        if not history.steps:
            _record_scales(history, quantizers, 0)
        with _interrupt_flag() as interrupted:
            while step < total and not done:
                for inputs, target in self.batches.epoch(step // per_epoch, step % per_epoch):
                    inputs, target = to_device((inputs, target), self.device)
                    self._set_rates(step, per_epoch, total)
                    self.optimizer.zero_grad(set_to_none=True)
                    with _seeded(derived_seed(self.seed, 0, step) + distributed.rank(), self.device):
                        losses = {name: loss.detach() for name, loss in compute_gradients(inputs, target, step).items()}
                    means, stop = distributed.averaged(torch.stack([*losses.values()]), interrupted.is_set())
                    numbers = dict(zip(losses, means.tolist(), strict=True))
                    self._check(numbers, parameters, names, step, inputs)
                    before = [scale.detach().clone() for scale in scales]
                    self.optimizer.step()
                    self._check_scales(scales, initial, names, step)
                    _limit_change(scales, before)
                    self.quantized.after_step()
                    step += 1
                    for name, number in numbers.items():
                        sums[name] = sums.get(name, 0.0) + number
                    if step % interval == 0 or step == total:
                        _record_losses(history, sums, step)
                        _record_scales(history, quantizers, step)
                        sums = {}
                        done = self.settled is not None and self.settled(history)
                    if self.progress is not None:
                        self.progress(step, total, {"loss": sum(numbers.values()) / len(numbers), **numbers})
                    ended = done or step == total
                    if distributed.size() == 1:  # several processes stop where all of them know
                        stop = interrupted.is_set()
                    if step % self.save_every == 0 or step % per_epoch == 0 or ended or stop:
                        self._save(step, sums, history, done)
                    if stop and not ended:
                        kept = (
                            "Its state was saved: the same call goes on from here."
                            if self.state_dir
                            else ("Nothing was saved; give a state_dir to be able to continue.")
                        )
                        msg = f"Training was interrupted at step {step} of {total}. {kept}"
                        raise InterruptedRun(msg)
                    if ended:
                        break
        return history

    def _set_rates(self, step: int, per_epoch: int, total: int) -> None:
        warmup = round(self.warmup_epochs * per_epoch)
        if step < warmup:
            share = (step + 1) / (warmup + 1)
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
            share = self.final_rate + (1 - self.final_rate) * cosine
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share

    def _check(
        self, losses: Mapping[str, float], parameters: list[nn.Parameter], names: dict[int, str], step: int, inputs: Any
    ) -> None:
        """Refuse what is not finite, clip gradients, and leave alone what has a zero gradient."""
        for name, loss in losses.items():
            if not math.isfinite(loss):
                self._fail(f"the loss of pass {name!r} is {loss}{self._first_bad(inputs, name, step)}", step)
        with_gradient = [p for p in parameters if p.grad is not None]
        if not with_gradient:
            return
        gradients = [p.grad for p in with_gradient if p.grad is not None]
        sizes = _largest(gradients)
        bad = [parameter for parameter, size in zip(with_gradient, sizes, strict=True) if not math.isfinite(size)]
        if bad:
            scales = [parameter for parameter in bad if " scale of " in names[id(parameter)]]
            self._fail(f"the gradient of {names[id((scales or bad)[0])]} is not finite", step)
        for parameter, size in zip(with_gradient, sizes, strict=True):
            if size == 0.0:
                parameter.grad = None  # neither momentum nor weight decay may move it
        if self.gradient_clip is not None and max(sizes) > self.gradient_clip:
            nn.utils.clip_grad_value_(
                [p for p in with_gradient if p.grad is not None], self.gradient_clip, foreach=True
            )

    def _first_bad(self, inputs: Any, name: str, step: int) -> str:
        """:return: where a pass's values stop being finite, in words; empty if that cannot be found."""
        found: list[str] = []

        def watch(label: str) -> Callable[[nn.Module, Any], None]:
            def hook(module: nn.Module, args: Any) -> None:
                assert isinstance(module, MultiBitQuantizer)
                if found:
                    return
                if not bool(torch.isfinite(module.scale()).all()):
                    found.append(f"; the {module.active}-bit scale of {label!r} is not finite")
                elif not bool(torch.isfinite(args[0]).all()):
                    found.append(f"; the first values that are not finite reach {label!r} (at {module.active} bits)")

            return hook

        if isinstance(inputs, Tensor) and not bool(torch.isfinite(inputs).all()):
            return "; an input of the batch holds NaN or an infinity: check the data"
        if self.select is not None:
            self.select(name, step)
        named = named_quantizers(self.quantized)
        handles = [quantizer.register_forward_pre_hook(watch(label)) for label, quantizer in named.items()]
        try:
            with torch.no_grad():
                self.quantized.model(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else ""

    def _check_scales(self, scales: list[Tensor], initial: dict[int, float], names: dict[int, str], step: int) -> None:
        sizes = _largest(scales)
        for scale, size in zip(scales, sizes, strict=True):
            if not size <= EXPLODED * max(initial[id(scale)], 0.01):  # NaN as well
                self._fail(f"{names[id(scale)]} went from {initial[id(scale)]:.3g} to {size:.3g}", step)

    def _fail(self, what: str, step: int) -> None:
        kept = f"The last good state is in {self.state_dir}." if self.state_dir else "No state was saved."
        msg = f"Training diverged at step {step + 1}: {what}. {ADVICE} {kept}"
        raise TrainingError(msg)

    def _save(self, step: int, sums: Mapping[str, float], history: History, done: bool) -> None:
        if self.state_dir is None or not distributed.is_main():
            return
        tensors = {f"model/{name}": value for name, value in model_tensors(self.quantized.model).items()}
        tensors |= {f"extra/{name}": value for name, value in self.extra.items()}
        tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        values = {"step": step, "sums": sums, "history": history.to_json(), "done": done}
        save_state(self.state_dir / STATE_FILE, tensors, {**values, "fingerprint": self._fingerprint()})

    def _resume(self) -> tuple[int, dict[str, float], History, bool]:
        path = None if self.state_dir is None else self.state_dir / STATE_FILE
        if path is None or not path.exists():
            return 0, {}, History(), False
        tensors, values = load_state(path)
        own, saved = self._fingerprint(), {**self.defaults, **values.get("fingerprint", {})}
        differing = [key for key in own.keys() | saved.keys() if own.get(key) != saved.get(key)]
        if differing:
            changes = ", ".join(f"{key}: {saved.get(key)!r} then, {own.get(key)!r} now" for key in sorted(differing))
            msg = f"{path} belongs to another training ({changes}). Use the same settings, or delete it to begin anew."
            raise InputError(msg)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "extra": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, rest = name.split("/", 1)
            parts[part][rest] = value
        restore_tensors(self.quantized.model, parts["model"])
        restore_optimizer(self.optimizer, parts["optimizer"])
        for name, value in self.extra.items():
            value.copy_(parts["extra"][name])
        return values["step"], dict(values["sums"]), History.from_json(values["history"]), values["done"]

    def _fingerprint(self) -> dict[str, Any]:
        return {**self.fingerprint, "steps_per_epoch": len(self.batches)}


def make_optimizer(
    quantized: QuantizedModel,
    name: str,
    *,
    learning_rate: float,
    scale_learning_rate: float | None,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    scale_bit_decay: float = 1.0,
) -> Optimizer:
    """
    An optimizer with groups for weights (with weight decay), vectors such as biases and batch norm (without), and the
    scales of each bit width (without). Parameters that do not require gradients are left out.

    :param name: ``sgd`` or ``adam``.
    :param scale_learning_rate: None takes ``learning_rate``.
    :param scale_bit_decay: factor on the scales' learning rate for each bit less than the highest.
    """
    kinds = quantizers_by_scale(quantized)
    weights: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    by_bits: dict[int, list[nn.Parameter]] = {}
    for parameter in quantized.model.parameters():
        if id(parameter) in kinds:
            by_bits.setdefault(kinds[id(parameter)], []).append(parameter)
        elif parameter.requires_grad:
            (weights if parameter.dim() > 1 else vectors).append(parameter)
    highest = max(quantized.bits, default=8)
    rate = learning_rate if scale_learning_rate is None else scale_learning_rate
    groups: list[dict[str, Any]] = [
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
        {"params": weights, "lr": learning_rate, "weight_decay": weight_decay},
    ]
    for bits, scales in sorted(by_bits.items()):
        decayed = rate * scale_bit_decay ** max(0, highest - bits)
        groups.append({"params": scales, "lr": decayed, "weight_decay": 0.0})
    groups = [{**group, "initial_lr": group["lr"]} for group in groups if group["params"]]
    if name == "sgd":
        return _FusedSGD(groups, lr=learning_rate, momentum=momentum, nesterov=nesterov and momentum > 0)
    if name == "adam":
        return torch.optim.Adam(groups, lr=learning_rate, betas=(momentum, 0.999), foreach=True)
    msg = f"optimizer: {name!r} is not known; choose 'sgd' or 'adam'."
    raise ConfigError(msg)


class _FusedSGD(torch.optim.SGD):
    """
    SGD in one pass over memory, without temporaries, for parameters whose first gradients come at different steps.

    torch's own takes momentum buffers for all parameters of a group or for none of them.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, fused=True, **options)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["momentum"] and parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return super().step(closure)


def quantizers_by_scale(quantized: QuantizedModel) -> dict[int, int]:
    """:return: ``id`` of each quantizer's scale parameter -> its bit width."""
    return {id(scale): int(bits) for q in named_quantizers(quantized).values() for bits, scale in q.scales.items()}


def _largest(tensors: list[Tensor]) -> list[float]:
    """:return: the largest absolute value in each tensor; NaN where it holds one."""
    if not tensors:
        return []
    if tensors[0].is_cuda:
        sizes = torch.stack([size.float() for size in torch._foreach_norm(tensors, math.inf)])
    else:  # where that norm takes 15 times as long as finding both ends
        ends = [torch.aminmax(tensor) for tensor in tensors]
        sizes = torch.stack([high for _, high in ends]).maximum(torch.stack([low for low, _ in ends]).neg_())
    values: list[float] = sizes.tolist()
    return values


def _limit_change(scales: list[Tensor], before: list[Tensor]) -> None:
    """
    Keep each scale within :data:`LARGEST_CHANGE` of what it was, and at or above the floor.

    The published learning rate moves a scale by up to 0.01 in a step, momentum not counted. That is more than the whole
    8-bit scale of many layers, which then lie at the floor, with all weights clipped to nothing.
    """
    if not scales:  # a floating-point model has none
        return
    with torch.no_grad():
        torch._foreach_clamp_min_(scales, torch._foreach_mul(before, 1 - LARGEST_CHANGE))
        torch._foreach_clamp_max_(scales, torch._foreach_mul(before, 1 + LARGEST_CHANGE))
        torch._foreach_clamp_min_(scales, SMALLEST_SCALE)


def _describe_parameters(model: nn.Module, quantizers: Mapping[str, MultiBitQuantizer]) -> dict[int, str]:
    names = {id(parameter): f"{name!r}" for name, parameter in model.named_parameters()}
    for name, quantizer in quantizers.items():
        for bits, scale in quantizer.scales.items():
            names[id(scale)] = f"the {bits}-bit scale of {name!r}"
    return names


def _record_losses(history: History, sums: Mapping[str, float], step: int) -> None:
    count = step - history.steps[-1]
    for name, total in sums.items():
        history.losses.setdefault(name, []).append(total / count)


def _record_scales(history: History, quantizers: Mapping[str, MultiBitQuantizer], step: int) -> None:
    history.steps.append(step)
    for name, quantizer in quantizers.items():
        curves = history.scales.setdefault(name, {})
        for bits, scale in quantizer.scales.items():
            curves.setdefault(bits, []).append(scale.detach().mean().item())


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """Ctrl-C sets the flag, so that the step under way ends whole; a second one interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if flag.is_set() and callable(previous):
            previous(number, frame)
        flag.set()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
