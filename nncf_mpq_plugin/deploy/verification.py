"""
Does the exported model compute what was trained?

Rounding in a quantized network turns differences of 1e-7 into whole steps where a value lies next to a rounding
threshold, so torch in float32 does not agree with torch in float64 on every sample either. The contract measures an
exported model against that: a runtime passes if it agrees with torch as well as torch agrees with itself. Where the
certificate of :mod:`nncf_mpq_plugin.deploy.margins` covers every quantized tensor, it has to agree on every sample.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nncf_mpq_plugin.deploy.compiling import own_batch_size
from nncf_mpq_plugin.deploy.divergence import Divergence, Trace
from nncf_mpq_plugin.deploy.graph import marked_graph
from nncf_mpq_plugin.deploy.margins import Certificate, certify
from nncf_mpq_plugin.deploy.onnx import to_standard_operators
from nncf_mpq_plugin.deploy.runtimes import BATCH, OUTPUT, run_onnxruntime, run_openvino
from nncf_mpq_plugin.errors import InputError, VerificationError

AGREEMENT = 1e-3  # outputs agree within this share of the outputs' standard deviation
SHARE_TOLERANCE = 0.02  # (a): how far a runtime's share of agreeing samples may be below torch's own
MEAN_TOLERANCE = 0.01  # (c): mean absolute difference as a share of the standard deviation
ONE_SAMPLE = "OpenVINO IR, batch of 1"
TRACED_SAMPLES = 16  # those that differ most, in which the first diverging layer is looked for


@dataclass(frozen=True)
class Agreement:
    """
    How far one set of outputs is from torch's in float32.

    :param name: the runtime.
    :param agreeing: share of samples whose outputs all agree within 1e-3 of the outputs' standard deviation.
    :param mean_difference: mean absolute difference over the standard deviation.
    :param largest_difference: largest absolute difference over the standard deviation.
    :param top1: share of samples with the same largest output.
    :param top1_decided: the same over samples whose margin exceeds torch's own noise; 1.0 if there is none.
    :param required: whether the contract covers it; the others are reported only.
    :param failures: what of the contract it breaks, in words.
    :param divergence: the first tensor that differs, where the contract is broken and one can be named.
    """

    name: str
    agreeing: float
    mean_difference: float
    largest_difference: float
    top1: float
    top1_decided: float
    required: bool
    failures: tuple[str, ...]
    divergence: Divergence | None = None


@dataclass(frozen=True)
class VerifyReport:
    """
    Agreement of every exported file with the torch model.

    :param samples: number of samples compared.
    :param torch_float64: how torch in float64 agrees with torch in float32: the model's own noise.
    :param certificate: of the frozen model as it is exported: which tensors cannot be rounded differently, and why
        others can.
    :param runtimes: each runtime and file; default properties are left out where ``ONEDNN_MAX_CPU_ISA`` is set.
    """

    samples: int
    torch_float64: Agreement
    certificate: Certificate
    runtimes: tuple[Agreement, ...]

    @property
    def ok(self) -> bool:
        """Whether every required runtime keeps the contract."""
        return not any(runtime.required and runtime.failures for runtime in self.runtimes)

    def to_json(self) -> dict[str, Any]:
        """:return: a JSON-serialisable object."""
        return {
            "schema_version": 1,
            "ok": self.ok,
            "samples": self.samples,
            "torch_float64": asdict(self.torch_float64),
            "certificate": self.certificate.to_json(),
            "runtimes": [asdict(runtime) for runtime in self.runtimes],
        }

    def check(self, export: str = "deploy.export") -> None:
        """
        :param export: what writes the files, as the caller knows it, for the message.
        :raises VerificationError: naming each runtime and what it breaks, if the contract is not kept.
        """
        if not self.ok:
            broken = [
                f"{r.name}: {'; '.join([*r.failures, *([str(r.divergence)] if r.divergence else [])])}"
                for r in self.runtimes
                if r.required and r.failures
            ]
            msg = (
                f"The exported model does not agree with the trained one on {self.samples} samples. "
                f"{' | '.join(broken)}. "
                f"Do not deploy it. Write it again with {export}; if that does not help, report the model."
            )
            raise VerificationError(msg, self.to_json())


def verify(
    frozen: nn.Module, path: str | Path, samples: Iterable[Tensor], limit: int = 256, target: str = "openvino"
) -> VerifyReport:
    """
    Compare exported files with the frozen model.

    :param frozen: the model that was exported.
    :param path: an exported file (``.xml`` or ``.onnx``), or the folder that holds ``model.xml`` and ``model.onnx``.
    :param samples: batches ``[N, ...]`` of real inputs.
    :param limit: number of samples to use.
    :param target: what the model was placed for; at ``onnxruntime`` OpenVINO, which fuses residual additions wrongly
        then, is reported only.
    :return: the report; call its ``check`` to fail on disagreement.
    :raises InputError: if a file is missing or another network's, or there are no samples.
    """
    runners = _runners(Path(path))
    inputs = _take(samples, limit)
    frozen = copy.deepcopy(frozen).cpu().eval()
    with torch.no_grad():
        reference = _output(torch.cat([_single(frozen(x)) for x in inputs.split(BATCH)]))
        double = frozen.double()
        exact = _output(torch.cat([_single(double(x.double())) for x in inputs.split(BATCH)]))
        frozen.float()
    noise = _compare("torch float64", exact, reference, None, required=False)
    certificate = certify(to_standard_operators(marked_graph(frozen, inputs[:1])))
    runtimes = []
    for name, runner in runners.items():
        required = runner.covered and (target == "openvino" or name == "ONNX Runtime")
        output = _output(runner(inputs.numpy(), [])[OUTPUT])
        if output.shape != reference.shape:
            msg = (
                f"{path}: {name} returns {output.size} numbers for {len(inputs)} samples, the model {reference.size}. "
                "Is the file another network's?"
            )
            raise InputError(msg)
        found = _compare(name, output, reference, (noise, exact), required, certificate.complete)
        if required and found.failures:
            difference = np.nan_to_num(np.abs(output - reference), nan=np.inf).max(1)
            # one whole batch where its size is fixed: tensors inside need not have the batch first
            known = own_batch_size(runner.path) or runner.options.get("batch_size")
            count = known or min(TRACED_SAMPLES, len(inputs))
            worst = np.sort(np.resize(np.argsort(-difference, kind="stable"), count))
            found = replace(found, divergence=Trace(frozen, inputs[worst]).first_divergence(runner))
        runtimes.append(found)
    return VerifyReport(len(inputs), noise, certificate, tuple(runtimes))


@dataclass(frozen=True)
class _Runner:
    """
    A file in a runtime.

    :param function: of :mod:`~nncf_mpq_plugin.deploy.runtimes`.
    :param options: of ``function``.
    :param covered: by the contract.
    """

    path: Path
    function: Callable[..., Mapping[str, np.ndarray]]
    options: Mapping[str, Any] = field(default_factory=dict)
    covered: bool = True

    def __call__(self, inputs: np.ndarray, taps: Sequence[str]) -> Mapping[str, np.ndarray]:
        return self.function(self.path, inputs, taps, **self.options)


def _runners(path: Path) -> dict[str, _Runner]:
    """:return: by name."""
    if path.is_dir():
        return {**_runners(path / "model.xml"), **_runners(path / "model.onnx")}
    if path.suffix == ".xml":
        runners = {
            "OpenVINO IR": _Runner(path, run_openvino),
            # where shapes are known, OpenVINO fuses other operations
            ONE_SAMPLE: _Runner(path, run_openvino, {"batch_size": 1}),
        }
        if (
            "ONEDNN_MAX_CPU_ISA" not in os.environ
        ):  # below the CPU's own, OpenVINO chooses bf16 all the same and crashes
            name = "OpenVINO IR, default properties"
            runners[name] = _Runner(path, run_openvino, {"properties": {}}, covered=False)
        return runners
    if path.suffix == ".onnx":
        return {"OpenVINO ONNX": _Runner(path, run_openvino), "ONNX Runtime": _Runner(path, run_onnxruntime)}
    msg = f"{path}: an exported model ends in .xml (with its .bin beside it) or .onnx."
    raise InputError(msg)


def _take(samples: Iterable[Tensor], limit: int) -> Tensor:
    batches: list[Tensor] = []
    count = 0
    for batch in samples:
        if not isinstance(batch, Tensor):
            msg = (
                f"Verification takes batches of inputs, and got a {type(batch).__name__}. Of a loader of pairs pass "
                "the inputs alone: [inputs for inputs, _ in loader]."
            )
            raise InputError(msg)
        batches.append(batch[: limit - count].float().cpu())
        count += len(batches[-1])
        if count >= limit:
            break
    if count == 0:
        msg = "There are no samples to verify the exported model with."
        raise InputError(msg)
    return torch.cat(batches)


def _compare(
    name: str,
    output: np.ndarray,
    reference: np.ndarray,
    own: tuple[Agreement, np.ndarray] | None,
    required: bool,
    certified: bool = False,
) -> Agreement:
    scale = float(reference.std()) or 1.0
    difference = np.abs(output - reference) / scale
    worst = difference.max(1)
    agreeing, mean = float((worst <= AGREEMENT).mean()), float(difference.mean())
    same = output.argmax(1) == reference.argmax(1)
    decided, failures = 1.0, []
    if not np.isfinite(output).all():
        failures.append("outputs are not finite")
    if own is not None:
        noise, exact = own
        spread = max(float(np.abs(exact - reference).max()), AGREEMENT * scale)
        ordered = np.sort(reference, 1)
        margin = ordered[:, -1] - ordered[:, -2] if reference.shape[1] > 1 else np.zeros(len(reference))
        clear = margin > 2 * spread
        decided = float(same[clear].mean()) if clear.any() else 1.0
        allowed = noise.agreeing - max(SHARE_TOLERANCE, 2 / len(reference))
        if certified and agreeing < 1.0:
            failures.append(f"{agreeing:.1%} of samples agree, the certificate promises all")
        elif agreeing < allowed:
            failures.append(f"{agreeing:.1%} of samples agree, torch's own float64 agrees on {noise.agreeing:.1%}")
        limit = max(MEAN_TOLERANCE, 2 * noise.mean_difference)
        if not mean <= limit:
            failures.append(f"mean difference {mean:.2%} of the standard deviation, allowed {limit:.2%}")
        if decided < 1.0:
            failures.append(f"top-1 differs on {1 - decided:.1%} of the samples where torch decides clearly")
    return Agreement(name, agreeing, mean, float(worst.max()), float(same.mean()), decided, required, tuple(failures))


def _single(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    msg = f"The model returns {type(output).__name__}; verification needs one tensor. Wrap it to return its logits."
    raise InputError(msg)


def _output(value: Any) -> np.ndarray:
    array = np.asarray(value, dtype=np.float64)
    return array.reshape(len(array), -1)
