"""Laws of appearance.py: each number against its definition, and moved by the fault it is there to see."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from heads.phantom import phantom_case
from scores import appearance

BOX = (32, 16, 192, 224)


@pytest.fixture(scope="module")
def head() -> tuple[Tensor, Tensor]:
    """(brain, tissue), uint8 [32, 256, 256] each, of a phantom."""
    images, masks = phantom_case(3, 1)
    return torch.from_numpy(images), torch.from_numpy(masks // 85)


def blurred(brain: Tensor, *sd: float) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(brain.numpy().astype(np.float32), sd)).round().to(torch.uint8)


def test_blur_is_a_gaussian(head):
    soft = appearance.blur(head[0][:2], 1.5)
    assert torch.allclose(soft, torch.from_numpy(ndimage.gaussian_filter(
        head[0][:2].numpy().astype(np.float32), (0, 1.5, 1.5), mode="constant")), atol=0.02)  # fmt: skip


def test_the_ribbon_is_the_valley_between_grey_and_white():
    """Known peaks: two gaussians of equal weight, far apart and near; and it is the same at any brightness."""
    rng, found = np.random.default_rng(0), []
    tissue = torch.ones(4, 256, 256, dtype=torch.uint8)
    tissue[:, :, 128:] = 3
    for apart, gain in ((40, 1), (40, 0.7), (14, 1)):
        brain = rng.normal(0, 14, (4, 256, 256))  # a blur of 1 leaves .28 of it
        brain = np.where(tissue.numpy() == 3, 150 + brain, 150 - apart * 1.5 + brain) * gain
        found.append(float(appearance.ribbon(torch.from_numpy(brain.clip(0, 255).astype(np.uint8)), tissue)))
    assert found[0] < 0.1 and found[1] == pytest.approx(found[0], abs=0.05) and found[2] > 0.5
    assert float(appearance.ribbon(torch.zeros(2, 64, 64, dtype=torch.uint8), tissue[:2, :64, :64])) == 1


def test_a_cortex_without_a_ribbon_is_seen(head):
    """Grey and white matter as one mottle, as an undecided denoiser makes it."""
    brain, tissue = head
    mottle = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(brain.shape), (0, 2, 2))
    mixed = blurred(brain, 0, 5, 5).float() + 18 * torch.from_numpy(mottle / mottle.std())
    vague = torch.where(tissue > 1, mixed, brain.float()).clamp(0, 255).to(torch.uint8)
    assert appearance.ribbon(vague, tissue) > appearance.ribbon(brain, tissue) + 0.1


def test_kurtosis_is_three_for_gaussian_grain_and_that_of_scipy(head):
    brain, tissue = head
    noise = (128 + 20 * torch.randn(8, 256, 256)).round().to(torch.uint8)
    everywhere = torch.ones_like(noise)
    assert appearance.kurtosis(noise, everywhere) == pytest.approx(3, abs=0.05)
    x = brain[9].numpy().astype(float)
    detail = (x[:-1, :-1] - x[:-1, 1:] - x[1:, :-1] + x[1:, 1:]) / 2
    expected = (detail**4).mean() / (detail**2).mean() ** 2
    assert float(appearance.kurtosis(brain[9:10], everywhere[:1])) == pytest.approx(expected, rel=1e-5)
    grainy = (brain.float() + 12 * torch.randn(brain.shape)).clamp(0, 255).to(torch.uint8)
    assert appearance.kurtosis(grainy, tissue) < 0.8 * appearance.kurtosis(brain, tissue)


def test_local_patterns_count_flat_edges_and_points():
    """Shares of each distance sum to 1; a plane has edge patterns, a lonely point the pattern without neighbours."""
    ramp = (torch.arange(64.0)[:, None] + torch.zeros(64) + 100)[None]
    found = appearance.local_patterns(ramp)
    assert torch.allclose(found.view(2, 10).sum(1), torch.ones(2))
    assert found[0, 5] > 0.9  # down and to both sides as bright or brighter: five of eight
    points = torch.full((1, 64, 64), 50.0)
    points[0, 8:-8:8, 8:-8:8] = 90
    count = appearance.local_patterns(points)[0]
    assert count[0] == pytest.approx(36 / 64**2) == count[10]
    assert not appearance.local_patterns(torch.zeros(1, 64, 64)).any()  # no head, no pattern


def test_edges_are_counted_by_direction_and_place():
    picture = torch.zeros(1, 64, 64)
    picture[0, :16, 8:] = 200  # one edge, upright, in the first cell; and its lower end
    cells = appearance.edge_histograms(picture).view(appearance.DIRECTIONS, 4, 4)
    assert cells.square().sum() == pytest.approx(1, abs=1e-5)
    assert cells[0, 0, 0] > 0 and not cells[:, 1:].any()
    turned = appearance.edge_histograms(picture.mT).view(appearance.DIRECTIONS, 4, 4)
    assert torch.allclose(turned[4, 0, 0], cells[0, 0, 0]) and torch.allclose(turned[0, 0], cells[4, :, 0])


def test_band_moments_see_blur_and_shape(head):
    brain = head[0][8:12]
    sharp, soft = (appearance.band_moments(part) for part in (brain, blurred(brain, 0, 1, 1)))
    assert (soft[:, 0] < sharp[:, 0] - 0.3).all()  # ln sd of the finest
    sparse = brain.float() + 60 * (torch.rand(brain.shape) < 0.001)
    assert (appearance.band_moments(sparse)[:, 1] > sharp[:, 1] + 0.3).all()  # ln kurtosis of the finest


def test_looks_have_all_of_them(head):
    found = appearance.looks(head[0][:3])
    assert found.shape == (3, 185) and found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(found[:, :20], appearance.local_patterns(head[0][:3]))
    assert torch.equal(found[:, 20:148], appearance.edge_histograms(head[0][:3]))


def test_coherence_is_the_correlation_with_itself_along_z():
    """A deviation that is smoothed along z by a known gaussian; and its parts inside and outside differ."""
    rng, sd = np.random.default_rng(1), 4.0
    noise = rng.standard_normal((96, 64, 64)).astype(np.float32)
    smooth = ndimage.gaussian_filter1d(noise, sd, axis=0)[16:-16]
    mean_head = torch.full((64, 64, 64), 100.0)
    tissue = torch.zeros(64, 64, 64, dtype=torch.uint8)
    tissue[:, :, 32:] = 2
    white = rng.standard_normal((64, 64, 32))
    apart = np.concatenate([10 * white, 20 * smooth[:, :, 32:] / smooth.std()], 2)
    brain = (mean_head.numpy() + apart).clip(0, 255).round().astype(np.uint8)
    found = appearance.coherence(torch.from_numpy(brain), mean_head, tissue)
    expected = [np.exp(-(lag**2) / (4 * sd**2)) for lag in appearance.LAGS]
    assert found[0] == pytest.approx(expected, abs=0.03)
    assert found[1] == pytest.approx([0, 0, 0], abs=0.03)
    scaled = appearance.coherence(torch.from_numpy(brain), 0.9 * mean_head + 0.1 * torch.from_numpy(brain), tissue)
    assert scaled == pytest.approx(found, abs=1e-3)  # a mean head that contains this brain
    assert appearance.coherence(torch.from_numpy(brain[:8]), mean_head[:8], tissue[:8])[:, 1:].isnan().all()


def test_symmetry_is_one_for_a_mirrored_brain_and_falls_with_a_lesion(head):
    brain, tissue = head
    mirrored = torch.cat([brain[:, :128], brain[:, :128].flip(1)], 1)
    both = torch.cat([tissue[:, :128], tissue[:, :128].flip(1)], 1)
    assert appearance.symmetry(mirrored, both) == pytest.approx(1, abs=1e-5)
    lesion = brain.clone()
    lesion[:, 80:110, 90:140] = 20
    assert appearance.symmetry(lesion, tissue) < appearance.symmetry(brain, tissue) - 0.05


def test_extremes_are_shares_of_the_box():
    brain = torch.zeros(2, 256, 256, dtype=torch.uint8)
    brain[0, 40:60, 30:50] = 1
    brain[1, 100, 100] = 255
    found = appearance.extremes(brain, BOX)
    size = BOX[2] * BOX[3]
    assert found == pytest.approx(torch.tensor([[0, 1 - 400 / size, 400 / size], [1, 1 - 1 / size, 0]]), abs=1e-6)
