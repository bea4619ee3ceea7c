"""Laws of evaluate.py: every score, price and interval against its definition; what the command prints and writes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

import dataset
import evaluate
import util
from evaluate import (
    adjacent_ssim,
    all_scores,
    bootstrap_interval,
    brain_positions,
    code_statistics,
    code_usage,
    entropy_bits,
    latent_statistics,
    ledger,
    mean_scores,
    ms_ssim,
    radial_spectrum,
    reslice_spectrum,
    score_codec,
    score_reconstruction,
    slice_scores,
    summarise,
    table,
)
from model_VAE import VAE, VQVAE, VQVAE2, save_second_stage
from pixelCNN import PixelCNN, PixelCNN2
from quantizer import digits_of

CPU = torch.device("cpu")


@pytest.fixture
def validate(phantom_folder, tmp_path, monkeypatch) -> dataset.Slices:
    """Eight slices of one head at 64 px, with masks."""
    monkeypatch.chdir(tmp_path)
    data = dataset.load_slices(phantom_folder, "validate", 64, masks=True)
    data.images, data.masks, data.z, data.case = (part[::4] for part in (data.images, data.masks, data.z, data.case))
    return data


def started(model, data: dataset.Slices):
    """The model as training starts it."""
    x, z, _ = data.batch(torch.arange(len(data)))
    model.start(x, z)
    return model.eval()


def vqvae(sizes: dict, data: dataset.Slices, codes: int = 16) -> VQVAE:
    return started(VQVAE(**sizes, codebook_size=codes), data)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Pictures [B, 1, H, W] under a gaussian of sigma pixels."""
    return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, sigma, sigma)))


# ------------------------------------------------------------------------------------------------------------ metrics


def test_brain_ssim_averages_exactly_the_masked_positions():
    """Position (i, j) of the map is pixel (i + 5, j + 5); a mask in the border, where no window fits, is left out."""
    x, x_hat = (torch.randint(0, 256, (3, 40, 44), dtype=torch.uint8) for _ in range(2))
    mask = torch.zeros(3, 40, 44, dtype=torch.uint8)
    mask[0, 7, 9], mask[0, 30, 38], mask[0, 2, 2], mask[0, 39, 20] = 85, 255, 255, 170
    mask[1, 5:35, 5:39] = 170
    scores = slice_scores(x_hat, x, mask)
    similarity = util.ssim_map(x_hat[:, None].double() / 255, x[:, None].double() / 255)[:, 0]
    assert torch.isclose(scores["brain_ssim"][0], (similarity[0, 2, 4] + similarity[0, 25, 33]) / 2)
    assert torch.isclose(scores["brain_ssim"][1], similarity[1].mean())
    assert torch.allclose(scores["ssim"], similarity.mean((1, 2)))
    assert scores["brain_ssim"][2].isnan() and scores["ssim"].dtype == torch.float64
    assert "brain_ssim" not in slice_scores(x_hat, x, None)


def test_psnr_by_hand():
    x = torch.full((2, 16, 16), 100, dtype=torch.uint8)
    x_hat = x.clone()
    x_hat[0] += 5
    x_hat[1, 0, 0] -= 64
    expected = [20 * math.log10(255 / 5), 20 * math.log10(255 / math.sqrt(64**2 / 256))]
    assert slice_scores(x_hat, x, None)["psnr"].tolist() == pytest.approx(expected)
    assert slice_scores(x, x, None)["psnr"].tolist() == [100, 100]
    assert slice_scores(x, x, None)["ssim"].tolist() == pytest.approx([1, 1])


def test_means_weigh_every_slice_alike_and_leave_out_those_without_brain():
    parts = [
        {"ssim": torch.tensor([1.0, 2.0, 3.0]), "brain_ssim": torch.tensor([1.0, math.nan, math.nan])},
        {"ssim": torch.tensor([10.0]), "brain_ssim": torch.tensor([4.0])},
    ]
    assert mean_scores(parts) == {"ssim": 4.0, "brain_ssim": 2.5}


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


@pytest.mark.parametrize(
    "size, weights",
    [
        (192, [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]),
        (64, [w / 0.6305 for w in (0.0448, 0.2856, 0.3001)]),
        (16, [1.0]),
    ],
)
def test_ms_ssim_is_its_formula(size, weights):
    """Five scales where the window fits in five, else as many as do, with weights that sum to 1; one is plain SSIM."""
    x = blurred(torch.rand(2, 1, size, size, dtype=torch.float64), 2)
    y = 0.9 * x + 0.02 * torch.rand_like(x)
    expected = [ms_ssim_by_hand(a[0].numpy(), b[0].numpy(), weights) for a, b in zip(x, y)]
    assert ms_ssim(x, y).tolist() == pytest.approx(expected, abs=1e-9)
    if size == 16:
        assert torch.allclose(ms_ssim(x, y), util.ssim_map(x, y).mean((1, 2, 3)))


def test_ms_ssim_is_1_for_identical_pictures_and_falls_with_blur():
    x = blurred(torch.rand(3, 1, 64, 64, dtype=torch.float64), 1)
    assert torch.allclose(ms_ssim(x, x), torch.ones(3, dtype=torch.float64))
    scores = torch.stack([ms_ssim(x, blurred(x, sigma)) for sigma in (0.5, 1, 2, 4)])
    assert (scores[0] < 1).all() and (scores.diff(dim=0) < 0).all() and (scores > 0).all()
    assert torch.allclose(ms_ssim(x, blurred(x, 1)), ms_ssim(blurred(x, 1), x))
    negative = ms_ssim(x, 1 - x)
    assert torch.isfinite(negative).all() and (negative >= 0).all()
    with pytest.raises(ValueError, match="11"):
        ms_ssim(x[..., :10], x[..., :10])


def test_white_noise_has_a_flat_spectrum_at_its_variance():
    noise = (128 + 30 * torch.randn(24, 64, 64)).round().clamp(0, 255).to(torch.uint8)
    power = radial_spectrum(noise, bands=8)
    assert power.shape == (24, 8) and power.dtype == torch.float64
    variance = (noise.double() / 255).var().item()
    assert power.mean(0).tolist() == pytest.approx([variance] * 8, rel=0.15)
    assert power.mean().item() == pytest.approx(variance, rel=0.05)


def test_a_wave_lies_in_its_ring_and_blur_takes_the_high_ones():
    """12 waves in 64 pixels are 0.1875 cycles per pixel: ring 6 of 16. The constant lies in none."""
    grey = 100 + 50 * torch.sin(2 * math.pi * 12 * torch.arange(64) / 64)
    for wave in (grey.round().expand(64, 64), grey.round().expand(64, 64).T):
        power = radial_spectrum(wave.to(torch.uint8)[None])[0]
        assert power.argmax() == 6 and power[6] > 0.99 * power.sum()
    assert not radial_spectrum(torch.full((1, 64, 64), 77, dtype=torch.uint8)).gt(1e-20).any()
    noise = torch.rand(8, 1, 64, 64)
    sharp, soft = (radial_spectrum((255 * x[:, 0]).round().to(torch.uint8)).mean(0) for x in (noise, blurred(noise, 1)))
    kept = soft / sharp
    assert kept[0] > 0.9 and kept[12:].max() < 0.05 and (kept[:10].diff() < 0).all()


# ---------------------------------------------------------------------------------------------------------- intervals


def test_adjacent_ssim_is_that_of_each_pair_of_neighbours():
    """As slice_scores of the two slices; 1 where they are equal; brains do not mix."""
    brains = torch.randint(256, (2, 32, 16, 16), dtype=torch.uint8)
    brains[1, 8] = brains[1, 7]
    scores = adjacent_ssim(brains)
    assert scores.shape == (2, 31) and scores.dtype == torch.float64
    for i, z in ((0, 0), (0, 30), (1, 7), (1, 12)):
        pair = slice_scores(brains[i, z : z + 1], brains[i, z + 1 : z + 2], None)["ssim"]
        assert scores[i, z].item() == pytest.approx(pair.item(), abs=1e-12)
    assert scores[1, 7].item() == pytest.approx(1) and scores[0].max() < 0.5
    assert torch.equal(adjacent_ssim(brains[1:])[0], scores[1])


def test_reslice_spectrum_keeps_all_power_and_finds_a_wave_at_its_frequency():
    """Parseval; white noise is flat; a brain without change has the constant alone; a ramp does not jump."""
    noise = torch.randint(256, (2, 32, 64, 64), dtype=torch.uint8)
    power, grey = reslice_spectrum(noise), noise.double() / 255
    assert power.shape == (2, 32) and power.dtype == torch.float64
    assert torch.allclose(power.sum(1), grey.square().mean((2, 3)).sum(1))
    assert torch.allclose(power[:, 1:], grey.var(1).mean((1, 2))[:, None].expand(2, 31), rtol=0.1)
    assert torch.allclose(power[:, 0], 32 * grey.mean(1).square().mean((1, 2)))
    still = reslice_spectrum(noise[:, :1].expand(2, 32, 64, 64))
    assert still[:, 0].min() > 1 and still[:, 1:].max() < 1e-20
    z = torch.arange(32, dtype=torch.float64)
    for k in (1, 9, 31):  # k / 64 cycles per slice
        wave = 128 + 100 * torch.cos(math.pi * k * (2 * z + 1) / 64)
        power = reslice_spectrum(wave.round().to(torch.uint8)[None, :, None, None].expand(1, 32, 8, 8))[0]
        assert power[1:].argmax() + 1 == k and power[k] > 0.999 * power[1:].sum()
        assert power[k].item() == pytest.approx(16 * (100 / 255) ** 2, rel=0.01)
    ramp = reslice_spectrum((8 * z).to(torch.uint8)[None, :, None, None].expand(1, 32, 8, 8))[0]
    assert ramp[16:].sum() < 1e-4 * ramp[1:].sum()  # periodic continuation would leave a hundred times as much
    assert torch.equal(reslice_spectrum(noise[1:])[0], reslice_spectrum(noise)[1])


def test_the_interval_holds_the_mean_and_shrinks_with_more_cases():
    """As the standard error of the mean of cases: 1.96 sd / sqrt(cases) on either side."""
    widths = []
    for cases in (16, 64, 256):
        values = torch.randn(cases, dtype=torch.float64)
        low, high = bootstrap_interval(values, torch.arange(cases))
        assert low < values.mean() < high
        assert (high - low) / 2 == pytest.approx(1.96 * values.std().item() / math.sqrt(cases), rel=0.2)
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]


def test_the_interval_resamples_cases_not_slices():
    """More slices that say the same are no more observations; nor does the order of the slices matter."""
    values, case = torch.randn(20, dtype=torch.float64), torch.arange(20)
    alone = bootstrap_interval(values, case)
    assert bootstrap_interval(values.repeat_interleave(32), case.repeat_interleave(32)) == pytest.approx(alone)
    assert bootstrap_interval(values.repeat(32), case.repeat(32)) == pytest.approx(alone)
    taken_for_cases = bootstrap_interval(values.repeat(32), torch.arange(640))
    assert taken_for_cases[1] - taken_for_cases[0] < 0.4 * (alone[1] - alone[0])


def test_the_interval_is_a_pure_function_and_knows_its_limits():
    """Seeded; slices without a score are left out, cases without any too; one case gives no interval."""
    values, case = torch.randn(40, dtype=torch.float64), torch.arange(40) // 4
    assert bootstrap_interval(values, case) == bootstrap_interval(values, case)
    assert bootstrap_interval(values, case) != bootstrap_interval(values, case, seed=1)
    holed = torch.cat([values, torch.full((4,), math.nan, dtype=torch.float64)])
    assert bootstrap_interval(holed, torch.cat([case, torch.full((4,), 99)])) == bootstrap_interval(values, case)
    assert bootstrap_interval(values, torch.zeros(40, dtype=torch.int64)) is None
    summary = summarise({"a": holed, "b": torch.full((44,), math.nan)}, torch.arange(44))
    assert summary.keys() == {"a", "a_interval"} and summary["a"] == pytest.approx(values.mean().item())


def test_a_codec_is_scored_over_all_slices(validate):
    """A codec that changes nothing is perfect; another has the means of its scores."""
    validate.case = torch.arange(8) // 2
    assert score_codec(validate, "copy", lambda real: real)["ms_ssim"] == pytest.approx(1)
    row = score_codec(validate, "dim", lambda real: real // 2)
    direct = all_scores(validate.images // 2, validate.images, validate.masks)
    for name in ("ssim", "brain_ssim", "ms_ssim", "psnr"):
        assert row[name] == pytest.approx(direct[name].mean().item())
        assert row[f"{name}_interval"][0] <= row[name] <= row[f"{name}_interval"][1]


# -------------------------------------------------------------------------------------------------- codes and latents


def test_entropy_and_usage():
    """Uniform codes: log2 K bits, all in use, perplexity K; one code alone: nothing; a coin of 1 : 3 by hand."""
    uniform = np.arange(64).repeat(5).reshape(4, 80)
    assert entropy_bits(uniform) == pytest.approx(6)
    assert code_usage(uniform, 64) == pytest.approx({"usage": 1, "perplexity": 64})
    assert code_usage(uniform, 128) == pytest.approx({"usage": 0.5, "perplexity": 64})
    assert entropy_bits(np.full(10, 3)) == 0
    assert entropy_bits(np.array([0, 1, 1, 1])) == pytest.approx(0.25 * 2 - 0.75 * math.log2(0.75))


def test_brain_positions_are_the_blocks_that_hold_brain(tiny_sizes):
    """By brute force, block by block of the box."""
    model = VQVAE(**tiny_sizes, codebook_size=8)
    masks = ((torch.rand(2, 64, 64) < 0.05) * 85).to(torch.uint8)
    found = brain_positions(masks, model)
    for b in range(2):
        for i in range(12):
            for j in range(14):
                block = masks[b, 8 + 4 * i : 12 + 4 * i, 4 + 4 * j : 8 + 4 * j]
                assert found[b, i, j] == block.any()
    assert 0 < found.float().mean() < 1
    coarse = brain_positions(masks, model, (6, 7))
    assert torch.equal(coarse, found.view(2, 6, 2, 7, 2).any(4).any(2))


def test_huge_codebooks_are_priced_by_the_channels_of_their_product_code():
    """61 bits a code: nothing of the codebook's size is made; the entropy is the sum of that of the digits."""
    levels = [2, 2**20, 2**40]
    digits = [np.random.default_rng(n).integers(0, high, (6, 4, 4)) for n, high in enumerate((2, 3, 5))]
    idx = digits[0] + 2 * digits[1] + 2**21 * digits[2]
    assert all((a == b).all() for a, b in zip(digits_of(idx, levels), digits, strict=True))
    result = code_statistics(idx, 2**61, levels, np.ones((6, 4, 4), bool))
    assert result["entropy_bits"] == pytest.approx(16 * sum(entropy_bits(digit) for digit in digits))
    assert result.keys() == {"grid", "codebook_size", "entropy_bits"}
    assert code_statistics(idx % 8, 8, [2, 4])["entropy_bits"] == pytest.approx(16 * entropy_bits(idx % 8))


def test_noise_share_and_active_channels_of_a_known_posterior():
    """Means of variance 4, 0.04 and 0.0025, noise of variance 1, 0.01 and 1: shares 1/5, 1/5 and nearly all."""
    mean = torch.randn(400, 3, 10, 10, dtype=torch.float64) * torch.tensor([2, 0.2, 0.05])[:, None, None] + 3
    variance = torch.tensor([1, 0.01, 1], dtype=torch.float64).expand(400, 3)
    result = latent_statistics(mean.mean((2, 3)), mean.square().mean((2, 3)), variance)
    assert result["noise_share_per_channel"] == pytest.approx([0.2, 0.2, 1 / 1.0025], abs=0.005)
    assert result["noise_share"] == pytest.approx(np.mean(result["noise_share_per_channel"]))
    assert result["active_channels"] == 2


# ------------------------------------------------------------------------------------------------------ a first stage


def test_scores_of_a_vqvae_and_its_price(tiny_sizes, validate):
    """The batch size changes nothing; bits are those of the grid; the entropy is of the codes actually sent."""
    model = vqvae(tiny_sizes, validate)
    validate.case = torch.arange(8) // 2
    result, again = (score_reconstruction(model, validate, CPU, batch_size) for batch_size in (3, 32))
    assert result.keys() == again.keys() and result["ssim"] == pytest.approx(again["ssim"], abs=1e-6)
    x, z, _ = validate.batch(torch.arange(8))
    idx = model.encode_indices(x, z)
    decoded = dataset.to_uint8(model.decode_indices(idx, z))[:, 0]
    direct = all_scores(decoded, validate.images, validate.masks)
    for name in ("ssim", "brain_ssim", "ms_ssim", "psnr"):
        assert result[name] == pytest.approx(direct[name].mean().item(), abs=1e-5)
        assert result[f"{name}_interval"] == pytest.approx(bootstrap_interval(direct[name], validate.case), abs=1e-5)
    for name in ("ssim", "brain_ssim"):
        expected = dict(zip(range(0, 32, 4), direct[name].tolist()))
        assert result[f"{name}_per_z"] == pytest.approx(expected, abs=1e-6)
    power = [radial_spectrum(pictures).sum(0) for pictures in (decoded, validate.images)]
    assert result["spectrum"]["power_ratio"] == pytest.approx((power[0] / power[1]).tolist(), rel=1e-4)
    assert result["spectrum"]["frequency"][12] == 12.5 / 32
    assert result["fixed_bits"] == 12 * 14 * 4 and result["grid"] == [12, 14] and result["numbers"] == 4 * 12 * 14
    assert result["entropy_bits"] == pytest.approx(12 * 14 * entropy_bits(idx.numpy()))
    assert result["entropy_bits"] <= result["fixed_bits"] and result["usage"] == len(idx.unique()) / 16
    on_brain = idx[brain_positions(validate.masks, model)]
    assert result["brain_usage"] == len(on_brain.unique()) / 16 <= result["usage"]


def test_the_price_of_a_vae_is_its_kl(tiny_sizes, validate, awaken, monkeypatch):
    """And its noise that of the posterior, here one of mean variance 4 and noise variance 1."""
    model = awaken(VAE(**tiny_sizes)).eval()
    result = score_reconstruction(model, validate, CPU, batch_size=3)
    x, z, _ = validate.batch(torch.arange(8))
    assert result["kl_bits"] == pytest.approx(model(x, z)[1]["kl"].item(), rel=1e-4) and "fixed_bits" not in result
    mean, log_variance = model.posterior(x, z)
    variance = log_variance.exp().mean((0, 2, 3))
    expected = variance / (mean.var((0, 2, 3), unbiased=False) + variance)
    assert result["noise_share_per_channel"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert 0 <= result["active_channels"] <= 4
    known = 2 * torch.randn(8, 4, 12, 14)
    monkeypatch.setattr(model, "posterior", lambda x, z: (known[: len(x)], torch.zeros(len(x), 4, 12, 14)))
    assert score_reconstruction(model, validate, CPU)["noise_share"] == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("kind", [VAE, VQVAE])
def test_the_decoder_is_told_a_wrong_z_and_the_encoder_its_own(kind, tiny_sizes, validate, monkeypatch):
    """The wrong ones are a permutation of all slices' z, across batches, the same at every batch size."""
    model = kind(**tiny_sizes, **({"codebook_size": 16} if kind is VQVAE else {})).eval()
    model = started(model, validate)
    names = ("encode_indices", "decode_indices") if kind is VQVAE else ("encode", "decode")
    told = {name: [] for name in names}

    def watch(name, original):
        monkeypatch.setattr(model, name, lambda latent, z: (told[name].append(z), original(latent, z))[1])

    for name in names:
        watch(name, getattr(model, name))
    results = [score_reconstruction(model, validate, CPU, batch_size) for batch_size in (8, 8, 3)]
    assert torch.equal(told[names[0]][0], validate.z)
    own, wrong = told[names[1]][:2]
    assert torch.equal(own, validate.z) and torch.equal(wrong.sort().values, own)
    assert (wrong != own).float().mean() > 0.5
    assert torch.equal(torch.cat(told[names[1]][4:][1::2]), wrong)
    assert results[0]["ssim_shuffled_z"] == results[1]["ssim_shuffled_z"]
    assert results[0]["ssim_shuffled_z"] == pytest.approx(results[2]["ssim_shuffled_z"], abs=1e-5)


def test_a_decoder_that_needs_z_is_found_out(tiny_sizes, validate, monkeypatch):
    """One that draws a stripe at row z matches the real stripes at the right z alone."""
    model = started(VAE(**tiny_sizes), validate)
    validate.images = torch.zeros(8, 64, 64, dtype=torch.uint8)
    validate.images[torch.arange(8), validate.z] = 200

    def stripes(latent, z):
        x = -torch.ones(len(z), 1, 64, 64)
        x[torch.arange(len(z)), :, z] = 200 / 127.5 - 1
        return x

    monkeypatch.setattr(model, "decode", stripes)
    result = score_reconstruction(model, validate, CPU)
    assert result["ssim"] == pytest.approx(1) and result["ssim_shuffled_z"] < 0.9


def test_codes_of_two_levels_are_priced_one_by_one(tiny_sizes, validate):
    """Grids of 6x7 above 12x14: each with its own use, their bits in sum; no single grid for k-means to match."""
    model = started(VQVAE2(**tiny_sizes, codebook_size=16), validate)
    prior = PixelCNN2(grids=model.grids, codebook_size=16, channels=16, layers=1).eval()
    result = score_reconstruction(model, validate, CPU, batch_size=3, prior=prior)
    x, z, _ = validate.batch(torch.arange(8))
    assert result["prior_bits"] == pytest.approx(prior.bits(model.encode_indices(x, z), z).mean().item(), rel=1e-3)
    for idx, level, grid in zip(model.encode_indices(x, z), result["levels"], ([6, 7], [12, 14]), strict=True):
        assert level["grid"] == grid and level["usage"] == len(idx.unique()) / 16
        assert level["entropy_bits"] == pytest.approx(idx[0].numel() * entropy_bits(idx.numpy()))
        assert 0 < level["brain_perplexity"] <= 16
    assert result["fixed_bits"] == 4 * (42 + 168) and "codebook_size" not in result and "usage" not in result
    assert result["entropy_bits"] == sum(level["entropy_bits"] for level in result["levels"]) <= result["fixed_bits"]
    assert "6x7" in ledger(result) and "12x14" in ledger(result)


def test_a_product_code_too_large_to_count_still_has_a_price(tiny_sizes, validate):
    model = started(VQVAE(**tiny_sizes, quantizer="fsq", levels=(64, 64, 64, 64)), validate)
    result = score_reconstruction(model, validate, CPU)
    assert result["fixed_bits"] == 12 * 14 * 24 and "usage" not in result
    x, z, _ = validate.batch(torch.arange(8))
    digits = model.quantizer.digits(model.encode_indices(x, z)).unbind(-1)
    expected = 12 * 14 * sum(entropy_bits(digit.numpy()) for digit in digits)
    assert result["entropy_bits"] == pytest.approx(expected) and 0 < expected <= result["fixed_bits"]


def test_without_masks_brain_scores_are_left_out(tiny_sizes, validate):
    validate.masks = None
    result = score_reconstruction(vqvae(tiny_sizes, validate), validate, CPU)
    assert not [name for name in result if name.startswith("brain")]


# ------------------------------------------------------------------------------------------------------------- report


def test_the_table_prints_a_dash_for_what_is_unknown():
    rows = [{"codec": "a", "bits": 2048.0, "ssim": 0.5, "psnr": 24.444, "psnr_interval": None}]
    rows += [{"codec": "b", "numbers": 16384, "ssim": 0.97651, "brain_ssim": 0.25, "ms_ssim": 0.75, "psnr": 30.0}]
    rows[1] |= {"ssim_interval": [0.97, 0.98], "kl_bits": 1234.5}
    assert table(rows).splitlines()[2:] == [
        "| a | 2,048 | - | 0.5000 | - | - | 24.44 |",
        "| b | 1,234 (KL) | 16,384 | 0.9765 [0.9700, 0.9800] | 0.2500 | 0.7500 | 30.00 |",
    ]


@pytest.fixture
def run_of(tmp_path):
    """run_of(model, "vqvae", kwargs, name): the model saved as a run; its description as it is loaded."""

    def save(model, kind: str, kwargs: dict, name: str = "mine") -> dict:
        description = {"kind": kind, "model_kwargs": kwargs, "step": 0}
        util.save_weights(tmp_path / f"model_ckpt/{name}/model.safetensors", model.state_dict(), description)
        return description | {"digest": util.digest_of(model.state_dict())}

    return save


def test_the_command_scores_a_run_and_says_where(run_main, run_of, tiny_sizes, validate, phantom_folder, tmp_path):
    """By the run's name; JSON with the stable names, a picture, a table with the floors; other splits by flag."""
    model = vqvae(tiny_sizes, validate)
    run_of(model, "vqvae", tiny_sizes | {"codebook_size": 16})
    flags = ("--reconstruction", "mine", "--data", phantom_folder, "--device", "cpu")
    status, out, errors = run_main(evaluate, *flags)
    assert status == 0, errors
    report = json.loads((tmp_path / "model_ckpt/mine/reconstruction_validate.json").read_text())
    direct = score_reconstruction(model, dataset.load_slices(phantom_folder, "validate", 64, masks=True), CPU)
    assert report["result"]["brain_ssim"] == pytest.approx(direct["brain_ssim"], abs=1e-6)
    assert report["data"]["split"] == "validate" and report["decoder"] == "fidelity"
    assert [row["codec"].split()[0] for row in report["rows"]] == ["vqvae", "k-means", "block", "AVIF"]
    assert all({"ssim", "brain_ssim", "ms_ssim", "psnr"} <= row.keys() for row in report["rows"])
    assert "| k-means 4x4, K 16 | 672 |" in out and "python pixelCNN.py --first-stage" in out
    with Image.open(tmp_path / "model_ckpt/mine/reconstruction_validate.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 10
    status, out, _ = run_main(evaluate, *flags, "--split", "train", "--no-floors", "--out", "elsewhere")
    report = json.loads(Path("elsewhere/reconstruction_train.json").read_text())
    assert status == 0 and report["data"]["split"] == "train" and len(report["rows"]) == 1 and "k-means" not in out
    for name in ("ssim", "brain_ssim", "ms_ssim", "psnr", "ssim_shuffled_z", "brain_ssim_shuffled_z"):
        low, high = report["result"][f"{name}_interval"]  # three cases
        assert low <= report["result"][name] <= high
    low, high = report["result"]["ssim_per_z_interval"]["7"]
    assert low <= report["result"]["ssim_per_z"]["7"] <= high


def test_the_command_scores_a_vae_with_floors_at_its_kl_bits(run_main, run_of, tiny_sizes, validate, phantom_folder):
    run_of(started(VAE(**tiny_sizes), validate), "vae", tiny_sizes, "vae")
    flags = ("--reconstruction", "vae", "--data", phantom_folder, "--device", "cpu")
    status, out, errors = run_main(evaluate, *flags)
    assert status == 0, errors
    rows = json.loads(Path("model_ckpt/vae/reconstruction_validate.json").read_text())["rows"]
    assert [row["codec"].split()[0] for row in rows] == ["vae", "block", "AVIF"] and "noise share" in out
    assert "(KL)" in out and "bits" not in rows[0] and "prior" not in out
    status, _, errors = run_main(evaluate, *flags, "--prior", "any")
    assert status == 2 and "no codes" in errors


def test_the_prior_of_this_first_stage_prices_its_codes(run_main, run_of, tiny_sizes, validate, phantom_folder, awaken):
    """The run pixelcnn by itself, but only if its first stage is this one; any other by --prior, or one line."""
    model = vqvae(tiny_sizes, validate)
    kwargs = tiny_sizes | {"codebook_size": 16}
    model.description = run_of(model, "vqvae", kwargs)
    run_of(vqvae(tiny_sizes, validate), "vqvae", kwargs, "other")
    sizes = {"codebook_size": 16, "grid": [12, 14], "channels": 16, "layers": 2}
    prior = awaken(PixelCNN(**sizes)).eval()
    weights = Path("model_ckpt/pixelcnn/model.safetensors")
    save_second_stage(weights, prior, model, {"model_kwargs": sizes})
    x, z, _ = validate.batch(torch.arange(8))
    expected = prior.bits(model.encode_indices(x, z), z).mean().item()
    result = score_reconstruction(model, validate, CPU, batch_size=3, prior=prior)
    assert result["prior_bits"] == pytest.approx(expected, rel=1e-4)

    flags = ("--data", phantom_folder, "--device", "cpu", "--no-floors")
    status, out, _ = run_main(evaluate, "--reconstruction", "mine", *flags)
    assert status == 0 and "under the PixelCNN" in out
    report = json.loads(Path("model_ckpt/mine/reconstruction_validate.json").read_text())
    assert 0 < report["result"]["prior_bits"] < 5000
    status, out, _ = run_main(evaluate, "--reconstruction", "other", *flags)
    assert status == 0 and "under the PixelCNN" not in out and "left out" in out
    status, _, errors = run_main(evaluate, "--reconstruction", "other", "--prior", "pixelcnn", *flags)
    assert status == 2 and len(errors.splitlines()) == 1 and "another first stage" in errors


def test_each_decoder_has_scores_of_its_own(run_main, run_of, tiny_sizes, validate, phantom_folder,
                                                          monkeypatch):  # fmt: skip
    """And its scores do not overwrite those of the fidelity decoder."""
    run_of(vqvae(tiny_sizes, validate), "vqvae", tiny_sizes | {"codebook_size": 16})
    asked, load = [], evaluate.load_first_stage
    monkeypatch.setattr(
        evaluate, "load_first_stage", lambda run, device, decoder: (asked.append(decoder), load(run))[1]
    )
    flags = ("--reconstruction", "mine", "--data", phantom_folder, "--device", "cpu", "--no-floors")
    for decoder in ("fidelity", "perceptual"):
        assert run_main(evaluate, *flags, "--decoder", decoder)[0] == 0
    assert asked == ["fidelity", "perceptual"]
    report = json.loads(Path("model_ckpt/mine/reconstruction_validate_perceptual.json").read_text())
    assert report["decoder"] == "perceptual" and Path("model_ckpt/mine/reconstruction_validate.json").is_file()


def test_missing_weights_are_one_line_and_status_2(run_script):
    done = run_script("evaluate.py", "--reconstruction", "nobody")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nobody" in done.stderr
