"""Laws of metrics.py: every score and interval against its definition."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

import util
from scores import metrics


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Pictures [B, 1, H, W] under a gaussian of sigma pixels."""
    return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, sigma, sigma)))


def test_brain_ssim_averages_exactly_the_masked_positions():
    """Position (i, j) of the map is pixel (i + 5, j + 5); a mask in the border, where no window fits, is left out."""
    x, x_hat = (torch.randint(0, 256, (3, 40, 44), dtype=torch.uint8) for _ in range(2))
    mask = torch.zeros(3, 40, 44, dtype=torch.uint8)
    mask[0, 7, 9], mask[0, 30, 38], mask[0, 2, 2], mask[0, 39, 20] = 85, 255, 255, 170
    mask[1, 5:35, 5:39] = 170
    scores = metrics.slice_scores(x_hat, x, mask)
    similarity = util.ssim_map(x_hat[:, None].double() / 255, x[:, None].double() / 255)[:, 0]
    assert torch.isclose(scores["brain_ssim"][0], (similarity[0, 2, 4] + similarity[0, 25, 33]) / 2)
    assert torch.isclose(scores["brain_ssim"][1], similarity[1].mean())
    assert torch.allclose(scores["ssim"], similarity.mean((1, 2)))
    assert scores["brain_ssim"][2].isnan() and scores["ssim"].dtype == torch.float64
    assert "brain_ssim" not in metrics.slice_scores(x_hat, x, None)


def test_psnr_and_decibel_by_hand():
    x = torch.full((2, 16, 16), 100, dtype=torch.uint8)
    x_hat = x.clone()
    x_hat[0] += 5
    x_hat[1, 0, 0] -= 64
    expected = [20 * math.log10(255 / 5), 20 * math.log10(255 / math.sqrt(64**2 / 256))]
    assert metrics.slice_scores(x_hat, x, None)["psnr"].tolist() == pytest.approx(expected)
    same = metrics.slice_scores(x, x, None)
    assert same["psnr"].tolist() == pytest.approx([100, 100]) and same["ssim"].tolist() == pytest.approx([1, 1])
    assert metrics.decibel(torch.tensor([1.0, 0.5, 0.0]), torch.ones(3)).tolist() == pytest.approx([0, -3.0103, -120])


def test_means_weigh_every_slice_alike_and_leave_out_those_without_brain():
    parts = [
        {"ssim": torch.tensor([1.0, 2.0, 3.0]), "brain_ssim": torch.tensor([1.0, math.nan, math.nan])},
        {"ssim": torch.tensor([10.0]), "brain_ssim": torch.tensor([4.0])},
    ]
    assert metrics.mean_scores(parts) == {"ssim": 4.0, "brain_ssim": 2.5}


def ms_ssim_by_hand(x: np.ndarray, y: np.ndarray, weights: list[float]) -> float:
    """From the formulas, with SciPy's gaussian: two pictures [H, W] in [0, 1]."""

    def blur(image):
        return gaussian_filter(image, 1.5, radius=5)[5:-5, 5:-5]

    product = 1
    for n, weight in enumerate(weights):
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
        term = (2 * cov + 0.03**2) / (var_x + var_y + 0.03**2)
        if n == len(weights) - 1:
            term = term * (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        product *= term.mean() ** weight
        x, y = ((p[::2, ::2] + p[1::2, ::2] + p[::2, 1::2] + p[1::2, 1::2]) / 4 for p in (x, y))
    return product


FIVE = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]


@pytest.mark.parametrize("size, weights", [(192, FIVE), (64, [w / 0.6305 for w in FIVE[:3]]), (16, [1.0])])
def test_ms_ssim_is_its_formula(size, weights):
    """Five scales where the window fits in five, else as many as do, with weights that sum to 1; one is plain SSIM."""
    x = blurred(torch.rand(2, 1, size, size, dtype=torch.float64), 2)
    y = 0.9 * x + 0.02 * torch.rand_like(x)
    expected = [ms_ssim_by_hand(a[0].numpy(), b[0].numpy(), weights) for a, b in zip(x, y)]
    assert metrics.ms_ssim(x, y).tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.allclose(metrics.ms_ssim(x, x), torch.ones(2, dtype=torch.float64))
    negative = metrics.ms_ssim(x, 1 - x)
    assert torch.isfinite(negative).all() and (negative >= 0).all()
    with pytest.raises(ValueError, match="11"):
        metrics.ms_ssim(x[..., :10], x[..., :10])


def test_noise_has_a_flat_spectrum_a_wave_lies_in_its_ring_and_blur_takes_the_high_ones():
    """12 waves in 64 pixels are 0.1875 cycles per pixel: ring 6 of 16. The constant lies in none."""
    noise = (128 + 30 * torch.randn(24, 64, 64)).round().clamp(0, 255).to(torch.uint8)
    power, variance = metrics.radial_spectrum(noise, bands=8), (noise.double() / 255).var().item()
    assert power.shape == (24, 8) and power.dtype == torch.float64
    assert power.mean(0).tolist() == pytest.approx([variance] * 8, rel=0.15)
    assert power.mean().item() == pytest.approx(variance, rel=0.05)
    grey = 100 + 50 * torch.sin(2 * math.pi * 12 * torch.arange(64) / 64)
    for wave in (grey.round().expand(64, 64), grey.round().expand(64, 64).T):
        power = metrics.radial_spectrum(wave.to(torch.uint8)[None])[0]
        assert power.argmax() == 6 and power[6] > 0.99 * power.sum()
    assert not metrics.radial_spectrum(torch.full((1, 64, 64), 77, dtype=torch.uint8)).gt(1e-20).any()
    noise = torch.rand(8, 1, 64, 64)
    greys = [(255 * x[:, 0]).round().to(torch.uint8) for x in (noise, blurred(noise, 1))]
    kept = metrics.radial_spectrum(greys[1]).mean(0) / metrics.radial_spectrum(greys[0]).mean(0)
    assert kept[0] > 0.9 and kept[12:].max() < 0.05 and (kept[:10].diff() < 0).all()


def test_adjacent_ssim_is_that_of_each_pair_of_neighbours():
    brains = torch.randint(256, (2, 32, 16, 16), dtype=torch.uint8)
    brains[1, 8] = brains[1, 7]
    scores = metrics.adjacent_ssim(brains)
    assert scores.shape == (2, 31) and scores.dtype == torch.float64
    for i, z in ((0, 0), (0, 30), (1, 7), (1, 12)):
        pair = metrics.slice_scores(brains[i, z : z + 1], brains[i, z + 1 : z + 2], None)["ssim"]
        assert scores[i, z].item() == pytest.approx(pair.item(), abs=1e-12)
    assert scores[1, 7].item() == pytest.approx(1) and scores[0].max() < 0.5
    assert torch.equal(metrics.adjacent_ssim(brains[1:])[0], scores[1])


def test_reslice_spectrum_keeps_all_power_and_finds_a_wave_at_its_frequency():
    """Parseval; white noise is flat; a brain without change has the constant alone; a ramp does not jump."""
    noise = torch.randint(256, (2, 32, 64, 64), dtype=torch.uint8)
    power, grey = metrics.reslice_spectrum(noise), noise.double() / 255
    assert power.shape == (2, 32) and power.dtype == torch.float64
    assert torch.allclose(power.sum(1), grey.square().mean((2, 3)).sum(1))
    assert torch.allclose(power[:, 1:], grey.var(1).mean((1, 2))[:, None].expand(2, 31), rtol=0.1)
    assert torch.allclose(power[:, 0], 32 * grey.mean(1).square().mean((1, 2)))
    same = metrics.reslice_spectrum(noise[:, :1].expand(2, 32, 64, 64))
    assert same[:, 0].min() > 1 and same[:, 1:].max() < 1e-10  # the cosines are float32
    z = torch.arange(32, dtype=torch.float64)
    for k in (1, 9, 31):  # k / 64 cycles per slice
        wave = 128 + 100 * torch.cos(math.pi * k * (2 * z + 1) / 64)
        power = metrics.reslice_spectrum(wave.round().to(torch.uint8)[None, :, None, None].expand(1, 32, 8, 8))[0]
        assert power[1:].argmax() + 1 == k and power[k] > 0.999 * power[1:].sum()
        assert power[k].item() == pytest.approx(16 * (100 / 255) ** 2, rel=0.01)
    ramp = metrics.reslice_spectrum((8 * z).to(torch.uint8)[None, :, None, None].expand(1, 32, 8, 8))[0]
    assert ramp[16:].sum() < 1e-4 * ramp[1:].sum()  # periodic continuation would leave a hundred times as much
    assert torch.equal(metrics.reslice_spectrum(noise[1:])[0], metrics.reslice_spectrum(noise)[1])


def test_the_interval_is_as_wide_as_the_standard_error_of_cases_not_of_slices():
    """1.96 sd / sqrt(cases) on either side. More slices that say the same, in any order, are no more observations."""
    for cases in (16, 64, 256):
        values, case = torch.randn(cases, dtype=torch.float64), torch.arange(cases)
        low, high = alone = metrics.bootstrap_interval(values, case)
        assert low < values.mean() < high
        assert (high - low) / 2 == pytest.approx(1.96 * values.std().item() / math.sqrt(cases), rel=0.2)
        assert metrics.bootstrap_interval(values.repeat(32), case.repeat(32)) == pytest.approx(alone)
        same = metrics.bootstrap_interval(values.repeat_interleave(32), case.repeat_interleave(32))
        assert same == pytest.approx(alone)


def test_the_interval_is_a_pure_function_and_knows_its_limits():
    """Seeded; slices without a score are left out, cases without any too; one case gives no interval."""
    values, case = torch.randn(40, dtype=torch.float64), torch.arange(40) // 4
    interval = metrics.bootstrap_interval(values, case)
    assert metrics.bootstrap_interval(values, case) == interval != metrics.bootstrap_interval(values, case, seed=1)
    holed = torch.cat([values, torch.full((4,), math.nan, dtype=torch.float64)])
    assert metrics.bootstrap_interval(holed, torch.cat([case, torch.full((4,), 99)])) == interval
    assert metrics.bootstrap_interval(values, torch.zeros(40, dtype=torch.int64)) is None
    summary = metrics.summarise({"a": holed, "b": torch.full((44,), math.nan)}, torch.arange(44))
    assert summary.keys() == {"a", "a_interval"} and summary["a"] == pytest.approx(values.mean().item())


def test_entropy_and_usage():
    """Uniform codes: log2 K bits, all in use, perplexity K; one code alone: nothing; a coin of 1 : 3 by hand."""
    uniform = np.arange(64).repeat(5).reshape(4, 80)
    assert metrics.entropy_bits(uniform) == pytest.approx(6)
    assert metrics.code_usage(uniform, 64) == pytest.approx({"usage": 1, "perplexity": 64})
    assert metrics.code_usage(uniform, 128) == pytest.approx({"usage": 0.5, "perplexity": 64})
    assert metrics.entropy_bits(np.full(10, 3)) == 0
    assert metrics.entropy_bits(np.array([0, 1, 1, 1])) == pytest.approx(0.25 * 2 - 0.75 * math.log2(0.75))


def test_noise_level_is_the_sd_of_noise_and_blind_to_ramps_and_black():
    ramp = (40 + torch.arange(128) + torch.arange(128)[:, None] / 2).expand(2, 128, 128)
    for sd in (2.0, 6.0):
        noisy = (ramp + sd * torch.randn(2, 128, 128)).round().to(torch.uint8)
        assert metrics.noise_level(noisy).tolist() == pytest.approx([sd] * 2, rel=0.05)
        noisy[:, :64] = 0  # black is no part of it
        assert metrics.noise_level(noisy).tolist() == pytest.approx([sd] * 2, rel=0.07)
    assert metrics.noise_level(ramp[:1].floor().to(torch.uint8))[0] < 0.5
    assert metrics.noise_level(torch.zeros(1, 64, 64, dtype=torch.uint8))[0] == 0


def test_random_features_are_fixed_and_follow_the_contrast():
    """Seeded, not from the global generator; twice the grey gives twice the activation, without bias."""
    pictures = torch.randint(0, 100, (2, 64, 64), dtype=torch.uint8)
    found = metrics.random_features(pictures)
    torch.rand(3)
    assert found.shape == (2, 64) and torch.equal(found, metrics.random_features(pictures))
    assert torch.allclose(metrics.random_features(2 * pictures), 2 * found, rtol=1e-4)
    assert not torch.allclose(metrics.random_features(pictures, seed=1), found)


def gaussian_sample(mean: Tensor, root: Tensor, count: int = 500) -> Tensor:
    """[count, D] whose mean is `mean` and whose covariance root @ root.T, both exactly."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T @ root.T + mean


def test_the_frechet_distance_of_known_gaussians_is_its_closed_form():
    """|m - n|^2 + sum (s - t)^2 for independent ones; SciPy's matrix root for others; 0 for the same; symmetric."""
    m, n = torch.tensor([1.0, 2, 3]).double(), torch.tensor([0.0, 2, 5]).double()
    s, t = torch.tensor([1.0, 2, 3]).double(), torch.tensor([2.0, 2, 0.5]).double()
    x, y = gaussian_sample(m, s.diag()), gaussian_sample(n, t.diag())
    assert metrics.frechet_distance(x, y) == pytest.approx(5 + 1 + 0 + 6.25)
    a, b = torch.randn(2, 3, 3, dtype=torch.float64)
    x, y = gaussian_sample(m, a), gaussian_sample(n, b)
    product = scipy.linalg.sqrtm((a @ a.T @ b @ b.T).numpy()).real
    expected = 5 + (a**2).sum().item() + (b**2).sum().item() - 2 * product.trace()
    assert metrics.frechet_distance(x, y) == pytest.approx(expected)
    assert metrics.frechet_distance(x, y) == pytest.approx(metrics.frechet_distance(y, x))
    assert metrics.frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-9)


def brains_of(count: int, own: float = 1.0, shift: float = 0.0) -> Tensor:
    """Features [count, 6, 5] of brains that each have a centre of their own."""
    return own * torch.randn(count, 1, 5) + 0.5 * torch.randn(count, 6, 5) + shift


def test_identical_sets_have_one_in_all_four_and_strangers_none():
    x = torch.randn(60, 1, 4)
    assert {name: value.mean().item() for name, value in metrics.manifold_scores(x, x).items()} == {
        "precision": 1, "density": 1, "recall": 1, "coverage": 1,
    }  # fmt: skip
    apart = metrics.manifold_scores(x, x + 100)
    assert not any(value.any() for value in apart.values())
    # neighbours are of other brains: slices that nearly repeat their own do not shrink the balls
    x, real = (torch.randn(40, 1, 3) + 0.01 * torch.randn(40, 8, 3) for _ in range(2))
    assert metrics.manifold_scores(x, real)["precision"].mean() > 0.45
    alone = metrics.manifold_scores(x.reshape(320, 1, 3), real.reshape(320, 1, 3))  # every slice taken for a brain
    assert alone["precision"].mean() < 0.1


def test_two_draws_have_density_one_and_coverage_near_its_expectation():
    """1 - 2^-5 (Naeem et al. 2020). What lacks half of the modes has precision but no recall."""
    x, real = torch.randn(2, 1200, 1, 2).unbind()
    scores = {name: value.mean().item() for name, value in metrics.manifold_scores(x, real).items()}
    assert scores["density"] == pytest.approx(1, abs=0.05)
    assert scores["coverage"] == pytest.approx(1 - 2**-5, abs=0.015)
    half = x[x[:, 0, 0] > 0]
    fewer = {name: value.mean().item() for name, value in metrics.manifold_scores(half, real).items()}
    assert fewer["precision"] > 0.95 and fewer["recall"] < 0.65 and fewer["coverage"] < 0.65


def test_wasserstein_is_that_of_scipy():
    x, y = torch.randn(17, 3), 2 * torch.randn(40, 3) + 1
    expected = [scipy.stats.wasserstein_distance(x[:, k], y[:, k]) for k in range(3)]
    assert metrics.wasserstein(x, y).tolist() == pytest.approx(expected)
    assert metrics.wasserstein(x, x.flip(0)).tolist() == pytest.approx([0, 0, 0])


def test_the_sliced_wasserstein_distance_of_less_contrast_is_known():
    """Gaussian noise at half its contrast: (1 - 1/2) sqrt(2 / pi) sd in every direction and at every level."""
    noise = 128 + 30 * torch.randn(2, 48, 64, 64)
    full, again = (metrics.patch_histograms(x.round().clamp(0, 255).to(torch.uint8)) for x in noise)
    half = metrics.patch_histograms((128 + (noise[0] - 128) / 2).round().to(torch.uint8))
    assert torch.allclose(full.sum(-1), torch.ones(3, 64)) and not metrics.sliced_wasserstein(full, full).any()
    expected = 1000 * 0.5 * math.sqrt(2 / math.pi)
    assert metrics.sliced_wasserstein(half, full)[:2].tolist() == pytest.approx([expected] * 2, rel=0.06)
    assert metrics.sliced_wasserstein(again, full)[0] < 60


def test_a_copy_is_found_though_shifted_brighter_and_at_the_next_z():
    """By any number of pixels up to two of 128, half a pixel of the thumbnail among them."""
    inside = F.pad(blurred(torch.rand(7 * 32, 1, 112, 112), 3), (8, 8, 8, 8))  # blobs, black at the border
    heads, brains = (255 * inside / inside.amax()).to(torch.uint8).view(7, 32, 128, 128).split([5, 2])
    reference = metrics.thumbnails(heads.flatten(0, 1)).view(5, 32, 64, 64)
    brains[1, 7] = heads[3, 8].roll((1, -2), (0, 1)) // 2 + 40
    brains[0] = heads[2]
    near = metrics.nearest(brains, reference)
    assert near["relative"][1, 7] < 0.2 and near["relative"][1, 8:].min() > 0.6
    assert (near["brain"][1, 7], near["z"][1, 7]) == (3, 8)
    assert near["brain_relative"][0] < 1e-2 and near["brain_relative"][1] > 0.6 and near["nearest_brain"][0] == 2
    assert torch.equal(near["z"][0], torch.arange(32)) and (near["brain"][0] == 2).all()
    direct = 1 - np.corrcoef(metrics.thumbnails(brains[1, 9:10]).flatten(), reference[0, 9].flatten())[0, 1]
    assert near["distance"][1, 9].item() <= math.sqrt(2 * direct) + 1e-5


def test_thumbnails_are_means_over_squares():
    pictures = torch.randint(256, (2, 128, 128), dtype=torch.uint8)
    expected = pictures.view(2, 64, 2, 64, 2).double().mean((2, 4)).round()
    assert torch.equal(metrics.thumbnails(pictures).double(), expected)
    assert torch.equal(metrics.thumbnails(pictures[:, :32, :32]), pictures[:, :32, :32])


def test_diversity_compares_different_brains_at_one_z():
    brains = torch.randint(256, (3, 8, 32, 32), dtype=torch.uint8)
    found = metrics.diversity(brains)
    assert found.shape == (3, 2) and found.dtype == torch.float64
    slices = brains.double() / 255
    assert torch.allclose(found[:, 0], metrics.ms_ssim(slices[:, 2, None], slices[[1, 2, 0], 2, None]))
    assert torch.allclose(found[:, 1], metrics.ms_ssim(slices[:, 6, None], slices[[2, 0, 1], 6, None]))
    assert torch.allclose(metrics.diversity(brains[:1].expand(3, -1, -1, -1)), torch.ones(3, 2, dtype=torch.float64))


def test_the_centred_interval_is_that_of_a_mean_and_holds_a_biased_distance():
    values = torch.randn(60, dtype=torch.float64)
    low, high = metrics.centred_interval(lambda i: float(values[i].mean()), 60, resamples=1000, least=-math.inf)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std().item() / math.sqrt(60), rel=0.15)
    x, y = brains_of(12), brains_of(200).flatten(0, 1)
    distance = metrics.frechet_distance(x.flatten(0, 1), y)
    low, high = metrics.centred_interval(lambda i: metrics.frechet_distance(x[i].flatten(0, 1), y), 12)
    assert 0 <= low < distance < high
    assert metrics.centred_interval(lambda i: 1.0, 1) is None
