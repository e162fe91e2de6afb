"""The benchmark of exported models, with real OpenVINO and ONNX Runtime. No test asserts a time."""

import itertools
import json

import pytest
import torch

nncf3 = pytest.importorskip("nncf_mpq_plugin.adapters.nncf3", reason="needs NNCF 3")

from networks import Residual, prepared  # noqa: E402
from rich.console import Console  # noqa: E402

from nncf_mpq_plugin import deploy, tables  # noqa: E402
from nncf_mpq_plugin.deploy.footprint import footprint  # noqa: E402
from nncf_mpq_plugin.deploy.measurement import (  # noqa: E402
    ANY_BATCH,
    FP32,
    INT8,
    MIXED,
    NAIVE,
    ONNX_RUNTIME,
    TURNS,
    Latency,
    take_turns,
)
from nncf_mpq_plugin.errors import InputError, MPQError  # noqa: E402
from nncf_mpq_plugin.types import LayerBits  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(2)
    data = [torch.randn(16, 3, 16, 16) for _ in range(4)]
    floating = prepared(Residual)
    quantized = nncf3.place(floating, data[0], data, bits=(2, 4))
    quantized.select({layer.cost.name: LayerBits(2, 4) for layer in quantized.searchable})
    folder = tmp_path_factory.mktemp("deploy")
    frozen = nncf3.freeze(quantized)
    deploy.export(frozen, data[0], folder)
    bits = {name: (b.weight, b.activation) for name, b in quantized.policy().all_layers.items()}
    return floating, frozen, folder, data, bits


@pytest.fixture(scope="module")
def report(exported):
    return deploy.benchmark(*exported, seconds=0.05, threads=1)


def test_all_models_are_measured(report):
    assert [model.name for model in report.models] == [FP32, INT8, NAIVE, MIXED, ANY_BATCH, ONNX_RUNTIME]
    assert not report.left_out
    for model in report.models:
        assert 0 < model.latency.low <= model.latency.median <= model.latency.high
        assert model.latency.runs >= 10
        assert model.file_bytes >= model.weight_bytes > 0


def test_the_kernel_of_every_layer_is_named(report, exported):
    bits = exported[-1]
    precisions = {
        name: {layer: kernel.split()[0] for layer, kernel in report.model(name).kernels.items()}
        for name in (FP32, INT8, NAIVE, MIXED)
    }
    assert all(list(found) == list(bits) for found in precisions.values())
    assert set(precisions[FP32].values()) == {"f32"}
    assert set(precisions[INT8].values()) <= {"u8", "i8"}
    assert set(precisions[MIXED].values()) <= {"u8", "i8"}
    assert precisions[NAIVE]["block1.conv1"] == "f32"
    assert report.model(FP32).integer_share == 0
    assert report.model(INT8).integer_share == report.model(MIXED).integer_share == 1


def test_the_mixed_file_is_smaller_than_int8(report):
    assert report.model(MIXED).weight_bytes < report.model(INT8).weight_bytes < report.model(FP32).weight_bytes


def test_json_and_tables_hold_the_figures(report):
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert value["threads"] == 1
    assert {model["name"]: model["relative_latency"] for model in value["models"]}[INT8] == 1
    console = Console(width=100, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(tables.benchmark_table(value), tables.kernel_table(value))
    text = captured.get()
    assert all(name in text for name in (FP32, NAIVE, ANY_BATCH, ONNX_RUNTIME, "block2.shortcut", "2 / 4"))


def test_models_take_turns():
    order = []
    result = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.001)
    switches = sum(one != other for one, other in itertools.pairwise(order))
    assert switches >= 2 * TURNS - 1
    assert {name: len(latency.turns) for name, latency in result.items()} == {"a": TURNS, "b": TURNS}


def test_a_slow_minute_does_not_change_ratios():
    one = Latency(1.0, 1.0, 2.0, 4, (1.0, 1.0, 2.0, 2.0))
    other = Latency(3.0, 1.5, 3.0, 4, (1.5, 3.0, 3.0, 3.0))
    assert other.relative_to(one) == 1.5
    assert one.relative_to(one) == 1


def test_a_missing_file_is_an_input_error(exported, tmp_path):
    floating, frozen, _, data, bits = exported
    with pytest.raises(InputError, match=r"model\.xml: no such file"):
        deploy.benchmark(floating, frozen, tmp_path, data, bits)


def test_a_failing_process_is_reported(tmp_path):
    with pytest.raises(MPQError, match=r"missing\.xml"):
        footprint(tmp_path / "missing.xml", (1, 3, 16, 16), {}, repeats=1)
