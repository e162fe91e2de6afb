"""
What loading a model costs, measured in a process of its own: ``python -m nncf_mpq_plugin.deploy.footprint``.

Memory that one model has touched stays with its process, so two models cannot be compared within one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nncf_mpq_plugin.errors import MPQError
from nncf_mpq_plugin.types import read_json, write_json


@dataclass(frozen=True)
class Footprint:
    """
    :param load_seconds: from the file to a compiled model.
    :param memory_bytes: growth of the resident memory from before loading to after the first inference.
    :param peak_bytes: the same for its peak.
    """

    load_seconds: float
    memory_bytes: int
    peak_bytes: int


def footprint(path: str | Path, shape: Sequence[int], properties: Mapping[str, Any], repeats: int = 3) -> Footprint:
    """
    Load a model in new processes.

    :param path: ``.xml`` or ``.onnx``, for OpenVINO.
    :param shape: of the input, ``[N, ...]``.
    :param properties: compile-time properties.
    :param repeats: number of processes; the result holds the medians.
    :raises MPQError: if a process fails.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "footprint.json"
        request = json.dumps({"path": str(path), "shape": list(shape), "properties": dict(properties)})
        for _ in range(repeats):
            command = [sys.executable, "-m", "nncf_mpq_plugin.deploy.footprint", request, str(result)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                msg = f"{path}: the process that loads it failed: {done.stderr.strip()[-500:]}"
                raise MPQError(msg)
            found.append(Footprint(**read_json(result)))
    return Footprint(
        median(item.load_seconds for item in found),
        int(median(item.memory_bytes for item in found)),
        int(median(item.peak_bytes for item in found)),
    )


def _load(path: str, shape: Sequence[int], properties: Mapping[str, Any]) -> Footprint:
    import numpy as np
    import openvino as ov

    core = ov.Core()
    core.get_versions("CPU")  # loads the plugin, which every model needs
    resident, peak = _memory()
    begin = time.perf_counter()
    model = core.read_model(path)
    model.reshape({0: list(shape)})
    compiled = core.compile_model(model, "CPU", dict(properties))
    seconds = time.perf_counter() - begin
    del model
    compiled(np.zeros(shape, np.float32))
    resident_after, peak_after = _memory()
    return Footprint(seconds, resident_after - resident, peak_after - peak)


def _memory() -> tuple[int, int]:
    """:return: resident memory and its peak, in bytes (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(lines[key].split()[0]) for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


if __name__ == "__main__":
    write_json(sys.argv[2], asdict(_load(**json.loads(sys.argv[1]))))
