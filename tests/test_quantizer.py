import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nncf_mpq_plugin.quantizer import (
    SMALLEST_SCALE,
    MultiBitQuantizer,
    integer_range,
    least_error_scale,
    lsq_quantize,
)


def lsq_by_formula(x, scale, low, high, grad, factor):
    """Esser et al. (ICLR 2020), equations 1 to 3 and 5, element by element."""
    v = x / scale
    y = torch.where(v <= low, low, torch.where(v >= high, high, v.round())) * scale
    inside = (v > low) & (v < high)
    slope = torch.where(v <= low, low, torch.where(v >= high, high, v.round() - v))
    grad_scale = slope * grad * factor
    return y, grad * inside, grad_scale.sum_to_size(scale.shape)


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


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_gradcheck_on_the_clipped_pieces(per_channel):
    """Where everything is clipped, the output is linear in the scale and constant in x: gradients are true ones."""
    x = torch.tensor([[9.0, -9.0, 12.0], [-20.0, 30.0, 8.0]], dtype=torch.float64, requires_grad=True)
    scale = torch.full((2, 1) if per_channel else (1,), 0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, s: lsq_quantize(a, s, -4, 3), (x, scale))


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
