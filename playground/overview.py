"""What happens to one slice in both stages?

    python playground/overview.py --first-stage vqvae --prior diffusion

Top: a validation slice, the box that is coded, the map of its codes (one colour per code), the reconstruction, and the
difference x5. Bottom: latents of a new brain at z = 15 on their way from noise, each decoded; SNR is that of x_t.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import util
from dataset import SLICES_PER_CASE, find_data, load_slices, to_uint8
from model_diffusion import LatentDiffusion, sample_ddim, sampling_times
from model_VAE import VQVAE, load_first_stage, load_second_stage
from pictures import sheets
from stable_diffusion import BrainNoise, decode_brain
from util import UserError

SHOWN = 15  # z


@torch.no_grad()
def draw(first_stage: VQVAE, data, prior: LatentDiffusion, decoder: VQVAE, seed: int):
    """The figure: one slice through stage one, one brain's slice through stage two."""
    x, z, case = data.batch((data.z == SHOWN).nonzero()[0])
    idx = first_stage.encode_indices(x, z)
    x_hat = first_stage.decode_indices(idx, z)
    real, fake = (to_uint8(p)[0, 0].int() for p in (x, x_hat))
    figure, axes = plt.subplots(2, 5, figsize=(15, 6.6), layout="constrained")
    h, w = first_stage.latent_shape[1:]
    colours = torch.rand(first_stage.codebook_size, 3, generator=torch.Generator().manual_seed(1))
    colours[int(first_stage.quantizer.count.argmax())] = 0  # the code of black
    stage_one = [
        (real, f"slice x, case {int(case)}, z = {SHOWN}"),
        (to_uint8(first_stage.crop(x))[0, 0], "the coded box"),
        (colours[idx[0]], f"codes: {h}x{w}, K = {first_stage.codebook_size}, {first_stage.fixed_bits:,.0f} bits"),
        (fake, "reconstruction"),
        ((128 + 5 * (fake - real)).clamp(0, 255), "difference x5, grey is none"),
    ]
    noise, brain = BrainNoise(seed, range(1), prior)(), torch.arange(SLICES_PER_CASE)
    walk = sample_ddim(lambda x, t: prior.denoise(x, t, brain), noise, prior.alpha, prior.sigma, None, steps=50)
    path = [noise, *tqdm(walk, desc="new brain", total=50, disable=None)]
    shown, times = [0, 28, 31, 34, 50], sampling_times(prior.alpha, prior.sigma, 50)
    stage_two = []
    for n in shown:
        ratio = (prior.alpha / prior.sigma)[times[n]] if 0 < n < 50 else None
        words = f"SNR {20 * ratio.log10():.0f} dB" if ratio else "noise" if n == 0 else "new slice"
        picture = torch.from_numpy(decode_brain(decoder, path[n], seed)[SHOWN])
        stage_two.append((picture, f"step {n} of 50, {words}"))
    for axis, (picture, title) in zip(axes.flat, stage_one + stage_two, strict=True):
        axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=11)
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("stage one", fontsize=12)
    axes[1, 0].set_ylabel("stage two, decoded", fontsize=12)
    return figure


def main() -> None:
    parser = util.plain_parser(__doc__)
    parser.add_argument("--first-stage", default="vqvae", metavar="RUN", help="a VQ-VAE (default: %(default)s)")
    parser.add_argument("--prior", default="diffusion", metavar="RUN", help="latent diffusion (default: %(default)s)")
    parser.add_argument("--data", metavar="FOLDER", help="as in training")
    parser.add_argument("--seed", type=int, default=0, help="of the new brain (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("playground_vis/overview.png"), help="default: %(default)s")
    args: argparse.Namespace = parser.parse_args()
    first_stage = load_first_stage(args.first_stage)
    if not isinstance(first_stage, VQVAE):
        raise UserError(
            f"--first-stage {args.first_stage} is a {first_stage.kind} and has no codes to show; give a VQ-VAE"
        )
    prior, decoder, _ = load_second_stage(args.prior, LatentDiffusion, "cpu", decoder=None)
    data = load_slices(find_data(args.data), "validate", first_stage.image_size)
    sheets.save_picture(args.out, draw(first_stage, data, prior, decoder, args.seed))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
