"""Which codes does a VQ-VAE use, how often, and what do they look like?

    python playground/codebook_usage.py --first-stage vqvae        # run name, folder or weights file

The picture. Left: the share of positions of every code on validate, most used first, over all positions and over those
that hold brain; perplexity is how many equally frequent codes would be as hard to guess. Right: the 64 most used codes
in reading order, each decoded in the middle of the head as a grid filled with that one code, of which the middle patch
is shown.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import util
from dataset import find_data, has_masks, load_slices, to_uint8
from model_VAE import VQVAE
from pictures import sheets
from scores.ledger import brain_positions
from scores.metrics import COUNTABLE, code_usage
from training.stages import load_first_stage
from util import UserError


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", metavar="RUN", default="vqvae", help="run name, folder or file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/codebook_usage.png"), help="picture (default: %(default)s)")
    return parser


@torch.no_grad()
def code_patches(model: VQVAE, codes: Tensor, z: int) -> Tensor:
    """uint8 [N, f, f]: the middle patch of the slice that a grid filled with one of int64 codes [N] decodes to."""
    (_, h, w), f = model.latent_shape, model.factor
    device, top, left = model.latent_mean.device, h // 2 * f, w // 2 * f
    grids = codes.to(device)[:, None, None].expand(-1, h, w).split(16)
    decoded = [model.decode_indices(idx, torch.full((len(idx),), z, device=device)) for idx in grids]
    return to_uint8(model.crop(torch.cat(decoded)))[:, 0, top : top + f, left : left + f].cpu()


def tiled(patches: Tensor) -> np.ndarray:
    """float [8 (f + 1), 8 (f + 1)] of up to 64 patches [n, f, f], in reading order; NaN between them and at the end."""
    tiles = np.pad(patches.numpy().astype(float), ((0, 64 - len(patches)), (0, 1), (0, 1)), constant_values=np.nan)
    side = tiles.shape[1]
    return tiles.reshape(8, 8, side, side).swapaxes(1, 2).reshape(8 * side, 8 * side)


@torch.no_grad()
def main() -> None:
    args = flags().parse_args()
    device, folder = util.pick_device(args.device), find_data(args.data)
    model = load_first_stage(args.first_stage, device)
    if not isinstance(model, VQVAE) or model.codebook_size > COUNTABLE:
        raise UserError(f"--first-stage {args.first_stage} is no VQ-VAE with at most {COUNTABLE:,} codes; name another")
    data = load_slices(folder, "validate", model.image_size, masks=has_masks(folder, "validate"))
    parts = util.progress(torch.arange(len(data)).split(32), "encode", unit="batch")
    codes = torch.cat([model.encode_indices(*data.batch(part, device)[:2]).cpu() for part in parts])
    K = model.codebook_size
    positions = {"all positions": codes.flatten()}
    if data.masks is not None:
        positions["brain positions"] = codes[brain_positions(data.masks, model)]
    by_use = torch.bincount(codes.flatten(), minlength=K).argsort(descending=True, stable=True)

    figure, (axis, patches) = plt.subplots(1, 2, figsize=(10.5, 5.2), layout="constrained")
    for (name, idx), colour in zip(positions.items(), sheets.COLOURS[::3]):
        score = code_usage(idx.numpy(), K)
        share = torch.bincount(idx, minlength=K).sort(descending=True).values / len(idx)
        label = f"{name}: perplexity {score['perplexity']:.0f}"
        axis.step(range(K), share.where(share > 0, torch.nan), color=colour, label=label)
        print(f"{name:15s}  {len(idx)} codes  usage {score['usage']:.3f}  perplexity {score['perplexity']:.1f}")
    axis.axhline(1 / K, color="grey", linestyle="--", linewidth=1, label=f"all {K} equally often")
    axis.set(yscale="log", xlabel="rank of the code, each curve by its own use", ylabel="share of positions")
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)
    axis.set_title(f"use of the {K} codes of {Path(args.first_stage).stem} on validate")

    height = data.slices_per_brain // 2
    patches.imshow(tiled(code_patches(model, by_use[:64], height)), cmap="gray", vmin=0, vmax=255)
    patches.set_title(f"the {min(64, K)} most used codes, {model.factor} x {model.factor} pixels each, at z = {height}")
    patches.axis("off")
    sheets.save_picture(args.out, figure)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
