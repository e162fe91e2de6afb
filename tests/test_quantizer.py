import copy
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nncf_mpq_plugin import lsq
from nncf_mpq_plugin.lsq import lsq_quantize
from nncf_mpq_plugin.quantizer import SMALLEST_SCALE, MultiBitQuantizer, integer_range, least_error_scale


def lsq_by_formula(x, scale, low, high, grad, factor):
    """Esser et al. (ICLR 2020), equations 1 to 3 and 5, element by element."""
    v = x / scale
    y = torch.where(v <= low, low, torch.where(v >= high, high, v.round())) * scale
    inside = (v > low) & (v < high)
    slope = torch.where(v <= low, low, torch.where(v >= high, high, v.round() - v))
    grad_scale = slope * grad * factor
    return y, grad * inside, grad_scale.sum_to_size(scale.shape)


@pytest.fixture(params=["kernel", "tensor operations"])
def way(request, monkeypatch):
    """Both ways to compute LSQ: compiled, and what there is without a compiler."""
    if request.param == "kernel":
        assert lsq.compiled(), "the kernel does not compile here"
    else:
        monkeypatch.setattr(lsq, "compiled", lambda: False)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(7,), (2, 5), (3, 4, 5, 6), (1, 1)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_forward_and_gradients_are_those_of_the_paper(shape, per_channel, signed, bits):
    generator = torch.Generator().manual_seed(bits)
    low, high = integer_range(bits, signed)
    x = torch.randn(shape, generator=generator) * 3
    scale = torch.full((shape[0],) + (1,) * (len(shape) - 1) if per_channel else (1,), 0.37)
    scale *= 1 + torch.rand(scale.shape, generator=generator)
    x.view(-1)[0] = 0.0  # a value on the lower limit of the unsigned range
    grad = torch.randn(shape, generator=generator)
    a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = lsq_quantize(a, s, low, high, 0.25)
    y.backward(grad)
    expected = lsq_by_formula(x, scale, low, high, grad, 0.25)
    assert torch.equal(y, expected[0])
    assert torch.equal(a.grad, expected[1])
    torch.testing.assert_close(s.grad, expected[2], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("scale", [0.3, 0.75, 3.0])  # 6 is beyond 3 bits, within them, and a tie's neighbour
@pytest.mark.parametrize("ceiling", [math.inf, 6.0], ids=["ReLU", "ReLU6"])
def test_an_unsigned_quantizer_contains_the_activation_function_before_it(ceiling, scale, per_channel):
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0)) * 4
    x.flatten()[:6] = torch.tensor([0.0, 6.0, -0.0, 1.5 * scale, math.inf, -math.inf])
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    scales = torch.full((4, 1, 1, 1) if per_channel else (1,), scale)
    results = []
    for apart in (True, False):
        a, s = x.clone().requires_grad_(), scales.clone().requires_grad_()
        activation = torch.relu(a) if ceiling == math.inf else torch.nn.functional.hardtanh(a, 0, ceiling)
        y = lsq_quantize(activation, s, 0, 7) if apart else lsq_quantize(a, s, 0, 7, ceiling=ceiling)
        y.backward(grad)
        results.append((y.detach(), a.grad, s.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
def test_memory_layout_does_not_matter(layout):
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    arranged = {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": torch.stack([x, x], 4)[..., 0],
    }[layout]
    results = []
    for value in (x, arranged):
        a, s = (
            value.detach().clone() if layout != "strided" else value.detach(),
            torch.tensor([0.3], requires_grad=True),
        )
        a = a.requires_grad_()
        y = lsq_quantize(a, s, -4, 3)
        y.backward(torch.ones_like(x) * x)
        results.append((y.detach(), a.grad, s.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_gradcheck_on_the_clipped_pieces(signed, per_channel):
    """Where everything is clipped, the output is linear in the scale and constant in x: gradients are true ones."""
    x = torch.tensor([[9.0, -9.0, 12.0], [-20.0, 30.0, 8.0]], dtype=torch.float64, requires_grad=True)
    scale = torch.full((2, 1) if per_channel else (1,), 0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, s: lsq_quantize(a, s, *integer_range(3, signed)), (x, scale))


def both_ways(x, scale, low, high, grad, monkeypatch, ceiling=math.inf):
    results = []
    for use_kernel in (True, False):
        monkeypatch.setattr(lsq, "compiled", lambda use_kernel=use_kernel: use_kernel)
        a, s = x.detach().requires_grad_(), scale.clone().requires_grad_()
        y = lsq_quantize(a, s, low, high, 0.1, ceiling)
        y.backward(grad)
        results.append((y.detach(), a.grad, s.grad))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "scales", "layout"),
    [
        ((32, 24, 40, 40), (1,), torch.contiguous_format),
        ((32, 24, 40, 40), (1,), torch.channels_last),
        ((64, 300, 3, 3), (64, 1, 1, 1), torch.channels_last),
        ((3, 70000), (3, 1), torch.contiguous_format),
        ((48, 1, 3, 3), (48, 1, 1, 1), torch.contiguous_format),
        ((32, 7, 96), (1,), torch.contiguous_format),
        ((5, 6, 7), (1, 6, 1), torch.contiguous_format),
        ((0, 3), (1,), torch.contiguous_format),
    ],
    ids=str,
)
@pytest.mark.parametrize("ceiling", [math.inf, 0.25], ids=["whole", "cut off"])
def test_the_kernel_computes_what_tensor_operations_do(shape, scales, layout, dtype, ceiling, monkeypatch):
    """Equal bit for bit, but for the order in which the scale's gradient is summed."""
    assert lsq.compiled()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    scale = 0.1 + torch.rand(scales, generator=generator, dtype=dtype)
    x.flatten()[: x.numel() // 4].fill_(1.5 * scale.flatten()[0])  # a tie where memory allows a view
    grad = torch.randn(shape, generator=generator, dtype=dtype)
    one, other = both_ways(x, scale, -4, 3, grad, monkeypatch, ceiling)
    assert torch.equal(one[0], other[0])
    assert one[0].stride() == other[0].stride()
    assert torch.equal(one[1], other[1])
    assert one[2].shape == scale.shape
    terms = max(1, x.numel() // scale.numel())
    tolerance = 10 * torch.finfo(dtype).eps * math.sqrt(terms)
    torch.testing.assert_close(one[2], other[2], rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("way")
def test_gradients_that_others_use_are_not_written_over():
    x, scale = torch.linspace(-2, 2, 9).requires_grad_(), torch.tensor([0.3]).requires_grad_()
    other, grad = torch.zeros(9).requires_grad_(), torch.arange(9.0)
    y = lsq_quantize(x, scale, -4, 3)
    y.retain_grad()
    (other + y + y.view(3, 3).flatten()).backward(grad)
    assert torch.equal(grad, torch.arange(9.0))
    assert torch.equal(other.grad, grad)
    assert torch.equal(y.grad, 2 * grad)
    inside = (x / 0.3 > -4) & (x / 0.3 < 3)
    assert torch.equal(x.grad, 2 * grad * inside)


@pytest.mark.parametrize("ceiling", [math.inf, 1.0])
def test_values_that_are_not_finite_stay_so(ceiling, monkeypatch):
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    one, other = both_ways(x, torch.tensor([0.5]), -4, 3, torch.ones(4), monkeypatch, ceiling)
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=0, equal_nan=True)
    assert math.isnan(one[0][0])
    assert math.isnan(one[2].item())
    assert math.isnan(other[2].item())


def test_gradients_do_not_depend_on_the_number_of_threads():
    x = torch.randn(64, 33, 30, 30, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            scale = torch.tensor([0.2], requires_grad=True)
            lsq_quantize(x, scale, -8, 7).backward(grad)
            results.append(scale.grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("trouble", ["no compiler", "broken compiler"])
def test_without_a_compiler_tensor_operations_do_the_work(trouble, tmp_path):
    """In a process of its own, for the outcome is remembered."""
    code = (
        "import logging, torch; logging.basicConfig(); from nncf_mpq_plugin import lsq; assert not lsq.compiled(); "
        "s = torch.ones(1, requires_grad=True); y = lsq.lsq_quantize(torch.tensor([0.6, 9.0]), s, -4, 3); "
        "y.sum().backward(); print(y.tolist(), s.grad.item())"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": "/nowhere"}
    if trouble == "broken compiler":
        environment["CXX"] = shutil.which("false") or "/bin/false"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    values, gradient = done.stdout.rsplit(maxsplit=1)
    assert values == "[1.0, 3.0]"
    assert float(gradient) == pytest.approx(1 - 0.6 + 3)
    assert "kernel could not be compiled" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_straight_through_inside_the_range():
    x = torch.linspace(-0.9, 0.9, 19, requires_grad=True)
    lsq_quantize(x, torch.tensor([0.4]), -4, 3).sum().backward()
    assert torch.equal(x.grad, torch.ones(19))


@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    scale=st.floats(1e-4, 10),
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_output_lies_on_the_grid_and_is_stable(bits, signed, scale, values):
    low, high = integer_range(bits, signed)
    x, s = torch.tensor(values), torch.tensor([scale])
    y = lsq_quantize(x, s, low, high)
    integers = (y / s).round()
    assert torch.equal(integers * s, y)
    assert integers.min() >= low
    assert integers.max() <= high
    assert torch.equal(lsq_quantize(y, s, low, high), y)
    limited = x.clamp(low * s.item(), high * s.item())
    assert ((y - limited).abs() <= s * (0.5 + 1e-3) + 1e-6).all()


@pytest.mark.parametrize(
    ("bits", "signed", "half", "expected"),
    [(2, True, False, (-2, 1)), (4, False, False, (0, 15)), (8, True, False, (-128, 127)), (8, True, True, (-64, 63))],
)
def test_integer_range(bits, signed, half, expected):
    assert integer_range(bits, signed, half) == expected


def test_gradient_factor_counts_weights_or_features():
    weight = MultiBitQuantizer((4,), signed=True, weight=True)
    assert weight.gradient_factor(torch.zeros(8, 3, 3, 3)) == pytest.approx(1 / math.sqrt(8 * 27 * 7))
    channel = MultiBitQuantizer((4,), signed=True, weight=True, scale_shape=(8, 1, 1, 1))
    assert channel.gradient_factor(torch.zeros(8, 3, 3, 3)) == pytest.approx(1 / math.sqrt(27 * 7))
    activation = MultiBitQuantizer((2,), signed=False)
    assert activation.gradient_factor(torch.zeros(32, 5, 2, 2)) == pytest.approx(1 / math.sqrt(20 * 3))


def test_each_bit_width_has_its_own_scale_and_gradient():
    quantizer = MultiBitQuantizer((2, 4), signed=True)
    quantizer.initialize(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert quantizer.scale(2) > quantizer.scale(4)
    quantizer.select(4)
    quantizer(torch.randn(3, 5)).sum().backward()
    assert quantizer.scale(4).grad is not None
    assert quantizer.scale(2).grad is None
    with pytest.raises(KeyError, match="3 is not among"):
        quantizer.select(3)


def test_least_error_scale_beats_its_neighbours():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    best = least_error_scale(x, (1,), -4, 3).item()

    def error(scale):
        return ((x / scale).round().clamp(-4, 3) * scale - x).square().mean().item()

    assert error(best) < error(best * 1.15)
    assert error(best) < error(best * 0.85)
    assert least_error_scale(torch.zeros(4), (1,), 0, 3).item() == pytest.approx(SMALLEST_SCALE)


def test_observing_passes_through_and_sets_scales():
    quantizer = MultiBitQuantizer((2, 8), signed=False)
    with pytest.raises(ValueError, match="saw no data"):
        quantizer.finish_observing()
    quantizer.start_observing()
    x = torch.rand(4, 100) * 6
    assert quantizer(x) is x
    quantizer.finish_observing()
    assert quantizer.scale(8).item() == pytest.approx(6 / 255, rel=0.1)
    quantizer.enabled = False
    assert quantizer(x) is x


def stored_pair(scale=0.1, stored=0.02):
    behind = MultiBitQuantizer((8,), signed=False)
    behind.scale().data.fill_(stored)
    quantizer = MultiBitQuantizer((2, 4), signed=False)
    quantizer.scale().data.fill_(scale)
    quantizer.behind = behind
    return quantizer, behind


@given(scale=st.floats(1e-4, 5), stored=st.floats(1e-3, 1))
@settings(max_examples=100, deadline=None)
def test_snapped_scale_puts_no_stored_integer_on_a_tie(scale, stored):
    quantizer, behind = stored_pair(scale, stored)
    assert quantizer.effective_scale() is quantizer.scale()
    quantizer.snap = True
    ratio = (quantizer.effective_scale() * 16 / behind.scale()).item()
    odd = round(ratio)
    assert ratio == pytest.approx(odd, rel=1e-5)
    assert odd % 2 == 1
    assert odd >= 1
    wanted = 16 * quantizer.scale().item() / behind.scale().item()
    assert odd == 1 or abs(odd - wanted) <= 1 + 1e-4 * wanted
    assert all((2 * 16 * k) % odd != 0 or ((2 * 16 * k) // odd) % 2 == 0 for k in range(256))


def test_snap_gives_its_gradient_to_its_own_scale_only():
    quantizer, behind = stored_pair()
    quantizer.snap = True
    quantizer(torch.rand(4, 6)).sum().backward()
    assert quantizer.scale().grad is not None
    assert behind.scale().grad is None


def test_behind_is_a_reference_that_copies_with_the_model():
    quantizer, behind = stored_pair()
    assert list(dict(quantizer.named_parameters())) == ["scales.2", "scales.4"]
    twin = copy.deepcopy(torch.nn.ModuleList([behind, quantizer]))
    assert twin[1].behind is twin[0]


def test_keep_only_and_scale_shape():
    quantizer = MultiBitQuantizer((2, 3, 4), signed=True, weight=True)
    quantizer.keep_only(3)
    assert quantizer.bits == (3,)
    assert list(quantizer.scales) == ["3"]
    quantizer.set_scale_shape((5, 1, 1, 1))
    quantizer.initialize(torch.randn(5, 2, 3, 3))
    assert quantizer.scale().shape == (5, 1, 1, 1)
    assert quantizer(torch.randn(5, 2, 3, 3)).shape == (5, 2, 3, 3)
