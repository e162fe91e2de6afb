"""Export and verification with real OpenVINO and ONNX Runtime."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch
from onnx import helper, numpy_helper
from openvino import opset13 as ops

nncf3 = pytest.importorskip("nncf_mpq_plugin.adapters.nncf3", reason="needs NNCF 3")

from damage import negate_weights  # noqa: E402
from networks import Branches, Dense, Residual, prepared  # noqa: E402
from torchvision.models import VisionTransformer  # noqa: E402

from nncf_mpq_plugin import deploy  # noqa: E402
from nncf_mpq_plugin.adapters.base import native_quantizers  # noqa: E402
from nncf_mpq_plugin.adapters.ties import short  # noqa: E402
from nncf_mpq_plugin.deploy import runtimes  # noqa: E402
from nncf_mpq_plugin.deploy.compiling import compile_exactly, kernels, read_model  # noqa: E402
from nncf_mpq_plugin.deploy.divergence import Trace  # noqa: E402
from nncf_mpq_plugin.deploy.onnx import count_operators, to_standard_operators  # noqa: E402
from nncf_mpq_plugin.deploy.openvino import save_ir, to_openvino  # noqa: E402
from nncf_mpq_plugin.deploy.runtimes import run_openvino  # noqa: E402
from nncf_mpq_plugin.errors import InputError, UnsupportedModelError, VerificationError  # noqa: E402
from nncf_mpq_plugin.types import LayerBits  # noqa: E402


def batches(count: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return [torch.randn(16, 3, 16, 16) for _ in range(count)]


def mixed(quantized) -> dict[str, LayerBits]:
    """Bit widths 2..6 in turn, one activation width for each group."""
    groups = {group: 2 + index % 5 for index, group in enumerate(quantized.searchable_groups)}
    return {
        layer.cost.name: LayerBits(6 - index % 5, groups[layer.cost.activation_group])
        for index, layer in enumerate(quantized.searchable)
    }


@pytest.fixture(scope="module", params=[Residual, Branches], ids=lambda network: network.__name__)
def exported(request, tmp_path_factory):
    data = batches()
    quantized = nncf3.place(prepared(request.param), data[0], data, bits=(2, 3, 4, 5, 6))
    quantized.select(mixed(quantized))
    frozen = nncf3.freeze(quantized)
    folder = tmp_path_factory.mktemp("deploy") / "3, 4 bits"  # OpenVINO's converter splits paths at commas
    folder.mkdir()
    deploy.export(frozen, data[0], folder)
    return quantized, frozen, folder


def test_all_runtimes_agree_with_torch(exported):
    _, frozen, folder = exported
    report = deploy.verify(frozen, folder, batches())
    assert report.ok, report.to_json()
    assert {runtime.name for runtime in report.runtimes if runtime.required} == {
        "OpenVINO IR",
        "OpenVINO IR, batch of 1",
        "OpenVINO ONNX",
        "ONNX Runtime",
    }


def test_onnx_has_standard_operators_only(exported):
    model = onnx.load(exported[2] / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]


def test_onnx_stores_weights_up_to_4_bits_as_int4(exported):
    quantized, _, folder = exported
    model = onnx.load(folder / "model.onnx")
    kinds = {item.name: item.data_type for item in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node}
    nodes = {node.name: node for node in model.graph.node}
    for name, bits in quantized.policy().all_layers.items():
        source = producers[nodes[name].input[1]].input[0]
        kind = kinds[producers[source].input[0] if source in producers else source]
        assert kind == (onnx.TensorProto.INT4 if bits.weight <= 4 else onnx.TensorProto.INT8), name


def test_a_strided_pointwise_convolution_over_8_channels_leaves_without_stride(exported):
    quantized, _, folder = exported
    if "block2.shortcut" not in quantized.sites:
        pytest.skip("the network has none")
    nodes = onnx.load(folder / "model.onnx").graph.node
    (shortcut,) = (node for node in nodes if node.name == "block2.shortcut")
    (pixels,) = (node for node in nodes if node.output[0] == shortcut.input[0])
    strides = [next(list(a.ints) for a in node.attribute if a.name == "strides") for node in (pixels, shortcut)]
    assert (pixels.op_type, strides) == ("MaxPool", [[2, 2], [1, 1]])


class Clamped(torch.nn.Module):
    """Ends in a clip of its own, and joins a prompt that is repeated over the batch and over its rows."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 4, 4)
        self.prompt = torch.nn.Parameter(torch.rand(1, 1, 8))
        self.last = torch.nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x).relu().flatten(2).transpose(1, 2)
        x = torch.cat([self.prompt.expand(x.shape[0], 5, 8), x], 1)
        return self.last(x).clamp(0, 1)


def test_a_last_clip_and_rows_that_are_repeated_stay(tmp_path):
    data = batches()
    torch.manual_seed(0)
    quantized = nncf3.place(Clamped().eval(), data[0], data, bits=(2, 3, 4, 5, 6), fixed_bits={})
    frozen = nncf3.freeze(quantized)
    deploy.export(frozen, data[0], tmp_path)
    expected = frozen(data[0]).detach().numpy()
    assert expected.shape[1] == 21
    for file in ("model.xml", "model.onnx"):
        found = run_openvino(tmp_path / file, data[0].numpy())["output"]
        assert abs(found - expected).mean() < 1e-2, file


def with_activation(function, step, *, read=False, behind=()):
    """:return: ``function`` of ``behind``, unsigned at 4 bits; ``active`` is an output, too, if ``read``."""
    constants = {
        "zero": np.float32(0),
        "six": np.float32(6),
        "scale": np.float32(step),
        "zero_point": np.uint8(0),
        "low": np.uint8(0),
        "high": np.uint8(15),
        "ones": np.ones(100, np.float32),
    }
    source = behind[-1].output[0] if behind else "input"
    nodes = [
        *behind,
        helper.make_node(function, [source, "zero", "six"][: 1 if function == "Relu" else 3], ["active"]),
        helper.make_node("QuantizeLinear", ["active", "scale", "zero_point"], ["rounded"]),
        helper.make_node("Clip", ["rounded", "low", "high"], ["clipped"]),
        helper.make_node("DequantizeLinear", ["clipped", "scale", "zero_point"], ["output"]),
    ]
    names = ["output", "active"] if read else ["output"]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "",
            [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", 100])],
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 100]) for name in names],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )


def clips_in_ir(model, folder):
    """Save ``model`` as ONNX file and IR. :return: how many functions of the IR clip."""
    onnx.save(model, folder / "model.onnx")
    converted = to_openvino(folder / "model.onnx")
    save_ir(converted, folder / "model.xml")
    return sum(op.get_type_name() in ("Relu", "Clamp") for op in converted.get_ops())


@pytest.mark.parametrize("function", ["Relu", "Clip"])
@pytest.mark.parametrize("step", [0.3, 1.0], ids=["the quantizer ends first", "the function ends first"])
@pytest.mark.parametrize("read", [False, True], ids=["only the quantizer reads it", "others read it"])
def test_an_activation_function_becomes_part_of_the_clip(tmp_path, function, step, read):
    assert clips_in_ir(with_activation(function, step, read=read), tmp_path) == 1 + read
    x = np.linspace(-2, 17.03, 100, dtype=np.float32)[None]
    active = x.clip(0, np.inf if function == "Relu" else 6)
    found = compile_exactly(tmp_path / "model.xml")([x])
    np.testing.assert_allclose(found["output"], np.round(active / np.float32(step)).clip(0, 15) * np.float32(step))
    if read:
        np.testing.assert_array_equal(found["active"], active)


def test_an_activation_function_behind_a_layer_norm_or_a_stored_tensor_stays(tmp_path):
    norm = helper.make_node("LayerNormalization", ["input", "ones"], ["behind"])
    stored = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero_point"], ["stored"]),
        helper.make_node("DequantizeLinear", ["stored", "scale", "zero_point"], ["behind"]),
    ]
    for behind in ([norm], stored):
        assert clips_in_ir(with_activation("Relu", 0.3, behind=behind), tmp_path) == 2


@pytest.mark.parametrize("producer", ["LayerNormalization", "Reshape", "Add"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_signed_values_next_to_a_tie_are_rounded_as_they_should(tmp_path, bits, producer):
    low, high, step = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, np.float32(short(0.0837))
    distance = 2.0**-23 * 2**bits  # what float32 can tell of values up to 2^bits
    halves = (np.arange(low, high)[:, None] + 0.5 + np.array([-4, -2, 2, 4]) * distance).flatten()
    values = (halves * np.float64(step)).astype(np.float32)
    shape = ["n", len(values)]
    quantize = {"domain": "mpq", "low": low, "high": high}
    constants = {
        "step": np.array([step]),
        "zeros": np.zeros_like(values),
        "values": values,
        "shape": np.array([-1, len(values)]),
    }
    before = {
        "LayerNormalization": [helper.make_node("LayerNormalization", ["input", "zeros", "values"], ["x"])],
        "Reshape": [
            helper.make_node("LayerNormalization", ["input", "zeros", "values"], ["normalized"]),
            helper.make_node("Reshape", ["normalized", "shape"], ["x"]),
        ],
        "Add": [
            helper.make_node("Mul", ["input", "zeros"], ["nothing"]),
            helper.make_node("Add", ["nothing", "values"], ["x"]),
        ],
    }
    graph = helper.make_graph(
        [*before[producer], helper.make_node("Quantize", ["x", "step"], ["output"], **quantize)],
        "one quantizer",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mpq", 1)]
    onnx.save(to_standard_operators(helper.make_model(graph, opset_imports=opsets)), tmp_path / "model.onnx")
    save_ir(to_openvino(tmp_path / "model.onnx"), tmp_path / "model.xml")
    for file in ("model.xml", "model.onnx"):
        found = compile_exactly(tmp_path / file)(np.random.default_rng(0).normal(size=(1, len(values))))[0][0]
        assert np.array_equal(np.rint(found / step), np.rint(halves)), file


def test_the_files_have_the_same_outputs_to_the_last_digit(exported):
    _, _, folder = exported
    inputs = batches(1)[0].numpy()
    outputs = [compile_exactly(folder / file)(inputs)[0] for file in ("model.xml", "model.onnx")]
    assert np.array_equal(*outputs)


def test_no_clip_stands_between_a_layer_norm_and_the_rounding(tmp_path):
    torch.manual_seed(0)
    network = VisionTransformer(16, 4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.uniform_(module.weight, 1, 2)
            torch.nn.init.uniform_(module.bias, 1, 2)
    data = batches(1)
    quantized = nncf3.place(network, data[0], data, bits=(2, 3, 4, 5, 6))
    quantized.select(mixed(quantized))
    deploy.export(nncf3.freeze(quantized), data[0], tmp_path)
    model = ov.Core().read_model(tmp_path / "model.xml")
    norms = [op for op in model.get_ops() if op.get_friendly_name().endswith("LayerNormalization")]
    readers = [target.get_node().get_type_name() for op in norms for target in op.output(0).get_target_inputs()]
    assert readers == ["FakeQuantize"] * 3


def test_the_bias_before_a_class_token_is_kept(tmp_path):
    torch.manual_seed(0)
    network = VisionTransformer(16, 4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10).eval()
    torch.nn.init.uniform_(network.conv_proj.bias, 1, 2)
    data = batches()
    quantized = nncf3.place(network, data[0], data, bits=(2, 3, 4, 5, 6))
    quantized.select(mixed(quantized))
    frozen = nncf3.freeze(quantized)
    deploy.export(frozen, data[0], tmp_path)
    trace, name = Trace(frozen, data[0]), "conv_proj/conv2d/0.quantized"
    for file in ("model.xml", "model.onnx"):
        found = run_openvino(tmp_path / file, trace.inputs, [name])[name]
        assert abs(found - trace.float32[name]).mean() < 0.01 * trace.steps[name], file


def test_pairs_are_no_samples(exported):
    _, frozen, folder = exported
    with pytest.raises(InputError, match="takes batches of inputs, and got a tuple"):
        deploy.verify(frozen, folder, [(batches(1)[0], torch.zeros(16))])


def test_every_layer_runs_in_an_integer_kernel(exported):
    quantized, _, folder = exported
    layers = [
        k for k in kernels(compile_exactly(folder / "model.xml")) if k["type"] in ("Convolution", "FullyConnected")
    ]
    assert len(layers) == len(quantized.layers)
    assert all(layer["precision"] in ("u8", "i8") for layer in layers), layers


def test_ir_stores_each_weight_at_its_bits(exported):
    quantized, _, folder = exported
    weight_bits = {name: bits.weight for name, bits in quantized.policy().all_layers.items()}
    # 8-bit weights are in half range, which is 7 bits
    ideal = sum(layer.cost.weights * min(weight_bits[layer.cost.name], 7) for layer in quantized.layers) / 8
    channels = sum(quantized.model.get_parameter(site.weight).shape[0] for site in quantized.sites.values())
    size = (folder / "model.bin").stat().st_size
    # scales, quantization limits and biases are float32 or int32 constants by channel; planes are padded to bytes
    assert ideal <= size <= ideal + 4 * 8 * channels + 2048


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("bias", math.nan, "a bias is no number or over 2"),
        ("bias", 1e30, "a bias is no number or over 2"),
        ("weight", math.inf, "a weight is zero, infinite or no number"),
        ("scale", math.nan, "scale is zero, infinite or no number"),
        ("scale", 0.0, "scale is zero, infinite or no number"),
    ],
)
def test_numbers_that_integer_kernels_cannot_have_are_refused(exported, tmp_path, part, value, message):
    frozen = copy.deepcopy(exported[1])
    norm = next(module for module in frozen.modules() if isinstance(module, torch.nn.BatchNorm2d))
    convolution = next(module for module in frozen.modules() if isinstance(module, torch.nn.Conv2d))
    scale = next(iter(native_quantizers(frozen).values()))._scale_param_storage
    with torch.no_grad():
        {"bias": norm.bias, "weight": convolution.weight, "scale": scale}[part].fill_(value)
    with pytest.raises(UnsupportedModelError, match=message):
        deploy.export(frozen, batches(1)[0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_freezing_after_training_that_diverged_is_refused():
    data = batches(1)
    quantized = nncf3.place(prepared(Residual), data[0], data, bits=(2, 4))
    quantizer = next(iter(quantized.activation_quantizers.values()))
    quantizer.scale().data.fill_(math.nan)
    with pytest.raises(UnsupportedModelError, match="training has diverged"):
        nncf3.freeze(quantized)


@pytest.mark.parametrize("network", [Residual, Dense], ids=["folded", "not folded"])
def test_batch_norms_that_are_no_numbers_are_named(network):
    data = batches(1)
    quantized = nncf3.place(prepared(network), data[0], data, bits=(2, 4))
    kept = list(quantized.norms.items())
    assert bool(kept) == (network is Dense)
    name = kept[0][1] if kept else "block1.bn1"
    quantized.model.get_submodule(name).running_var.fill_(math.nan)
    with pytest.raises(UnsupportedModelError, match=f"batch norm '{(kept[0][0] if kept else name)}' has weights or"):
        nncf3.freeze(quantized)


def test_batch_size_is_free(exported):
    compiled = compile_exactly(exported[2] / "model.xml")
    assert compiled({0: np.zeros((3, 3, 16, 16), np.float32)})[0].shape == (3, 10)


@pytest.mark.parametrize("file", ["model.xml", "model.onnx"])
def test_batch_size_can_be_fixed(exported, file):
    (data,) = batches(1)
    free, fixed = (compile_exactly(exported[2] / file, batch_size=size) for size in (None, 1))
    assert fixed.input(0).shape == ov.Shape([1, 3, 16, 16])
    found = np.concatenate([fixed(sample[None])[0] for sample in data.numpy()])
    np.testing.assert_allclose(found, free(data.numpy())[0], atol=1e-5)
    with pytest.raises(RuntimeError):
        fixed(data.numpy())
    assert compile_exactly(exported[2] / file, batch_size=np.int64(2)).input(0).shape[0] == 2
    for size in (0, 1.5):
        with pytest.raises(InputError, match=f"batch_size is {size}; it takes a whole number from 1 up"):
            compile_exactly(exported[2] / file, batch_size=size)


SIGNALLED = """
import os, signal, sys
import numpy as np
from nncf_mpq_plugin import deploy
from nncf_mpq_plugin.deploy.runtimes import run_openvino
caught = []
signal.signal(signal.SIGINT, lambda *_: caught.append(True))
first, second = deploy.compile(sys.argv[1]), deploy.compile(sys.argv[1], batch_size=1)
del first
run_openvino(sys.argv[1], np.zeros((1, 3, 16, 16), np.float32))
del second
os.kill(os.getpid(), signal.SIGINT)
assert caught
"""


@pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO sets a stack for signals on Linux only")
def test_signals_survive_the_release_of_compiled_models_in_any_order(exported):
    done = subprocess.run([sys.executable, "-c", SIGNALLED, exported[2] / "model.xml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("channels", "problem"),
    [(3, "192 numbers for 64 samples, the model 640. Is the file another"), (2, "cannot use it")],
    ids=["output", "input"],
)
def test_a_file_of_another_network_is_refused(exported, tmp_path, channels, problem):
    data = ops.parameter([-1, channels, 16, 16], np.float32)
    ov.save_model(ov.Model([ops.reduce_mean(data, np.array([2, 3]))], [data]), tmp_path / "model.xml")
    with pytest.raises(InputError, match=problem):
        deploy.verify(exported[1], tmp_path / "model.xml", batches())


def test_the_ir_is_verified_free_and_for_one_sample(exported, monkeypatch):
    sizes = []

    def spy(path, batch_size):
        sizes.append(batch_size)
        return read_model(path, batch_size)

    monkeypatch.setattr(runtimes, "read_model", spy)
    deploy.verify(exported[1], exported[2] / "model.xml", batches())
    assert sizes[:2] == [None, 1]  # then, unless the CPU is limited, with default properties


@pytest.mark.parametrize("size", [16, 24], ids=["divides the samples", "leaves a rest"])
def test_a_file_with_a_batch_size_of_its_own_is_verified_at_it(exported, tmp_path, size):
    quantized, frozen, folder = exported
    layer = LAYERS["Residual" if "block1.conv1" in quantized.sites else "Branches"][0]
    damaged(folder, tmp_path, layer)
    for source, ok in ((folder, True), (tmp_path, False)):
        model = to_openvino(source / "model.onnx")
        model.reshape([size, 3, 16, 16])
        save_ir(model, tmp_path / "fixed.xml")
        report = deploy.verify(frozen, tmp_path / "fixed.xml", batches())
        assert report.ok == ok, report.to_json()
        assert all(ok or layer in runtime.divergence.layers for runtime in report.runtimes if runtime.required)


@pytest.mark.parametrize("samples", [0, 2, 3, 5], ids=str)
@pytest.mark.parametrize("size", [-1, 3], ids=["free", "fixed"])
def test_samples_of_a_filled_batch_are_left_out(tmp_path, size, samples):
    data = ops.parameter([size, 2, 4], np.float32)
    ov.save_model(ov.Model([ops.reshape(data, np.array([-1, 4]), False)], [data]), tmp_path / "model.xml")
    inputs = np.arange(samples * 8, dtype=np.float32).reshape(-1, 2, 4)
    if size > 0 and not samples:
        with pytest.raises(InputError, match="cannot use it"):
            run_openvino(tmp_path / "model.xml", inputs)
    else:
        np.testing.assert_array_equal(run_openvino(tmp_path / "model.xml", inputs)["output"], inputs.reshape(-1, 4))


class SequenceFirst(torch.nn.Module):
    """Its tensors have the batch second."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = torch.nn.Linear(16, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 10)

    def forward(self, x):
        x = self.second(self.first(x.transpose(0, 1)).relu()).relu()
        return self.fc(x.mean(0))


class Flattened(SequenceFirst):
    """Its tensors have a sample's tokens in the first dimension."""

    def forward(self, x):
        x = self.second(self.first(x.reshape(-1, 16)).relu()).relu()
        return self.fc(x.reshape(-1, 8, 32).mean(1))


@pytest.mark.parametrize("size", [None, 8, 24], ids=["free", "as many as tokens", "leaves a rest"])
@pytest.mark.parametrize(("network", "layer"), [(SequenceFirst, "fc"), (Flattened, "first")])
def test_a_divergence_is_found_where_the_batch_is_not_first(network, layer, size, tmp_path):
    torch.manual_seed(0)
    data = [torch.randn(32, 8, 16) for _ in range(2)]
    quantized = nncf3.place(network().eval(), data[0], data, bits=(2, 4))
    frozen = nncf3.freeze(quantized)
    deploy.export(frozen, data[0], tmp_path)
    negate_weights(tmp_path / "model.onnx", tmp_path / "model.onnx", layer)
    model = to_openvino(tmp_path / "model.onnx")
    if size is not None:
        model.reshape([size, 8, 16])
    save_ir(model, tmp_path / "model.xml")
    report = deploy.verify(frozen, tmp_path / "model.xml", data)
    assert [r.divergence.layers for r in report.runtimes if r.required] == [(layer,)] * 2


def damaged(folder, target, layer):
    """Copy the export and negate a layer's weights in the ONNX file."""
    for name in ("model.xml", "model.bin", "model.onnx"):
        (target / name).write_bytes((folder / name).read_bytes())
    negate_weights(folder / "model.onnx", target / "model.onnx", layer)


def test_for_onnxruntime_every_layer_and_addition_is_an_integer_kernel(tmp_path):
    data = batches()
    quantized = nncf3.place(prepared(Residual), data[0], data, bits=(2, 3, 4, 5, 6), target="onnxruntime")
    quantized.select(mixed(quantized))
    frozen = nncf3.freeze(quantized)
    deploy.export(frozen, data[0], tmp_path)
    report = deploy.verify(frozen, tmp_path, data, target="onnxruntime")
    assert report.ok
    assert [runtime.name for runtime in report.runtimes if runtime.required] == ["ONNX Runtime"]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # says that the optimized file is for this machine only
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    counts = count_operators(onnx.load(tmp_path / "optimized.onnx"))
    assert not counts.keys() & {"Conv", "FusedConv", "Gemm", "MatMul"}, counts
    assert counts["QLinearConv"] + counts["QGemm"] == len(quantized.layers)
    assert counts["QLinearAdd"] == 2


LAYERS = {"Residual": ["stem", "block1.conv1", "block2.conv2"], "Branches": ["left", "depthwise", "head"]}


@pytest.mark.parametrize("index", range(3), ids=["early", "middle", "late"])
def test_disagreement_is_found_and_its_layer_named(exported, tmp_path, index):
    quantized, frozen, folder = exported
    layer = LAYERS["Residual" if "block1.conv1" in quantized.sites else "Branches"][index]
    damaged(folder, tmp_path, layer)
    report = deploy.verify(frozen, tmp_path, batches())
    broken = {r.name: r for r in report.runtimes if r.required and r.failures}
    assert set(broken) == {"OpenVINO ONNX", "ONNX Runtime"}
    for runtime in broken.values():
        assert layer in runtime.divergence.layers
        assert runtime.divergence.share > 0.001 > runtime.divergence.own_share
        assert runtime.divergence.expected != runtime.divergence.got
    with pytest.raises(
        VerificationError, match=rf"ONNX Runtime.*first diverges in layer [^(]*{layer}.*again with deploy.export"
    ):
        report.check()


def test_a_divergence_of_an_openvino_ir_is_found(exported, tmp_path):
    quantized, frozen, folder = exported
    layer = list(quantized.sites)[2]
    damaged(folder, tmp_path, layer)
    save_ir(to_openvino(tmp_path / "model.onnx"), tmp_path / "model.xml")
    report = deploy.verify(frozen, tmp_path / "model.xml", batches())
    assert [layer in r.divergence.layers for r in report.runtimes if r.required] == [True, True]
    json.dumps(report.to_json(), allow_nan=False)


def test_a_divergence_that_looking_would_hide_is_found(exported):
    """As a fused kernel does: the wrong values appear only while the tensor before them is not looked at."""
    _, frozen, folder = exported
    inputs = torch.cat(batches())[:8]
    trace = Trace(copy.deepcopy(frozen), inputs)
    second, third = trace.tensors[1:3]

    def run(samples, taps):
        found = run_openvino(folder / "model.xml", samples, taps)
        if second not in taps and third in found:
            found[third] = found[third] + trace.steps[third]
        return found

    assert trace.first_divergence(lambda x, taps: run_openvino(folder / "model.xml", x, taps)) is None
    assert trace.first_divergence(run).tensor == third


def test_a_file_of_another_kind_is_an_input_error(exported, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"ends in \.xml"):
        deploy.verify(exported[1], tmp_path / "model.pt", batches())


@pytest.mark.parametrize("length", [None, 0, -5])
def test_weights_that_are_missing_or_cut_off_are_named(exported, tmp_path, length):
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_bytes((exported[2] / name).read_bytes())
    whole = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").unlink()
    if length is not None:
        (tmp_path / "model.bin").write_bytes(whole[:length])
    message = "no such file" if length is None else f"has {len(whole[:length])} bytes of the {len(whole)}"
    with pytest.raises(InputError, match=rf"model\.bin: {message}"):
        deploy.verify(exported[1], tmp_path / "model.xml", batches())


def test_missing_file_is_an_input_error(exported, tmp_path):
    with pytest.raises(InputError, match=r"model\.xml"):
        deploy.verify(exported[1], tmp_path, batches())


def test_no_samples_is_an_input_error(exported):
    with pytest.raises(InputError, match="no samples"):
        deploy.verify(exported[1], exported[2], [])
