"""U with H^-1 = U^T U: against torch's inverse and factorization, at any size, and within one matrix of memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lilliput.models import triangular
from lilliput.models.triangular import inverse_factor, invert_lower


def positive(n: int, seed: int = 0) -> Tensor:
    x = torch.randn(n, 2 * n + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T / n + 0.01 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 5, 64, 65, 300])
@pytest.mark.parametrize("stripe", [7, 256])
def test_it_is_the_factor_of_torchs_inverse(n: int, stripe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangular, "_STRIPE", stripe)
    h, order = positive(n), torch.randperm(n, generator=torch.Generator().manual_seed(1))
    kept = h.clone()
    upper = inverse_factor(h, order)
    assert upper is not None
    expected = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    torch.testing.assert_close(upper, expected.float(), rtol=1e-5, atol=1e-6)
    assert not upper.tril(-1).any()
    assert torch.equal(h, kept)


def test_float32_is_as_near_as_float32_can_be() -> None:
    h, order = positive(200), torch.arange(200)
    upper = inverse_factor(h.float(), order)
    assert upper is not None
    torch.testing.assert_close(upper, inverse_factor(h, order), rtol=1e-3, atol=1e-4)


def test_what_is_not_positive_definite_has_no_factor() -> None:
    assert inverse_factor(-torch.eye(70), torch.arange(70)) is None
    assert inverse_factor(torch.full((3, 3), float("nan")), torch.arange(3)) is None


def test_the_inverse_of_a_triangle_is_put_in_its_place() -> None:
    lower = torch.linalg.cholesky(positive(150))
    held = lower.clone()
    invert_lower(held)
    torch.testing.assert_close(held @ lower, torch.eye(150, dtype=torch.float64))


PROGRAM = """
import torch
from lilliput import memory
from lilliput.models.triangular import inverse_factor
inverse_factor(torch.eye(600), torch.arange(600))  # what the libraries take once
h = torch.eye(4000)
before = memory.held()[1]
upper = inverse_factor(h, torch.arange(4000))
print((memory.held()[0] - before) / h.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from Linux' accounts")
def test_one_matrix_of_memory_and_stripes_are_taken() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.6  # the result, and some times 256 of the 4000 rows
