"""Five hundred joint steps on a real placed model; prints the resident memory in bytes after every 25th, as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from nncf_mpq_plugin.adapters.nncf3 import place
from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.networks import digits_resnet

STEPS, BATCH, SIDE, WIDTH = 500, 64, 16, 4


def resident() -> int:
    """:return: bytes of this process that lie in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(state: Path) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(50 * BATCH, 1, SIDE, SIDE), torch.arange(50 * BATCH) % 10
    quantized = place(digits_resnet(width=WIDTH, blocks=1), inputs[:1], [inputs[:BATCH]], bits=(2, 3, 4, 6))
    found: list[int] = []

    def progress(step: int, total: int, numbers: object) -> None:
        assert total == STEPS
        if step % 25 == 0:
            found.append(resident())

    loader = DataLoader(TensorDataset(inputs, targets), BATCH)
    config = JointConfig(epochs=STEPS // 50, data_fraction=1.0)
    train_jointly(quantized, loader, config, state_dir=state, progress=progress)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
