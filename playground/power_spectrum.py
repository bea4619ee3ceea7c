"""What does the perceptual decoder buy, and what does it cost? Both decoders against real slices.

    python playground/power_spectrum.py --first-stage vqvae        # trained with --gan-weight above 0

Both decoders read the same latents of the first validation brains; the perceptual one draws texture. Above: power of
their pictures over that of the real ones, per spatial frequency; below 1 is blur, above 1 is too much texture; the
legend gives the price, SSIM over the slices and over the brain. Below: a piece of real slices and of the
reconstructions, enlarged. Anterior is right.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch

import util
from dataset import find_data, has_masks, load_slices, to_uint8
from pictures import sheets
from scores.metrics import RINGS, mean_scores, radial_spectrum, slice_scores
from training.stages import load_first_stage
from util import UserError


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", metavar="RUN", default="vqvae", help="run name, folder or file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--brains", type=util.positive_int, default=4, help="of validate (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/power_spectrum.png"), help="picture (default: %(default)s)")
    return parser


@torch.no_grad()
def main() -> None:
    args = flags().parse_args()
    device, folder = util.pick_device(args.device), find_data(args.data)
    model = load_first_stage(args.first_stage, device, "perceptual")
    data = load_slices(folder, "validate", model.image_size, masks=has_masks(folder, "validate"))
    brains = data.whole_cases()[: args.brains]
    if not len(brains):
        raise UserError(f"no brain of {folder} has all slices; python dataset.py {folder} lists the missing")
    index, generator = brains.flatten(), torch.Generator().manual_seed(0)
    real, masks = data.images[index].cpu(), data.masks[index] if data.masks is not None else None

    decoded = {"fidelity": [], "perceptual": []}
    for brain in brains:
        x, z, _ = data.batch(brain, device)
        latent = model.encode(x, z)
        for name, pictures in decoded.items():
            model.use_decoder(name)
            pictures.append(to_uint8(model.draw(latent, z, generator))[:, 0].cpu())
    decoded = {name: torch.cat(pictures) for name, pictures in decoded.items()}

    figure = plt.figure(figsize=(10.5, 9.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.6))
    axis, power = above.subplots(), radial_spectrum(real).mean(0)
    frequency = (torch.arange(RINGS) + 0.5) / (2 * RINGS)
    for (name, pictures), colour, marker in zip(decoded.items(), sheets.COLOURS[::2], sheets.MARKERS[::2]):
        scores = mean_scores([slice_scores(pictures, real, masks)])
        brain = f", brain SSIM {scores['brain_ssim']:.4f}" if "brain_ssim" in scores else ""
        ratio = radial_spectrum(pictures).mean(0) / power
        label = f"{name}:\nSSIM {scores['ssim']:.4f}{brain}"
        axis.plot(frequency, ratio, color=colour, marker=marker, markersize=5, label=label)
        print(f"{name:22s}  SSIM {scores['ssim']:.4f}{brain}  power ratio by frequency " +
              " ".join(f"{r:.3f}" for r in ratio.tolist()))  # fmt: skip
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(xlabel="spatial frequency, cycles per pixel", ylabel="power, reconstructed / real", ylim=(0, None))
    axis.set(title=f"{len(index)} validation slices; 1 is real, less is blur")
    above.legend(loc="outside right upper")  # nowhere in the axes is room beside the curves
    axis.grid(alpha=0.3)

    Z, side = data.slices_per_brain, model.image_size
    piece = slice(side // 4, side // 2)  # cortex, rear left
    columns = {
        name: pictures[[Z // 3, 2 * Z // 3], piece, piece].numpy()
        for name, pictures in {"real": real, **decoded}.items()
    }
    brightest = int(columns["real"].max())
    for column, (name, pictures) in zip(below.subplots(2, len(columns)).T, columns.items(), strict=True):
        for cell, picture, z in zip(column, pictures, (Z // 3, 2 * Z // 3), strict=True):
            cell.imshow(picture, cmap="gray", vmin=0, vmax=brightest)
            cell.set(xticks=[], yticks=[], ylabel=f"z = {z}" if name == "real" else "")
        column[0].set_title(name)
    below.suptitle(f"{side // 4} x {side // 4} pixels with cortex; white is grey level {brightest}")
    sheets.save_picture(args.out, figure)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
