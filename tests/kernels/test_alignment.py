"""Centred alignment against centring matrices and against CKA of features."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from iclgd_lens.kernels.alignment import centred_alignment


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(a: Tensor, b: Tensor) -> float:
    """`⟨A', B'⟩ / (‖A'‖ ‖B'‖)` with `A' = H A H`, `H = I − 11ᵀ/n` of either side's size."""
    centred = []
    for kernel in (a, b):
        before, behind = (torch.eye(n, dtype=kernel.dtype) - torch.full((n, n), 1.0 / n, dtype=kernel.dtype) for n in kernel.shape)
        centred.append([float(x) for x in (before @ kernel @ behind).flatten()])
    dot, first, second = (sum(x * y for x, y in zip(*pair, strict=True)) for pair in (centred, centred[:1] * 2, centred[1:] * 2))
    return dot / math.sqrt(first * second)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (2, 2), (2, 9)])
def test_alignment_is_that_of_kernels_between_centring_matrices(shape):
    a, b = random(3, *shape), 2.0 + random(3, *shape, seed=1)
    found = centred_alignment(a, b)
    assert found.tolist() == pytest.approx([naive(x, y) for x, y in zip(a, b, strict=True)], rel=1e-9)
    assert centred_alignment(b, a).tolist() == pytest.approx(found.tolist(), rel=1e-12)


def test_alignment_of_linear_kernels_is_cka_of_their_features():
    x, y = random(12, 5), random(12, 7, seed=1) + 3.0
    y[:, :3] += x[:, :3]
    found = float(centred_alignment(x @ x.T, y @ y.T))
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    expected = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert found == pytest.approx(float(expected), rel=1e-10)
    assert 0.1 < found < 0.9


def test_a_kernel_is_aligned_with_itself_however_scaled_and_shifted_and_against_its_negative():
    kernel = random(4, 6, 5)
    shifted = 0.01 * kernel + random(4, 6, 1, seed=1) + random(4, 1, 5, seed=2) + 3.0
    for other, expected in ((kernel, 1.0), (100.0 * kernel - 40.0, 1.0), (shifted, 1.0), (-kernel, -1.0)):
        assert centred_alignment(kernel, other).tolist() == pytest.approx([expected] * 4, rel=1e-9)


def test_scale_and_offsets_of_either_kernel_do_not_matter():
    a, b = random(6, 5), random(6, 5, seed=1)
    expected = float(centred_alignment(a, b))
    for other in (3e8 * b, 1e-8 * b, b - 70.0, b + random(6, 1, seed=3), b + random(1, 5, seed=3)):
        assert float(centred_alignment(a, other)) == pytest.approx(expected, rel=1e-6)
        assert float(centred_alignment(other, a)) == pytest.approx(expected, rel=1e-6)


def test_unrelated_kernels_are_not_aligned():
    found = centred_alignment(random(50, 40, 40), 5.0 + random(50, 40, 40, seed=1))
    assert found.abs().max() < 5 / 40
    assert found.mean().abs() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 0.1, 1e5 / 3])
def test_alignment_with_a_kernel_that_is_constant_once_centred_is_undefined(offset, dtype):
    kernel = random(2, 6, 5).to(dtype)
    constant = torch.full((6, 5), offset, dtype=dtype)
    for other in (constant, constant + random(6, 1).to(dtype), constant + random(1, 5).to(dtype)):
        assert centred_alignment(kernel, other).isnan().all()
        assert centred_alignment(other, kernel).isnan().all()
    assert centred_alignment(kernel[:, :1], kernel[:, :1]).isnan().all()


def test_leading_axes_broadcast_and_one_constant_kernel_spoils_no_other():
    a, b = random(3, 1, 6, 5), random(4, 6, 5, seed=1)
    a[1] = 2.0
    found = centred_alignment(a, b)
    assert found.shape == (3, 4)
    assert found[1].isnan().all()
    for row in (0, 2):
        for column in range(4):
            assert float(found[row, column]) == pytest.approx(naive(a[row, 0], b[column]), rel=1e-9)


def test_half_precision_is_aligned_in_float32():
    a, b = (random(30, 20, seed=seed).to(torch.bfloat16) for seed in (0, 1))
    found = centred_alignment(a, a + b)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(naive(a.double(), (a + b).double()), rel=1e-4)


BROKEN = torch.eye(3).masked_fill(torch.eye(3) == 1, math.nan)


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.eye(3), torch.eye(4), r"a must have the shape .* with 4 points; got \[3, 3\]"),
        (torch.eye(3)[:2], torch.eye(3), "the kernels are of 2 and of 3 queries"),
        (torch.ones(3), torch.ones(3, 3), r"a must have the shape .*; got \[3\]"),
        (torch.ones(3, 3), torch.ones(3), r"b must have the shape .*; got \[3\]"),
        (BROKEN, torch.eye(3), "a has 3 of 9 entries that are not finite"),
        (torch.eye(3), torch.full((3, 3), math.inf), "b has 9 of 9 entries that are not finite"),
    ],
)
def test_kernels_that_cannot_be_aligned_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        centred_alignment(a, b)
