"""What happens to one slice in both stages?

    python playground/overview.py --first-stage vqvae --prior diffusion

Top: a validation slice and the box that is coded (dashed); the grid of its codes, each coloured by the first three
numbers that it stands for; the reconstruction; and the difference x5. Bottom: the middle slice of a new brain on its
way from noise, decoded after some of the sampler's steps; dB are the signal-to-noise ratio of the noised latent which
the step began with.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import util
from dataset import Slices, find_data, load_slices, to_uint8
from heads.people import as_heard, draw_person
from model_diffusion import LatentDiffusion, sampling_times
from model_VAE import VQVAE
from parts.autoencoder import Autoencoder
from pictures import sheets
from stable_diffusion import MODELS, Sampling, decode_brain, sample_latents
from training.stages import load_first_stage, load_second_stage
from util import UserError

STEPS = (1, 11, 13, 20)  # of the sampler's 20, after which the latent is decoded


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", default="vqvae", metavar="RUN", help="a VQ-VAE (default: %(default)s)")
    add("--prior", default="diffusion", metavar="RUN", help="latent diffusion (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--seed", type=util.seed, default=0, help="of the new brain (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/overview.png"), help="picture (default: %(default)s)")
    return parser


@torch.no_grad()
def stage_one(model: VQVAE, data: Slices) -> dict[str, Tensor]:
    """{title: picture} of one slice on its way through the codes."""
    x, z, case = data.batch((data.z - data.slices_per_brain // 2).abs().argmin().view(1))
    idx = model.encode_indices(x, z)
    real, fake = (to_uint8(p)[0, 0].int() for p in (x, model.decode_indices(idx, z)))
    (C, h, w), latent = model.latent_shape, model.dequantise(idx)[0]
    return {
        f"slice x, case {int(case)}, z = {int(z)}\ndashed: the coded box": real,
        f"its {h} x {w} codes of {model.codebook_size:,},\n{model.fixed_bits:,.0f} bits": (
            0.5 + latent[torch.arange(3) % C].movedim(0, -1) / 5  # the latent has an sd of 1
        ).clamp(0, 1),
        "reconstruction x_hat\nfrom the codes": model.crop(fake),
        "5 (x_hat - x),\ngrey is none": model.crop((128 + 5 * (fake - real)).clamp(0, 255)),
    }


def stage_two(prior: LatentDiffusion, decoder: Autoencoder, seed: int) -> dict[str, Tensor]:
    """{title: picture} of the middle slice of a new brain, decoded on its way from noise."""
    sampling, person = Sampling(seed=seed), draw_person({}, prior.description, seed, 0)
    way = list(sample_latents(prior, sampling, range(1), [as_heard(person, prior.description, seed, 0)]))
    alpha, sigma = prior.alpha, prior.sigma
    snr = 20 * (alpha / sigma).log10()[sampling_times(alpha, sigma, sampling.steps)]
    shown = [prior.slices_per_brain // 2]
    return {
        f"after step {n} of {sampling.steps},\nwhich began at {snr[n - 1]:+.0f} dB": torch.from_numpy(
            decoder.crop(decode_brain(decoder, way[n - 1], seed, shown=shown))[0]
        )
        for n in STEPS
    }


def main() -> None:
    args = flags().parse_args()
    first_stage = load_first_stage(args.first_stage)
    if not isinstance(first_stage, VQVAE):
        raise UserError(f"--first-stage {args.first_stage} is a {first_stage.kind}; name a VQ-VAE")
    prior, decoder = load_second_stage(args.prior, MODELS)
    data = load_slices(find_data(args.data), "validate", first_stage.image_size)
    rows = {"stage one": stage_one(first_stage, data), "stage two, decoded": stage_two(prior, decoder, args.seed)}
    figure, axes = plt.subplots(2, 4, figsize=(10.5, 5.6), layout="constrained")
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name)
        for axis, (title, picture) in zip(row, pictures.items(), strict=True):
            axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=255)
            axis.set_title(title, fontsize=10)
            axis.set(xticks=[], yticks=[])
    top, left, height, width = first_stage.box
    axes[0, 0].add_patch(plt.Rectangle((left, top), width, height, fill=False, edgecolor="white", linestyle="--"))
    sheets.save_picture(args.out, figure)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
