"""Laws of completion.py, on a prior that is exactly Gaussian: slices known, the others drawn given these."""

import pytest
import torch
from torch import Tensor

from model_diffusion import LatentDiffusion, sample_dpm
from parts.completion import complete, weights_of_known

Z, KNOWN = torch.arange(6), torch.tensor([4, 1])


@pytest.fixture
def model() -> LatentDiffusion:
    """Untrained, so it denoises as its Gaussian prior does: variance 1, and a correlation along z in each channel."""
    model = LatentDiffusion(latent_shape=(2, 4, 4), widths=(8,), blocks=1, slices_per_brain=6).eval()
    distance = (Z[:, None] - Z).abs()
    model.gaussian.correlation.copy_(torch.stack([torch.exp(-distance / (1 + kind)) for kind in range(8)]))
    model.gaussian.mean.normal_()
    return model


@torch.no_grad()
def completed(model: LatentDiffusion, known: Tensor, noise: Tensor) -> Tensor:
    """[6, 2, 4, 4] drawn from this noise."""
    denoise = complete(lambda x, t: model.denoise(x, t, Z), model.gaussian, model.alpha, model.sigma, known, KNOWN)
    *_, latent = sample_dpm(denoise, noise, model.alpha, model.sigma, 100)
    return latent


def test_brains_of_a_gaussian_prior_have_its_conditional_mean_and_covariance(model):
    """Given slices come back as they were; a brain is linear in the noise, so noise 0 gives the mean."""
    known, R = torch.randn(2, 2, 4, 4), model.gaussian.correlation[:2]
    within, across = R[:, KNOWN][:, :, KNOWN], R[:, :, KNOWN]
    away = known - model.gaussian.mean[KNOWN]
    expected = model.gaussian.mean + torch.einsum("cak,kcyx->acyx", across @ torch.linalg.inv(within), away)
    mean = completed(model, known, torch.zeros(6, 2, 4, 4))
    assert torch.allclose(mean, expected, atol=1e-3) and torch.allclose(mean[KNOWN], known, atol=1e-5)
    # column b of `moved` is what noise at slice b alone does; noise of a brain has the correlation R
    one_by_one = torch.eye(6)[:, :, None, None, None].expand(6, 6, 2, 4, 4)
    moved = torch.stack([completed(model, known, noise) - mean for noise in one_by_one], 1)[..., 0, 0]
    covariance = torch.einsum("abc,cbd,edc->cae", moved, R, moved)
    assert torch.allclose(covariance, R - across @ torch.linalg.inv(within) @ across.mT, atol=0.03)
    assert not covariance[:, KNOWN].abs().max() > 1e-4 and covariance[:, 0, 0].min() > 0.3


def test_slices_that_tell_nothing_of_each_other_are_drawn_as_if_nothing_was_known(model):
    model.gaussian.correlation.copy_(torch.eye(6).expand(8, 6, 6))
    noise, others = torch.randn(6, 2, 4, 4), [0, 2, 3, 5]
    drawn = [completed(model, torch.randn(2, 2, 4, 4), noise) for _ in range(2)]
    assert torch.allclose(drawn[0][others], drawn[1][others], atol=1e-4)


def test_slices_that_are_all_alike_are_the_mean_of_the_known():
    """As before any correlation was measured: no division by zero."""
    weights = weights_of_known(torch.ones(1, 6, 6), KNOWN)
    assert torch.allclose(weights[0, [0, 2, 3, 5]], torch.full((4, 2), 0.5), atol=1e-4)
    assert torch.equal(weights[0, KNOWN], torch.eye(2))
