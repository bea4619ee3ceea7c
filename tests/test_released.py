"""The released files give the pictures they were released with, whatever the code around them has become.

tests/released.npz holds eight slices of the phantom and, of every released file, each so-many-th number of its answers,
recorded on one thread of an Intel processor by `python tests/test_released.py NAME ...` when the file was new. The
tolerance is for other processors: float32 sums in another order, of which a few end up on the other side of a grey
level or of a code.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import pixelCNN
import stable_diffusion
import util
from dataset import to_float, to_uint8
from heads.people import CONDITIONS
from stable_diffusion import Sampling, draw_brains
from training.stages import load_first_stage, load_second_stage

PRETRAINED = HERE.parent / "pretrained"
RECORDED = np.load(HERE / "released.npz")
FIRST_STAGES = ("vae_f8d4", "vae_f8d8", "vqvae_f8", "vqvae_2048bit", "vqvae_fidelity")
Z = torch.arange(2, 32, 4)


def thinned(pictures: torch.Tensor, every: int = 53) -> np.ndarray:
    return to_uint8(pictures).flatten()[::every].numpy()


def slices() -> torch.Tensor:
    """x [8, 1, 256, 256] of the recorded pictures, which are the box of the picture that holds the head."""
    return to_float(F.pad(torch.from_numpy(RECORDED["images"]), (16, 16, 32, 32)))[:, None]


@torch.no_grad()
def answers_of_first_stage(name: str) -> dict[str, np.ndarray]:
    """Latents, codes and pictures of the recorded slices."""
    model, x = load_first_stage(PRETRAINED / f"{name}.safetensors", decoder=None), slices()
    latent = model.encode(x, Z)
    found = {"latent": latent.flatten()[::11].numpy(), "decode": thinned(model.decode(latent, Z))}
    if hasattr(model, "encode_indices"):
        idx = model.encode_indices(x, Z)
        found |= {"idx": idx.flatten()[::5].numpy(), "decode_indices": thinned(model.decode_indices(idx, Z))}
    if model.texture is not None:
        found["draw"] = thinned(model.draw(latent, Z, torch.Generator().manual_seed(5), 32))
    return {f"{name}.{answer}": value for answer, value in found.items()}


def answers_of_diffusion() -> dict[str, np.ndarray]:
    """A brain in three steps instead of twenty, which takes seconds, and its person."""
    model, first_stage = load_second_stage(PRETRAINED / "stable_diffusion.safetensors", stable_diffusion.MODELS)
    ((brain, person, _),) = draw_brains(model, first_stage, Sampling(seed=1234, steps=3, precision="fp32"))
    return {
        "stable_diffusion.person": np.array([person.get(name, np.nan) for name in CONDITIONS]),
        "stable_diffusion.brain": brain.flatten()[::211],
    }


@torch.no_grad()
def answers_of_pixelcnn(codes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Known codes priced and decoded: one that is drawn otherwise would change all that come after it.

    Where None are known, those of the recorded slices.
    """
    prior, first_stage = load_second_stage(PRETRAINED / "pixelcnn.safetensors", pixelCNN.PRIORS)
    codes = first_stage.encode_indices(slices(), Z).numpy() if codes is None else codes
    idx = torch.from_numpy(codes).long()
    drawn = first_stage.draw(first_stage.dequantise(idx), Z, util.brain_generator(1234, 0, "texture"), 32)
    bits = prior.bits(idx, Z).numpy()
    return {"pixelcnn.codes": codes.astype(np.int16), "pixelcnn.bits": bits, "pixelcnn.brain": thinned(drawn)}


def assert_as_recorded(found: dict[str, np.ndarray]) -> None:
    """Latents and bits nearly, codes but for a few, pictures but for one grey level in one of a thousand pixels."""
    for name, value in found.items():
        recorded, answer = RECORDED[name], name.split(".")[1]
        if answer in ("latent", "bits", "person"):
            assert np.allclose(value, recorded, rtol=1e-3, atol=1e-3, equal_nan=True), name
        elif answer in ("idx", "decode_indices"):  # another code changes a whole block
            assert (value == recorded).mean() > (0.995 if answer == "idx" else 0.99), name
        else:
            apart = np.abs(value.astype(int) - recorded.astype(int))
            assert apart.max() <= 1 and (apart > 0).mean() <= 1e-3, name


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_a_first_stage_encodes_and_decodes_as_it_was_released(name):
    assert_as_recorded(answers_of_first_stage(name))


def test_diffusion_draws_the_brain_it_was_released_with():
    assert_as_recorded(answers_of_diffusion())


def test_the_pixelcnn_prices_and_decodes_the_codes_it_was_released_with():
    assert_as_recorded(answers_of_pixelcnn(RECORDED["pixelcnn.codes"]))


if __name__ == "__main__":
    others = {"stable_diffusion": answers_of_diffusion, "pixelcnn": lambda: answers_of_pixelcnn(None)}
    new = dict(RECORDED)
    for file in sys.argv[1:]:
        new = {name: value for name, value in new.items() if not name.startswith(f"{file}.")}
        new |= others[file]() if file in others else answers_of_first_stage(file)
    np.savez_compressed(HERE / "released.npz", **new)
