"""Laws of grain.py: the lapped transform, what the field learns and draws, and how it changes along z."""

import pytest
import torch

from grain import Grain, lapped_transform, noise_of_slices


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_lapped_transform_is_orthonormal_and_sorts_by_frequency(size):
    grain, basis = Grain(4, size), lapped_transform(size)
    along = basis[:size, 0].sum(1)  # one half wave down the rows, ever more along them
    assert ((along.sign().diff(dim=1) != 0).sum(1).diff() > 0).all()
    coefficients = torch.zeros(3, size**2, 6, 7)
    coefficients[..., 2:-2, 2:-2] = torch.randn(3, size**2, 2, 3)  # what is at the border has no neighbour beyond
    field = grain.draw(torch.nn.functional.pixel_shuffle(coefficients, size), torch.zeros(1))
    assert torch.allclose(grain.coefficients(field), coefficients, atol=1e-4)
    assert torch.allclose(field.square().sum(), coefficients.square().sum(), rtol=1e-4)


def test_grain_shows_no_edges_of_blocks():
    """Smooth noise of blocks stays smooth where blocks meet: the step there is no larger than within them."""
    torch.manual_seed(0)
    log_sd = torch.full((64, 1, 1), -20.0)
    log_sd[0] = 0
    field = Grain(4, 8).draw(torch.randn(64, 1, 64, 64), log_sd)[..., 8:-8, 8:-8]
    step = field.diff(dim=-1).square().mean((0, 1, 2))
    at_edges = step[7::8].mean()
    assert at_edges < 1.5 * step.mean()


def test_grain_learns_what_power_is_missing_block_by_block_and_frequency_by_frequency():
    """Of the power of real slices, less what the decoder's pictures have; nothing where nothing is missing."""
    torch.manual_seed(0)
    grain, sd = Grain(4, 4), torch.zeros(16, 4, 5)
    sd[3, 1], sd[7, 2], sd[9, 1:3, 3] = 0.2, 0.05, 0.1
    features = torch.randn(1, 4, 4, 5).expand(256, -1, -1, -1)

    def field(sd: torch.Tensor) -> torch.Tensor:
        return grain.draw(torch.randn(256, 1, 16, 20), sd.clamp(min=1e-9).log().expand(256, -1, -1, -1))

    measured = grain.coefficients(field(sd)).std(0)
    inner = (slice(None), slice(1, 3), slice(1, 4))
    assert torch.allclose(measured[inner], sd[inner], atol=0.05)  # what is drawn has this sd
    assert (measured[inner][sd[inner] == 0] < 1e-6).all()
    log_sd = torch.full((1, 16, 4, 5), -2.0, requires_grad=True)
    optimizer, decoded = torch.optim.Adam([log_sd], lr=0.05), field(0.6 * sd)
    real = decoded + field(0.8 * sd)
    for _ in range(400):
        loss = grain.loss(real, decoded, log_sd)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = log_sd.detach().exp()[0][inner]
    assert torch.allclose(learned[sd[inner] > 0], 0.8 * sd[inner][sd[inner] > 0], rtol=0.25)
    assert learned[sd[inner] == 0].max() < 0.01
    features = features.clone().requires_grad_()
    grain.loss(real, decoded, grain.log_sd(features)).backward()
    assert features.grad is None and grain.head[4].bias.grad.any()  # it teaches the decoder nothing


def test_grain_is_smooth_along_z():
    """White noise after a gaussian of sd 1 over z correlates by exp(-lag^2 / 4); in every slice its variance is 1."""
    z, covariance = torch.arange(32), torch.cov(noise_of_slices(32, 48, 56).flatten(1))
    assert torch.allclose(covariance, torch.exp(-((z[:, None] - z) ** 2) / 4), atol=0.1)  # at both ends too
