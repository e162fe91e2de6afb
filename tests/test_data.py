"""Data sources by name, and what is refused about batches."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nncf_mpq_plugin.batches import Batches
from nncf_mpq_plugin.data import DIGITS_VALIDATION, Data, check_batch, check_data, load_data
from nncf_mpq_plugin.errors import ConfigError, InputError


def image_folder(root: Path, classes: dict[str, tuple[str, ...]], images: int = 3) -> Path:
    from PIL import Image

    for part, names in classes.items():
        for index, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for image in range(images):
                Image.new("RGB", (40, 30), (80 * index, 20 * image, 7)).save(root / part / name / f"{image}.png")
    return root


def test_digits_have_the_input_s_shape_and_a_fixed_split() -> None:
    data = load_data("digits", [1, 3, 16, 12], batch_size=50)
    again = load_data("digits", [1, 3, 16, 12], batch_size=50)
    inputs, targets = next(iter(data.validation))
    assert inputs.shape == (50, 3, 16, 12)
    assert inputs.dtype == torch.float32
    assert float(inputs.min()) >= -1
    assert float(inputs.max()) <= 1
    assert torch.equal(inputs, next(iter(again.validation))[0])
    assert len(data.validation.dataset) == DIGITS_VALIDATION
    assert len(data.train.dataset) == 1797 - DIGITS_VALIDATION
    assert len(targets) == 50
    counts = torch.bincount(data.validation.dataset.tensors[1])
    assert len(counts) == 10
    assert int(counts.min()) >= 48  # stratified


def test_training_and_validation_digits_are_different_samples() -> None:
    data = load_data("digits", [1, 1, 8, 8], batch_size=64)
    train = {tuple(row) for row in data.train.dataset.tensors[0].flatten(1).tolist()}
    validation = {tuple(row) for row in data.validation.dataset.tensors[0].flatten(1).tolist()}
    assert not train & validation


def test_a_batch_larger_than_the_data_is_the_whole_data() -> None:
    data = load_data("digits", [1, 1, 8, 8], batch_size=10_000)
    assert len(data.train) == 1
    assert len(next(iter(data.train))[0]) == 1797 - DIGITS_VALIDATION


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    loaders = [load_data("digits", [1, 1, 8, 8], batch_size=64).train for _ in range(2)]
    first, second = (Batches(loader, seed=1) for loader in loaders)
    torch.manual_seed(123)
    a = [target for _, target in first.epoch(3)]
    torch.manual_seed(456)
    b = [target for _, target in second.epoch(3)]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], next(iter(second.epoch(4)))[1])
    assert not torch.equal(a[0], next(iter(Batches(loaders[0], seed=2).epoch(3)))[1])


def test_an_image_folder_gives_normalised_crops(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, {"train": ("cat", "dog"), "val": ("cat", "dog")})
    data = load_data(f"imagefolder:{folder}", [1, 3, 24, 24], batch_size=4)
    inputs, targets = next(iter(data.train))
    assert inputs.shape == (4, 3, 24, 24)
    assert targets.dtype == torch.int64
    assert data.classes == 2
    assert len(data.validation.dataset) == 6
    black = (0 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(next(iter(data.validation))[0][0, :2, 0, 0], black[:2])  # class 0, image 0 is (0, 0, 7)


def test_random_crops_depend_on_seed_epoch_and_sample_only(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, {"train": ("a", "b"), "val": ("a", "b")}, images=8)
    source = f"imagefolder:{folder}"
    loaders = [load_data(source, [1, 3, 8, 8], batch_size=4, workers=workers).train for workers in (0, 2)]
    results = []
    for seed, loader in enumerate(loaders):
        torch.manual_seed(seed)
        results.append(torch.cat([inputs for inputs, _ in Batches(loader, seed=5).epoch(1)]))
    assert torch.equal(*results)


REFUSED_SOURCES = {
    "misspelt": ("digit", [1, 1, 8, 8], "Did you mean 'digits'"),
    "no folder": ("imagefolder:/nowhere", [1, 3, 8, 8], "/nowhere/train"),
    "folder for another input": ("imagefolder:/nowhere", [1, 1, 8, 8], r"needs \[1, 3, height, width\]"),
    "digits of an impossible size": ("digits", [1, 1, 10**6, 10**6], "cannot be held in memory"),
    "digits for no image": ("digits", [1, 10], "digits are images"),
    "code that was not allowed": ("os:getcwd", [1, 1, 8, 8], "--allow-code"),
    "not a name": ("my loader:x y", [1, 1, 8, 8], "package.module:callable"),
}


@pytest.mark.parametrize(("source", "size", "message"), REFUSED_SOURCES.values(), ids=REFUSED_SOURCES.keys())
def test_a_source_that_cannot_be_used_says_why(source: str, size: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(source, size, batch_size=4)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"hello", None], ids=["no image", "half an image"])
def test_a_damaged_image_is_named(tmp_path: Path, workers: int, content: bytes | None) -> None:
    folder = image_folder(tmp_path, {"train": ("a", "b"), "val": ("a", "b")})
    path = folder / "val" / "b" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(content or whole[: len(whole) * 2 // 3])
    data = load_data(f"imagefolder:{folder}", [1, 3, 8, 8], batch_size=4, workers=workers)
    with pytest.raises(InputError, match=r"val/b/1\.png: cannot be read as an image"):
        list(data.validation)


def test_an_empty_class_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match="no images by class"):
        load_data(f"imagefolder:{tmp_path}", [1, 3, 8, 8], batch_size=4)


def test_different_classes_in_train_and_val_are_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, {"train": ("cat", "dog"), "val": ("cat", "cow")})
    with pytest.raises(InputError, match="in one only: cow, dog"):
        load_data(f"imagefolder:{folder}", [1, 3, 8, 8], batch_size=4)


def test_loaders_of_a_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_loaders.py").write_text(
        "import torch\n"
        "def make(samples):\n"
        "    batch = (torch.zeros(samples, 1, 8, 8), torch.zeros(samples, dtype=torch.int64))\n"
        "    return [batch], [batch]\n"
        "def one():\n    return [1]\n"
        "def broken():\n    raise RuntimeError('no disk')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    load = lambda name, **arguments: load_data(  # noqa: E731
        f"my_loaders:{name}", [1, 1, 8, 8], batch_size=1, arguments=arguments, allow_code=True
    )
    data = load("make", samples=3)
    check_data(data, [1, 1, 8, 8], 10)
    assert len(data.train[0][0]) == 3
    with pytest.raises(ConfigError, match="missing a required argument: 'samples'"):
        load("make")
    with pytest.raises(InputError, match="expected a pair"):
        load("one")
    with pytest.raises(ConfigError, match="RuntimeError: no disk"):
        load("broken")
    with pytest.raises(ConfigError, match="Did you mean 'my_loaders:make'"):
        load("makes")
    sys.modules.pop("my_loaders")


def test_a_data_set_with_more_classes_than_outputs_is_refused() -> None:
    with pytest.raises(InputError, match="10 classes, the model 5 outputs"):
        check_data(load_data("digits", [1, 1, 8, 8], batch_size=4), [1, 1, 8, 8], 5)


def test_an_empty_loader_is_refused() -> None:
    empty = DataLoader(TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(InputError, match="training loader gives no batch"):
        check_data(Data(empty, empty), [1, 1, 8, 8], 10)


@pytest.mark.parametrize("loader", [None, 3, iter([1])], ids=["none", "number", "iterator"])
def test_a_loader_that_cannot_be_read_again_is_refused(loader: Any) -> None:
    whole = [(IMAGES, LABELS)]
    with pytest.raises(InputError, match=r"validation loader is of type .* cannot be read anew"):
        check_data(Data(whole, loader), [1, 1, 8, 8], 10)


IMAGES = torch.zeros(2, 1, 8, 8)
LABELS = torch.tensor([0, 9])
REFUSED_BATCHES = {
    "no pair": (IMAGES, "pair of tensors"),
    "three parts": ((IMAGES, LABELS, LABELS), "pair of tensors"),
    "not tensors": (([1], [2]), "pair of tensors"),
    "other shape": ((torch.zeros(2, 3, 8, 8), LABELS), r"shape \[2, 3, 8, 8\]"),
    "double": ((IMAGES.double(), LABELS), "torch.float64"),
    "no sample": ((IMAGES[:0], LABELS[:0]), "holds no sample"),
    "bytes": ((IMAGES.byte(), LABELS), "torch.uint8"),
    "NaN": ((IMAGES + math.nan, LABELS), "NaN"),
    "label too large": ((IMAGES, torch.tensor([0, 10])), r"label 10 is outside 0\.\.9"),
    "negative label": ((IMAGES, torch.tensor([-1, 2])), r"label -1 is outside"),
    "fractional labels": ((IMAGES, torch.tensor([0.0, 1.0])), "torch.float32"),
    "one label": ((IMAGES, torch.tensor([0])), r"int64 of shape \[2\]"),
}


@pytest.mark.parametrize(("batch", "message"), REFUSED_BATCHES.values(), ids=REFUSED_BATCHES.keys())
def test_a_batch_that_does_not_fit_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_batch(batch, [1, 1, 8, 8], 10, "training data")


def test_a_batch_that_fits_is_accepted() -> None:
    check_batch((IMAGES, LABELS), [1, 1, 8, 8], 10, "training data")
