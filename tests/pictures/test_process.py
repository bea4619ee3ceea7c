"""Laws of process.gif, from noise to brain and code by code: even, small, and its end is the slice that was saved."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import pixelCNN
import stable_diffusion
from heads.phantom import phantom_case
from pictures import sheets
from training.checkpoints import RELEASED
from training.stages import load_first_stage


def evenness(pictures: np.ndarray) -> float:
    """The largest change from one of pictures [n, H, W] to the next, over the smallest."""
    changes = np.abs(np.diff(pictures.astype(float), axis=0)).mean((1, 2))
    return changes.max() / changes.min()


def written(pictures: np.ndarray, path) -> tuple[np.ndarray, list[int]]:
    """The last frame's picture at the size of `pictures`, and the milliseconds of each frame, of the GIF of these."""
    captions = [f"step {n} of {len(pictures)}" for n in range(len(pictures))]
    sheets.save_gif(path, sheets.frames(pictures, "a title", captions), seconds=4)
    assert path.stat().st_size < 3_000_000
    with Image.open(path) as gif:
        times = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
        gif.seek(gif.n_frames - 1)
        last = np.asarray(gif.convert("L"))
    height, width = pictures.shape[1:]
    zoom = (last.shape[1] - 8) // width
    return last[-24 - zoom * height : -24 : zoom, 4 : 4 + zoom * width : zoom], times


@pytest.mark.parametrize("steps", [1, 20, 31])
def test_a_brain_comes_evenly_out_of_the_noise(steps, tmp_path):
    """Though nearly all changes in a few steps: the released decoder at 256 px, on a way that ends at a phantom."""
    first_stage = load_first_stage(RELEASED / "vqvae_f8.safetensors", decoder="perceptual")
    z = torch.tensor([3, 16])
    x = torch.from_numpy(phantom_case(0, 1)[0][z])[:, None] / 127.5 - 1
    with torch.no_grad():
        clean = torch.zeros(32, *first_stage.latent_shape).index_copy(0, z, first_stage.encode(x.float(), z))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    alpha = torch.sigmoid(torch.linspace(-12, 12, steps)) if steps > 1 else torch.ones(1)
    way = [a * clean + (1 - a**2).sqrt() * noise for a in alpha]
    pictures, places = stable_diffusion.from_noise(first_stage, way, 16, 0, 0)
    saved = first_stage.crop(stable_diffusion.decode_brain(first_stage, way[-1], 0, 0, [16])[0])
    assert len(pictures) == stable_diffusion.FRAMES and places[-1] == steps - 1 and (np.diff(places) >= 0).all()
    assert np.abs(pictures[-1].astype(int) - saved).max() <= 1
    last, times = written(pictures, tmp_path / "a.gif")
    assert np.abs(last.astype(int) - saved).max() <= 1 + 4  # of 64 grey levels
    if steps > 1:
        assert evenness(pictures) < 1.5 and times[-1] > 5 * max(times[:-1])


@pytest.mark.parametrize("size, grid", [(256, (24, 28)), (64, (6, 8))])
def test_codes_uncover_their_blocks_evenly_and_in_order(size, grid, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (grid[0] * 8, grid[1] * 8), dtype=np.uint8)
    picture[: len(picture) // 2] //= 8  # darker where the first codes are
    pictures, drawn = pixelCNN.filling(picture, grid)
    for shown, n in zip(pictures, drawn, strict=True):
        uncovered = (np.arange(grid[0] * grid[1]) < n).reshape(grid).repeat(8, 0).repeat(8, 1)
        assert np.array_equal(shown[uncovered], picture[uncovered]) and (shown[~uncovered] == pixelCNN.NO_CODE).all()
    assert drawn[0] == 0 and drawn[-1] == grid[0] * grid[1] and evenness(pictures) < (1.5 if size == 256 else 4)
    last, times = written(pictures, tmp_path / "a.gif")
    assert np.abs(last.astype(int) - picture).max() <= 4 and times[-1] > 5 * max(times[:-1])
