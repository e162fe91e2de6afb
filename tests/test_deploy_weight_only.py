"""Policies that leave activations in floating point: frozen, saved, exported and verified."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from networks import Attention, Branches, Residual, prepared

nncf3 = pytest.importorskip("nncf_mpq_plugin.adapters.nncf3", reason="needs NNCF 3")

from nncf_mpq_plugin import deploy  # noqa: E402
from nncf_mpq_plugin.deploy.compiling import compile_exactly, kernels  # noqa: E402
from nncf_mpq_plugin.types import LayerBits  # noqa: E402

BITS = (2, 3, 4, 5, 6, 8)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(16, 3, 16, 16, generator=generator) for _ in range(4)]


def place(network, bits=BITS):
    data = batches()
    return nncf3.place(prepared(network), data[0], data, bits=bits)


@pytest.fixture(scope="module", params=[Residual, Branches, Attention], ids=lambda network: network.__name__)
def exported(request, tmp_path_factory):
    quantized = place(request.param)
    policy = {layer.cost.name: LayerBits(BITS[i % 6], 32) for i, layer in enumerate(quantized.searchable)}
    quantized.select(policy)
    assert quantized.policy().layers == policy
    frozen = nncf3.freeze(quantized)
    folder = tmp_path_factory.mktemp("weight_only")
    deploy.export(frozen, batches()[0], folder)
    return request.param, quantized, frozen, folder


def test_all_runtimes_agree_with_torch(exported):
    _, _, frozen, folder = exported
    report = deploy.verify(frozen, folder, batches())
    assert report.ok, report.to_json()


def test_only_the_fixed_layers_read_quantized_activations(exported):
    _, quantized, _, folder = exported
    model = onnx.load(folder / "model.onnx")
    readers = [layer for layer in quantized.layers if layer.fixed is not None]
    count = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    assert count == len({layer.cost.activation_group for layer in readers})
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.INT4)
    weights = [item for item in model.graph.initializer if item.data_type in kinds and len(item.dims) > 1]
    assert len(weights) >= len(quantized.layers)


def test_freezing_changes_nothing(exported):
    _, quantized, frozen, _ = exported
    x = batches()[0]
    with torch.no_grad():
        expected, got = quantized.model(x), frozen(x)
    assert (got - expected).abs().mean() < 0.02 * expected.std()  # the fixed last layer's input may fall on a threshold


def test_a_saved_model_computes_the_same(exported, tmp_path):
    network, _, frozen, _ = exported
    nncf3.save_model(tmp_path, frozen)
    restored = nncf3.load_model(tmp_path, prepared(network))
    with torch.no_grad():
        assert torch.equal(restored(batches()[0]), frozen(batches()[0]))


def test_the_ir_stores_each_weight_at_its_bits(exported):
    _, quantized, frozen, folder = exported
    bits = quantized.policy().all_layers
    ideal = sum(layer.cost.weights * bits[layer.cost.name].weight for layer in quantized.layers) / 8
    channels = sum(quantized.model.get_parameter(site.weight).shape[0] for site in quantized.sites.values())
    others = 4 * sum(p.numel() for name, p in frozen.named_parameters() if "norm" in name or "position" in name)
    assert ideal <= (folder / "model.bin").stat().st_size <= ideal + 4 * 4 * channels + others + 2048


@pytest.mark.parametrize(
    ("bits", "kept"), [(2, "i4"), (3, "i4"), (4, "i4"), (5, "i8"), (6, "i8"), (7, "i8"), (8, "i8")]
)
def test_linear_layers_keep_their_weights_compressed(bits, kept, tmp_path):
    quantized = place(Attention, (bits,))
    quantized.select({layer.cost.name: LayerBits(bits, 32) for layer in quantized.searchable})
    frozen = nncf3.freeze(quantized)
    deploy.export(frozen, batches()[0], tmp_path)
    assert deploy.verify(frozen, tmp_path, batches()).ok
    found = [k["precision"] for k in kernels(compile_exactly(tmp_path / "model.xml")) if k["type"] == "FullyConnected"]
    assert found.count(kept) >= 4, found


def test_a_group_in_floating_point_beside_quantized_ones(tmp_path):
    quantized = place(Residual)
    groups = list(quantized.searchable_groups)
    policy = {
        layer.cost.name: LayerBits(4, 32 if layer.cost.activation_group == groups[0] else 4)
        for layer in quantized.searchable
    }
    quantized.select(policy)
    frozen = nncf3.freeze(quantized)
    deploy.export(frozen, batches()[0], tmp_path)
    assert deploy.verify(frozen, tmp_path, batches()).ok
    quantized.select_uniform(4)
    assert all(quantizer.enabled for quantizer in quantized.stored_quantizers.values())
    assert quantized.policy().layers == {name: LayerBits(4, 4) for name in policy}


def test_output_of_a_weight_only_model_is_close_to_the_floating_point_one_at_8_bits(tmp_path):
    quantized = place(Branches, (8,))
    quantized.select({layer.cost.name: LayerBits(8, 32) for layer in quantized.searchable})
    frozen = nncf3.freeze(quantized)
    with torch.no_grad():
        expected = prepared(Branches)(batches()[0]).numpy()
        got = frozen(batches()[0]).numpy()
    assert np.abs(got - expected).mean() < 0.1 * expected.std()
