"""
The quantizer module: LSQ fake quantization (lsq.py) with one learnable scale per bit width.

``scale`` is LSQ's step size s (Esser et al., "Learned Step Size Quantization", ICLR 2020). A quantizer in joint
training has one scale per candidate bit width; in fine-tuning, or where the bit width is fixed, it has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nncf_mpq_plugin.lsq import lsq_quantize

SMALLEST_SCALE = 1e-5  # as in the published LIMPQ code: keeps x / s finite
SEARCH_SAMPLE = 2**18  # values that the search for the initial scale looks at


def integer_range(bits: int, signed: bool, half_range: bool = False) -> tuple[int, int]:
    """
    Smallest and largest integer of a quantizer.

    :param bits: bit width b.
    :param signed: [-2^(b-1), 2^(b-1) - 1] if true, [0, 2^b - 1] otherwise.
    :param half_range: one bit less, signed only: 8-bit weights in [-64, 63] keep u8 x s8 products from saturating on
        CPUs without VNNI.
    """
    if half_range:
        bits -= 1
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class _StraightThrough(torch.autograd.Function):
    """Gives ``value`` exactly, and its gradient to ``scale``."""

    @staticmethod
    def forward(ctx, scale: Tensor, value: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return value

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad, None


class MultiBitQuantizer(nn.Module):
    """
    Fake quantizer with one learnable scale per bit width; ``active`` selects the one in use.

    :param bits: candidate bit widths; one only where the bit width is fixed.
    :param signed: whether the integers are signed (weights always are).
    :param scale_shape: ``(1,)`` for one scale, ``(out, 1, ...)`` for one per output channel.
    :param half_range: see :func:`integer_range`; applies to 8 bits only.
    :param weight: whether the quantized tensor is a weight (decides N in the gradient factor).
    """

    def __init__(
        self,
        bits: Sequence[int],
        *,
        signed: bool,
        scale_shape: tuple[int, ...] = (1,),
        half_range: bool = False,
        weight: bool = False,
    ):
        super().__init__()
        self.bits = tuple(sorted(bits))
        self.signed = signed
        self.half_range = half_range
        self.weight = weight
        self.scales = nn.ParameterDict({str(b): nn.Parameter(torch.ones(scale_shape)) for b in self.bits})
        self.active = self.bits[-1]
        self.enabled = True
        self._observed: list[Tensor] | None = None
        self.behind: MultiBitQuantizer | None = None
        self.power_of_two = False
        self.snap = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "behind":  # a reference, not a submodule
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def effective_scale(self) -> Tensor:
        """
        The scale that forward really uses.

        With ``snap`` on, a quantizer of the network's input uses the nearest power of two: dividing by it is exact, so
        that every runtime rounds alike. A quantizer that reads a stored 8-bit tensor of step ``t`` uses ``t * p / 16``
        with the nearest odd p: then no stored integer k lies on a rounding tie, since ``k / (p/16) = m + 1/2`` would
        mean ``32 k = p (2m + 1)``, even on one side and odd on the other. The gradient goes straight through to the
        quantizer's own scale.
        """
        scale = self.scale()
        if self.snap and self.power_of_two:
            return _StraightThrough.apply(scale, torch.exp2(scale.detach().log2().round()))
        if not self.snap or self.behind is None:
            return scale
        stored = self.behind.effective_scale().detach()
        odd = 2 * torch.floor(8 * scale.detach() / stored).clamp_min(0) + 1
        return _StraightThrough.apply(scale, stored * odd / 16)

    def scale(self, bits: int | None = None) -> nn.Parameter:
        """:return: the scale of ``bits`` (default: the active bit width)."""
        return self.scales[str(self.active if bits is None else bits)]

    def integer_range(self, bits: int | None = None) -> tuple[int, int]:
        """:return: smallest and largest integer at ``bits`` (default: the active bit width)."""
        bits = self.active if bits is None else bits
        return integer_range(bits, self.signed, self.half_range and bits == 8)

    def select(self, bits: int) -> None:
        """
        Make ``bits`` the active bit width.

        :raises KeyError: if it is not among the candidates.
        """
        if bits not in self.bits:
            msg = f"bit width {bits} is not among {self.bits}"
            raise KeyError(msg)
        self.active = bits

    @property
    def quantizes(self) -> bool:
        """Whether it does anything: it is neither observing nor switched off."""
        return self.enabled and self._observed is None

    def forward(self, x: Tensor, ceiling: float = math.inf) -> Tensor:
        """
        :param x: any shape.
        :param ceiling: what ``x`` is cut off at first, where it quantizes.
        :return: ``x`` on the active grid; ``x`` itself while observing or switched off.
        """
        if self._observed is not None:
            self._observe(x)
            return x
        if not self.enabled:
            return x
        low, high = self.integer_range()
        with torch._C.DisableTorchFunction():  # NNCF's function hooks would intercept every operation in here
            return lsq_quantize(x, self.effective_scale(), low, high, self.gradient_factor(x), ceiling)

    def gradient_factor(self, x: Tensor) -> float:
        """
        :return: LSQ's g = 1 / sqrt(N * Qp) (Esser et al., section 2.2): N is the number of weights that share a scale,
            or the number of features of one sample.
        """
        count = x.numel() // self.scale().numel() if self.weight else x.numel() // max(1, x.shape[0])
        return 1.0 / math.sqrt(max(1, count) * self.integer_range()[1])

    def start_observing(self) -> None:
        """Pass inputs through unchanged and remember (a sample of) them until :meth:`finish_observing`."""
        self._observed = []

    def finish_observing(self) -> None:
        """
        Initialise the scale of each bit width by its own statistics: the step with the least squared error.

        :raises ValueError: if nothing was observed.
        """
        self.initialize(self.observed_values())

    def observed_values(self) -> Tensor:
        """
        End observing.

        :return: the weight, or a flat sample of the activations seen.
        :raises ValueError: if nothing was observed.
        """
        observed, self._observed = self._observed, None
        if not observed:
            msg = "the quantizer saw no data"
            raise ValueError(msg)
        return observed[-1] if self.weight else torch.cat(observed)

    def keep_only(self, bits: int) -> None:
        """
        Drop the scales of all other bit widths.

        :raises KeyError: if ``bits`` is not among the candidates.
        """
        self.select(bits)
        self.bits = (bits,)
        for other in [key for key in self.scales if key != str(bits)]:
            del self.scales[other]

    def set_scale_shape(self, shape: Sequence[int]) -> None:
        """
        Replace every scale by a new parameter of ``shape``, to be initialised next.

        :param shape: ``(1,)`` for one scale, ``(out, 1, ...)`` for one per output channel.
        """
        for key, scale in self.scales.items():
            self.scales[key] = nn.Parameter(scale.new_ones(tuple(shape)), requires_grad=scale.requires_grad)

    def initialize(self, x: Tensor) -> None:
        """
        Set every scale to the step that quantizes ``x`` with the least squared error (grid search over clipping).

        :param x: the weight, or a flat sample of activations.
        """
        for bits, scale in self.scales.items():
            low, high = self.integer_range(int(bits))
            scale.data.copy_(least_error_scale(x.detach(), scale.shape, low, high))

    def _observe(self, x: Tensor, limit: int = 16384) -> None:
        assert self._observed is not None
        x = x.detach()
        if not self.weight:
            x = x.flatten()
            # a fixed, irregular stride samples the tensor evenly without touching the random state
            x = x[:: max(1, x.numel() // limit)] if x.numel() > limit else x
            x = x.clone()
        self._observed.append(x)

    def extra_repr(self) -> str:
        return f"bits={list(self.bits)}, active={self.active}, signed={self.signed}"


def least_error_scale(x: Tensor, shape: Sequence[int], low: int, high: int, candidates: int = 64) -> Tensor:
    """
    Step size with the least squared quantization error, by grid search over the clipping point.

    :param x: values; if ``shape`` has more than one element its leading dimension is ``x``'s.
    :param shape: shape of the result.
    :return: ``shape``, at least :data:`SMALLEST_SCALE`.
    """
    rows = x.reshape(math.prod(shape), -1).float()
    reach = rows.abs().amax(1, keepdim=True) / max(high, -low)
    if low < 0:
        reach = torch.minimum(rows.abs().amax(1, keepdim=True) / high, 2 * reach) if high > 0 else reach
    reach = reach.clamp_min(SMALLEST_SCALE)
    rows = rows[:, :: max(1, rows.numel() // SEARCH_SAMPLE)]  # the search needs a sample only, the reach all values
    best, best_error = reach.clone(), torch.full_like(reach, math.inf)
    for index in range(1, candidates + 1):
        scale = reach * (index / candidates)
        error = ((rows / scale).round().clamp(low, high) * scale - rows).square().sum(1, keepdim=True)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best.clamp_min(SMALLEST_SCALE).reshape(tuple(shape))


def quantizers_of(model: nn.Module) -> Iterator[MultiBitQuantizer]:
    """:return: every :class:`MultiBitQuantizer` of ``model``, each once."""
    return (module for module in model.modules() if isinstance(module, MultiBitQuantizer))
