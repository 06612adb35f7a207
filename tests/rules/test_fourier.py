"""Fourier transforms, each against autograd."""

import pytest
import torch

from hzo.rules import fourier
from hzo.rules.base import rules
from support.tape_oracle import check, leaves_of

NORMS = ["backward", "ortho", "forward"]

CASES = {
    "aten._fft_c2c.default": [
        ("fft", torch.fft.fft, (3, 4), True, {}),
        ("ifft", torch.fft.ifft, (3, 5), True, {"dim": 0}),
        ("fft of real", torch.fft.fft, (3, 4), True, {"n": 6}),
        ("fft2", torch.fft.fft2, (2, 3, 4), True, {}),
        ("fft2 of real", torch.fft.fft2, (3, 4), False, {}),
        ("ifftn", torch.fft.ifftn, (2, 3, 4), True, {"dim": (0, 2), "s": (3, 2)}),
    ],
    "aten._fft_r2c.default": [
        ("rfft", torch.fft.rfft, (3, 4), False, {}),
        ("rfft odd", torch.fft.rfft, (3, 5), False, {}),
        ("rfft cut", torch.fft.rfft, (3, 5), False, {"n": 4, "dim": 0}),
        ("rfft of one", torch.fft.rfft, (3, 1), False, {}),
        ("rfft2", torch.fft.rfft2, (2, 4, 5), False, {"dim": (0, 1)}),
        ("rfftn", torch.fft.rfftn, (2, 3, 4), False, {}),
        ("fft", torch.fft.fft, (3, 5), False, {}),
        ("ihfft", torch.fft.ihfft, (3, 6), False, {}),
    ],
    "aten._fft_c2r.default": [
        ("irfft", torch.fft.irfft, (3, 4), True, {}),
        ("irfft odd", torch.fft.irfft, (3, 4), True, {"n": 7}),
        ("irfft of one", torch.fft.irfft, (3, 1), True, {"n": 1}),
        ("irfft of two", torch.fft.irfft, (3, 2), True, {"n": 2}),
        ("irfft2", torch.fft.irfft2, (4, 3, 2), True, {"dim": (1, 0)}),
        ("irfftn", torch.fft.irfftn, (2, 3, 4), True, {}),
        ("hfft", torch.fft.hfft, (3, 4), True, {}),
    ],
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("name", "function", "shape", "is_complex", "options"),
    [(name, *case[1:]) for name, cases in CASES.items() for case in cases],
    ids=[case[0] for cases in CASES.values() for case in cases],
)
def test_transform(name, function, shape, is_complex, options, norm):
    dtype = torch.complex128 if is_complex else torch.float64
    check(lambda x: function(x * x, norm=norm, **options), leaves_of(shape, dtype=dtype), calls=[name])


def test_short_time_transform_and_back():
    window = torch.hann_window(8, dtype=torch.float64)

    def function(x, w):
        spectrum = torch.stft(x, 8, 4, window=window * w, return_complex=True)
        filtered = spectrum * w[:5, None].to(spectrum.dtype)
        return torch.istft(filtered, 8, 4, window=window), spectrum.abs()

    check(function, leaves_of((2, 32), (8,)))


@pytest.mark.parametrize("options", [{"onesided": False}, {"center": False}, {"normalized": True}])
def test_short_time_transform(options):
    window = torch.hann_window(8, dtype=torch.float64)
    check(lambda x: torch.stft(x, 8, 2, window=window, return_complex=True, **options), leaves_of((32,)))


def test_convolution_by_products_of_spectra():
    def function(x, k):
        product = torch.fft.rfft(x, n=12) * torch.fft.rfft(k, n=12).conj()
        return torch.fft.irfft(product, n=12)[..., :8], torch.view_as_real(product)

    check(function, leaves_of((2, 8), (3, 1, 5)), weights=(1,))


def test_mixing_of_tokens():
    """As in FNet: the real part of a transform over tokens and features."""
    check(lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real, leaves_of((2, 5, 4)))


def test_spectral_layer():
    """As in Fourier neural operators: some modes times complex weights, put into zeros."""

    def function(x, w):
        spectrum = torch.fft.rfft2(x)
        out = torch.zeros(2, 3, 6, 4, dtype=torch.complex128)
        out[:, :, :2, :3] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :2, :3], w)
        out[:, :, -2:, :3] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -2:, :3], w.conj())
        return torch.fft.irfft2(out, s=(6, 6))

    x, w = leaves_of((2, 2, 6, 6))[0], leaves_of((2, 3, 2, 3), dtype=torch.complex128)[0]
    check(function, [x, w], weights=(1,))


def test_every_rule_has_a_case():
    own = {str(target) for target, rule in rules.items() if rule.vjp.__module__ == fourier.__name__}
    assert own <= set(CASES)
