"""What test_distributed.py does in one process and, started by torchrun, in several; the results go to files."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import small_net
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nncf_mpq_plugin import distributed
from nncf_mpq_plugin.adapters.nncf3 import place
from nncf_mpq_plugin.batches import Batches
from nncf_mpq_plugin.checkpoint import model_tensors, save_state
from nncf_mpq_plugin.errors import InputError, PeerError
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune
from nncf_mpq_plugin.floating import FloatConfig, train_float
from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.networks import digits_resnet
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.quantizer import quantizers_of
from nncf_mpq_plugin.types import LayerBits

JOINT = JointConfig(epochs=4, data_fraction=1.0, learning_rate=0.02, scale_learning_rate=0.001)


def small_model() -> QuantizedModel:
    """
    In float64: in float32 the order of a sum can decide which way a value is rounded, and steps then differ. The layer
    before a relu gets a bias for the same reason: sums of few-bit integers are often 0, on relu's edge.
    """
    quantized = small_net.small_model()
    quantized.model.left.bias = nn.Parameter(torch.linspace(0.01, 0.02, quantized.model.left.out_channels))
    quantized.model.double()
    return quantized


def data() -> DataLoader:
    inputs, targets = small_net.data().dataset[:]
    return DataLoader(TensorDataset(inputs.double(), targets), batch_size=16)


def joint(**changes: object) -> dict[str, Tensor]:
    quantized = small_model()
    train_jointly(quantized, data(), dataclasses.replace(JOINT, **changes))  # type: ignore[arg-type]
    return model_tensors(quantized.model)


def fine_tuned(**changes: object) -> dict[str, Tensor]:
    quantized = small_model()
    policy = dataclasses.replace(
        quantized.policy(), layers={layer.cost.name: LayerBits(3, 4) for layer in quantized.searchable}
    )
    finetune(quantized, policy, data(), FinetuneConfig(epochs=4, **changes))  # type: ignore[arg-type]
    return model_tensors(quantized.model)


def floating() -> dict[str, Tensor]:
    quantized = small_model()
    for quantizer in quantizers_of(quantized.model):
        quantizer.enabled = False
    train_float(quantized.model, data(), FloatConfig(epochs=4, learning_rate=0.05))
    return model_tensors(quantized.model)


def listed() -> dict[str, Tensor]:
    """Batches of a list in place of a loader's samples."""
    quantized = small_model()
    train_jointly(quantized, [(inputs, target) for inputs, target in data()], JOINT)
    return model_tensors(quantized.model)


def placed() -> dict[str, Tensor]:
    """A network with NNCF's hooks, in which batch norm is called another way."""
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    quantized = place(digits_resnet(width=4, blocks=1), images[:1], [images], bits=(2, 4))
    quantized.model.double()
    loader: DataLoader = DataLoader(TensorDataset(images.double(), torch.arange(64) % 10), 16)
    train_jointly(quantized, loader, dataclasses.replace(JOINT, epochs=2))
    return model_tensors(quantized.model)


def batch_norm() -> dict[str, Tensor]:
    """One batch norm layer in training: output and gradients of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5, 3, 3, generator=generator, dtype=torch.float64) * 2 + 1
    weights = torch.randn(8, 5, 3, 3, generator=generator, dtype=torch.float64)
    x, weights = distributed.share(x).requires_grad_(), distributed.share(weights)
    gamma = torch.linspace(0.5, 2, 5, dtype=torch.float64, requires_grad=True)
    beta = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)
    mean, variance = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    with distributed.SynchronizedBatchNorm() if distributed.size() > 1 else torch.enable_grad():
        output = F.batch_norm(x, mean, variance, gamma, beta, True, 0.3, 1e-5)
    (output.sin() * weights).sum().backward()
    assert x.grad is not None
    assert gamma.grad is not None
    assert beta.grad is not None
    whole = torch.zeros(2, 8, 5, 3, 3, dtype=torch.float64)
    whole[0, distributed.rank() :: distributed.size()] = output.detach()
    whole[1, distributed.rank() :: distributed.size()] = x.grad
    parts = {"output and gradient": whole, "gamma": gamma.grad, "beta": beta.grad}
    sums = {name: distributed.averaged(value)[0] * distributed.size() for name, value in parts.items()}
    return {**sums, "mean": mean, "variance": variance}


SCENARIOS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "joint": joint,
    "joint, shared statistics": lambda: joint(batch_norm="shared"),
    "joint, frozen statistics": lambda: joint(batch_norm="frozen"),
    "joint, distillation": lambda: joint(distillation=0.5),
    "joint, frozen weights": lambda: joint(train_weights=False),
    "joint, Adam": lambda: joint(optimizer="adam", learning_rate=0.001),
    "fine-tuning": fine_tuned,
    "fine-tuning, label free": lambda: fine_tuned(label_free=True),
    "floating point": floating,
    "a list of batches": listed,
    "a model with hooks": placed,
    "batch norm": batch_norm,
}


def refusals() -> None:
    """What must not work, in several processes."""

    def fail() -> None:
        message = "on purpose"
        raise InputError(message)

    kind, text = (InputError, "on purpose") if distributed.is_main() else (PeerError, "first process ended with InputE")
    with pytest.raises(kind, match=text):
        distributed.on_main(fail)
    assert distributed.on_main(lambda: [distributed.rank()]) == [0]
    odd: DataLoader = DataLoader(data().dataset, batch_size=15)
    with pytest.raises(InputError, match="batch of 15 samples cannot be shared by 2"):
        list(Batches(odd, shared=True).epoch(0))
    assert len(list(Batches(odd).epoch(0))) == 4


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with distributed.joined("cpu"):
        assert distributed.size() == 2
        for name, scenario in SCENARIOS.items():
            save_state(folder / f"{name}.{distributed.rank()}.safetensors", scenario(), {})
        refusals()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
