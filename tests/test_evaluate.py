"""Laws of evaluate.py: prices against their definition; what the command prints and writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import evaluate
from evaluate import brain_positions, code_statistics, ledger, score_codec, score_reconstruction, table
from model_VAE import VAE, VQVAE, VQVAE2, latent_digest, save_second_stage
from parts.quantizer import digits_of
from pixelCNN import PixelCNN, PixelCNN2
from scores.metrics import all_scores, bootstrap_interval, entropy_bits, radial_spectrum
from training import checkpoints

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


# -------------------------------------------------------------------------------------------------- codes and latents


def test_a_codec_is_scored_over_all_slices(validate):
    """A codec that changes nothing is perfect; another has the means of its scores."""
    validate.case = torch.arange(8) // 2
    assert score_codec(validate, "copy", lambda real: real)["ms_ssim"] == pytest.approx(1)
    row = score_codec(validate, "dim", lambda real: real // 2)
    direct = all_scores(validate.images // 2, validate.images, validate.masks)
    for name in ("ssim", "brain_ssim", "ms_ssim", "psnr"):
        assert row[name] == pytest.approx(direct[name].mean().item())
        assert row[f"{name}_interval"][0] <= row[name] <= row[f"{name}_interval"][1]


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


def test_the_noise_share_over_head_and_brain_leaves_black_out(tiny_sizes, validate, monkeypatch):
    """A mean that knows only head from black: all positions hide the noise, those of the head show nothing but it."""
    model = VAE(**tiny_sizes).eval()
    head, brain = (brain_positions(pictures, model) for pictures in (validate.images, validate.masks))
    assert (head | ~brain).all() and brain.sum() < head.sum() < head.numel()
    mean = 10 * head[:, None].double().expand(8, 4, 12, 14)
    monkeypatch.setattr(model, "posterior", lambda x, z: (mean, torch.zeros(mean.shape)))
    result = score_reconstruction(model, validate, CPU)
    share = head.double().mean().item()
    assert result["noise_share"] == pytest.approx(1 / (1 + 100 * share * (1 - share)))
    assert result["head_noise_share"] == pytest.approx(1) == result["brain_noise_share"]
    assert result["active_channels"] == 4 and result["head_active_channels"] == 0
    assert "over the head 1.0000" in ledger(result) and "over the brain 1.0000" in ledger(result)


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
        checkpoints.save_weights(tmp_path / f"model_ckpt/{name}/model.safetensors", model.state_dict(), description)
        return description | {"digest": latent_digest(model.state_dict())}

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
