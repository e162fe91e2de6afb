"""
What does joint training cost? A joint step at five bit widths (six passes) beside six plain FP32 steps.

    python benchmarks/joint_training.py                            # resnet18 and mobilenet_v2, 64x64, batch 32
    python benchmarks/joint_training.py --network resnet18 --rounds 1 --batch 4
    python benchmarks/joint_training.py --threads 1 --cpu-seconds  # on a machine that does other work as well

In one process, in turns. Seconds are medians over the rounds, and ratios are medians of the rounds' ratios, since a
virtual machine becomes faster and slower from one minute to the next. The joint step is that of train_jointly,
safeguards included; "tensor operations" is the same without a compiler; "chain" is the same schedule in the plain way:
a quantizer written as the usual chain of differentiable tensor operations, every pass in full, nothing computed again,
NNCF's hooks as they are. Memory is the peak of tensor bytes that torch's CPU allocator has handed out in two steps
(torch.profiler), plus the model's: parameters, gradients, momentum, saved activations, temporaries; not the buffers
that oneDNN allocates for itself.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nncf_mpq_plugin import joint, lsq, quantizer
from nncf_mpq_plugin.adapters.nncf3 import NNCFQuantizedModel, place
from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.memory import keep_freed_memory
from nncf_mpq_plugin.placement import QuantizedModel

BITS = (2, 3, 4, 5, 6)
PASSES = len(BITS) + 1
CLASSES, SIZE = 1000, 64
STEPS = 3  # of which the first is not timed
Batch = tuple[Tensor, Tensor]
Clock = Callable[[], float]


def chain(x: Tensor, scale: Tensor, low: int, high: int, factor: float = 1.0, ceiling: float = math.inf) -> Tensor:
    """LSQ in differentiable tensor operations, as most published code has it."""
    scale = (scale - scale * factor).detach() + scale * factor
    v = (x / scale).clamp(low, high)
    return ((v.round() - v).detach() + v) * scale


def fp32_steps(model: nn.Module, batches: list[Batch], count: int, clock: Clock = time.perf_counter) -> list[float]:
    """:return: seconds of each of ``count`` plain training steps."""
    model.train()
    options = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 2.5e-5, "fused": True}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    seconds = []
    for index in range(count):
        begin = clock()
        inputs, target = batches[index % len(batches)]
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(inputs), target, label_smoothing=0.1).backward()
        optimizer.step()
        seconds.append(clock() - begin)
    return seconds


def joint_steps(quantized: QuantizedModel, batches: list[Batch], clock: Clock = time.perf_counter) -> list[float]:
    """:return: seconds of each joint step but the first."""
    times: list[float] = []
    config = JointConfig(epochs=1, data_fraction=1.0, learning_rate=1e-3)
    train_jointly(quantized, batches, config, progress=lambda *_: times.append(clock()))
    return [later - earlier for earlier, later in itertools.pairwise(times)]


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    """Inside, quantizers work as ``name`` says."""
    with contextlib.ExitStack() as stack:
        if name == "chain":
            stack.enter_context(mock.patch.object(quantizer, "lsq_quantize", chain))
            stack.enter_context(mock.patch.object(joint, "computed_once", contextlib.nullcontext))
            stack.enter_context(mock.patch.object(joint, "recomputed", contextlib.nullcontext))
            several_passes = QuantizedModel.several_passes
            stack.enter_context(mock.patch.object(NNCFQuantizedModel, "several_passes", several_passes))
        elif name == "tensor operations":
            stack.enter_context(mock.patch.object(lsq, "compiled", return_value=False))
        yield


def peak_bytes(model: nn.Module, step: Callable[[], object]) -> int:
    """:return: the model's bytes and the most that were allocated beyond them in ``step``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    allocated = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    own = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    return own + max(allocated)


def measure(name: str, batch: int, rounds: int, clock: Clock, out: Console) -> None:
    """Measure one network and print its table."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=CLASSES)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(batch, 3, SIZE, SIZE, generator=generator),
            torch.randint(CLASSES, (batch,), generator=generator),
        )
        for _ in range(STEPS)
    ]
    placed = place(copy.deepcopy(model).eval(), batches[0][0][:1], [batches[0][0]], bits=BITS)
    assert lsq.compiled(), "the kernel does not compile on this machine"
    names = ("joint step", "tensor operations", "chain")
    seconds: dict[str, list[float]] = {"FP32": [], **{kind: [] for kind in names}}  # of each round
    fp32_steps(copy.deepcopy(model), batches, 2)
    for _ in range(rounds):
        steps = fp32_steps(copy.deepcopy(model), batches, PASSES, clock)[1:]
        seconds["FP32"].append(PASSES * statistics.median(steps))
        for kind in names:
            with variant(kind):
                seconds[kind].append(statistics.median(joint_steps(copy.deepcopy(placed), batches, clock)))
    memory = {"FP32": peak_bytes(model, lambda: fp32_steps(copy.deepcopy(model), batches[:2], 2))}
    for kind in names:
        twin = copy.deepcopy(placed)
        with variant(kind):
            memory[kind] = peak_bytes(twin.model, lambda twin=twin: joint_steps(twin, batches[:2]))
    copied = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    memory["FP32"] -= copied  # of the copy made in the step

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    base = statistics.median(seconds["FP32"])
    table = Table(
        title=f"{name}, batch {batch} of {SIZE}x{SIZE}, {torch.get_num_threads()} threads", title_justify="left"
    )
    unit = "CPU seconds" if clock is time.process_time else "seconds"
    for heading in ("", unit, f"/ {PASSES} FP32 steps", "chain / this", "peak MB", "/ FP32 step"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(f"{PASSES} FP32 steps", f"{base:.3f}", "1.00", "-", f"{memory['FP32'] / 1e6:.0f}", "1.00")
    for kind in names:
        table.add_row(
            kind,
            f"{statistics.median(seconds[kind]):.3f}",
            f"{ratio(kind, 'FP32'):.2f}",
            f"{ratio('chain', kind):.2f}",
            f"{memory[kind] / 1e6:.0f}",
            f"{memory[kind] / memory['FP32']:.2f}",
        )
    out.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-seconds", action="store_true", help="of this process, all threads; default: wall clock")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command does
    for name in options.network:
        measure(name, options.batch, options.rounds, clock, Console(width=110))


if __name__ == "__main__":
    main()
