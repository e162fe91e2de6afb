"""
Looking before choosing: policies compared by their loss in the jointly trained model.

The jointly trained model holds every bit width, so any policy can be measured in it without fine-tuning, once the
batch-norm statistics are re-estimated at its bits. This picks the best of several programs' answers (a program costs
milliseconds), then improves it by swaps within the budgets: one tensor up, another down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nncf_mpq_plugin.allocation.search import Prepared, Solution, solution_of, solve_prepared
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.training import (
    LossFunction,
    cross_entropy,
    evaluation_mode,
    output_distance,
    quantizers_off,
    reestimate_batch_norm,
)
from nncf_mpq_plugin.types import LayerBits

REFINED = "refined"
Bits = Mapping[str, LayerBits]


@dataclass(frozen=True)
class Swap:
    """
    A change that lowered the loss.

    :param moves: tensor (``layer.weight`` or ``group.activation``) -> bit width before and after.
    :param predicted: change of the objective that the importances promise.
    :param loss: the loss with it.
    """

    moves: Mapping[str, tuple[int, int]]
    predicted: float
    loss: float


@dataclass(frozen=True)
class Refinement:
    """
    :param solution: the refined policy, checked against every budget; its status is ``refined`` and its summary holds
        the rest of this.
    :param start: name of the candidate that the swaps began with.
    :param losses: candidate -> its loss in the joint model.
    :param swaps: the accepted ones, in order.
    :param loss: the loss in the end.
    :param evaluations: how often a policy was measured.
    :param seconds: time taken.
    """

    solution: Solution
    start: str
    losses: Mapping[str, float]
    swaps: tuple[Swap, ...]
    loss: float
    evaluations: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object without the solution."""
        return {
            "start": self.start,
            "losses": dict(self.losses),
            "swaps": [asdict(swap) for swap in self.swaps],
            "loss": self.loss,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class JointLoss:
    """
    The loss of a policy in the jointly trained model. Batch-norm statistics are those of the last policy afterwards,
    unless they are kept.

    :param quantized: the jointly trained model.
    :param estimation: inputs for batch-norm statistics, a few hundred samples; none keeps the model's statistics.
    :param judges: (input, target) that the loss is measured on, best not those that joint training saw.
    :param loss_fn: (output, target) -> mean loss; default: cross entropy.
    :param label_free: measure the distance to the outputs with the quantizers off.
    """

    quantized: QuantizedModel
    estimation: Sequence[Tensor]
    judges: Sequence[tuple[Any, Any]]
    loss_fn: LossFunction | None = None
    label_free: bool = False

    def __call__(self, bits: Bits) -> float:
        """:return: mean loss at the policy's bits."""
        model, loss_fn = self.quantized.model, self.loss_fn or cross_entropy()
        total, samples = 0.0, 0
        with torch.no_grad(), evaluation_mode(model), self.quantized.several_passes():
            references = []
            if self.label_free:
                with quantizers_off(model):
                    self._estimate()
                    references = [model(inputs) for inputs, _ in self.judges]
            self.quantized.select(bits)
            self._estimate()
            for index, (inputs, target) in enumerate(self.judges):
                output = model(inputs)
                loss = output_distance(output, references[index]) if self.label_free else loss_fn(output, target)
                total += loss.item() * len(inputs)
                samples += len(inputs)
        return total / samples

    def _estimate(self) -> None:
        if self.estimation:
            reestimate_batch_norm(self.quantized.model, self.estimation)


def refine(
    prepared: Prepared,
    measure: Callable[[Bits], float],
    *,
    candidates: Mapping[str, Bits] | None = None,
    evaluations: int | None = None,
    seconds: float | None = None,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> Refinement:
    """
    Improve the program's answer by what the model really loses.

    :param prepared: the program; its importances order the proposals, its budgets and constraints hold throughout.
    :param measure: bit widths of the searchable layers -> loss, such as :class:`JointLoss`.
    :param candidates: further policies within the same budgets to begin with, by name.
    :param evaluations: how many policies to measure at most; None for no limit. Repeatable, unlike ``seconds``.
    :param seconds: time after which no further policy is measured; None for no limit.
    :param progress: called after each measurement with how many are done, the limit (0 for none) and the loss so far.
    :raises InfeasibleBudgetError: if no policy meets the budgets.
    """
    begin = time.perf_counter()
    starts = {"program": solve_prepared(prepared), **(candidates or {})}
    losses: dict[str, float] = {}
    done = 0

    def spent() -> bool:
        out_of_time = seconds is not None and time.perf_counter() - begin >= seconds
        return out_of_time or (evaluations is not None and done >= evaluations)

    def loss_of(bits: Bits) -> float:
        nonlocal done
        done += 1
        loss = measure(bits)
        if progress:
            progress(done, evaluations or 0, {"loss": min([loss, *losses.values(), *(swap.loss for swap in swaps)])})
        return loss

    swaps: list[Swap] = []
    for name, bits in starts.items():
        if not losses or not spent():
            losses[name] = loss_of(bits)
    start = min(losses, key=lambda name: losses[name])
    bits, loss = dict(starts[start]), losses[start]
    refused: set[tuple[tuple[str, int], ...]] = set()
    accepted = True
    while accepted and not spent():
        accepted = False
        for predicted, moves, proposal in _proposals(prepared, bits):
            key = tuple(sorted((tensor, after) for tensor, (_, after) in moves.items()))
            if key in refused:
                continue
            if spent():
                break
            new = loss_of(proposal)
            if new < loss:
                bits, loss, accepted = proposal, new, True
                swaps.append(Swap(moves, predicted, new))
                break
            refused.add(key)
    solution = solution_of(prepared, bits, begin)
    took = time.perf_counter() - begin
    refinement = Refinement(solution, start, losses, tuple(swaps), loss, done, took)
    policy = replace(
        solution.policy,
        summary={**solution.policy.summary, "status": REFINED, "refinement": refinement.to_json()},
    )
    return replace(refinement, solution=replace(solution, policy=policy, status=REFINED))


def _proposals(
    prepared: Prepared, bits: Bits
) -> Iterator[tuple[float, dict[str, tuple[int, int]], dict[str, LayerBits]]]:
    """:return: policies one tensor up from ``bits``, and one down where the budgets ask for it; best promise first."""
    problem, layers = prepared.problem, [layer.cost for layer in prepared.table.layers]
    widths = {"weight": prepared.table.bits, "activation": prepared.activation_bits}
    now = {
        "weight": np.array([widths["weight"].index(bits[layer.name].weight) for layer in layers]),
        "activation": np.array([widths["activation"].index(bits[layer.name].activation) for layer in layers]),
    }
    tensors = [(f"{layer.name}.weight", "weight", np.array([row])) for row, layer in enumerate(layers)]
    for group in range(int(problem.groups.max()) + 1):
        rows = np.flatnonzero(problem.groups == group)
        tensors.append((f"{layers[rows[0]].activation_group}.activation", "activation", rows))
    before = float(problem.of(problem.costs, now["weight"], now["activation"]))

    def moved(state: Mapping[str, np.ndarray], tensor: tuple[str, str, np.ndarray], step: int) -> dict[str, Any] | None:
        _, kind, rows = tensor
        index = int(state[kind][rows[0]]) + step
        if not 0 <= index < len(widths[kind]):
            return None
        changed = {**state, kind: state[kind].copy()}
        changed[kind][rows] = index
        return changed

    found = []
    for up in tensors:
        higher = moved(now, up, 1)
        if higher is None:
            continue
        options = [(None, higher)] if problem.feasible(higher["weight"], higher["activation"]) else []
        if not options:
            options = [(down, moved(higher, down, -1)) for down in tensors if down is not up]  # type: ignore[misc]
        for down, state in options:
            if state is None or not problem.feasible(state["weight"], state["activation"]):
                continue
            after = float(problem.of(problem.costs, state["weight"], state["activation"]))
            if np.isfinite(after):
                found.append((after - before, [tensor for tensor in (up, down) if tensor is not None], state))
    for predicted, changed, state in sorted(found, key=lambda item: item[0]):
        moves = {
            name: (widths[kind][now[kind][rows[0]]], widths[kind][state[kind][rows[0]]]) for name, kind, rows in changed
        }
        proposal = {
            layer.name: LayerBits(widths["weight"][w], widths["activation"][a])
            for layer, w, a in zip(layers, state["weight"], state["activation"], strict=True)
        }
        yield predicted, moves, proposal
