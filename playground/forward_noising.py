"""What does the forward process of diffusion do to a slice, and to its latent?

    python playground/forward_noising.py                           # pixels only, needs no run
    python playground/forward_noising.py --first-stage vqvae       # also the latent, noised and then decoded

The picture: x_t = alpha_t x_0 + sigma_t noise at growing t (columns), for each noise schedule (rows), first on pixels
as an illustration, then on the latent that stable_diffusion.py really noises. SNR is alpha^2 / sigma^2 in dB, that of a
signal of unit variance, as every latent channel has over the training set. Noise is the same all along a row. Pixels
beyond [-1, 1] are clipped to black and white; anterior is right.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import util
from dataset import find_data, load_slices, to_uint8
from model_diffusion import SCHEDULES, noise_levels
from pictures import sheets
from training.stages import load_first_stage
from util import UserError

TIMES = [0, 100, 250, 500, 750, 900, 999]


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", metavar="RUN", help="run name, folder or weights file; default: none, so pixels only")
    add("--data", metavar="FOLDER", help="as in training")
    add("--z", type=util.whole_number, default=15, help="of the slice (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of the noise (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/forward_noising.png"), help="picture (default: %(default)s)")
    return parser


@torch.no_grad()
def main() -> None:
    args = flags().parse_args()
    first_stage = load_first_stage(args.first_stage) if args.first_stage else None
    data = load_slices(find_data(args.data), "validate", first_stage.image_size if first_stage else 256)
    chosen = (data.z == args.z).nonzero()[:1, 0]
    if not len(chosen):
        raise UserError(f"--z {args.z}: validate has no such slice; choose one of 0..{data.slices_per_brain - 1}")
    x, z, case = data.batch(chosen)

    inputs = {"pixels": (x, lambda noised: noised)}
    if first_stage:
        inputs["latent"] = first_stage.encode(x, z), lambda noised: first_stage.decode(noised, z.expand(len(TIMES)))
    rows, captions, box = {}, [], sheets.head_box([data.images[chosen].numpy()])
    for what, (clean, show) in inputs.items():
        for schedule in SCHEDULES:
            alpha, sigma = (level[TIMES].view(-1, 1, 1, 1) for level in noise_levels(schedule, 1000))
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(args.seed))
            noised = to_uint8(show(alpha * clean + sigma * noise))[:, 0, box[0], box[1]]
            rows[f"{what}, {schedule}"] = noised.numpy()
            snr = 20 * (alpha / sigma).log10().flatten()
            captions += [f"t = {t}: {s:+.0f} dB" for t, s in zip(TIMES, snr)]
    page = sheets.sheet(
        list(rows.values()),
        title=f"forward process, case {int(case)}, z = {int(z)}: x_t = alpha x_0 + sigma noise, T = 1000; "
        "dB: SNR, alpha^2 / sigma^2; grey -1..1, clipped; anterior right",
        row_names=list(rows),
        captions=captions,
        zoom=max(1, 192 // x.shape[-1]),
    )
    sheets.save_picture(args.out, page)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
