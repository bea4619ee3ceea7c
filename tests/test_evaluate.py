"""Laws of evaluate.py: every score against its definition, every floor against what it must reach."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import evaluate
import util
from evaluate import (
    avif,
    brain_positions,
    code_usage,
    entropy_bits,
    from_blocks,
    kmeans,
    mean_scores,
    score_floors,
    score_reconstruction,
    slice_scores,
    table,
    to_blocks,
)
from model_VAE import VAE, VQVAE


@pytest.fixture
def validate(phantom_folder, tmp_path, monkeypatch) -> dataset.Slices:
    """Eight slices of one head at 64 px, with masks."""
    monkeypatch.chdir(tmp_path)
    data = dataset.load_slices(phantom_folder, "validate", 64, masks=True)
    data.images, data.masks, data.z, data.case = (part[::4] for part in (data.images, data.masks, data.z, data.case))
    return data


def vqvae(sizes: dict, data: dataset.Slices, codes: int = 16) -> VQVAE:
    """A VQ-VAE as training starts it."""
    model = VQVAE(**sizes, codebook_size=codes).eval()
    x, z, _ = data.batch(torch.arange(len(data)))
    model.start_linear_path(x, whiten=False)
    with torch.no_grad():
        model.quantizer.start(model.vectors(x, z).movedim(1, -1).reshape(-1, sizes["latent_channels"]))
    return model


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


def test_entropy_and_usage():
    """Uniform codes: log2 K bits, all in use, perplexity K; one code alone: nothing; a coin of 1 : 3 by hand."""
    uniform = np.arange(64).repeat(5).reshape(4, 80)
    assert entropy_bits(uniform, 64) == pytest.approx(6)
    assert code_usage(uniform, 64) == pytest.approx({"usage": 1, "perplexity": 64})
    assert code_usage(uniform, 128) == pytest.approx({"usage": 0.5, "perplexity": 64})
    assert entropy_bits(np.full(10, 3), 64) == 0
    assert entropy_bits(np.array([0, 1, 1, 1]), 2) == pytest.approx(0.25 * 2 - 0.75 * math.log2(0.75))


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


# ------------------------------------------------------------------------------------------------------ a first stage


def test_scores_of_a_vqvae_and_its_price(tiny_sizes, validate):
    """The batch size changes nothing; bits are those of the grid; the entropy is of the codes actually sent."""
    model = vqvae(tiny_sizes, validate)
    result, again = (score_reconstruction(model, validate, torch.device("cpu"), batch_size) for batch_size in (3, 32))
    assert result.keys() == again.keys() and result["ssim"] == pytest.approx(again["ssim"], abs=1e-6)
    x, z, _ = validate.batch(torch.arange(8))
    idx = model.encode_indices(x, z)
    direct = slice_scores(dataset.to_uint8(model.decode_indices(idx, z))[:, 0], validate.images, validate.masks)
    assert result["ssim"] == pytest.approx(direct["ssim"].mean().item(), abs=1e-6)
    assert result["brain_ssim"] == pytest.approx(direct["brain_ssim"].mean().item(), abs=1e-6)
    assert result["ssim_per_z"] == pytest.approx(dict(zip(range(0, 32, 4), direct["ssim"].tolist())), abs=1e-6)
    assert result["fixed_bits"] == 12 * 14 * 4 and result["grid"] == [12, 14] and result["numbers"] == 4 * 12 * 14
    assert result["entropy_bits"] == pytest.approx(12 * 14 * entropy_bits(idx.numpy(), 16))
    assert result["entropy_bits"] <= result["fixed_bits"] and result["usage"] == len(idx.unique()) / 16
    on_brain = idx[brain_positions(validate.masks, model)]
    assert result["brain_usage"] == len(on_brain.unique()) / 16 <= result["usage"]


def test_the_price_of_a_vae_is_its_kl(tiny_sizes, validate, awaken):
    model = awaken(VAE(**tiny_sizes)).eval()
    result = score_reconstruction(model, validate, torch.device("cpu"), batch_size=3)
    x, z, _ = validate.batch(torch.arange(8))
    assert result["kl_bits"] == pytest.approx(model(x, z)[1]["kl"].item(), rel=1e-4) and "fixed_bits" not in result


# --------------------------------------------------------------------------------------------------------- the floors


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_recovers_well_separated_clusters(seed):
    """Whatever it starts from: a floor that is stuck flatters the network above it. Black has a centre of its own."""
    generator = torch.Generator().manual_seed(seed)
    means = 10 * torch.rand(7, 4, generator=generator) + 20 * torch.eye(7)[:, :4] + 5
    means[4:] += 40 * torch.eye(4)[:3]
    vectors = means.repeat(60, 1) + 0.1 * torch.rand(420, 4, generator=generator)
    centres = kmeans(torch.cat([vectors, torch.zeros(400, 4)]), 8, seed=seed)
    assert centres.shape == (8, 4) and not centres[-1].any()
    assert torch.cdist(means + 0.05, centres).amin(1).max() < 0.1


def test_kmeans_is_a_local_optimum_and_a_pure_function():
    """Each centre is the mean of the vectors nearest to it; the global generator plays no part."""
    vectors = torch.rand(500, 3)
    centres = kmeans(vectors, 9, iterations=200)
    torch.rand(3)
    assert torch.equal(centres, kmeans(vectors, 9, iterations=200))
    idx = torch.cdist(vectors, centres[:-1]).argmin(1)
    means = torch.stack([vectors[idx == k].mean(0) for k in range(8)])
    assert torch.allclose(means, centres[:-1], atol=1e-4)


def test_blocks_are_those_of_the_coded_box_and_come_back(tiny_sizes, validate):
    """In grey 0..1, in the reading order of the grid; nothing is lost but what lies outside the box, which is black."""
    model = VAE(**tiny_sizes)
    blocks = to_blocks(model, validate.images)
    expected = validate.images[0, 8 + 4 * 5 : 12 + 4 * 5, 4 + 4 * 6 : 8 + 4 * 6].float() / 255
    assert torch.allclose(blocks[0, 5 * 14 + 6].view(4, 4), expected, atol=1e-6)
    assert torch.equal(from_blocks(model, blocks), validate.images)


def floors(model, data) -> dict[str, dict]:
    return {row["codec"]: row for row in score_floors(model, data, data)}


def test_the_klt_floor_is_lossless_with_all_channels_and_grows_with_them(tiny_sizes, validate, monkeypatch):
    monkeypatch.setattr(evaluate, "avif", lambda pictures, quality, sizes: (sizes.append(1), pictures)[1])
    rows = [floors(VAE(**tiny_sizes | {"latent_channels": C}), validate)[f"block KLT f4 d{C}"] for C in (1, 4, 8, 16)]
    assert [row["numbers"] for row in rows] == [C * 12 * 14 for C in (1, 4, 8, 16)]
    assert rows[3]["psnr"] == 100 and rows[3]["ssim"] == pytest.approx(1) == rows[3]["brain_ssim"]
    blocks = to_blocks(VAE(**tiny_sizes), validate.images).flatten(0, 1)
    basis = torch.linalg.svd(blocks, full_matrices=False)[2]
    for row, C in zip(rows[:3], (1, 4, 8)):  # no other C numbers per block leave less error
        error = (blocks - (blocks @ basis[:C].T @ basis[:C]).clamp(0, 1)).view(8, -1).square().sum(1) / 64**2
        assert row["psnr"] == pytest.approx(float(-10 * error.log10().mean()), abs=0.02)


def test_the_floors_of_a_vqvae_pay_the_same_bits(tiny_sizes, validate):
    """k-means on the model's own grid and K; AVIF gets better with its bits."""
    rows = floors(vqvae(tiny_sizes, validate), validate)
    assert rows["k-means 4x4, K 16"]["bits"] == 12 * 14 * 4
    assert 0.3 < rows["k-means 4x4, K 16"]["ssim"] < 1
    pictures = [row for codec, row in rows.items() if codec.startswith("AVIF")]
    assert len(pictures) == 5 and all(row["bits"] > 500 for row in pictures)
    for score in ("bits", "ssim", "psnr"):
        values = [row[score] for row in pictures]
        assert values == sorted(values)


def test_the_kmeans_floor_is_exact_where_codes_suffice(tiny_sizes, validate, monkeypatch):
    """Pictures of eight kinds of blocks, black among them, need eight codes."""
    monkeypatch.setattr(evaluate, "avif", lambda pictures, quality, sizes: (sizes.append(1), pictures)[1])
    kinds = torch.randint(0, 256, (8, 4, 4), dtype=torch.uint8)
    kinds[0] = 0
    grid = torch.randint(0, 8, (8, 12, 14))
    validate.images = torch.zeros(8, 64, 64, dtype=torch.uint8)
    validate.images[:, 8:56, 4:60] = kinds[grid].permute(0, 1, 3, 2, 4).reshape(8, 48, 56)
    row = floors(VQVAE(**tiny_sizes, codebook_size=8), validate)["k-means 4x4, K 8"]
    assert row["psnr"] == 100 and row["ssim"] == pytest.approx(1)


def test_avif_returns_the_picture_and_its_true_size(validate):
    sizes: list[int] = []
    decoded = avif(validate.images, 90, sizes)
    assert decoded.dtype == torch.uint8 and decoded.shape == validate.images.shape and len(sizes) == 8
    assert (decoded.int() - validate.images.int()).abs().float().mean() < 4
    avif(validate.images, 10, sizes)
    assert all(small < large for small, large in zip(sizes[8:], sizes[:8]))


# ------------------------------------------------------------------------------------------------------------- report


def test_the_table_prints_a_dash_for_what_is_unknown():
    rows = [{"codec": "a", "bits": 2048.0, "ssim": 0.5, "psnr": 24.444}]
    rows += [{"codec": "b", "numbers": 16384, "ssim": 0.97651, "brain_ssim": 0.25, "psnr": 30.0}]
    assert table(rows).splitlines()[2:] == [
        "| a | 2,048 | - | 0.5000 | - | 24.44 |",
        "| b | - | 16,384 | 0.9765 | 0.2500 | 30.00 |",
    ]


def test_the_command_scores_a_run_and_says_where(run_main, tiny_sizes, validate, phantom_folder, tmp_path):
    """By the run's name; JSON with the stable names, a picture, a table with the floors; other splits by flag."""
    model = vqvae(tiny_sizes, validate)
    description = {"kind": "vqvae", "model_kwargs": tiny_sizes | {"codebook_size": 16}, "step": 0}
    util.save_weights(tmp_path / "model_ckpt/mine/model.safetensors", model.state_dict(), description)
    flags = ("--reconstruction", "mine", "--data", phantom_folder, "--device", "cpu")
    status, out, errors = run_main(evaluate, *flags, "--floors")
    assert status == 0, errors
    report = json.loads((tmp_path / "model_ckpt/mine/reconstruction_validate.json").read_text())
    direct = score_reconstruction(
        model, dataset.load_slices(phantom_folder, "validate", 64, masks=True), torch.device("cpu")
    )
    assert report["result"]["brain_ssim"] == pytest.approx(direct["brain_ssim"], abs=1e-6)
    assert report["data"]["split"] == "validate" and len(report["rows"]) == 8
    assert "| k-means 4x4, K 16 | 672 |" in out
    with Image.open(tmp_path / "model_ckpt/mine/reconstruction_validate.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 10
    status, _, _ = run_main(evaluate, *flags, "--split", "test", "--out", "elsewhere")
    assert status == 0 and json.loads(Path("elsewhere/reconstruction_test.json").read_text())["data"]["split"] == "test"


def test_missing_weights_are_one_line_and_status_2(run_script):
    done = run_script("evaluate.py", "--reconstruction", "nobody")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nobody" in done.stderr
