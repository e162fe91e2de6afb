"""
One training in several processes: ``torchrun --nproc_per_node=N -m nncf_mpq_plugin run CONFIG``.

Every process holds the model and takes its share of each batch, so N processes take the same steps as one. In a joint
step gradients are summed locally over the passes and exchanged in the last one, by ``DistributedDataParallel``. What
makes the results those of one process:

* A batch is the config's ``batch_size`` samples over all processes, see :class:`nncf_mpq_plugin.batches.Batches`.
* Batch norm in training uses the statistics of the whole batch (batch_norm.py).
* Random bits come from (seed, step), in all processes the same.

The first process alone writes, prints, measures, searches and exports; the others wait (:func:`on_main`). torchrun ends
all of them when one dies.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nncf_mpq_plugin.batch_norm import SynchronizedBatchNorm
from nncf_mpq_plugin.errors import InputError, PeerError

STEP_TIMEOUT = timedelta(minutes=30)  # for one exchange: a step, loading its data, compiling a kernel at the first one
STAGE_TIMEOUT = timedelta(days=1)  # for what the first process does alone; torchrun ends the others if it dies


def size() -> int:
    """:return: how many processes train together; 1 for a process of its own."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """:return: this process's number, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    """:return: whether this process writes and prints."""
    return rank() == 0


class _Messages:
    """What the first process tells the others, as JSON in torchrun's store."""

    def __init__(self) -> None:
        self.store: dist.Store | None = None
        self.count = 0

    def key(self) -> str:
        self.count += 1
        return f"on_main/{self.count}"


_messages = _Messages()


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """
    Join the processes that torchrun has started; without torchrun nothing happens.

    :param device: the config's ``device``. CUDA takes the GPU of torchrun's LOCAL_RANK and NCCL, the CPU gloo.
    :raises InputError: if there are fewer GPUs than processes.
    :raises PeerError: if another process of this run ends early.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            msg = f"There are {torch.cuda.device_count()} GPUs here; torchrun --nproc_per_node cannot be larger."
            raise InputError(msg)
        torch.cuda.set_device(local)
    store, number, processes = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("training", store),
        rank=number,
        world_size=processes,
        timeout=STEP_TIMEOUT,
    )
    _messages.store, _messages.count = dist.PrefixStore("messages", store), 0
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = (str(error).splitlines() or [""])[0]
        msg = f"Another process of this run has ended, or cannot be reached ({reason}). What was saved is kept."
        raise PeerError(msg) from error
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone
    _messages.store = None


def on_main(function: Callable[[], Any]) -> Any:
    """
    Call ``function`` in the first process, while the others wait.

    :param function: returns a JSON-serialisable value.
    :return: what it returned, in all processes.
    :raises PeerError: in the others, if it raised in the first.
    """
    if size() == 1:
        return function()
    key, store = _messages.key(), _messages.store
    assert store is not None
    if is_main():
        try:
            value = function()
            told = json.dumps({"value": value})
        except BaseException as error:
            store.set(key, json.dumps({"error": type(error).__name__}))
            raise
        store.set(key, told)
        return value
    store.wait([key], STAGE_TIMEOUT)
    answer = json.loads(store.get(key))
    if "error" in answer:
        msg = f"The first process ended with {answer['error']}."
        raise PeerError(msg)
    return answer["value"]


def share(items: Any) -> Any:
    """
    :param items: a batch's sample numbers, or a tensor (or a tuple, list or mapping of tensors) of its samples.
    :return: this process's part: every N-th one.
    :raises InputError: if the samples cannot be shared equally.
    """
    if size() == 1:
        return items
    if isinstance(items, Mapping):
        return {name: share(value) for name, value in items.items()}
    if isinstance(items, tuple) or (isinstance(items, list) and items and isinstance(items[0], Tensor)):
        return type(items)(share(value) for value in items)
    if isinstance(items, Tensor | Sequence):
        if len(items) % size():
            msg = (
                f"A batch of {len(items)} samples cannot be shared by {size()} processes. Make data.batch_size a "
                "multiple of their number, and leave out an incomplete last batch (drop_last=True of a DataLoader)."
            )
            raise InputError(msg)
        return items[rank() :: size()]
    return items


def replicated(model: nn.Module, device: torch.device) -> nn.Module:
    """
    :param model: on ``device``, with the parameters that require gradients decided.
    :return: what to call in its place in training: parameters and buffers are the first process's, gradients are means
        over the processes. The model itself for a process of its own.
    """
    if size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,  # they stay equal, and statistics of batch norm change places with other sets
        find_unused_parameters=True,  # a pass uses the scales of its own bit widths only
    )


@contextlib.contextmanager
def one_pass(model: nn.Module, *, last: bool = True) -> Iterator[None]:
    """
    Around one forward and backward pass.

    :param model: what :func:`replicated` returned.
    :param last: exchange the gradients, summed since the last exchange.
    """
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    with SynchronizedBatchNorm(), contextlib.nullcontext() if last else model.no_sync():
        yield


def averaged(values: Tensor, flag: bool = False) -> tuple[Tensor, bool]:
    """
    :param values: any shape.
    :return: the mean over the processes, and whether ``flag`` is set in any of them.
    """
    if size() == 1:
        return values, flag
    packed = torch.cat([values.flatten(), values.new_tensor([float(flag)])])
    dist.all_reduce(packed)
    return (packed[:-1] / size()).reshape(values.shape), bool(packed[-1] > 0)
