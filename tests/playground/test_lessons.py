"""Laws of the lessons of playground/: what each says is so, and its code by hand is what the project computes."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from model_diffusion import LatentDiffusion
from module import SelfAttention, norm
from parts.quantizer import FiniteScalarQuantizer
from playground import lesson_attention as attention
from playground import lesson_causality as causality
from playground import lesson_diffusion_2d as diffusion
from playground import lesson_kl as kl
from playground import lesson_normalisation as normalisation
from playground import lesson_straight_through as straight

LESSONS = [attention, causality, diffusion, kl, normalisation, straight]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: Path(lesson.__file__).stem)
def test_a_lesson_says_what_it_shows_and_draws_one_picture(lesson, run_main):
    """Of 836 pixels, which a page shows as it is."""
    more = ["--steps", 2] if lesson is diffusion else []
    more += ["--seed", 3] if lesson is not straight else []
    status, out, _ = run_main(lesson, *more, "--out", "lesson.png")
    assert status == 0 and len(out.splitlines()) > 3 and [str(path) for path in Path().iterdir()] == ["lesson.png"]
    assert Image.open("lesson.png").width == 836


# ------------------------------------------------------------------------------------------------------ normalisation


@pytest.fixture
def pictures():
    return 3 * torch.randn(normalisation.B, normalisation.C, normalisation.H, normalisation.W) + 5


def test_the_four_normalisations_are_those_of_torch_and_of_the_project(pictures):
    _, C, H, W = pictures.shape
    of_torch = {
        "batch": nn.BatchNorm2d(C),
        "layer": nn.LayerNorm((C, H, W)),
        "instance": nn.InstanceNorm2d(C),
        "group": nn.GroupNorm(normalisation.GROUPS, C),
    }
    for name, by_hand in normalisation.NORMALISATIONS.items():
        assert torch.allclose(by_hand(pictures), of_torch[name](pictures), atol=1e-5), name
    wide = torch.randn(2, 32, 3, 3)
    by_hand = normalisation.normalise(wide.unflatten(1, (norm(32).num_groups, -1)), (2, 3, 4))
    assert torch.allclose(by_hand.flatten(1, 2), norm(32)(wide), atol=1e-5) and norm(32).num_groups == 2


def test_one_mean_is_shared_along_the_axes_that_it_is_taken_over(pictures):
    (b, c), half = normalisation.FRAMED, normalisation.C // normalisation.GROUPS
    picture, channel = torch.meshgrid(torch.arange(normalisation.B), torch.arange(normalisation.C), indexing="ij")
    shared = {
        "batch": channel == c,
        "layer": picture == b,
        "instance": (picture == b) & (channel == c),
        "group": (picture == b) & (channel // half == c // half),
    }
    for name, f in normalisation.NORMALISATIONS.items():
        assert torch.equal(normalisation.shared_with(f, pictures), shared[name]), name


def test_a_normalisation_does_not_see_what_changes_all_numbers_of_a_mean_alike(pictures):
    """Only batch normalisation sees the neighbours; a channel by itself is lost to instance normalisation."""
    seen = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1]], dtype=torch.bool)
    effects = normalisation.effects(pictures)
    assert list(normalisation.NORMALISATIONS) == ["batch", "layer", "instance", "group"]
    assert (effects[seen] > 0.03).all() and (effects[~seen] < 1e-4).all()


# ---------------------------------------------------------------------------------------------------------- attention


def test_attention_by_hand_is_that_of_torch_and_of_the_project(awaken):
    q, k, v = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 7)
    assert torch.allclose(attention.attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    assert torch.allclose(attention.weights(q, k).sum(-1), torch.ones(2, 3, 10))
    layer, x = awaken(SelfAttention(64), 0.3), torch.randn(2, 64, 3, 5)
    assert layer.heads == 2 and torch.allclose(attention.by_hand(layer, x), layer(x), atol=1e-4)
    assert (layer(x) - x).abs().max() > 0.1


def test_shuffled_positions_give_the_shuffled_output_and_shuffled_keys_alone_change_nothing():
    q, k, v, order = torch.randn(9, 4), torch.randn(9, 4), torch.randn(9, 5), torch.randperm(9)
    out = attention.attention(q, k, v)
    assert torch.allclose(attention.attention(q[order], k[order], v[order]), out[order], atol=1e-6)
    assert torch.allclose(attention.attention(q, k[order], v[order]), out, atol=1e-6)
    assert not torch.allclose(attention.attention(q, k, v[order]), out, atol=1e-2)


def test_the_weights_of_patches_are_non_local_means():
    """exp(-|p_i - p_j|^2 / (2 h^2)) over its sum, and a position of a slice becomes nearer to the truth."""
    clean, side = attention.phantom_slice(), attention.PATCH
    x = clean + attention.NOISE * torch.randn_like(clean)
    (q, k), v = attention.patch_queries(x), x.view(-1, 1)
    p = F.pad(x, [side // 2] * 4, mode="replicate")[0, 0].unfold(0, side, 1).unfold(1, side, 1).reshape(-1, side**2)
    i, h2 = 1700, side**2 * attention.NOISE**2 / 2
    expected = (-(p - p[i]).square().sum(1) / (2 * h2)).softmax(0)
    assert torch.allclose(attention.weights(q[[i]], k)[0], expected, atol=1e-5)
    denoised = attention.attention(q, k, v).view_as(x)
    assert attention.error(denoised, clean) < 0.6 * attention.error(x, clean)
    assert attention.error(denoised, clean) < 0.9 * attention.error(F.avg_pool2d(x, 3, 1, 1), clean)


# ----------------------------------------------------------------------------------------------------------------- KL


def test_the_kl_of_the_vae_is_that_of_torch_and_of_samples():
    """All of 50 numbers within four standard errors, and two thirds within one."""
    mean, log_variance = 2 * torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64) - 1
    bits = kl.closed_form(mean, log_variance)
    q, p = torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0, 1)
    assert torch.allclose(bits, torch.distributions.kl_divergence(q, p) / math.log(2))
    ratios = kl.log_ratios(mean, log_variance, 10_000, torch.Generator().manual_seed(0))
    off = (ratios.mean(0) - bits).abs() / (ratios.std(0) / 100)
    assert off.max() < 4 and (off < 1).float().mean() == pytest.approx(0.68, abs=0.2)


def test_the_error_of_a_sampled_kl_falls_as_one_over_the_root_of_n():
    """With the sd of one sample, Var[log q - log p] = sum over numbers of (s^2 - 1)^2 / 2 + m^2 s^2, in nats."""
    mean, log_variance = torch.tensor([0.5, -1.0]), torch.tensor([0.2, -0.5])
    error, sd = kl.errors(mean, log_variance, torch.Generator().manual_seed(0))
    s2 = log_variance.exp()
    assert sd.item() == pytest.approx(((s2 - 1) ** 2 / 2 + mean**2 * s2).sum().sqrt().item() / math.log(2), rel=0.05)
    assert (error * torch.tensor(kl.COUNTS).sqrt()).tolist() == pytest.approx([sd.item()] * len(kl.COUNTS), rel=0.15)


# --------------------------------------------------------------------------------------------------- straight-through


def test_rounding_stops_the_gradient_and_straight_through_passes_it():
    """The same values; the project's quantiser of vectors does the same, to whichever code is nearest."""
    e = 4 * torch.rand(50) - 2
    for quantise in (straight.straight_through, straight.of_project(straight.whole_numbers())):
        assert torch.allclose(quantise(e), e.round(), atol=1e-6)
        assert torch.equal(straight.gradient(quantise, e), torch.ones(50))
    assert torch.equal(straight.gradient(torch.round, e), torch.zeros(50))


def test_the_finite_scalar_quantiser_passes_rounding_straight_through_and_nothing_else():
    """d atanh(sg-rounded tanh(e)) / de = (1 - tanh(e)^2) / (1 - rounded^2), which fades where tanh saturates."""
    e, quantise = torch.linspace(-4, 4, 50), straight.of_project(FiniteScalarQuantizer((5,)))
    slope = straight.gradient(quantise, e)
    assert torch.allclose(slope, (1 - e.tanh() ** 2) / (1 - quantise(e).tanh() ** 2), rtol=1e-3)
    assert slope[0] < 0.02 and slope[25] > 0.9


def test_a_number_learns_through_straight_through_and_stands_still_without():
    still, learned, of_project = map(
        straight.learn, (torch.round, straight.straight_through, straight.of_project(straight.whole_numbers()))
    )
    assert set(still) == {0.0} and learned[0] == 0 and learned[-1] == straight.TARGET
    assert of_project == pytest.approx(learned, abs=1e-5)
    assert all(a <= b for a, b in pairwise(learned))


# ---------------------------------------------------------------------------------------------------------- diffusion


def test_the_loss_and_the_guess_of_the_lesson_are_those_of_latent_diffusion():
    """Points are latents of two channels and one pixel, and the prior is N(0, 1), so x_0 = alpha x_t + sigma output."""
    network, model = diffusion.Network(), LatentDiffusion(latent_shape=(2, 1, 1), widths=(8,), blocks=1, drop_z=0.0)
    model.unet.forward = lambda x, guess, t, *_: (
        (network(x[..., 0, 0], t) - diffusion.ALPHA[t, None] * x[..., 0, 0]) / diffusion.SIGMA[t, None]
    ).float()[..., None, None]
    x0, noise, t = torch.randn(40, 2), torch.randn(40, 2), torch.randint(1000, (40,))
    latent, z = x0[..., None, None], torch.zeros(40, dtype=torch.long)
    expected = model(latent, z, t, noise[..., None, None])
    assert torch.allclose(diffusion.loss(network, x0, t, noise), expected, rtol=1e-3)
    of_model = model.denoise(latent, 500, z, slices=1)
    for a, b in zip(diffusion.denoise_by(network)(x0, 500), of_model, strict=True):
        assert torch.allclose(a.float(), b[..., 0, 0], atol=1e-4)


def test_the_loss_of_the_lesson_is_the_squared_error_of_v():
    network, x0, noise, t = diffusion.Network(), torch.randn(40, 2), torch.randn(40, 2), torch.randint(1000, (40,))
    alpha, sigma = diffusion.ALPHA[t, None], diffusion.SIGMA[t, None]
    x = alpha * x0 + sigma * noise
    error = (alpha * x - network(x.float(), t)) / sigma - (alpha * noise - sigma * x0)
    assert torch.allclose(diffusion.loss(network, x0, t, noise), error.square().mean(1).float(), rtol=1e-3)


def test_samples_are_far_nearer_to_the_data_than_noise_is():
    """After a short training; points of the data have distance 0, but for chance, and mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(0)
    real, noise = diffusion.moons(3000, generator), torch.randn(3000, 2, generator=generator)
    assert real.mean(0).abs().max() < 0.06 and real.std(0).tolist() == pytest.approx([1, 1], abs=0.04)
    denoise = diffusion.denoise_by(diffusion.train(400, generator, batch=256))
    samples = diffusion.sample("dpm", denoise, noise, 20)[-1]
    of_noise = diffusion.energy_distance(noise, real)
    assert abs(diffusion.energy_distance(diffusion.moons(3000, generator), real)) < of_noise / 10
    assert diffusion.energy_distance(samples, real) < of_noise / 4


def test_energy_distance_is_that_of_gaussians_in_closed_form():
    """In the plane, E|x - y| = sd sqrt(pi) for x, y ~ N(0, sd^2 I), and sqrt(pi / 2 (sd^2 + sd'^2)) for two sd."""
    x, y = torch.randn(4000, 2), 3 * torch.randn(4000, 2)
    expected = 2 * math.sqrt(math.pi / 2 * (1 + 9)) - math.sqrt(math.pi) * (1 + 3)
    assert diffusion.energy_distance(x, y) == pytest.approx(expected, rel=0.1)


def test_samplers_converge_to_the_covariance_of_gaussian_data_by_their_order():
    """With the exact guess; and M^T M is the covariance of samples, as many as there are."""
    error = {name: [diffusion.covariance_error(name, steps) for steps in (20, 40, 80)] for name in diffusion.STYLES}
    for name, errors in error.items():
        order = 1 if name == "ddim" else 2
        for coarse, fine in pairwise(errors):
            assert 0.8 * 2**order < coarse / fine < 3 * 2**order, (name, errors)
    assert error["ddim"][-1] < 0.1 and error["dpm"][-1] < 0.01 and error["heun"][-1] < 0.001
    drawn = diffusion.sample("heun", diffusion.denoise_gaussian, torch.randn(20_000, 2), 20)[-1]
    assert torch.allclose(drawn.T.cov(), diffusion.COVARIANCE, atol=0.06)


# ---------------------------------------------------------------------------------------------------------- causality


@pytest.mark.parametrize("position", [(0, 0), (0, 12), (5, 6), (8, 0), (8, 12)])
def test_the_past_is_seen_without_a_blind_spot_and_nothing_else(position):
    """By enough layers: 8 rows above and 12 columns to either side."""
    seen = causality.influence(causality.two_stacks(12), position) > 0
    assert torch.equal(seen, causality.earlier(position))


def test_fewer_layers_see_less_of_the_past_and_one_stack_has_a_blind_spot():
    """The stack of masked convolutions misses all that lies above and farther to the right than above."""
    (r, c), past = causality.FRAMED, causality.earlier(causality.FRAMED)
    maps = [causality.influence(causality.two_stacks(layers), causality.FRAMED) > 0 for layers in (1, 3, 6)]
    assert all((few <= more).all() and few.sum() < more.sum() for few, more in pairwise(maps))
    assert torch.equal(maps[-1], past) and maps[0][r, c - 1]
    row, column = torch.meshgrid(*map(torch.arange, causality.GRID), indexing="ij")
    blind = past & (column - c > r - row)
    assert blind.sum() > 10 and torch.equal(causality.influence(causality.one_stack(6), (r, c)) > 0, past & ~blind)


def test_the_measure_of_influence_finds_a_network_that_reads_the_answer():
    """Two layers that must not, but do see their centre."""
    leak = nn.Sequential(causality.MaskedConv(centre=True), nn.SiLU(), causality.MaskedConv(centre=True))
    assert causality.influence(leak, causality.FRAMED)[causality.FRAMED] > 0
