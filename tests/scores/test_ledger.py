"""Laws of ledger.py: scores and prices of a first stage against their definition, and the words for them."""

import numpy as np
import pytest
import torch

import dataset
from model_VAE import VAE, VQVAE, VQVAE2
from parts.quantizer import digits_of
from pixelCNN import PixelCNN2
from scores.ledger import brain_positions, code_statistics, ledger_lines, score_codec, score_reconstruction, table
from scores.metrics import all_scores, bootstrap_interval, entropy_bits, radial_spectrum, slice_scores

EVERY = torch.arange(8)


def fitted(model, data: dataset.Slices):
    """The model at the start of its training."""
    x, z, _ = data.batch(torch.arange(len(data)))
    model.fit(x, z)
    return model.eval()


@pytest.fixture
def vqvae(tiny_sizes, validate) -> VQVAE:
    return fitted(VQVAE(**tiny_sizes, codebook_size=16), validate)


def test_a_codec_is_scored_over_all_slices(validate):
    assert score_codec(validate, "copy", lambda real: real)["ms_ssim"] == pytest.approx(1)
    row = score_codec(validate, "dim", lambda real: real // 2)
    direct = all_scores(validate.images // 2, validate.images, validate.masks)
    for name in ("ssim", "brain_ssim", "ms_ssim", "psnr"):
        assert row[name] == pytest.approx(direct[name].mean().item())
        assert row[f"{name}_interval"][0] <= row[name] <= row[f"{name}_interval"][1]


def test_brain_positions_are_the_blocks_that_hold_brain(vqvae):
    masks = ((torch.rand(2, 64, 64) < 0.05) * 85).to(torch.uint8)
    found = brain_positions(masks, vqvae)
    blocks = masks[:, 8:56, 4:60].reshape(2, 12, 4, 14, 4)
    assert torch.equal(found, (blocks > 0).any(4).any(2)) and 0 < found.float().mean() < 1
    assert torch.equal(brain_positions(masks, vqvae, (6, 7)), found.view(2, 6, 2, 7, 2).any(4).any(2))


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


def test_scores_of_a_vqvae_and_its_price(vqvae, validate):
    """The batch size changes nothing; bits are those of the grid; the entropy is of the codes actually sent."""
    result, again = (score_reconstruction(vqvae, validate, batch_size=batch_size) for batch_size in (8, 3))
    assert result.keys() == again.keys() and result["ssim"] == pytest.approx(again["ssim"], abs=1e-3)
    x, z, _ = validate.batch(EVERY)
    idx = vqvae.encode_indices(x, z)
    decoded = dataset.to_uint8(vqvae.decode_indices(idx, z))[:, 0]
    direct = all_scores(decoded, validate.images, validate.masks)
    for name in ("ssim", "brain_ssim", "ms_ssim", "psnr"):
        assert result[name] == pytest.approx(direct[name].mean().item(), rel=1e-4)
        assert result[f"{name}_interval"] == pytest.approx(bootstrap_interval(direct[name], validate.case), rel=1e-4)
    for name in ("ssim", "brain_ssim"):
        expected = dict(zip(range(0, 32, 4), direct[name].tolist()))
        assert result[f"{name}_per_z"] == pytest.approx(expected, rel=1e-4)
    power = [radial_spectrum(pictures).sum(0) for pictures in (decoded, validate.images)]
    assert result["spectrum"]["power_ratio"] == pytest.approx((power[0] / power[1]).tolist(), rel=1e-3)
    assert result["spectrum"]["frequency"][12] == 12.5 / 32
    assert result["fixed_bits"] == 12 * 14 * 4 and result["grid"] == [12, 14] and result["numbers"] == 4 * 12 * 14
    assert result["entropy_bits"] == pytest.approx(12 * 14 * entropy_bits(idx.numpy()))
    assert result["entropy_bits"] <= result["fixed_bits"] and result["usage"] == len(idx.unique()) / 16
    on_brain = idx[brain_positions(validate.masks, vqvae)]
    assert result["brain_usage"] == len(on_brain.unique()) / 16 <= result["usage"]
    validate.masks = None
    result = score_reconstruction(vqvae, validate)
    assert result["ssim"] > 0 and not [name for name in result if name.startswith("brain")]


def test_the_price_of_a_vae_is_its_kl(tiny_sizes, validate, awaken, monkeypatch):
    """And its noise that of the posterior, here one of mean variance 4 and noise variance 1."""
    model = awaken(VAE(**tiny_sizes)).eval()
    result = score_reconstruction(model, validate, batch_size=3)
    x, z, _ = validate.batch(EVERY)
    mean, log_variance = model.posterior(x, z)
    assert result["kl_bits"] == pytest.approx(model.kl_bits(mean, log_variance).mean().item(), rel=1e-4)
    variance = log_variance.exp().mean((0, 2, 3))
    expected = variance / (mean.var((0, 2, 3), unbiased=False) + variance)
    assert result["noise_share_per_channel"] == pytest.approx(expected.tolist(), rel=1e-3)
    assert 0 <= result["active_channels"] <= 4 and "fixed_bits" not in result
    known = 2 * torch.randn(8, 4, 12, 14)
    monkeypatch.setattr(model, "posterior", lambda x, z: (known[: len(x)], torch.zeros(len(x), 4, 12, 14)))
    assert score_reconstruction(model, validate)["noise_share"] == pytest.approx(0.2, abs=0.02)


def test_the_noise_share_over_head_and_brain_leaves_black_out(tiny_sizes, validate, monkeypatch):
    """A mean that knows only head from black: all positions hide the noise, those of the head show nothing but it."""
    model = VAE(**tiny_sizes).eval()
    head, brain = (brain_positions(pictures, model) for pictures in (validate.images, validate.masks))
    assert (head | ~brain).all() and brain.sum() < head.sum() < head.numel()
    mean = 10 * head[:, None].double().expand(8, 4, 12, 14)
    monkeypatch.setattr(model, "posterior", lambda x, z: (mean, torch.zeros(mean.shape)))
    result = score_reconstruction(model, validate, batch_size=8)
    share = head.double().mean().item()
    assert result["noise_share"] == pytest.approx(1 / (1 + 100 * share * (1 - share)))
    assert result["head_noise_share"] == pytest.approx(1) == result["brain_noise_share"]
    assert result["active_channels"] == 4 and result["head_active_channels"] == 0
    assert "over the head 1.0000" in ledger_lines(result) and "over the brain 1.0000" in ledger_lines(result)


@pytest.mark.parametrize("kind", [VAE, VQVAE])
def test_the_decoder_is_told_a_wrong_z_and_the_encoder_its_own(kind, tiny_sizes, validate, monkeypatch):
    """The wrong ones are a permutation of all slices' z, across batches, the same at every batch size."""
    model = fitted(kind(**tiny_sizes, **({"codebook_size": 16} if kind is VQVAE else {})), validate)
    names = ("encode_indices", "decode_indices") if kind is VQVAE else ("encode", "decode")
    told = {name: [] for name in names}

    def watch(name, original):
        monkeypatch.setattr(model, name, lambda latent, z: (told[name].append(z), original(latent, z))[1])

    for name in names:
        watch(name, getattr(model, name))
    results = [score_reconstruction(model, validate, batch_size=batch_size) for batch_size in (8, 8, 3)]
    assert torch.equal(told[names[0]][0], validate.z)
    own, wrong = told[names[1]][:2]
    assert torch.equal(own, validate.z) and torch.equal(wrong.sort().values, own)
    assert (wrong != own).float().mean() > 0.5
    assert torch.equal(torch.cat(told[names[1]][4:][1::2]), wrong)
    assert results[0]["ssim_shuffled_z"] == results[1]["ssim_shuffled_z"]
    assert results[0]["ssim_shuffled_z"] == pytest.approx(results[2]["ssim_shuffled_z"], abs=1e-3)


def test_a_decoder_that_needs_z_is_found_out(tiny_sizes, validate, monkeypatch):
    """One that draws a stripe at row z matches the real stripes at the right z alone."""
    model = VAE(**tiny_sizes).eval()
    validate.images = torch.zeros(8, 64, 64, dtype=torch.uint8)
    validate.images[EVERY, validate.z] = 200

    def stripes(latent, z):
        x = -torch.ones(len(z), 1, 64, 64)
        x[torch.arange(len(z)), :, z] = 200 / 127.5 - 1
        return x

    monkeypatch.setattr(model, "decode", stripes)
    result = score_reconstruction(model, validate)
    assert result["ssim"] == pytest.approx(1) and result["ssim_shuffled_z"] < 0.9


def test_texture_has_scores_of_its_own_and_the_power(tiny_sizes, validate, awaken):
    """The other scores are those of the faithful picture; equal seeds give equal texture."""
    model = fitted(VQVAE(**tiny_sizes, codebook_size=16, perceptual=True), validate)
    faithful = score_reconstruction(model, validate, batch_size=8)
    model.use_decoder("perceptual")
    awaken(model.texture)
    result, again, other = (score_reconstruction(model, validate, batch_size=8, seed=seed) for seed in (0, 0, 1))
    x, z, _ = validate.batch(EVERY)
    generator = torch.Generator().manual_seed(0)
    torch.randperm(8, generator=generator)  # of the wrong z
    latent = model.dequantise(model.encode_indices(x, z))
    with torch.no_grad():
        drawn = dataset.to_uint8(model.draw(latent, z, generator))[:, 0]
    assert faithful["ssim"] == result["ssim"] and "ssim_drawn" not in faithful
    direct = slice_scores(drawn, validate.images, validate.masks)
    for name in ("ssim", "brain_ssim", "psnr"):
        assert result[f"{name}_drawn"] == pytest.approx(direct[name].mean().item(), rel=1e-4)
        assert result[f"{name}_drawn"] == again[f"{name}_drawn"] != other[f"{name}_drawn"] < result[name]
    power = radial_spectrum(drawn).sum(0) / radial_spectrum(validate.images).sum(0)
    assert result["spectrum"]["power_ratio"] == pytest.approx(power.tolist(), rel=1e-3)
    assert "with texture      SSIM" in ledger_lines(result) and "power kept        with texture" in ledger_lines(result)


def test_codes_of_two_levels_are_priced_one_by_one(tiny_sizes, validate):
    """Grids of 6x7 above 12x14: each with its own use, their bits in sum; no single grid for k-means to match."""
    model = fitted(VQVAE2(**tiny_sizes, codebook_size=16), validate)
    prior = PixelCNN2(grids=model.grids, codebook_size=16, channels=16, layers=1).eval()
    result = score_reconstruction(model, validate, batch_size=8, prior=prior)
    x, z, _ = validate.batch(EVERY)
    grids = model.encode_indices(x, z)
    assert result["prior_bits"] == pytest.approx(prior.bits(grids, z).mean().item(), rel=1e-3)
    for idx, level, grid in zip(grids, result["levels"], ([6, 7], [12, 14]), strict=True):
        assert level["grid"] == grid and level["usage"] == len(idx.unique()) / 16
        assert level["entropy_bits"] == pytest.approx(idx[0].numel() * entropy_bits(idx.numpy()))
        assert 0 < level["brain_perplexity"] <= 16
    assert result["fixed_bits"] == 4 * (42 + 168) and "codebook_size" not in result and "usage" not in result
    assert result["entropy_bits"] == sum(level["entropy_bits"] for level in result["levels"]) <= result["fixed_bits"]
    assert all(words in ledger_lines(result) for words in ("6x7", "12x14", "under the PixelCNN"))


def test_the_table_prints_a_dash_for_what_is_unknown():
    rows = [{"codec": "a", "bits": 2048.0, "ssim": 0.5, "psnr": 24.444, "psnr_interval": None}]
    rows += [{"codec": "b", "numbers": 16384, "ssim": 0.97651, "brain_ssim": 0.25, "ms_ssim": 0.75, "psnr": 30.0}]
    rows[1] |= {"ssim_interval": [0.97, 0.98], "kl_bits": 1234.5}
    assert table(rows).splitlines()[2:] == [
        "| a | 2,048 | - | 0.5000 | - | - | 24.44 |",
        "| b | 1,234 (KL) | 16,384 | 0.9765 [0.9700, 0.9800] | 0.2500 | 0.7500 | 30.00 |",
    ]
