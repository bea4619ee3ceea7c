"""Laws of playground/complete.py: what drawn slices are compared with, and that the command does it."""

import numpy as np
import torch
from PIL import Image

from dataset import load_slices
from model_diffusion import LatentDiffusion
from model_VAE import VAE
from playground import complete
from training import checkpoints
from training.stages import latent_digest, save_second_stage


def test_interpolation_keeps_given_slices_and_draws_straight_lines():
    head = np.arange(0, 60, 6, dtype=np.uint8)[:, None, None] * np.ones((4, 4), np.uint8)
    assert np.array_equal(complete.interpolated(head[[0, 4, 9]], [0, 4, 9], 10), head)


def test_the_conditional_mean_keeps_known_slices_and_is_the_mean_head_far_from_them():
    prior = LatentDiffusion(latent_shape=(2, 4, 4), widths=(8,), blocks=1, slices_per_brain=40).gaussian
    distance = (torch.arange(40)[:, None] - torch.arange(40)).abs()
    prior.correlation.copy_((0.5**distance).expand(8, -1, -1))
    prior.mean.normal_()
    known, z = torch.randn(2, 2, 4, 4), torch.tensor([0, 3])
    brain = complete.conditional_mean(prior, known, z)
    assert torch.allclose(brain[z], known, atol=1e-5) and torch.allclose(brain[39], prior.mean[39], atol=1e-5)
    assert torch.allclose(brain[4] - prior.mean[4], (known[1] - prior.mean[3]) / 2, atol=1e-4)


def test_the_command_prints_a_table_and_draws_a_picture(run_main, refused, heads_folder, tiny_sizes):
    first_stage = VAE(**tiny_sizes)
    first_stage.fit(*load_slices(heads_folder, "train", 64).batch(torch.arange(0, 80, 8))[:2])
    described = {"kind": "vae", "model_kwargs": tiny_sizes, "step": 0}
    first_stage.description = described | {"digest": latent_digest(first_stage.state_dict())}
    sizes = {"latent_shape": list(first_stage.latent_shape), "widths": [8], "blocks": 1, "slices_per_brain": 20}
    run = checkpoints.run_weights("mine")
    save_second_stage(run, LatentDiffusion(**sizes), first_stage, {"model_kwargs": sizes, "step": 0})
    command = [complete, "--run", "mine", "--data", heads_folder, "--device", "cpu", "--out", "mine.png"]
    status, out, errors = run_main(*command)
    assert status == 0 and "heads: 1, slices given: 6 of 20" in out, errors
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][2:]
    assert [row[0][2:] for row in rows] == ["interpolated", "Gaussian prior", "drawn", "drawn again",
                                            "real, after stage one"]  # fmt: skip
    assert float(rows[-1][1]) > max(float(row[1]) for row in rows[1:4])
    with Image.open("mine.png") as picture:
        assert picture.width > 1000 and len(np.unique(np.asarray(picture))) > 50
    refused(*command, "--every", 1, names=["--every 1"])
