"""Self-attention in the IR: rewired where it can be, and the same values everywhere."""

import sys
import warnings

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

nncf3 = pytest.importorskip("nncf_mpq_plugin.adapters.nncf3", reason="needs NNCF 3")

from networks import Attention, prepared  # noqa: E402

from nncf_mpq_plugin import deploy  # noqa: E402
from nncf_mpq_plugin.deploy.attention import _scale_layer  # noqa: E402
from nncf_mpq_plugin.deploy.compiling import EXACT, compile_exactly  # noqa: E402
from nncf_mpq_plugin.deploy.openvino import save_ir, to_openvino  # noqa: E402
from nncf_mpq_plugin.finetune import reduce_to_policy  # noqa: E402
from nncf_mpq_plugin.types import LayerBits, Policy  # noqa: E402

TOKENS, HEADS, WIDTH = 7, 2, 6


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention``, whose tokens are the first dimension inside."""

    def __init__(self, batch_first: bool = True, masked: bool = False):
        super().__init__()
        self.attention = nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=batch_first)
        nn.init.normal_(self.attention.in_proj_bias)
        self.mask = torch.randn(TOKENS, TOKENS) if masked else None
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        return self.attention(x, x, x, need_weights=False, attn_mask=self.mask)[0]


class Projected(nn.Module):
    """Attention as vision transformers write it: queries, keys and values of one layer, the batch first."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)

    def parts(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.reshape(-1, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.parts(self.qkv(x)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Written(Projected):
    def attend(self, q, k, v):
        return (((q * 0.3) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)


class OtherOrder(Projected):
    """Keys before queries."""

    def attend(self, q, k, v):
        return super().attend(k, q, v)


class ReadElsewhere(Projected):
    def forward(self, x):
        y = self.qkv(x)
        return self.attend(*self.parts(y)) + y[..., :1]


class KeysReadElsewhere(Projected):
    def attend(self, q, k, v):
        return super().attend(q, k, v) + k.sum((1, 2, 3))[:, None, None]


class Gated(Projected):
    """Queries are multiplied by something that depends on the input in another way."""

    def forward(self, x):
        q, k, v = self.parts(self.qkv(x))
        return self.attend(q * x.mean((1, 2))[:, None, None, None].sigmoid(), k, v)


class ScaledByChannel(Projected):
    def attend(self, q, k, v):
        return super().attend(q * torch.linspace(0.5, 1.5, WIDTH), k, v)


class ScaledValues(Projected):
    def attend(self, q, k, v):
        return super().attend(q, k, v * 2)


class ScaledByValue(Projected):
    """Queries are multiplied by one of the layer's outputs."""

    def forward(self, x):
        y = self.qkv(x)
        q, k, v = self.parts(y)
        return self.attend(q * y[0, 0, 0], k, v)


class MaskedByQueries(Projected):
    def attend(self, q, k, v):
        mask = 3 * q[..., :1].transpose(-1, -2)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class ScaledByBatch(Projected):
    def attend(self, q, k, v):
        return super().attend(q * torch._shape_as_tensor(q)[0].float(), k, v)


class FirstSamples(Projected):
    def parts(self, y):
        return super().parts(y[:8])


class FourParts(Projected):
    """One of which nothing reads."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 4 * HEADS * WIDTH)

    def parts(self, y):
        return y.reshape(-1, TOKENS, 4, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)[:3]


class Flat(Projected):
    """The layer sees samples and tokens as one dimension."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1))


class OneHead(Projected):
    def parts(self, y):
        return y.chunk(3, -1)

    def attend(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)


class LearnedKeys(Projected):
    def __init__(self):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(1, HEADS, TOKENS, WIDTH))

    def attend(self, q, k, v):
        return super().attend(q, self.keys.expand(q.shape[0], -1, -1, -1), v)


class ChosenSamples(Written):
    def forward(self, x):
        return super().forward(x[x[:, 0, 0] > -9])


class Half(Written):
    def forward(self, x):
        return super().forward(x.half()).float()


class FixedBatch(Projected):
    def parts(self, y):
        return y.reshape(5, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        y = x.flip(1)
        return self.attention(x, y, y, need_weights=False)[0]


@pytest.fixture(autouse=True)
def without_fast_path():
    """torch's exporter does not know it; ``deploy.export`` turns it off itself."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def attentions(model: ov.Model) -> list[ov.Node]:
    return [op for op in model.get_ops() if op.get_type_name() == "ScaledDotProductAttention"]


def rewired(attention: ov.Node) -> bool:
    """:return: whether its inputs are the three parts of one transposition."""
    parts = [attention.input_value(port).get_node() for port in range(3)]
    if [part.get_type_name() for part in parts] != ["Gather"] * 3:
        return False
    sources = {part.input_value(0) for part in parts}
    return len(sources) == 1 and sources.pop().get_node().get_type_name() == "Transpose"


@pytest.mark.parametrize("network", [SelfAttention, lambda: SelfAttention(False), Projected, Written])
def test_attention_of_one_layer_is_rewired(network, tmp_path):
    (attention,) = attentions(converted(network, tmp_path))
    assert rewired(attention)


@pytest.mark.parametrize(
    "network",
    [
        OtherOrder,
        ReadElsewhere,
        KeysReadElsewhere,
        Gated,
        ScaledByChannel,
        ScaledByValue,
        ScaledByBatch,
        ScaledValues,
        MaskedByQueries,
        FirstSamples,
        ChosenSamples,
        FourParts,
        Flat,
        OneHead,
        LearnedKeys,
        CrossAttention,
    ],
)
def test_other_attention_stays(network, tmp_path):
    (attention,) = attentions(converted(network, tmp_path))
    assert not rewired(attention)


def test_attention_in_half_precision_stays(tmp_path):
    (attention,) = attentions(converted(lambda: Half().half(), tmp_path, tolerance=5e-3))
    assert not rewired(attention)


@pytest.mark.parametrize("network", [SelfAttention, Projected])
def test_as_many_tokens_as_heads_are_not_confused(network, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "HEADS", TOKENS)
    (attention,) = attentions(converted(network, tmp_path))
    assert attention.input_value(0).get_node().get_type_name() == "Transpose"
    for size in (1, 2, TOKENS):
        fixed = ov.Core().read_model(tmp_path / "a.xml")
        batch = np.random.default_rng(0).standard_normal((size, TOKENS, HEADS * WIDTH)).astype(np.float32)
        fixed.reshape({0: list(batch.shape)})
        outputs = [ov.compile_model(m, "CPU", EXACT)([batch])[0] for m in (fixed, tmp_path / "a.xml")]
        np.testing.assert_allclose(*outputs, atol=1e-5)


def test_a_masked_attention_is_computed_right(tmp_path):
    converted(lambda: SelfAttention(masked=True), tmp_path)


def test_a_network_for_one_size_of_batches_is_converted(tmp_path):
    (attention,) = attentions(converted(FixedBatch, tmp_path, sizes=(5,)))
    assert not rewired(attention)


def converted(network, folder, sizes=(1, 4, 9), tolerance=1e-5) -> ov.Model:
    """:return: the IR, after its outputs were compared with torch's."""
    torch.manual_seed(0)
    model = network().eval()
    dynamic = {"input": {0: "batch"}}
    example = torch.randn(5, TOKENS, HEADS * WIDTH)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's exporter
        torch.onnx.export(
            model, (example,), folder / "a.onnx", dynamo=False, input_names=["input"], dynamic_axes=dynamic
        )
        ir = to_openvino(folder / "a.onnx")
        save_ir(ir, folder / "a.xml")
        for size in sizes:
            batch = torch.randn(size, TOKENS, HEADS * WIDTH)
            found = compile_exactly(folder / "a.xml")(batch.numpy())[0]
            np.testing.assert_allclose(found, model(batch).numpy(), atol=tolerance)
    return ir


@pytest.mark.parametrize("steps", [(6,), (1, 6), (6, 1)], ids=str)
@pytest.mark.parametrize("bias", [(6,), (1, 6), (1, 6, 1)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_only_steps_and_biases_of_output_channels_are_scaled(steps, bias, transposed):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 6, 6)).astype(np.float32)
    factors = np.array([0.5, 0.5, 1, 1, 1, 1], np.float32)
    weight = ops.multiply(
        ops.constant(random.random((6, 6), np.float32)), ops.constant(random.random(steps, np.float32))
    )
    parameter = ops.parameter([2, 6, 6], np.float32)
    layer = ops.add(ops.matmul(parameter, weight, False, transposed), ops.constant(random.random(bias, np.float32)))
    model = ov.Model([layer], [parameter])
    before = ov.compile_model(model, "CPU", EXACT)([x])[0]
    by_channel = bias != (1, 6, 1) and (steps == (6, 1)) == transposed
    assert _scale_layer(layer.output(0), factors) == by_channel
    after = ov.compile_model(model, "CPU", EXACT)([x])[0]
    np.testing.assert_allclose(after, before * factors if by_channel else before, rtol=1e-5)


def linear(parameter, steps=True):
    weight = ops.constant(np.ones((6, 6), np.float32))
    return ops.matmul(parameter, ops.multiply(weight, np.full(6, 2, np.float32)) if steps else weight, False, False)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: [linear(x)],
        lambda x: [ops.add(x, np.ones(6, np.float32))],
        lambda x: [ops.add(ops.relu(x), np.ones(6, np.float32))],
        lambda x: [ops.add(linear(x, steps=False), np.ones(6, np.float32))],
        lambda x: [ops.add(linear(x), np.ones(1, np.float32))],
        lambda x: [ops.add(layer := linear(x), np.ones(6, np.float32)), ops.relu(layer)],
        lambda x: [
            ops.add(ops.matmul(x, w := linear(x).input_value(1), False, False), np.ones(6, np.float32)),
            ops.matmul(x, w, False, False),
        ],
    ],
    ids=["no bias", "no layer", "a function", "no steps", "one bias", "read elsewhere", "a shared weight"],
)
def test_the_scale_stays_out_of_what_is_no_layer_of_its_own(make):
    outputs = make(ops.parameter([2, 6], np.float32))
    assert not _scale_layer(outputs[0].output(0), np.full(6, 2, np.float32))


class Projections(Attention):
    """With a bias of the layer that makes queries, keys and values."""

    def __init__(self):
        super().__init__()
        nn.init.normal_(self.attention.in_proj_bias)


@pytest.mark.parametrize("bits", [LayerBits(4, 4), LayerBits(3, 32)], ids=str)
def test_the_layer_before_takes_in_the_scale(bits, tmp_path):
    torch.manual_seed(3)
    data = [torch.randn(16, 3, 16, 16) for _ in range(2)]
    quantized = nncf3.place(prepared(Projections), data[0], data, bits=(3, 4, 5, 6))
    policy = Policy({layer.cost.name: bits for layer in quantized.searchable})
    reduce_to_policy(quantized, policy, data)
    frozen = nncf3.freeze(quantized)
    deploy.export(frozen, data[0], tmp_path)
    (attention,) = attentions(ov.Core().read_model(tmp_path / "model.xml"))
    assert rewired(attention)
    assert attention.input_value(4).get_node().data.item() == 1
    report = deploy.verify(frozen, tmp_path, data)
    assert report.ok, report.to_json()
    outputs = [compile_exactly(tmp_path / file)(data[0].numpy())[0] for file in ("model.xml", "model.onnx")]
    assert np.abs(outputs[0] - outputs[1]).mean() < 1e-2 * outputs[1].std()
