"""Do the 32 slices of a sampled brain belong together because they share one noise?

    python playground/noise_sharing.py --run diffusion        # a run of stable_diffusion.py

Samples the same brains twice, once from one noise for all 32 slices, once from a noise of its own for every slice.
Printed: the SSIM of neighbouring slices (z and z + 1), the mean and sd over brains or cases, beside that of real
validation cases. The picture: eight neighbouring slices of each. Slices of one head pass smoothly into each other;
those of different heads jump in size, shape and brightness. An SSIM above the real one is no merit: the slices then
change too little with z. Anterior is right.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util
from dataset import SLICES_PER_CASE, find_data, load_slices
from metrics import adjacent_ssim
from model_diffusion import LatentDiffusion, sample_ddim
from model_VAE import load_second_stage
from stable_diffusion import BrainNoise, decode_brains
from util import UserError


@torch.no_grad()
def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--run", default="diffusion", help="second stage: run name, folder or weights file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--brains", type=util.positive_int, default=2, help="to sample either way (default: %(default)s)")
    add("--sample-steps", type=util.positive_int, default=25, help="of ddim (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/noise_sharing.png"), help="picture (default: %(default)s)")
    args = parser.parse_args()
    device = util.pick_device(args.device)
    model, first_stage, description = load_second_stage(args.run, LatentDiffusion, device)
    if args.sample_steps > model.T:
        raise UserError(f"--sample-steps {args.sample_steps} is more than the model's {model.T}")
    data = load_slices(find_data(args.data), "validate", first_stage.image_size)
    z = torch.arange(SLICES_PER_CASE, device=device)

    def sample(noise: Tensor) -> Tensor:
        denoise, draw = partial(model.denoise, z=z), partial(torch.randn_like, noise)  # at eta 0 nothing is drawn
        *_, latent = sample_ddim(denoise, noise, model.alpha, model.sigma, draw, args.sample_steps)
        return torch.from_numpy(decode_brains(first_stage, latent)[0])

    brains = {"one noise": [], "noise per slice": [], "real": []}
    for i in range(args.brains):
        brains["one noise"].append(sample(BrainNoise(args.seed, range(i, i + 1), model.latent_shape, device)()))
        own = torch.Generator().manual_seed(util.mix_seed(args.seed, i))
        noise = torch.randn(SLICES_PER_CASE, *model.latent_shape, generator=own)
        brains["noise per slice"].append(sample(noise.to(device)))
    for case in data.case.unique():
        if (data.case == case).sum() == SLICES_PER_CASE:
            brains["real"].append(data.images[data.case == case])
    if not brains["real"]:
        raise UserError(
            f"no case of {data.folder} has all 32 slices; python dataset.py {data.folder} lists what is missing"
        )

    rows, captions, shown = [], [], range(12, 20)
    for name, group in brains.items():
        scores = adjacent_ssim(torch.stack(group))
        mean, sd = scores.mean(), scores.mean(1).std(correction=0)
        print(f"{name:16s} SSIM of neighbours {mean:.4f}, sd {sd:.4f} over {len(group)} brains")
        rows.append(group[0][shown].numpy())
        captions += [f"z = {n}, SSIM to z = {n - 1}: {scores[0, n - 1]:.3f}" for n in shown]
    title = f"neighbouring slices, {args.run} after {description['step']} steps, seed {args.seed}, "
    title += f"ddim in {args.sample_steps} steps; anterior right"
    zoom = max(1, 192 // first_stage.image_size)
    page = util.sheet(rows, title=title, row_names=list(brains), captions=captions, zoom=zoom)
    util.save_picture(args.out, page)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
