"""What should the noise of a brain's slices have in common, so that they make one head?

    python playground/noise_sharing.py --run diffusion        # a run of stable_diffusion.py

Samples the same people from three kinds of noise: correlated along z as the latents of training heads are (matched,
what stable_diffusion.py does), one noise for all slices (shared), and a noise of its own for every slice (own).
Printed: the SSIM of neighbouring slices (z and z + 1), its mean and its sd over brains, beside that of real validation
brains. The picture: eight neighbouring slices of each. Slices of one head pass smoothly into each other; those of
different heads jump in size, shape and brightness. An SSIM above the real one is no merit: the slices then change too
little with z. Anterior is right.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import util
from dataset import find_data, load_slices
from model_diffusion import LatentDiffusion
from pictures import sheets
from scores.metrics import adjacent_ssim
from stable_diffusion import MODELS, Sampling, draw_brains
from training.stages import load_second_stage
from util import UserError

WORDS = {"matched": "matched: correlated along z as latents are", "shared": "shared: one noise for all slices",
         "own": "own: a noise for each slice", "real": "real"}  # fmt: skip


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--run", default="diffusion", help="second stage: run name, folder or weights file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--brains", type=util.positive_int, default=2, help="to sample each way (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of the noise (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/noise_sharing.png"), help="picture (default: %(default)s)")
    return parser


def correlations(model: LatentDiffusion) -> dict[str, Tensor]:
    """{name of a noise: its correlation along z, [kinds, Z, Z]}."""
    measured = model.gaussian.correlation.clone()
    identity = torch.eye(len(measured[0]), device=measured.device).expand_as(measured)
    return {"matched": measured, "shared": torch.ones_like(measured), "own": identity}


def main() -> None:
    args = flags().parse_args()
    model, first_stage = load_second_stage(args.run, MODELS, util.pick_device(args.device))
    data = load_slices(find_data(args.data), "validate", first_stage.image_size)
    real, sampling = data.whole_brains(), Sampling(seed=args.seed)
    if not len(real):
        raise UserError(f"no brain of {data.folder} has all slices; python dataset.py {data.folder} lists the missing")

    steps = [step for step in (1, 4, 8, 16) if step < model.slices_per_brain]
    for kind, correlation in enumerate(model.gaussian.correlation):
        words = ", ".join(f"{correlation.diagonal(step).mean():.2f}" for step in steps)
        print(f"kind {kind} of place: noise correlates by {words} over {', '.join(map(str, steps))} slices")

    groups = {}
    for kind, correlation in correlations(model).items():
        model.gaussian.correlation.copy_(correlation)
        drawn = draw_brains(model, first_stage, sampling, range(args.brains))
        groups[kind] = torch.stack([torch.from_numpy(slices) for slices, _, _ in drawn])
    groups["real"] = real

    middle = model.slices_per_brain // 2
    shown, captions = range(max(1, middle - 4), min(middle + 4, model.slices_per_brain)), []
    for name, group in groups.items():
        scores = adjacent_ssim(group)
        mean, sd = scores.mean(), scores.mean(1).std(correction=0)
        print(f"{name:8s} SSIM of neighbours {mean:.4f}, sd {sd:.4f} over {len(group)} brains")
        captions += [f"z = {z}: {scores[0, z - 1]:.3f}" for z in shown]
    page = sheets.sheet(
        sheets.heads([group[0][shown].numpy() for group in groups.values()]),
        title=f"neighbouring slices, and the SSIM of each to the slice below; {model.description['step']:,} training "
        f"steps, seed {args.seed}, {sampling.words()}; anterior right",
        row_names=[WORDS[name] for name in groups],
        captions=captions,
        zoom=max(1, 192 // first_stage.image_size),
    )
    sheets.save_picture(args.out, page)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
