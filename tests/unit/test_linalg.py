"""Damping, Cholesky and block LDL of Hessians; the figures of a report."""

import math

import pytest
import torch

from vqllm.core import linalg, metrics
from vqllm.errors import NumericalError


def hessian(num_features: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_NC = torch.randn(3 * num_features, num_features, generator=generator, dtype=torch.float64)
    mix_CC = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    x_NC = x_NC @ mix_CC
    return (x_NC.T @ x_NC / len(x_NC)).to(dtype)


class TestDamp:
    def test_adds_a_share_of_the_mean_diagonal(self) -> None:
        H = hessian(12)
        before = H.clone()
        damped = linalg.damp(H, 0.03)
        expected = H + 0.03 * torch.diagonal(H).mean() * torch.eye(12, dtype=H.dtype)
        torch.testing.assert_close(damped, expected)
        assert torch.equal(H, before)

    def test_makes_a_rank_deficient_hessian_positive_definite(self) -> None:
        x = torch.randn(4, 40, generator=torch.Generator().manual_seed(1))
        H = x.T @ x / 4
        assert torch.linalg.cholesky_ex(linalg.damp(H, 0.01))[1] == 0

    def test_shrinks_what_is_off_the_diagonal(self) -> None:
        H = torch.tensor([[2.0, 1.0, -2.0], [1.0, 4.0, 0.0], [-2.0, 0.0, 6.0]])
        damped = linalg.damp(H, 0.5, 0.25)
        assert damped.tolist() == [[4.0, 0.25, -0.5], [0.25, 6.0, 0.0], [-0.5, 0.0, 8.0]]
        assert torch.equal(linalg.damp(H, 0.5, 0.0), torch.diag(torch.tensor([4.0, 6.0, 8.0])))

    def test_without_shrinkage_every_bit_is_that_of_h(self) -> None:
        H = hessian(12, dtype=torch.float32)
        damped = linalg.damp(H, 0.01, 1.0)
        assert torch.equal(damped, linalg.damp(H, 0.01))
        assert torch.equal(damped.triu(1), H.triu(1))

    def test_does_not_depend_on_the_unit_of_the_activations(self) -> None:
        H = hessian(9)
        torch.testing.assert_close(linalg.damp(1e6 * H, 0.1), 1e6 * linalg.damp(H, 0.1))

    def test_features_that_were_never_active_get_the_mean_diagonal(self) -> None:
        H = hessian(10)
        H[3], H[:, 3] = 0, 0
        damped = linalg.damp(H, 0.01)
        assert damped[3, 3] == torch.diagonal(H).mean()
        assert damped[3].count_nonzero() == 1
        assert torch.linalg.cholesky_ex(damped)[1] == 0
        assert torch.linalg.cholesky_ex(linalg.damp(H, 0.0))[1] == 0

    def test_refuses_a_zero_hessian(self) -> None:
        with pytest.raises(NumericalError, match="zero on every calibration token"):
            linalg.damp(torch.zeros(4, 4), 0.01)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_refuses_entries_that_are_not_finite(self, bad: float) -> None:
        H = hessian(6)
        H[1, 2] = bad
        with pytest.raises(NumericalError, match="1 NaN or infinite entries of 36"):
            linalg.damp(H, 0.01)


class TestCholesky:
    def test_factor(self) -> None:
        H = hessian(30)
        M = linalg.cholesky(H)
        assert torch.equal(M, M.tril())
        torch.testing.assert_close(M @ M.T, H)

    def test_goes_on_in_float64_where_float32_fails(self) -> None:
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(40, 200, generator=generator, dtype=torch.float64)
        H = (x.T @ x + 1e-5 * torch.eye(200, dtype=torch.float64)).float()
        assert torch.linalg.cholesky_ex(H)[1] > 0, "float32 alone must fail for this test"
        M = linalg.cholesky(H)
        assert M.dtype == torch.float32
        torch.testing.assert_close(M @ M.T, H, atol=1e-4, rtol=0)

    def test_names_what_to_do_with_an_indefinite_matrix(self) -> None:
        with pytest.raises(NumericalError, match=r"\[2, 2\] is not positive definite.*damping=0.1"):
            linalg.cholesky(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


class TestBlockLDL:
    @pytest.mark.parametrize("block", [1, 2, 3, 4, 8, 24])
    @pytest.mark.parametrize("stripe", [1, 8, 1024])
    def test_is_a_factorisation(
        self, block: int, stripe: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(linalg, "STRIPE", stripe)
        H = hessian(24)
        L, D_KGG = linalg.block_ldl(H, block)
        D = torch.block_diag(*D_KGG)
        torch.testing.assert_close(L @ D @ L.T, H, atol=1e-9, rtol=1e-9)
        assert torch.equal(L, L.tril())
        eye = torch.eye(block, dtype=H.dtype).expand(24 // block, -1, -1)
        assert torch.equal(linalg.diagonal_blocks(L, block), eye)
        assert bool((torch.linalg.eigvalsh(D_KGG) > 0).all())

    def test_determinant_is_that_of_the_blocks(self) -> None:
        H = hessian(12)
        _, D_KGG = linalg.block_ldl(H, 3)
        torch.testing.assert_close(torch.logdet(D_KGG).sum(), torch.logdet(H))

    def test_float32_agrees_with_float64(self) -> None:
        H = linalg.damp(hessian(64), 0.01)
        L, D = linalg.block_ldl(H, 8)
        L32, D32 = linalg.block_ldl(H.float(), 8)
        torch.testing.assert_close(L32.double(), L, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(D32.double(), D, atol=1e-3 * float(D.max()), rtol=0)

    def test_input_is_left_alone(self) -> None:
        H = hessian(16)
        before = H.clone()
        linalg.block_ldl(H, 4)
        assert torch.equal(H, before)

    def test_refuses_blocks_that_do_not_divide(self) -> None:
        with pytest.raises(ValueError, match="blocks of 5 do not divide 12 features"):
            linalg.block_ldl(hessian(12), 5)


class TestMetrics:
    def test_proxy_loss_is_the_relative_error_of_the_output(self) -> None:
        generator = torch.Generator().manual_seed(2)
        x, W = torch.randn(500, 20, generator=generator), torch.randn(7, 20, generator=generator)
        W_hat = W + 0.1 * torch.randn(7, 20, generator=generator)
        H = x.T @ x / 500
        direct = float((x @ (W - W_hat).T).square().sum() / (x @ W.T).square().sum())
        assert metrics.proxy_loss(W, W_hat, H) == pytest.approx(direct, rel=1e-5)

    def test_proxy_loss_at_the_ends(self) -> None:
        W, H = torch.ones(2, 3), torch.eye(3)
        assert metrics.proxy_loss(W, W, H) == 0
        assert metrics.proxy_loss(W, 0 * W, H) == 1
        assert metrics.proxy_loss(0 * W, 0 * W, H) == 0
        assert metrics.proxy_loss(0 * W, W, H) == math.inf

    def test_sqnr(self) -> None:
        W = torch.tensor([[3.0, 4.0]])
        assert metrics.sqnr_db(W, 0.9 * W) == pytest.approx(20, abs=1e-5)
        assert metrics.sqnr_db(W, W) == math.inf
        assert metrics.sqnr_db(0 * W, W) == -math.inf

    def test_gaussian_efficiency(self) -> None:
        assert metrics.gaussian_efficiency(4.0**-3, 3) == pytest.approx(1)
        # E8P at 2 bits has a distortion of 0.0913.
        assert metrics.gaussian_efficiency(0.0913, 2) == pytest.approx(0.863, abs=1e-3)
        assert metrics.gaussian_efficiency(0.0, 2) == math.inf
        with pytest.raises(ValueError, match="undefined"):
            metrics.gaussian_efficiency(0.1, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_symmetric_products_are_as_exact_as_float32(dtype: torch.dtype) -> None:
    x_NC = torch.randn(300, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    total_CC = torch.zeros(700, 700)
    for part in x_NC.split(100):
        linalg.add_symmetric(total_CC, part, part)
    exact_CC = x_NC.double().T @ x_NC.double()
    error = (linalg.symmetric(total_CC).double() - exact_CC).abs().max()
    assert error < 2e-6 * exact_CC.abs().max()


def test_other_products_are_not_rounded() -> None:
    x_NC = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before = x_NC @ x_NC
    linalg.add_symmetric(torch.zeros(64, 64), x_NC.bfloat16(), x_NC.bfloat16())
    assert torch.equal(x_NC @ x_NC, before)
