"""
Batches in an order that depends on a seed and the epoch only.

A training that was stopped at any step can so go on with the batches that it would have seen: nothing of the global
random state, of worker processes or of earlier epochs decides what a batch holds.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from nncf_mpq_plugin import distributed
from nncf_mpq_plugin.errors import InputError


def derived_seed(*parts: int) -> int:
    """:return: a 32-bit seed for the stream named by ``parts`` (seed, epoch, sample, ...)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class _SeededSamples(Dataset):
    """A data set whose random augmentations depend on (seed, epoch, sample) only."""

    def __init__(self, dataset: Dataset, seed: int, epoch: int):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Any:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seed = derived_seed(self.seed, self.epoch, index)
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            return self.dataset[index]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


class Batches:
    """
    The batches of a loader, epoch by epoch.

    A ``DataLoader`` over a map-style data set is shuffled anew each epoch, whatever sampler it has, and its samples
    are drawn with random states of their own. A list or tuple of batches is shuffled likewise. Any other iterable is
    taken in its own order, with the global random state seeded by (seed, epoch) while it runs.

    :param loader: yields (input, target), or the input alone.
    :param seed: decides the order and, with ``fraction``, which samples are used.
    :param fraction: share of the samples to use, 0 < fraction <= 1; the same samples in each epoch.
    :param held_back: use the other samples instead, those that ``fraction`` leaves out; all of them where it leaves
        out none.
    :param shared: each process of a training takes its share of each batch; the batches are those of one process.
    :raises InputError: if the loader is empty or has no length, or the fraction is not a share.
    """

    def __init__(
        self, loader: Any, *, seed: int = 0, fraction: float = 1.0, held_back: bool = False, shared: bool = False
    ):
        if not 0 < fraction <= 1:
            msg = f"data_fraction must be above 0 and at most 1, got {fraction}."
            raise InputError(msg)
        self._loader, self._seed = loader, seed
        self._share = distributed.share if shared else lambda items: items
        self._by_sample = (
            isinstance(loader, DataLoader)
            and not isinstance(loader.dataset, IterableDataset)
            and loader.batch_size is not None
        )
        source = loader.dataset if self._by_sample else loader
        try:
            total = len(source)
        except TypeError as error:
            msg = f"The data loader ({type(loader).__name__}) has no length; the schedule needs one. Give it __len__."
            raise InputError(msg) from error
        if total == 0:
            msg = "The data loader is empty: there is nothing to train on."
            raise InputError(msg)
        count = max(1, round(fraction * total))
        order = torch.randperm(total, generator=torch.Generator().manual_seed(derived_seed(seed)))
        if held_back and count < total:
            order, count = order[count:], total - count
        self._chosen = order[:count].sort().values
        if self._by_sample:
            size = loader.batch_size
            rest = count % size
            drop = rest and count > size and (loader.drop_last or rest == 1)  # batch norm cannot train on one sample
            self._size, self._steps = size, count // size + (1 if rest and not drop else 0)
        else:
            self._size, self._steps = 1, count

    def __len__(self) -> int:
        """:return: batches of one epoch."""
        return self._steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, Any]]:
        """
        :param epoch: number of the epoch, from 0.
        :param start: batches to leave out at the epoch's beginning (they are not loaded).
        :return: (input, target) of each batch; the target is None where the loader gives the input alone.
        """
        generator = torch.Generator().manual_seed(derived_seed(self._seed, epoch))
        order = self._chosen[torch.randperm(len(self._chosen), generator=generator)].tolist()
        if self._by_sample:
            batches: Any = self._sample_batches(order, epoch, start)
        elif isinstance(self._loader, Sequence):
            batches = (self._share(self._loader[index]) for index in order[start:])
        else:
            batches = map(self._share, self._as_given(epoch, start))
        for batch in batches:
            yield split_batch(batch)

    def _sample_batches(self, order: list[int], epoch: int, start: int) -> DataLoader:
        loader: DataLoader = self._loader
        lists = [self._share(order[i * self._size : (i + 1) * self._size]) for i in range(start, self._steps)]
        dataset: Dataset = loader.dataset
        if not isinstance(dataset, TensorDataset):
            dataset = _SeededSamples(dataset, self._seed, epoch)
        return DataLoader(
            dataset,
            batch_sampler=lists,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            generator=torch.Generator().manual_seed(derived_seed(self._seed, epoch)),
        )

    def _as_given(self, epoch: int, start: int) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self._seed, epoch))
            iterator = iter(self._loader)
        yield from itertools.islice(iterator, start, self._steps)

    def first(self, samples: int) -> Iterator[tuple[Any, Any]]:
        """:return: (input, target) of the first epoch until there are ``samples``; the last batch is whole."""
        for inputs, target in self.epoch(0):
            yield inputs, target
            samples -= len(inputs)
            if samples <= 0:
                break

    def take(self, samples: int) -> list[tuple[Any, Any]]:
        """:return: all of :meth:`first` at once."""
        return list(self.first(samples))


def split_batch(batch: Any) -> tuple[Any, Any]:
    """
    :param batch: what a loader yields: (input, target) or the input alone.
    :return: input and target (None where there is none).
    :raises InputError: if it is neither.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, list | tuple) and len(batch) in (1, 2):
        return (batch[0], batch[1]) if len(batch) == 2 else (batch[0], None)
    msg = (
        f"A batch must be a tensor or a pair (input, target); the data loader gave {type(batch).__name__}"
        f"{f' of {len(batch)} items' if isinstance(batch, Sized) else ''}. Wrap the loader to give such pairs."
    )
    raise InputError(msg)


def first_batches(loader: Any, samples: int) -> list[Tensor]:
    """
    Inputs for calibration.

    :param samples: how many samples to take; fewer where the loader has fewer.
    :return: input batches in the loader's own order, the last one cut to size.
    """
    result: list[Tensor] = []
    for batch in loader:
        inputs = split_batch(batch)[0]
        result.append(inputs[:samples])
        samples -= len(result[-1])
        if samples <= 0:
            break
    return result
