"""Export and verification with real OpenVINO and ONNX Runtime."""

import numpy as np
import onnx
import pytest
import torch

nncf3 = pytest.importorskip("nncf_mpq_plugin.adapters.nncf3", reason="needs NNCF 3")

from networks import Branches, Residual, prepared  # noqa: E402

from nncf_mpq_plugin import deploy  # noqa: E402
from nncf_mpq_plugin.deploy.openvino import compile_exactly, kernels  # noqa: E402
from nncf_mpq_plugin.errors import InputError, VerificationError  # noqa: E402
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
    folder = tmp_path_factory.mktemp("deploy")
    deploy.export(frozen, data[0], folder)
    return quantized, frozen, folder


def test_all_runtimes_agree_with_torch(exported):
    _, frozen, folder = exported
    report = deploy.verify(frozen, folder, batches())
    assert report.ok, report.to_json()
    assert {runtime.name for runtime in report.runtimes if runtime.required} == {
        "OpenVINO IR",
        "OpenVINO ONNX",
        "ONNX Runtime",
    }


def test_onnx_has_standard_operators_only(exported):
    model = onnx.load(exported[2] / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]


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
    ideal = sum(layer.cost.weights * weight_bits[layer.cost.name] for layer in quantized.layers) / 8
    channels = sum(quantized.model.get_parameter(site.weight).shape[0] for site in quantized.sites.values())
    size = (folder / "model.bin").stat().st_size
    # scales, quantization limits and biases are float32 or int32 constants by channel; planes are padded to bytes
    assert ideal <= size <= ideal + 4 * 8 * channels + 2048


def test_batch_size_is_free(exported):
    compiled = compile_exactly(exported[2] / "model.xml")
    assert compiled({0: np.zeros((3, 3, 16, 16), np.float32)})[0].shape == (3, 10)


def test_disagreement_is_found(exported, tmp_path):
    _, frozen, folder = exported
    for name in ("model.xml", "model.bin", "model.onnx"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    model = onnx.load(tmp_path / "model.onnx")
    weight = next(item for item in model.graph.initializer if item.name.endswith(".integers") and len(item.dims) > 1)
    data = onnx.numpy_helper.to_array(weight).copy()
    data[0] = -data[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(data, weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    report = deploy.verify(frozen, tmp_path, batches())
    assert {r.name for r in report.runtimes if r.required and r.failures} == {"OpenVINO ONNX", "ONNX Runtime"}
    with pytest.raises(VerificationError, match="ONNX Runtime"):
        report.check()


def test_missing_file_is_an_input_error(exported, tmp_path):
    with pytest.raises(InputError, match=r"model\.xml"):
        deploy.verify(exported[1], tmp_path, batches())


def test_no_samples_is_an_input_error(exported):
    with pytest.raises(InputError, match="no samples"):
        deploy.verify(exported[1], exported[2], [])
