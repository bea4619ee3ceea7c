"""The released files give the pictures they were released with, whatever the code around them has become.

tests/released.npz holds eight slices of the phantom and, of every released file, each so-many-th number of its answers,
recorded with the code of release 1 (commit c949349) on one thread of an Intel processor. The tolerance is for other
processors: float32 sums in another order, of which a few end up on the other side of a grey level or of a code.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pixelCNN
import stable_diffusion
import util
from dataset import to_float, to_uint8
from heads.people import CONDITIONS
from stable_diffusion import Sampling, draw_brains
from training.stages import load_first_stage, load_second_stage

HERE = Path(__file__).parent
PRETRAINED = HERE.parent / "pretrained"
RECORDED = np.load(HERE / "released.npz")
Z = torch.arange(2, 32, 4)


def slices() -> Tensor:
    """x [8, 1, 256, 256] of the recorded pictures, which are the box of the picture that holds the head."""
    box = torch.from_numpy(RECORDED["images"])
    return to_float(F.pad(box, (16, 16, 32, 32)))[:, None]


def same_pixels(pictures: Tensor, recorded: np.ndarray, every: int) -> bool:
    """At most one grey level, in at most one of a thousand pixels."""
    apart = np.abs(pictures.flatten()[::every].numpy().astype(int) - recorded.astype(int))
    return apart.max() <= 1 and (apart > 0).mean() <= 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["vae_f8d4", "vae_f8d8", "vqvae_f8", "vqvae_2048bit", "vqvae_fidelity"])
def test_a_first_stage_encodes_and_decodes_as_it_was_released(name):
    model, x = load_first_stage(PRETRAINED / f"{name}.safetensors"), slices()
    latent = model.encode(x, Z)
    assert np.allclose(latent.flatten()[::11].numpy(), RECORDED[f"{name}.latent"], rtol=1e-3, atol=1e-3)
    assert same_pixels(to_uint8(model.decode(latent, Z)), RECORDED[f"{name}.decode"], 53)
    if f"{name}.idx" in RECORDED:
        idx = model.encode_indices(x, Z)
        assert (idx.flatten()[::5].numpy() == RECORDED[f"{name}.idx"]).mean() > 0.995
        pictures, recorded = to_uint8(model.decode_indices(idx, Z)), RECORDED[f"{name}.decode_indices"]
        assert (pictures.flatten()[::53].numpy() == recorded).mean() > 0.99  # another code changes a whole block
    if f"{name}.with_grain" in RECORDED:
        model.use_decoder("perceptual")
        pictures = to_uint8(model.decode_with_grain(latent, Z, torch.Generator().manual_seed(5)))
        assert same_pixels(pictures, RECORDED[f"{name}.with_grain"], 53)


def test_diffusion_draws_the_brain_it_was_released_with():
    """In three steps instead of twenty, which takes seconds; the person too is the one it was."""
    model, first_stage = load_second_stage(PRETRAINED / "stable_diffusion.safetensors", stable_diffusion.MODELS)
    ((brain, person, _),) = draw_brains(model, first_stage, Sampling(seed=1234, steps=3, precision="fp32"))
    assert [person[name] for name in CONDITIONS] == RECORDED["stable_diffusion.person"].tolist()
    assert same_pixels(torch.from_numpy(brain), RECORDED["stable_diffusion.brain"], 211)


@torch.no_grad()
def test_the_pixelcnn_prices_and_decodes_the_codes_it_was_released_with():
    """One code drawn otherwise would change all that come after it: so its own codes are priced and decoded again."""
    prior, first_stage = load_second_stage(PRETRAINED / "pixelcnn.safetensors", pixelCNN.PRIORS)
    idx, z = torch.from_numpy(RECORDED["pixelcnn.idx"]).long(), torch.arange(32)[::4]
    assert np.allclose(prior.bits(idx, z).numpy(), RECORDED["pixelcnn.bits"], rtol=1e-4)
    generator = util.brain_generator(1234, 0, "grain")
    pictures = to_uint8(first_stage.decode_with_grain(first_stage.dequantise(idx), z, generator, 32))
    assert same_pixels(pictures, RECORDED["pixelcnn.brain"], 53)
