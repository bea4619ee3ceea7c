"""Given every fourth slice of a head, how near are the slices drawn between to the real ones?

    python playground/complete.py --run diffusion            # a run, or a weights file
    python playground/complete.py --run diffusion --every 8

Of held-out heads, every fourth slice and the last are given. The others are linear interpolations of the given pixels;
or the conditional mean of the Gaussian prior, decoded; or drawn by diffusion, twice. Beside them are the real slices
after stage one, which no drawing from its latents can surpass. Printed over all slices that are not given: SSIM, also
within the brain; the areas of cerebrospinal fluid (CSF), grey and white matter as shares of the real ones, as read by
the network of scores/scorer.py, with the mean error of a slice behind; and how far two draws of a slice differ, beside
how far a draw differs from the real slice after stage one: about as far, if draws leave open what the given slices
leave open. The picture shows the first head.
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
from dataset import find_data, has_masks, load_slices, to_float
from parts.completion import weights_of_known
from parts.gaussian_prior import GaussianPrior
from pictures import sheets
from pictures.volume import FIELD, cut
from scores.metrics import mean_scores, slice_scores
from scores.page import markdown_table
from scores.scorer import TISSUES, Scorer, find_scorer, read_slices
from stable_diffusion import MODELS, Sampling, complete_brain, decode_brain
from training.stages import find_encoder, load_second_stage
from util import UserError

CUTS = {"x": ("sagittal", 25), "y": ("coronal", -30)}  # mm
SHOWN = ("real", "interpolated", "drawn", "drawn again")


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--run", default="diffusion", help="second stage: run name, folder or weights file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--heads", type=util.positive_int, default=6, help="at most (default: %(default)s)")
    add("--every", type=util.positive_int, default=4, metavar="N", help="slice is given (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of the first draw; the second has the next (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/complete.png"), help="picture (default: %(default)s)")
    return parser


def interpolated(slices: np.ndarray, z: list[int], slices_per_brain: int) -> np.ndarray:
    """uint8 [Z, S, S]: a brain whose slices at z are given, uint8 [k, S, S]; each pixel is linear between them."""
    weights = np.stack([np.interp(np.arange(slices_per_brain), z, row) for row in np.eye(len(z))], 1)
    return np.tensordot(weights, slices, 1).round().astype(np.uint8)


def conditional_mean(gaussian: GaussianPrior, known: Tensor, z: Tensor) -> Tensor:
    """Latents [Z, C, h, w]: the mean of the prior's brains that have known latents [k, C, h, w] at z int64 [k]."""
    weights = weights_of_known(gaussian.correlation, z)[gaussian.kind]
    return gaussian.mean + torch.einsum("chwak,kchw->achw", weights, known - gaussian.mean[z])


def table(found: dict[str, list[np.ndarray]], real: Tensor, masks: Tensor | None, scorer: Scorer) -> str:
    """A row for each way, of its slices of every head, [n, S, S] each, beside the real ones [heads n, S, S]."""
    true, rows = read_slices(scorer, real)["areas"], []
    for way, heads in found.items():
        slices = torch.from_numpy(np.concatenate(heads))
        scores, areas = mean_scores([slice_scores(slices, real, masks)]), read_slices(scorer, slices)["areas"]
        share, error = areas.mean(0) / true.mean(0), (areas - true).abs().mean(0) / true.mean(0)
        rows.append([way, f"{scores['ssim']:.4f}", f"{scores.get('brain_ssim', np.nan):.4f}",
                     *(f"{a:.3f}, {b:.1%}" for a, b in zip(share.tolist(), error.tolist()))])  # fmt: skip
    return markdown_table(["slices", "SSIM", "brain SSIM", *(f"{tissue}, error" for tissue in TISSUES)], rows)


def draw(heads: dict[str, np.ndarray], z: list[int], title: str):
    """The picture, of {name: one head uint8 [Z, S, S]}: a slice between two that are given, and two reslices."""
    Z, size = next(iter(heads.values())).shape[:2]
    box = sheets.head_box(list(heads.values()))
    between = min((n for n in range(Z) if n not in z), key=lambda n: abs(n - Z // 2))
    figure = plt.figure(figsize=(10.5, 7.2), layout="constrained")
    figure.suptitle(f"{title}; slice z = {between} is not")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.6))
    widths = [part.stop - part.start for part in box[::-1]]
    for axis, (name, head) in zip(above.subplots(1, len(heads)), heads.items(), strict=True):
        axis.imshow(head[between][box], "gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[], title=f"{name}, z = {between}")
    panels = below.subplots(len(heads), 2, width_ratios=widths)
    for row, (name, head) in zip(panels, heads.items(), strict=True):
        for cell, (axis, (kind, mm)), part in zip(row, CUTS.items(), box[::-1], strict=True):
            picture = cut(head, axis, mm)[:, part]
            width = picture.shape[1] * FIELD / size
            cell.imshow(picture, "gray", vmin=0, vmax=255, origin="lower", extent=(0, width, -0.5, Z - 0.5), aspect=1)
            cell.set(xticks=[], yticks=z, yticklabels=[])
            cell.tick_params(length=5)
            if head is next(iter(heads.values())):
                cell.set_title(f"{kind}, {axis} = {mm} mm; marks: given slices")
        row[0].set_ylabel(name)
    return figure


def main() -> None:
    args = flags().parse_args()
    device = util.pick_device(args.device)
    model, first_stage = load_second_stage(args.run, MODELS, device)
    encoder, Z = find_encoder(first_stage), model.slices_per_brain
    if encoder is None:
        raise UserError(f"--run {args.run}: the encoder of its first stage is not here; name a run trained here")
    z = sorted({*range(0, Z, args.every), Z - 1})
    missing = [n for n in range(Z) if n not in z]
    if not missing:
        raise UserError(f"--every {args.every}: all slices are given; choose 2 or more")
    folder = find_data(args.data)
    data = load_slices(folder, "validate", first_stage.image_size, masks=has_masks(folder, "validate"))
    whole = data.whole_cases()[: args.heads]
    if not len(whole) or data.slices_per_brain != Z:
        raise UserError(f"{folder} has no whole validation brains of {Z} slices; name other data")
    people, scorer = data.people(model.conditions), find_scorer()[0].to(device)

    ways = ("interpolated", "Gaussian prior", "drawn", "drawn again", "real, after stage one")
    found, shown, at = {way: [] for way in ways}, {}, torch.tensor(z, device=device)
    for number, row in enumerate(util.progress(whole, "complete", unit="head")):
        head = data.images[row].cpu()
        person = {name: n for name, n in zip(model.conditions, people[row[0]].tolist()) if not np.isnan(n)}
        with torch.no_grad():
            latent = encoder.encode(to_float(head)[:, None].to(device), torch.arange(Z, device=device))
        mean = conditional_mean(model.gaussian, latent[at], at)
        given = {n: head[n].numpy() for n in z}
        drawn = [complete_brain(model, first_stage, encoder, Sampling(seed=args.seed + n), given, number, person)
                 for n in range(2)]  # fmt: skip
        brains = (interpolated(head[z].numpy(), z, Z), decode_brain(first_stage, mean, args.seed, number), *drawn,
                  decode_brain(first_stage, latent, args.seed, number))  # fmt: skip
        for way, brain in zip(ways, brains, strict=True):
            found[way].append(brain[missing])
        shown = shown or dict(zip(SHOWN, (head.numpy(), brains[0], *drawn)))

    index = whole[:, missing].flatten()
    real, masks = data.images[index].cpu(), None if data.masks is None else data.masks[index]
    print(table(found, real, masks, scorer))
    first, second, best = (np.concatenate(found[way]).astype(float) for way in ways[2:])
    apart, error = (np.sqrt(np.square(second - other).mean()) for other in (first, best))
    print(f"heads: {len(whole)}, slices given: {len(z)} of {Z}; root mean square of grey levels: two draws differ by "
          f"{apart:.2f}, a draw and the real slice after stage one by {error:.2f}")  # fmt: skip
    title = f"{model.description['step']:,} training steps; {len(z)} of {Z} slices of a held-out head are given"
    sheets.save_picture(args.out, draw(shown, z, title))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
