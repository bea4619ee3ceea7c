"""Laws of texture.py: what a picture is before training, what it depends on, and the noise along z."""

import pytest
import torch

from parts.texture import SMOOTHING, Texture, noise_of_slices


@pytest.fixture
def given() -> list[torch.Tensor]:
    """Two slices of 24x28 pixels: faithful pictures, features at a quarter of the side, noise, z."""
    faithful, white = torch.rand(2, 1, 24, 28) * 2 - 1, torch.randn(2, 1, 24, 28)
    return [faithful, torch.randn(2, 8, 6, 7), white, torch.tensor([3, 28])]


def test_before_training_a_picture_comes_out_as_it_went_in(given):
    """And the layer that makes it so can learn."""
    texture = Texture(8)
    drawn = texture(*given)
    assert torch.equal(drawn, given[0]) and drawn.dtype == torch.float32
    drawn.square().sum().backward()
    assert texture.out[2].weight.grad.any()


def test_a_picture_depends_on_all_that_is_given(given, awaken):
    texture = awaken(Texture(8)).eval()
    drawn = texture(*given)
    for place, other in enumerate((given[0].flip(0), given[1].flip(0), torch.randn(2, 1, 24, 28), given[3].flip(0))):
        changed = [*given[:place], other, *given[place + 1 :]]
        assert (texture(*changed) - drawn).abs().mean() > 1e-4, place
    assert torch.equal(texture(*given), drawn)


def test_it_teaches_the_features_nothing(given, awaken):
    texture, leaves = awaken(Texture(8)), [tensor.requires_grad_() for tensor in given[:3]]
    texture(*given).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, False, True]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in texture.parameters())


def test_slices_of_a_batch_do_not_see_each_other(given, awaken):
    texture = awaken(Texture(8)).train()
    alone = texture(*(part[1:] for part in given))
    assert torch.allclose(texture(*given)[1:], alone, atol=1e-5)


@pytest.mark.parametrize("size, grid", [((26, 30), (13, 15)), ((22, 28), (3, 7)), ((20, 20), (20, 20))])
def test_sizes_need_only_be_even_and_features_may_have_any(size, grid, awaken):
    faithful, white = torch.zeros(1, 1, *size), torch.randn(1, 1, *size)
    drawn = awaken(Texture(4))(faithful, torch.randn(1, 4, *grid), white, torch.tensor([0]))
    assert drawn.shape == faithful.shape and drawn.isfinite().all()


def test_noise_is_smooth_along_z_and_white_within_a_slice():
    """After a gaussian of sd s over z it correlates by exp(-lag^2 / 4 s^2); its variance is 1, at both ends too."""
    noise = noise_of_slices(32, 48, 56, torch.Generator().manual_seed(0))
    z, covariance = torch.arange(32), torch.cov(noise.flatten(1))
    wanted = sum(torch.exp(-((z[:, None] - z) ** 2) / (4 * sd**2)) for sd in SMOOTHING) / len(SMOOTHING)
    assert torch.allclose(covariance, wanted, atol=0.1)
    for axis in (-1, -2):
        assert (noise.diff(dim=axis).square().mean() - 2).abs() < 0.1  # neighbours know nothing of each other


def test_noise_is_that_of_its_generator():
    first, again, other = (noise_of_slices(5, 8, 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (5, 1, 8, 8) and torch.equal(first, again) and not torch.equal(first, other)
