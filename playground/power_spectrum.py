"""What does the perceptual decoder buy, and what does it cost? Both decoders against real slices.

    python playground/power_spectrum.py --first-stage vqvae        # trained with --gan-weight above 0

Both decoders read the same latents of the first eight validation cases; a perceptual decoder that draws grain is shown
without and with grain. Left: power of their pictures over that of the real ones, per spatial
frequency; below 1 is blur, above 1 is too much texture; the legend gives the price, SSIM over the slices and over the
brain. Right: the middle of four real slices and of the reconstructions, enlarged. Anterior is right.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util
from dataset import find_data, has_masks, load_slices, to_uint8
from model_VAE import load_first_stage
from pictures import sheets
from scores.metrics import RINGS, mean_scores, radial_spectrum, slice_scores


@torch.no_grad()
def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", metavar="RUN", default="vqvae", help="run name, folder or file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--cases", type=util.positive_int, default=8, help="of validate (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/power_spectrum.png"), help="picture (default: %(default)s)")
    args = parser.parse_args()
    device, folder = util.pick_device(args.device), find_data(args.data)
    model = load_first_stage(args.first_stage, device, "perceptual")
    data = load_slices(folder, "validate", model.image_size, masks=has_masks(folder, "validate"))
    index = torch.isin(data.case, data.case.unique()[: args.cases]).nonzero()[:, 0]
    real, masks = data.images[index].cpu(), data.masks[index] if data.masks is not None else None

    decoded = {"fidelity": [], "perceptual": []} | ({"perceptual, with grain": []} if model.draws else {})
    generator = torch.Generator().manual_seed(0)
    for part in index.split(32):
        x, z, _ = data.batch(part, device)
        latent = model.encode(x, z)
        for name, pictures in decoded.items():
            model.use_decoder(name.split(",")[0])
            grain = model.draw_grain(len(part), generator) if name.endswith("grain") else None
            pictures.append(to_uint8(model.decode(latent, z, grain))[:, 0].cpu())
    decoded = {name: torch.cat(pictures) for name, pictures in decoded.items()}

    figure = plt.figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    axis, power = left.subplots(), radial_spectrum(real).mean(0)
    frequency = (torch.arange(RINGS) + 0.5) / (2 * RINGS)
    for (name, pictures), colour in zip(decoded.items(), ("C0", "C3", "C2"), strict=False):
        scores = mean_scores([slice_scores(pictures, real, masks)])
        ratio = radial_spectrum(pictures).mean(0) / power
        brain = f", brain {scores['brain_ssim']:.4f}" if "brain_ssim" in scores else ""
        axis.plot(frequency, ratio, color=colour, marker=".", label=f"{name}: SSIM {scores['ssim']:.4f}{brain}")
        print(f"{name:22s}  SSIM {scores['ssim']:.4f}{brain}  power ratio by frequency " +
              " ".join(f"{r:.3f}" for r in ratio.tolist()))  # fmt: skip
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(
        xlabel="spatial frequency, cycles per pixel",
        ylabel="power, reconstructed / real",
        title=f"{len(index)} validation slices; 1 is real, less is blur",
        ylim=(0, None),
    )
    left.legend(loc="outside lower center")  # nowhere in the axes is room beside the curves
    axis.grid(alpha=0.3)

    side = model.image_size
    shown = [int((data.z[index] == z).nonzero()[0]) for z in (6, 12, 18, 24)]
    rows = {"real": real, **decoded}
    axes = right.subplots(len(rows), len(shown))
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for cell, i in zip(row, shown, strict=True):
            middle = slice(3 * side // 8, 5 * side // 8)
            cell.imshow(np.asarray(pictures[i][middle, middle]), cmap="gray", vmin=0, vmax=255)
            cell.set(xticks=[], yticks=[])
            if name == "real":
                cell.set_title(f"z = {int(data.z[index[i]])}", fontsize=9)
        row[0].set_ylabel(name.replace(", ", ",\n"), fontsize=9)
    right.suptitle(f"the middle {side // 4} x {side // 4} pixels, grey 0..255", fontsize=10)
    sheets.save_picture(args.out, figure)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
