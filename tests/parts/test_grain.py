"""Laws of grain.py: the lapped transform, what the field learns and draws, and how it changes along z."""

import pytest
import torch

from parts.grain import KNEE, SMOOTHING, Grain, bend_white, compand, expand, lapped_transform, noise_of_slices


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_lapped_transform_is_orthonormal_and_sorts_by_frequency(size):
    grain, basis = Grain(4, size), lapped_transform(size)
    along = basis[:size, 0].sum(1)  # one half wave down the rows, ever more along them
    assert ((along.sign().diff(dim=1) != 0).sum(1).diff() > 0).all()
    coefficients = torch.zeros(3, size**2, 6, 7)
    coefficients[..., 2:-2, 2:-2] = torch.randn(3, size**2, 2, 3)  # what is at the border has no neighbour beyond
    field = grain.synthesis(coefficients)
    assert torch.allclose(grain.analysis(field), coefficients, atol=1e-4)
    assert torch.allclose(field.square().sum(), coefficients.square().sum(), rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_block_is_drawn_where_it_is(size):
    """The energy of all frequencies of the middle one of 5 x 5 blocks is centred on the middle of the picture."""
    each_alone = torch.zeros(size**2, size**2, 5, 5)
    each_alone[:, :, 2, 2] = torch.eye(size**2)
    energy = Grain(4, size).synthesis(each_alone).square().sum((0, 1))
    place = torch.arange(5 * size) + 0.5
    for profile in (energy.sum(0), energy.sum(1)):
        assert abs((profile * place).sum() / profile.sum() - 2.5 * size) <= 0.51


def test_grain_shows_no_edges_of_blocks():
    """Smooth noise of blocks stays smooth where blocks meet: the step there is no larger than within them."""
    torch.manual_seed(0)
    coefficients = torch.randn(64, 64, 8, 8) * (torch.arange(64) == 0)[:, None, None]
    field = Grain(4, 8).synthesis(coefficients)[..., 8:-8, 8:-8]
    step = field.diff(dim=-1).square().mean((0, 1, 2))
    at_edges = step[7::8].mean()
    assert at_edges < 1.5 * step.mean()


def test_grain_learns_the_missing_power_block_by_block_and_frequency_by_frequency():
    """The power of real slices minus that of the decoder's pictures; nothing where nothing is missing."""
    torch.manual_seed(0)
    grain, sd = Grain(4, 4), torch.zeros(16, 4, 5)
    sd[3, 1], sd[7, 2], sd[9, 1:3, 3] = 0.1, 0.03, 0.05
    inner = (slice(None), slice(1, 3), slice(1, 4))  # blocks at the border have no neighbour beyond
    grey = torch.full((256, 1, 16, 20), -0.2)
    features = torch.randn(1, 4, 4, 5).expand(256, -1, -1, -1)

    def with_grain(picture: torch.Tensor, sd: torch.Tensor) -> torch.Tensor:
        return grain.add(picture, torch.randn_like(picture), sd.clamp(min=1e-9).log().expand(256, -1, -1, -1))

    measured = grain.analysis(compand(with_grain(grey, sd)) - compand(grey)).std(0)[inner]
    assert torch.allclose(measured, sd[inner], atol=0.02) and (measured[sd[inner] == 0] < 1e-4).all()
    decoded = with_grain(grey, 0.6 * sd)
    real, log_sd = with_grain(decoded, 0.8 * sd), torch.full((1, 16, 4, 5), -2.0, requires_grad=True)
    optimizer = torch.optim.Adam([log_sd], lr=0.1)
    for _ in range(120):
        loss = grain.loss(real, decoded, log_sd)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned, missing = log_sd.detach().exp()[0][inner], sd[inner] > 0
    assert torch.allclose(learned[missing], 0.8 * sd[inner][missing], rtol=0.25)
    assert learned[~missing & (torch.arange(16) > 0)[:, None, None]].max() < 0.02  # grey itself is in the lowest
    features = features.clone().requires_grad_()
    grain.loss(real, decoded, grain.log_sd(features)).backward()
    assert features.grad is None and grain.strength[4].bias.grad.any()  # it teaches the decoder nothing


def test_texture_in_companded_grey_is_weaker_in_the_dark_and_white_is_bent():
    x = torch.linspace(-1, 1, 201)
    assert torch.allclose(expand(compand(x)), x, atol=1e-5) and compand(x[0]) == 0 and compand(x[-1]) == 2
    moved = expand(compand(x) + 0.01) - x
    assert (moved.diff() > 0).all() and 0 < moved[0] < 0.1 * moved[-1] and torch.equal(expand(torch.tensor(-0.1)), x[0])
    x = torch.linspace(-1.2, 1.5, 271, dtype=torch.float64)
    bent = bend_white(x)
    assert torch.equal(bent[x <= KNEE], x[x <= KNEE]) and bent.max() < 1
    slope = bent.diff() / x.diff()
    assert (slope > 0).all() and (slope.diff() < 1e-9).all() and slope[x[1:] < KNEE + 0.02].min() > 0.97  # no kink
    assert 238 < 127.5 * (1 + bend_white(torch.ones(()))) < 244


def test_grain_is_smooth_along_z():
    """White noise after a gaussian of sd s over z correlates by exp(-lag^2 / 4 s^2); its variance is 1 everywhere."""
    z, covariance = torch.arange(32), torch.cov(noise_of_slices(32, 48, 56).flatten(1))
    wanted = sum(torch.exp(-((z[:, None] - z) ** 2) / (4 * sd**2)) for sd in SMOOTHING) / len(SMOOTHING)
    assert torch.allclose(covariance, wanted, atol=0.1)  # at both ends too
