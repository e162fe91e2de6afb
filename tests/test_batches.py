import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from nncf_mpq_plugin.batches import Batches, first_batches, split_batch
from nncf_mpq_plugin.errors import InputError


class Augmented(Dataset):
    """Each sample draws from all three random number generators."""

    def __init__(self, size=20):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        noise = torch.rand(1).item() + random.random() + np.random.rand()
        return torch.tensor([float(index), noise]), index


class Stream(IterableDataset):
    def __init__(self, size=12):
        self.size = size

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(torch.arange(float(self.size)).reshape(-1, 1))


def collect(batches, epoch=0, start=0):
    return [inputs.tolist() for inputs, _ in batches.epoch(epoch, start)]


@pytest.mark.parametrize("workers", [0, 2], ids=["in process", "two workers"])
def test_order_and_augmentation_depend_on_seed_and_epoch_only(workers):
    def loader(count):
        return DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=count)

    whole = collect(Batches(loader(0), seed=3), epoch=2)
    torch.manual_seed(99)
    random.seed(99)
    assert collect(Batches(loader(workers), seed=3), epoch=2, start=2) == whole[2:]
    assert collect(Batches(loader(0), seed=3), epoch=1) != whole
    assert collect(Batches(loader(0), seed=4), epoch=2) != whole


def test_global_random_state_is_left_alone():
    batches = Batches(DataLoader(Augmented(), batch_size=4, shuffle=True), seed=3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    collect(batches)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_fraction_takes_the_same_samples_each_epoch():
    loader = DataLoader(TensorDataset(torch.arange(40.0).reshape(-1, 1), torch.zeros(40)), batch_size=8)
    batches = Batches(loader, seed=1, fraction=0.5)
    seen = [sorted(value for batch in collect(batches, epoch) for value in batch) for epoch in range(3)]
    assert len(batches) == 3
    assert len(seen[0]) == 20
    assert seen[0] == seen[1] == seen[2]
    assert collect(batches, 0) != collect(batches, 1)


@pytest.mark.parametrize(
    ("samples", "drop_last", "sizes"),
    [(17, False, [8, 8]), (18, False, [8, 8, 2]), (18, True, [8, 8]), (3, True, [3]), (16, False, [8, 8])],
)
def test_batch_sizes(samples, drop_last, sizes):
    """A last batch of one sample is left out: batch norm cannot train on it."""
    loader = DataLoader(TensorDataset(torch.zeros(samples, 1)), batch_size=8, drop_last=drop_last)
    batches = Batches(loader)
    assert [len(batch) for batch in collect(batches)] == sizes
    assert len(batches) == len(sizes)


def test_lists_are_shuffled_and_streams_taken_as_they_come():
    numbers = [(torch.full((2, 1), float(i)), None) for i in range(6)]
    order = [batch[0][0] for batch in collect(Batches(numbers, seed=1))]
    assert sorted(order) == [0, 1, 2, 3, 4, 5]
    assert order != sorted(order)
    stream = Batches(DataLoader(Stream(), batch_size=3), seed=1, fraction=0.5)
    assert collect(stream) == [[[0.0], [1.0], [2.0]], [[3.0], [4.0], [5.0]]]
    assert collect(stream, start=1) == [[[3.0], [4.0], [5.0]]]


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.count()


@pytest.mark.parametrize(
    ("loader", "fraction", "message"),
    [
        ([], 1.0, "empty"),
        ((x for x in []), 1.0, "no length"),
        (DataLoader(Endless()), 1.0, r"\(DataLoader\) has no length"),
        ([1], 0.0, "data_fraction"),
        ([1], 1.5, "data_fraction"),
    ],
    ids=["empty", "generator", "stream", "no data", "too much"],
)
def test_unusable_loaders(loader, fraction, message):
    with pytest.raises(InputError, match=message):
        Batches(loader, fraction=fraction)


def test_split_batch():
    x, y = torch.zeros(2), torch.ones(2)
    assert split_batch(x) == (x, None)
    assert split_batch([x]) == (x, None)
    assert split_batch((x, y)) == (x, y)
    with pytest.raises(InputError, match="dict"):
        split_batch({"image": x, "label": y, "weight": y})
    with pytest.raises(InputError, match="3 items"):
        split_batch((x, y, y))


def test_first_batches_are_cut_to_size():
    loader = DataLoader(TensorDataset(torch.arange(10.0), torch.zeros(10)), batch_size=4)
    assert [len(batch) for batch in first_batches(loader, 6)] == [4, 2]
    assert sum(len(batch) for batch in first_batches(loader, 100)) == 10


def test_held_back_samples_are_those_that_the_fraction_leaves_out():
    loader = DataLoader(TensorDataset(torch.arange(20.0)), batch_size=4)

    def values(**options):
        return {value for inputs, _ in Batches(loader, seed=3, **options).epoch(0) for value in inputs.tolist()}

    used, rest = values(fraction=0.6), values(fraction=0.6, held_back=True)
    assert (len(used), len(rest)) == (12, 8)
    assert not used & rest
    assert values(held_back=True) == values()


def test_take_stops_at_the_batch_that_has_enough():
    loader = DataLoader(TensorDataset(torch.arange(20.0), torch.arange(20)), batch_size=4)
    taken = Batches(loader, seed=3).take(6)
    assert [len(inputs) for inputs, _ in taken] == [4, 4]
    assert len(Batches(loader).take(100)) == 5
