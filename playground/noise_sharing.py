"""What should the noise of a brain's 32 slices have in common, so that they make one head?

    python playground/noise_sharing.py --run diffusion        # a run of stable_diffusion.py

Samples the same brains three times: from noise that is correlated along z as the training latents are (matched), from
one noise for all 32 slices (shared), and from a noise of its own for every slice (own). Printed: the SSIM of
neighbouring slices (z and z + 1), its mean and its sd over brains or cases, beside that of real validation cases. The
picture: eight neighbouring slices of each. Slices of one head pass smoothly into each other; those of different heads
jump in size, shape and brightness. An SSIM above the real one is no merit: the slices then change too little with z.
Anterior is right.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stable_diffusion
import util
from dataset import find_data, load_slices
from heads.people import draw_person
from model_diffusion import SLICE_NOISE, LatentDiffusion
from model_VAE import load_second_stage
from pictures import sheets
from scores.metrics import adjacent_ssim
from stable_diffusion import decode_brain, sample_latents
from util import UserError

SHOWN = range(12, 20)


def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--run", default="diffusion", help="second stage: run name, folder or weights file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--brains", type=util.positive_int, default=2, help="to sample each way (default: %(default)s)")
    add("--sample-steps", type=util.positive_int, default=20, help="of the sampler dpm (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of the noise (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/noise_sharing.png"), help="picture (default: %(default)s)")
    args = parser.parse_args()
    device = util.pick_device(args.device)
    model, first_stage, description = load_second_stage(args.run, LatentDiffusion, device, decoder=None)
    data = load_slices(find_data(args.data), "validate", first_stage.image_size)
    real = data.whole_brains()
    if not len(real):
        raise UserError(
            f"no case of {data.folder} has all 32 slices; python dataset.py {data.folder} lists what is missing"
        )

    brains = {}
    for how in SLICE_NOISE:
        settings = stable_diffusion.flags().parse_args(["--slice-noise", how])
        settings.seed, settings.sample_steps = args.seed, args.sample_steps
        brains[how] = []
        for i in range(args.brains):
            person = draw_person({}, description, args.seed, i)
            latent = sample_latents(model, range(i, i + 1), settings, device, person=person)[-1]
            brains[how].append(torch.from_numpy(decode_brain(first_stage, latent, args.seed, i)))
    groups = {name: torch.stack(group) for name, group in brains.items()} | {"real": real}

    rows, captions = [], []
    for name, group in groups.items():
        scores = adjacent_ssim(group)
        mean, sd = scores.mean(), scores.mean(1).std(correction=0)
        print(f"{name:8s} SSIM of neighbours {mean:.4f}, sd {sd:.4f} over {len(group)} brains")
        rows.append(group[0][SHOWN].numpy())
        captions += [f"z = {n}, SSIM to z = {n - 1}: {scores[0, n - 1]:.3f}" for n in SHOWN]
    title = f"neighbouring slices after {description['step']:,} training steps, seed {args.seed}, "
    title += f"dpm in {args.sample_steps} steps; anterior right"
    zoom = max(1, 192 // first_stage.image_size)
    sheets.save_picture(args.out, sheets.sheet(rows, title=title, row_names=list(groups), captions=captions, zoom=zoom))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
