"""Laws of floors.py: every codec reaches what it must, and none pays other bits than it says."""

from functools import partial

import pytest
import torch

from model_VAE import VAE
from scores import floors
from scores.floors import avif, avif_quality, from_blocks, kmeans, score_floors, to_blocks
from scores.ledger import score_codec


def scored(model, data, bits=6000.0, codebook_size=None) -> dict[str, dict]:
    """The rows by codec, fitted to and scored on the same slices."""
    rows = score_floors(model, data, data, partial(score_codec, data), bits, codebook_size)
    return {row["codec"]: row for row in rows}


@pytest.fixture
def no_avif(monkeypatch):
    """AVIF that changes nothing and costs nothing, for tests of the others."""
    monkeypatch.setattr(floors, "avif", lambda pictures, quality, sizes: (sizes.append(1), pictures)[1])


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


def test_blocks_are_those_of_the_coded_box_and_come_back(tiny_sizes, validate):
    """In grey 0..1, in the reading order of the grid; nothing is lost but what lies outside the box, which is black."""
    model = VAE(**tiny_sizes)
    blocks = to_blocks(model, validate.images)
    expected = validate.images[0, 8 + 4 * 5 : 12 + 4 * 5, 4 + 4 * 6 : 8 + 4 * 6].float() / 255
    assert torch.allclose(blocks[0, 5 * 14 + 6].view(4, 4), expected, atol=1e-6)
    assert torch.equal(from_blocks(model, blocks), validate.images)


def test_the_klt_floor_is_lossless_with_all_channels_and_grows_with_them(tiny_sizes, validate, no_avif):
    rows = [scored(VAE(**tiny_sizes | {"latent_channels": C}), validate)[f"block KLT f4 d{C}"] for C in (1, 4, 8, 16)]
    assert [row["numbers"] for row in rows] == [C * 12 * 14 for C in (1, 4, 8, 16)]
    assert rows[3]["psnr"] == pytest.approx(100) and rows[3]["ssim"] == pytest.approx(1) == rows[3]["brain_ssim"]
    blocks = to_blocks(VAE(**tiny_sizes), validate.images).flatten(0, 1)
    basis = torch.linalg.svd(blocks, full_matrices=False)[2]
    for row, C in zip(rows[:3], (1, 4, 8)):  # no other C numbers per block leave less error
        error = (blocks - (blocks @ basis[:C].T @ basis[:C]).clamp(0, 1)).view(8, -1).square().sum(1) / 64**2
        assert row["psnr"] == pytest.approx(float(-10 * error.log10().mean()), abs=0.02)


def test_the_kmeans_floor_pays_the_bits_of_the_grid_and_is_exact_where_codes_suffice(tiny_sizes, validate, no_avif):
    """Pictures of eight kinds of blocks, black among them, need eight codes."""
    row = scored(VAE(**tiny_sizes), validate, codebook_size=16)["k-means 4x4, K 16"]
    assert row["bits"] == 12 * 14 * 4 and 0.3 < row["ssim"] < 1
    kinds = torch.randint(0, 256, (8, 4, 4), dtype=torch.uint8)
    kinds[0] = 0
    grid = torch.randint(0, 8, (8, 12, 14))
    validate.images = torch.zeros(8, 64, 64, dtype=torch.uint8)
    validate.images[:, 8:56, 4:60] = kinds[grid].permute(0, 1, 3, 2, 4).reshape(8, 48, 56)
    row = scored(VAE(**tiny_sizes), validate, codebook_size=8)["k-means 4x4, K 8"]
    assert row["psnr"] == pytest.approx(100) and row["ssim"] == pytest.approx(1)


def test_what_cannot_be_had_is_left_out_and_said(tiny_sizes, validate, no_avif, monkeypatch, capsys):
    """Codebooks too large for k-means, widths beyond the pixels of a block, and AVIF where Pillow has none."""
    rows = scored(VAE(**tiny_sizes), validate, codebook_size=2**61)
    assert "k-means: left out" in capsys.readouterr().out and not any("k-means" in codec for codec in rows)
    assert not any("k-means" in codec for codec in scored(VAE(**tiny_sizes), validate))
    model = VAE(**tiny_sizes)
    model.latent_shape = (24, 12, 14)
    assert scored(model, validate)["block KLT f4 d16"]["numbers"] == 16 * 12 * 14
    monkeypatch.setattr(floors.features, "check", lambda name: name != "avif")
    rows = scored(VAE(**tiny_sizes), validate, codebook_size=16)
    assert [codec.split()[0] for codec in rows] == ["k-means", "block"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("AVIF")]
    assert "left out" in line and "pillow" in line


def test_avif_comes_as_near_to_the_bits_as_any_quality(validate):
    pictures = validate.images[::3]
    bits = []
    for quality in range(101):
        sizes: list[int] = []
        avif(pictures, quality, sizes)
        bits.append(8 * sum(sizes) / len(sizes))
    for target in (0.0, bits[20], (2 * bits[40] + bits[41]) / 3, bits[70] + 3, 1e9):
        found = avif_quality(pictures, target)
        assert abs(bits[found] - target) == min(abs(b - target) for b in bits)


def test_avif_returns_the_picture_and_the_floor_pays_for_whole_files(tiny_sizes, validate):
    """And its price on the split is near what was asked, since it was chosen there."""
    sizes: list[int] = []
    decoded = avif(validate.images, 60, sizes)
    assert decoded.dtype == torch.uint8 and decoded.shape == validate.images.shape and len(sizes) == 8
    avif(validate.images, 10, sizes)
    assert all(small < large for small, large in zip(sizes[8:], sizes[:8]))
    wanted = sum(sizes[:8])  # 8 bits a byte, over 8 pictures
    (row,) = [row for codec, row in scored(VAE(**tiny_sizes), validate, wanted).items() if "AVIF" in codec]
    assert row["bits"] == pytest.approx(wanted, rel=1e-6)
    decoded = avif(validate.images, 90, sizes)
    assert (decoded.int() - validate.images.int()).abs().float().mean() < 4
