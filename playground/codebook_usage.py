"""Which codes does a VQ-VAE use, how often, and what do they look like?

    python playground/codebook_usage.py --first-stage vqvae        # run name, folder or weights file

The picture. Left: the share of positions of every code on validate, most used first, over all positions and over those
that hold brain; perplexity is how many equally frequent codes would be as hard to guess. Middle: the coded part of a
slice and its codes, coloured by their rank over all positions. Right: the 64 most used of these in reading order, each
decoded at z = 15 as a grid filled with that one code, of which the middle patch is shown. Grey is 0..255.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util
from dataset import find_data, has_masks, load_slices, to_uint8
from evaluate import brain_positions
from model_VAE import VQVAE, load_first_stage
from pictures import sheets
from scores.metrics import code_usage
from util import UserError


@torch.no_grad()
def code_patches(model: VQVAE, codes: torch.Tensor, z: int) -> np.ndarray:
    """uint8 [N, f, f]: the middle patch of the slice that a grid filled with one of int64 codes [N] decodes to."""
    (_, h, w), f = model.latent_shape, model.factor
    device, top, left = model.latent_mean.device, h // 2 * f, w // 2 * f
    grids = codes.to(device)[:, None, None].expand(-1, h, w).split(16)
    decoded = [model.decode_indices(idx, torch.full((len(idx),), z, device=device)) for idx in grids]
    return to_uint8(model.crop(torch.cat(decoded)))[:, 0, top : top + f, left : left + f].cpu().numpy()


@torch.no_grad()
def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", metavar="RUN", default="vqvae", help="run name, folder or file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/codebook_usage.png"), help="picture (default: %(default)s)")
    args = parser.parse_args()
    device = util.pick_device(args.device)
    model, folder = load_first_stage(args.first_stage, device), find_data(args.data)
    if not isinstance(model, VQVAE):
        raise UserError(f"--first-stage {args.first_stage} is a {model.kind} and has no codes; name a VQ-VAE")
    data = load_slices(folder, "validate", model.image_size, masks=has_masks(folder, "validate"))

    parts = tqdm(torch.arange(len(data)).split(32), desc="encode", unit="batch", disable=None)
    codes = torch.cat([model.encode_indices(*data.batch(part, device)[:2]).cpu() for part in parts])
    K, (_, h, w) = model.codebook_size, model.latent_shape
    positions = {"all positions": codes.flatten()}
    if data.masks is not None:
        positions["brain positions"] = codes[brain_positions(data.masks, model)]
    count = torch.bincount(codes.flatten(), minlength=K)
    by_use = count.argsort(descending=True, stable=True)
    rank = by_use.argsort()

    figure = plt.figure(figsize=(15, 5.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1.15, 0.85, 1))
    axis = left.subplots()
    for name, idx in positions.items():
        score = code_usage(idx.numpy(), K)
        share = torch.bincount(idx, minlength=K).sort(descending=True).values / len(idx)
        axis.step(range(K), share.where(share > 0, torch.nan), label=f"{name}: perplexity {score['perplexity']:.0f}")
        print(f"{name:15s}  {len(idx)} codes  usage {score['usage']:.3f}  perplexity {score['perplexity']:.1f}")
    axis.axhline(1 / K, color="grey", linestyle="--", linewidth=1, label=f"all {K} equally often")
    axis.set(yscale="log", xlabel="rank of the code, each curve by its own use", ylabel="share of positions")
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)
    axis.set_title(f"use of the {K} codes of {args.first_stage} on validate")

    middle_of_head = (data.z - 15).abs().argmin().view(1)
    x, z, case = data.batch(middle_of_head)
    above, below = middle.subplots(2, 1)
    above.imshow(to_uint8(model.crop(x))[0, 0], cmap="gray", vmin=0, vmax=255)
    drawn = below.imshow(rank[codes[middle_of_head][0]], cmap="turbo", vmin=0, vmax=K - 1)
    middle.colorbar(drawn, ax=[above, below], label="rank of the code over all positions", shrink=0.8)
    above.set_title(f"case {int(case)}, z = {int(z)}; anterior right")
    below.set_title(f"its {h} x {w} codes")

    patches = code_patches(model, by_use[:64], z=15).astype(float)  # tiled 8 x 8, a pixel of nothing between them
    tiles = np.pad(patches, ((0, 64 - len(patches)), (0, 1), (0, 1)), constant_values=np.nan)
    side = 8 * tiles.shape[1]
    axis = right.subplots()
    axis.imshow(tiles.reshape(8, 8, *tiles.shape[1:]).swapaxes(1, 2).reshape(side, side), cmap="gray", vmin=0, vmax=255)
    axis.axis("off")
    axis.set_title(f"the {min(64, K)} most used codes, {model.factor} x {model.factor} pixels each, at z = 15")
    for axis in (above, below):
        axis.set(xticks=[], yticks=[])
    sheets.save_picture(args.out, figure)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
