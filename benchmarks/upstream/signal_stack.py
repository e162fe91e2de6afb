"""
A signal after several Cores were released.

Needs numpy and openvino only (Linux).
"""

import mmap
import os
import signal
import subprocess
import sys

import numpy as np
import openvino as ov
from openvino import opset13 as ops

ORDERS = {
    "none released": (),
    "last made, first released": (1, 0),
    "first made, first released": (0, 1),
}
MAPPED = "memory is mapped in between"


def compiled():
    parameter = ops.parameter([1, 4], np.float32)
    return ov.Core().compile_model(ov.Model([ops.relu(parameter)], [parameter]), "CPU")


def child(name):
    """Python has signals handled on the thread's alternate stack (SA_ONSTACK), as most runtimes do."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    models = [compiled(), compiled()]  # each keeps the Core that compiled it
    for index in ORDERS.get(name, (0, 1)):
        models[index] = None
    memory = [np.frombuffer(mmap.mmap(-1, 3 * mmap.PAGESIZE), np.uint8) for _ in range(100 if name == MAPPED else 0)]
    os.kill(os.getpid(), signal.SIGUSR1)
    overwritten = sum(np.count_nonzero(zeros) for zeros in memory)
    print(f"{name}: goes on" + (f", {overwritten} bytes overwritten" if memory else ""))


if len(sys.argv) > 1:
    child(sys.argv[1])
else:
    for name in (*ORDERS, MAPPED):
        done = subprocess.run([sys.executable, __file__, name])
        if done.returncode < 0:
            print(f"{name}: killed by {signal.Signals(-done.returncode).name}", flush=True)
