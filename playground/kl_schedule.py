"""What does annealing the weight of the KL do for a VAE? Three small VAEs, equal but for the schedule of that weight.

    python playground/kl_schedule.py                  # trains kl-constant, kl-monotonic, kl-cyclical; again: draws only

A VAE pays for every bit of its latent. If it pays the full price from the start, it may stop using latent numbers
before the decoder has learned what they are good for (posterior collapse). Constant pays in full all the time,
monotonic after half of the steps, cyclical starts anew four times (Fu et al. 2019). The models are those of
prestage_train.py at 64 pixels, with the same seed, slices, order and number of steps; the price is high, so that
collapse is a danger.

Printed for the whole validation split: SSIM of the decoded posterior mean; KL in bits per slice; the objective, which
is the training loss at the full price, lower is better; and how much of the latent is in use: channels, and single
numbers of the grid, whose posterior mean has a variance above 0.01 over the slices (Burda et al. 2016). SSIM alone is
no verdict: who pays for more bits keeps more. The picture shows the weights, SSIM and KL while training, the variances,
and heads drawn from the prior: one latent from N(0, 1), the same for all three, decoded at several z.
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
from dataset import Slices, find_data, load_slices, to_uint8
from logger import read_log
from model_VAE import VAE
from pictures import sheets
from prestage_train import reconstruction_loss
from scores.metrics import ACTIVE, mean_scores, slice_scores
from scores.page import markdown_table
from training.stages import load_first_stage

SCHEDULES = {name: {"label": name, "color": colour, "linestyle": line} for name, colour, line in zip(
             ("constant", "monotonic", "cyclical"), sheets.COLOURS[::2], ("-", "--", "-."))}  # fmt: skip
SMALL = ["--model", "vae", "--preset", "demo", "--gan-weight", 0, "--patch", 4, "--widths", 32]


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=util.positive_int, default=500, help="of each run (default: %(default)s)")
    add("--kl-weight", type=util.positive_float, default=1.0, help="at its full, of the KL in bits per pixel (default: "
        "%(default)s)")  # fmt: skip
    add("--seed", type=util.seed, default=0, help="of the runs and of the drawn latent (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/kl_schedule.png"), help="picture (default: %(default)s)")
    return parser


def train(schedule: str, args: argparse.Namespace) -> VAE:
    """The VAE of one schedule, trained by prestage_train.py, which leaves finished runs alone."""
    flags = [*SMALL, "--name", f"kl-{schedule}", "--kl-schedule", schedule, "--kl-weight", args.kl_weight]
    flags += ["--steps", args.steps, "--seed", args.seed, "--device", args.device]
    util.run_script("prestage_train.py", flags + (["--data", args.data] if args.data else []))
    return load_first_stage(f"kl-{schedule}", util.pick_device(args.device))


@torch.no_grad()
def measure(model: VAE, data: Slices, kl_weight: float) -> tuple[dict[str, float], Tensor]:
    """Scores over a whole split, and the variance over its slices of every number's posterior mean, [C, h, w]."""
    torch.manual_seed(0)  # of the posterior samples
    scores, means, kl, loss = [], [], 0.0, 0.0
    for index in torch.arange(len(data)).split(32):
        x, z, _ = data.batch(index, model.latent_mean.device)
        means.append(model.posterior(x, z)[0].cpu())
        decoded = to_uint8(model.reconstruct(x, z))[:, 0].cpu()
        scores.append(slice_scores(decoded, data.images[index].cpu(), None))
        x_hat, losses = model(x, z)
        kl += float(losses["kl"]) * len(index) / len(data)
        loss += float(reconstruction_loss(x_hat, model.crop(x))) * len(index) / len(data)
    means = torch.cat(means)
    variance = means.var(0)
    result = mean_scores(scores) | {"kl": kl, "objective": loss + kl_weight * kl / model.image_size**2}
    result["channels"] = int((means.movedim(1, 0).flatten(1).var(1) > ACTIVE).sum())
    return result | {"numbers": int((variance > ACTIVE).sum())}, variance


@torch.no_grad()
def draw_head(model: VAE, shown: list[int], seed: int) -> np.ndarray:
    """Slices uint8 [n, S, S] at the z of `shown`, all decoded from one latent that only `seed` decides."""
    latent, device = model.prior_latent(1, torch.Generator().manual_seed(seed)), model.latent_mean.device
    latent = latent.to(device).expand(len(shown), -1, -1, -1)
    return to_uint8(model.decode(latent, torch.tensor(shown, device=device)))[:, 0].cpu().numpy()


def curve(lines: list[dict], scalar: str) -> tuple[list, list]:
    """Steps and values of one scalar of a log."""
    points = [(line["step"], line[scalar]) for line in lines if scalar in line]
    return tuple(zip(*points, strict=True)) if points else ([], [])


def draw(variances: dict[str, Tensor], heads, title: str):
    """The picture: four panels of curves, and under them the sheet `heads`."""
    figure = plt.figure(figsize=(10.5, 11), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    panels = above.subplots(2, 2).flatten()
    for schedule, style in SCHEDULES.items():
        lines = read_log(Path("log") / f"kl-{schedule}")
        for axis, scalar in zip(panels, ("weight/kl", "validate/ssim", "train/kl")):
            axis.plot(*curve(lines, scalar), **style)
        panels[3].plot(variances[schedule].flatten().sort(descending=True).values.clamp(min=1e-6), **style)
    for axis, name in zip(panels, ("weight of the KL in bits", "SSIM on validate", "training KL, bits per slice")):
        axis.set(title=name, xlabel="step")
    panels[3].set(title="variance of the posterior mean", yscale="log", xlabel="numbers of the latent, in order")
    panels[1].legend()
    axis = below.subplots()
    axis.imshow(np.asarray(heads), cmap="gray", vmin=0, vmax=255)
    axis.axis("off")
    figure.suptitle(title)
    return figure


def main() -> None:
    args = flags().parse_args()
    folder = find_data(args.data)
    models = {schedule: train(schedule, args) for schedule in SCHEDULES}
    size = models["constant"].image_size
    data = load_slices(folder, "validate", size)
    case, Z = (data.case == data.case[0]).nonzero()[:, 0], data.slices_per_brain
    case = case[Z // 8 :: max(1, Z // 6)]
    shown = data.z[case].tolist()

    rows, variances, heads = [], {}, {}
    for schedule, model in models.items():
        result, variances[schedule] = measure(model, data, args.kl_weight)
        heads[schedule] = draw_head(model, shown, args.seed)
        rows.append([schedule, f"{result['ssim']:.4f}", f"{result['kl']:,.0f}", f"{result['objective']:.4f}"])
        rows[-1] += [f"{result['channels']}", f"{result['numbers']:,}"]
    channels, numbers = len(variances["constant"]), variances["constant"].numel()
    in_use = [f"channels in use, of {channels}", f"numbers in use, of {numbers:,}"]
    print(markdown_table(["schedule", "SSIM", "KL, bits", "objective", *in_use], rows))
    heads["real"] = data.images[case].cpu().numpy()
    page = sheets.sheet(
        sheets.heads(list(heads.values())),
        title="drawn from the prior: one latent from N(0, 1), the same for all three",
        row_names=list(heads),
        captions=[f"z = {z}" for _ in heads for z in shown],
        zoom=max(1, 192 // size),
    )
    title = f"Three schedules of the KL weight, {args.steps:,} steps, full weight {args.kl_weight:g}, {size} px"
    sheets.save_picture(args.out, draw(variances, page, title))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
