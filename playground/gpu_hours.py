"""How long, and in how much memory, does preset `base` train on which GPU?

    python playground/gpu_hours.py

Nothing is run: the operations and the memory of a training step are counted with tensors that have shapes but no
numbers. A card is taken to reach a sixteenth of the speed in half precision on its label, which is what small batches
of convolutions often reach. An H100 would be done sooner than the processor beside it can ask for the next step: its
hours are of steps that were measured. Memory is that of a step, without PyTorch's own half a GB.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import pixelCNN
import prestage_train
import stable_diffusion
import util
from model_diffusion import LatentDiffusion
from model_discriminator import PatchDiscriminator
from model_VAE import VQVAE
from pixelCNN import PixelCNN
from training.memory import in_words, step_bytes
from training.presets import PRESETS

CARDS = {"T4": 65e12, "RTX 3090": 71e12}  # operations a second, half precision, label
REACHED = 1 / 16
# Seconds a step on an H100, means of 50 steps in bfloat16, 2026-11-27. The card itself computed for .027, .028, .066
# and .024 of them.
MEASURED = {"codec": 0.060, "texture": 0.067, "diffusion": 0.154, "codes": 0.043}
BOX, LATENT, CODES = (32, 16, 192, 224), (8, 24, 28), 1024  # of 256 px, at 8x8 pixels a code


class Work(NamedTuple):
    """Of a trainer at preset base: operations of the whole training, its seconds on an H100, and the bytes of a step
    at a batch size."""

    operations: float
    seconds: float
    bytes: Callable[[int], int]


def count(step: Callable[[], object]) -> int:
    """Operations of a function, with all it does inside."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def half() -> torch.autocast:
    """Half precision where autocast would use it on a GPU."""
    return torch.autocast("cpu", torch.bfloat16)


def first_stage() -> Work:
    """Both phases together; the memory is that of the texture, with the discriminator."""
    args = prestage_train.flags().presets["base"]
    steps = prestage_train.phase_steps(argparse.Namespace(**args, start_from=None))
    sizes = {name: args[name] for name in ("image_size", "patch", "widths", "blocks", "codebook_size")}
    sizes |= {"box": BOX, "latent_channels": LATENT[0], "perceptual": True}

    def models() -> tuple[VQVAE, PatchDiscriminator]:
        return VQVAE(**sizes).eval(), PatchDiscriminator()

    def slices(B: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(B, 1, args["image_size"], args["image_size"]), torch.zeros(B, dtype=torch.long)

    def drawing(model: VQVAE, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            faithful, features = model.faithful(prestage_train.latents_of(model, x, z), z)
        return faithful, features, faithful, z  # any picture stands for the noise

    with FakeTensorMode():
        (model, critic), (x, z) = models(), slices(1)
        known = drawing(model, x, z)
        seen = torch.cat([known[0]] * 3, 1)
        work = {"codec": count(lambda: model(x, z)[0].sum().backward()),
                "texture": count(lambda: drawing(model, x, z))
                + count(lambda: model.texture(*known).sum().backward())
                # real and drawn slices, then drawn ones again; the penalty is about twice the first, every few steps
                + (3 + 4 / prestage_train.EVERY) * count(lambda: critic(seen, z).sum().backward())}  # fmt: skip

    def memory(B: int) -> int:
        (model, critic), (x, z) = models(), slices(B)
        codec = step_bytes(model, (x, z), {}, half)
        x, z = slices(round(prestage_train.SHARE * B))
        known = drawing(model, x, z)
        seen = torch.cat([known[0]] * 3, 1)
        texture = step_bytes(model.texture, known, {}, half) + 3 * step_bytes(critic, (seen, z), {}, half)
        return max(codec, texture)

    operations = steps["codec"] * work["codec"] + prestage_train.SHARE * steps["texture"] * work["texture"]
    seconds = sum(MEASURED[phase] * number for phase, number in steps.items())
    return Work(args["batch_size"] * operations, seconds, memory)


def diffusion() -> Work:
    args = stable_diffusion.flags().presets["base"]
    S, modes = args["slices"], stable_diffusion.MODES

    def model() -> LatentDiffusion:
        return LatentDiffusion(latent_shape=LATENT, widths=args["widths"], blocks=stable_diffusion.BLOCKS, slices=S,
                               modes=modes, moved=True)  # fmt: skip

    def windows(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.zeros(n * S, *LATENT), torch.arange(S).repeat(n), torch.zeros(n, modes)

    with FakeTensorMode():
        network, (x, z, known) = model(), windows(1)
        work = count(lambda: network(x, z, projections=known).sum().backward())

    def memory(B: int) -> int:
        x, z, known = windows(B // S)
        return step_bytes(model(), (x, z), {"projections": known}, half)

    return Work(args["steps"] * args["batch_size"] // S * work, args["steps"] * MEASURED["diffusion"], memory)


def prior_of_codes() -> Work:
    args = pixelCNN.flags().presets["base"]

    def model() -> PixelCNN:
        return PixelCNN(codebook_size=CODES, grid=LATENT[1:], channels=args["channels"], layers=args["layers"])

    def codes(B: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(B, *LATENT[1:], dtype=torch.long), torch.zeros(B, dtype=torch.long)

    with FakeTensorMode():
        network, (idx, z) = model(), codes(1)
        work = count(lambda: network.bits(idx, z).sum().backward())
    seconds = args["steps"] * MEASURED["codes"]
    return Work(args["steps"] * args["batch_size"] * work, seconds, lambda B: step_bytes(model(), codes(B), {}, half))


TRAINERS = {"prestage_train.py": first_stage, "stable_diffusion.py": diffusion, "pixelCNN.py": prior_of_codes}


def table() -> str:
    """In Markdown, a row a trainer: batch size, memory of a step, and hours of each card."""
    rows = [f"| trainer | batch | memory | {' | '.join(CARDS)} | H100 |", "|---" * (4 + len(CARDS)) + "|"]
    for script, count_work in TRAINERS.items():
        work, B = count_work(), PRESETS[script]["base"]["batch_size"]
        seconds = [work.operations / (label * REACHED) for label in CARDS.values()] + [work.seconds]
        hours = [f"{number / 3600:.1f} h" for number in seconds]
        rows.append(f"| `{script}` | {B} | {in_words(work.bytes(B))} | {' | '.join(hours)} |")
    return "\n".join(rows)


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    return util.plain_parser(__doc__)


def main() -> None:
    flags().parse_args()
    print(table())


if __name__ == "__main__":
    util.command(main)
