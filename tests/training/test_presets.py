"""Preset base is sized by work: counted with tensors that have shapes but no numbers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import pixelCNN
import prestage_train
import stable_diffusion
from model_diffusion import LatentDiffusion
from model_discriminator import PatchDiscriminator
from model_VAE import VQVAE
from pixelCNN import PixelCNN

T4 = 4e12  # operations a second that a T4 reaches in half precision, of 65e12 on its label
HOURS = 4


def count(step) -> int:
    """Operations of a function, with all it does inside."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def first_stage_work() -> float:
    args = prestage_train.flags().presets["base"]
    steps = prestage_train.phase_steps(type("Args", (), {**args, "start_from": None}))
    with FakeTensorMode():
        sizes = {name: args[name] for name in ("image_size", "patch", "widths", "blocks", "codebook_size")}
        sizes |= {"box": (32, 16, 192, 224), "latent_channels": 8, "perceptual": True, "grain": True}
        model, critic = VQVAE(**sizes).eval(), PatchDiscriminator(channels=prestage_train.DISCRIMINATOR_CHANNELS)
        x, z = torch.zeros(1, 1, args["image_size"], args["image_size"]), torch.zeros(1, dtype=torch.long)
        box, work = model.crop(x), {}
        for phase in steps:
            model.train_only("codec" if phase == "codec" else "perceptual")
            work[phase] = count(lambda: model(x, z)[0].sum().backward())
        work["sharpen"] += 3 * count(lambda: critic(box, z)[0].sum().backward())  # both updates, and real features
    return args["batch_size"] * sum(steps[phase] * work[phase] for phase in steps)


def diffusion_work() -> float:
    args = stable_diffusion.flags().presets["base"]
    with FakeTensorMode():
        model = LatentDiffusion(latent_shape=(8, 24, 28), widths=args["widths"], blocks=stable_diffusion.BLOCKS,
                                slices=args["slices"], modes=stable_diffusion.MODES, moved=True)  # fmt: skip
        x, z = torch.zeros(args["slices"], 8, 24, 28), torch.arange(args["slices"])
        known = torch.zeros(1, stable_diffusion.MODES)
        work = count(lambda: model(x, z, projections=known).sum().backward())
    return args["steps"] * args["batch_size"] // args["slices"] * work


def pixelcnn_work() -> float:
    args = pixelCNN.flags().presets["base"]
    with FakeTensorMode():
        model = PixelCNN(codebook_size=1024, grid=(24, 28), channels=args["channels"], layers=args["layers"])
        idx, z = torch.zeros(1, 24, 28, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        work = count(lambda: model.bits(idx, z).sum().backward())
    return args["steps"] * args["batch_size"] * work


@pytest.mark.parametrize("work", [first_stage_work, diffusion_work, pixelcnn_work])
def test_each_stage_of_preset_base_takes_at_most_four_hours_of_a_t4(work):
    """And at least one: a GPU that is lent for an afternoon should be used."""
    assert 1 < work() / T4 / 3600 <= HOURS
