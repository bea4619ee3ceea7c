"""Laws of grain.py: the cosine transform, what the field learns and draws, and how it changes along z."""

import torch

from grain import Grain, cosine_transform, noise_of_slices


def test_the_cosine_transform_is_orthonormal_and_sorts_by_frequency():
    basis = cosine_transform(8)
    assert torch.allclose(basis @ basis.T, torch.eye(64), atol=1e-5)
    rows = basis[:8].view(8, 8, 8)  # no change from row to row, more and more along them
    assert torch.allclose(rows, rows[:, :1], atol=1e-6)
    assert torch.equal((rows[:, 0].sign().diff(dim=1) != 0).sum(1), torch.arange(8))
    down, along = torch.arange(8.0).repeat_interleave(8), torch.arange(8.0).repeat(8)  # blocks are in reading order
    assert (basis @ down)[1:8].abs().max() < 1e-4 < (basis @ along)[1].abs()


def test_grain_learns_what_is_missing_block_by_block_and_frequency_by_frequency():
    """Of what the faithful picture misses, less what the decoder adds by itself; nothing where nothing is missed."""
    torch.manual_seed(0)
    grain, sd = Grain(4, 4), torch.zeros(16, 2, 3)
    sd[3, 0], sd[7, 1], sd[9, :, 2] = 0.2, 0.05, 0.1
    features = torch.randn(1, 4, 2, 3).expand(64, -1, -1, -1)

    def field(sd: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        noise = torch.randn(64, 1, 8, 12) if noise is None else noise
        return grain.draw(noise, sd.clamp(min=1e-9).log().expand(64, -1, -1, -1))

    measured = torch.einsum("kj,bjhw->bkhw", grain.basis, torch.nn.functional.pixel_unshuffle(field(sd), 4)).std(0)
    assert torch.allclose(measured, sd, atol=0.05) and (measured[sd == 0] < 1e-6).all()  # what is drawn has this sd
    log_sd = torch.full((1, 16, 2, 3), -2.0, requires_grad=True)
    optimizer, added = torch.optim.Adam([log_sd], lr=0.05), field(0.6 * sd, torch.ones(64, 1, 8, 12))
    for _ in range(400):
        loss = grain.loss(field(sd), added, log_sd)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = log_sd.detach().exp()[0]
    assert torch.allclose(learned[sd > 0], 0.8 * sd[sd > 0], rtol=0.2)  # 0.6^2 + 0.8^2 = 1
    assert learned[sd == 0].max() < 0.01
    features = features.clone().requires_grad_()
    grain.loss(field(sd), added, grain.log_sd(features)).backward()
    assert features.grad is None and grain.head[4].bias.grad.any()  # it teaches the decoder nothing


def test_grain_is_smooth_along_z():
    """White noise after a gaussian of sd 1 over z correlates by exp(-lag^2 / 4); in every slice its variance is 1."""
    z, covariance = torch.arange(32), torch.cov(noise_of_slices(32, 48, 56).flatten(1))
    assert torch.allclose(covariance, torch.exp(-((z[:, None] - z) ** 2) / 4), atol=0.1)  # at both ends too
