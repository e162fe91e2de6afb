"""
Training and validation loaders by name.

All are plain ``DataLoader`` objects over map-style data sets: the order of an epoch and the random crops of a sample
are decided by :class:`nncf_mpq_plugin.batches.Batches`, from (seed, epoch, sample) alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from nncf_mpq_plugin.errors import ConfigError, InputError
from nncf_mpq_plugin.models import call, import_callable
from nncf_mpq_plugin.schema import nearest

DIGITS_VALIDATION = 500  # of 1797
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZE = 256 / 224  # side of the resized image / side of its centre crop


@dataclass(frozen=True)
class Data:
    """
    Loaders of one data set.

    :param train: yields ``(input [N, ...], target [N])`` and has a length.
    :param validation: likewise; always in the same order.
    :param classes: number of classes, where it is known.
    """

    train: Any
    validation: Any
    classes: int | None = None


def digits(sample_size: Sequence[int], batch_size: int) -> Data:
    """
    scikit-learn's 1,797 digits, 8 x 8, upscaled; 500 of them (a fixed, stratified choice) for validation.

    :param sample_size: ``[1, C, H, W]``; the grey value, in [-1, 1], is repeated in each of C channels.
    :param batch_size: samples in a batch.
    :raises ConfigError: if the model's input is not an image, or is too large.
    """
    if len(sample_size) != 4:
        msg = (
            f"input_info.sample_size: digits are images and need [1, channels, height, width], got {list(sample_size)}."
        )
        raise ConfigError(msg)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    try:
        images = torch.nn.functional.interpolate(images, tuple(sample_size[2:]), mode="bilinear", align_corners=False)
        images = images.expand(-1, sample_size[1], -1, -1).contiguous()
    except RuntimeError as error:
        msg = f"input_info.sample_size: the digits cannot be held in memory at {list(sample_size)} ({error})."
        raise ConfigError(msg) from error
    samples = TensorDataset(images, torch.tensor(labels, dtype=torch.int64))
    train, validation = train_test_split(
        range(len(labels)), test_size=DIGITS_VALIDATION, random_state=0, stratify=labels
    )
    return Data(
        DataLoader(TensorDataset(*samples[train]), min(batch_size, len(train)), shuffle=True, drop_last=True),
        DataLoader(TensorDataset(*samples[validation]), batch_size),
        classes=10,
    )


def imagefolder(directory: str | Path, sample_size: Sequence[int], batch_size: int, workers: int = 0) -> Data:
    """
    Images in ``directory/train/CLASS/`` and ``directory/val/CLASS/``, with ImageNet's usual crops and normalisation.

    :param sample_size: ``[1, 3, H, W]``.
    :param batch_size: samples in a batch.
    :param workers: processes that read images.
    :raises InputError: if a folder is missing or empty, or the two have different classes; later, while loading, if a
        file is no image.
    """
    if len(sample_size) != 4 or sample_size[1] != 3:
        msg = f"input_info.sample_size: an image folder needs [1, 3, height, width], got {list(sample_size)}."
        raise ConfigError(msg)
    from torchvision import datasets
    from torchvision.transforms import v2

    size = tuple(sample_size[2:])
    tail = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    transforms = {
        "train": v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *tail]),
        "val": v2.Compose([v2.Resize(round(max(size) * RESIZE)), v2.CenterCrop(size), *tail]),
    }
    folders = {}
    for part, transform in transforms.items():
        path = Path(directory) / part
        try:
            folders[part] = datasets.ImageFolder(str(path), transform, loader=_read_image)
        except OSError as error:
            msg = f"data.source: {path}: no images by class ({error}). Expected {path}/CLASS/IMAGE.jpg."
            raise InputError(msg) from error
    train, validation = folders["train"], folders["val"]
    if train.classes != validation.classes:
        odd = sorted(set(train.classes) ^ set(validation.classes))
        msg = f"data.source: {directory}: train/ and val/ have different classes; in one only: {', '.join(odd[:5])}."
        raise InputError(msg)
    return Data(
        DataLoader(train, min(batch_size, len(train)), shuffle=True, drop_last=True, num_workers=workers),
        DataLoader(validation, batch_size, num_workers=workers),
        classes=len(train.classes),
    )


def _read_image(path: str) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:  # a damaged file makes PIL raise nearly anything
        msg = f"{path}: cannot be read as an image ({error}). Repair or remove it."
        raise InputError(msg) from error


def load_data(
    source: str,
    sample_size: Sequence[int],
    *,
    batch_size: int,
    workers: int = 0,
    arguments: Mapping[str, Any] | None = None,
    allow_code: bool = False,
) -> Data:
    """
    Make the loaders that a config names.

    :param source: ``digits``, ``imagefolder:DIR`` or ``package.module:callable`` that returns a pair of loaders.
    :param sample_size: shape of the model's input.
    :param arguments: keyword arguments for the callable.
    :param allow_code: whether callables outside this package may be imported.
    :raises InputError: if the source is unknown or cannot be used.
    """
    if source == "digits":
        return digits(sample_size, batch_size)
    if source.startswith("imagefolder:"):
        return imagefolder(source.removeprefix("imagefolder:"), sample_size, batch_size, workers)
    check_source_name(source)
    place = f"data.source {source!r}"
    loaders = call(import_callable(source, "data.source", allow_code=allow_code), arguments or {}, place)
    if not isinstance(loaders, tuple | list) or len(loaders) != 2:
        msg = f"{place}: expected a pair (training loader, validation loader), got {type(loaders).__name__}."
        raise InputError(msg)
    return Data(*loaders)


def check_source_name(source: str) -> None:
    """:raises ConfigError: if ``source`` is none of the forms that :func:`load_data` knows."""
    if source != "digits" and ":" not in source:
        close = nearest(source, ["digits", "imagefolder:DIR", "package.module:callable"])
        msg = (
            f"data.source: {source!r} is not 'digits', 'imagefolder:DIR' or 'package.module:callable'."
            f"{f' Did you mean {close!r}?' if close else ''}"
        )
        raise ConfigError(msg)


def check_data(data: Data, sample_size: Sequence[int], classes: int) -> None:
    """
    Look at the first batch of each loader.

    :param sample_size: shape of the model's input, whose first dimension is free.
    :param classes: the model's outputs.
    :raises InputError: if a loader is empty or can be read only once, or its batches do not fit the model.
    """
    if data.classes is not None and data.classes > classes:
        msg = f"The data set has {data.classes} classes, the model {classes} outputs. Set model_arguments.num_classes."
        raise InputError(msg)
    for name, loader in (("training", data.train), ("validation", data.validation)):
        check_batch(first_batch(loader, name), sample_size, classes, f"{name} data")


def first_batch(loader: Any, name: str) -> Any:
    """
    :param name: what to call the loader in messages.
    :return: the first batch.
    :raises InputError: if there is none, or the loader can be read only once.
    """
    iterator = iter(loader) if hasattr(loader, "__iter__") or hasattr(loader, "__getitem__") else None
    if iterator is None or iterator is loader:
        msg = (
            f"The {name} loader is of type {type(loader).__name__}, which cannot be read anew each epoch. Give a "
            "DataLoader, a list of batches, or an object with __iter__ and __len__."
        )
        raise InputError(msg)
    batch = next(iterator, None)
    if batch is None:
        msg = f"The {name} loader gives no batch: the data set is empty (or smaller than one batch)."
        raise InputError(msg)
    return batch


def check_batch(batch: Any, sample_size: Sequence[int], classes: int, place: str) -> None:
    """:raises InputError: if ``batch`` is not ``(input, target)`` with the input's shape and targets < ``classes``."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        msg = f"{place}: a batch must be a pair of tensors (input, target), got {type(batch).__name__}."
        raise InputError(msg)
    inputs, targets = batch
    check_inputs(inputs, sample_size, place)
    if targets.dtype != torch.int64 or targets.shape != inputs.shape[:1]:
        found = f"{targets.dtype} of shape {list(targets.shape)}"
        msg = f"{place}: targets are {found}, expected class numbers, int64 of shape [{len(inputs)}]."
        raise InputError(msg)
    if int(targets.min()) < 0 or int(targets.max()) >= classes:
        bad = targets.min() if int(targets.min()) < 0 else targets.max()
        msg = f"{place}: the label {int(bad)} is outside 0..{classes - 1}, the model's outputs."
        raise InputError(msg)


def check_inputs(inputs: Tensor, sample_size: Sequence[int], place: str) -> None:
    """:raises InputError: if ``inputs`` are not finite float32 ``[N, ...]`` of the model's shape, N > 0."""
    if inputs.dtype != torch.float32 or list(inputs.shape[1:]) != list(sample_size[1:]):
        msg = (
            f"{place}: inputs are {inputs.dtype} of shape {list(inputs.shape)}, the model needs torch.float32 of shape "
            f"{['N', *sample_size[1:]]} (input_info.sample_size)."
        )
        raise InputError(msg)
    if not len(inputs):
        msg = f"{place}: the first batch holds no sample."
        raise InputError(msg)
    if not torch.isfinite(inputs).all():
        msg = f"{place}: an input holds NaN or an infinity."
        raise InputError(msg)
