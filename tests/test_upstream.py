"""The scripts of docs/upstream.md run, and still show what the document says they show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openvino", reason="needs OpenVINO")

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "benchmarks" / "upstream").glob("*.py"))


def output(script: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_document_names_the_script(script: Path) -> None:
    assert f"benchmarks/upstream/{script.name}" in (ROOT / "docs" / "upstream.md").read_text()


def test_the_fused_residual_loses_a_rounding_only_with_low_precision_transformations() -> None:
    fused, unfused = output(ROOT / "benchmarks/upstream/fused_residual.py").splitlines()
    assert fused.endswith("0.00% if the inner FakeQuantize only clips")
    assert " 0.00% of the elements are off" not in fused
    assert " 0.00% of the elements are off" in unfused


def test_half_range_weights_do_not_saturate() -> None:
    full, half = output(ROOT / "benchmarks/upstream/saturation.py", ONEDNN_MAX_CPU_ISA="AVX2").splitlines()
    assert " 0.00% of the elements" not in full
    assert " 0.00% of the elements" in half


def test_uint8_activations_are_exact_without_vnni() -> None:
    lines = output(ROOT / "benchmarks/upstream/int8_activations.py", ONEDNN_MAX_CPU_ISA="AVX2").splitlines()
    assert lines[1].startswith("u8: 0.00% of the elements are off")
    assert not lines[0].startswith("i8: 0.00%")


def test_f32_at_compile_time_is_exact() -> None:
    _, exact = output(ROOT / "benchmarks/upstream/precision_in_the_model.py").splitlines()
    assert "float32" in exact
    assert "16.01600, expected 16.01600" in exact


def test_f32_compiles_under_a_limited_instruction_set() -> None:
    lines = output(ROOT / "benchmarks/upstream/limited_isa.py", ONEDNN_MAX_CPU_ISA="AVX2").splitlines()
    assert [line for line in lines if ", f32:" in line] == ["convolution, f32: compiles", "softmax, f32: compiles"]


def test_layer_norm_runs_without_a_limited_instruction_set() -> None:
    lines = output(ROOT / "benchmarks/upstream/limited_isa_layer_norm.py", ONEDNN_MAX_CPU_ISA="").splitlines()
    assert lines == ["12 values: runs", "16 values: runs"]


def test_int4_weights_behind_a_cast_keep_integer_kernels() -> None:
    lines = dict(line.split(": ") for line in output(ROOT / "benchmarks/upstream/int4_weights.py").splitlines())
    assert "ONNX Runtime QLinearConv" in lines["int4 and Cast"]
    assert "_I8" in lines["int4 and Cast"]
    assert "QLinearConv" not in lines["int4"]
    assert "_I8" not in lines["int4"]


def test_pixels_taken_first_keep_strided_pointwise_convolutions_exact() -> None:
    lines = output(ROOT / "benchmarks/upstream/strided_pointwise.py", ONEDNN_MAX_CPU_ISA="AVX2").splitlines()
    assert lines[-1] == "24 channels, MaxPool in front: 0 of 50 runs with two threads differ from one thread"


def test_a_token_repeated_by_values_keeps_the_bias_before_it() -> None:
    lines = output(ROOT / "benchmarks/upstream/lost_bias.py").splitlines()
    found = [line.split(": ")[1] for line in lines if "values" in line]
    assert found == ["channels 1 and 15 are off by 0.00 and 0.00"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO sets a stack for signals on Linux only")
def test_cores_released_in_the_order_of_their_making_make_a_signal_fatal() -> None:
    lines = dict(line.split(": ") for line in output(ROOT / "benchmarks/upstream/signal_stack.py").splitlines())
    assert lines["last made, first released"] == "goes on"
    assert lines["first made, first released"].startswith("killed")


def test_a_dynamic_batch_keeps_attention_with_as_many_tokens_as_heads() -> None:
    others, equal, dynamic = output(ROOT / "benchmarks/upstream/tokens_and_heads.py").splitlines()
    assert others.endswith(": 0% of the elements are off")
    assert not equal.endswith(": 0% of the elements are off")
    assert dynamic.endswith(": 0% of the elements are off")
