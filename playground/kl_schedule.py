"""What does annealing the weight of the KL do for a VAE? Three small VAEs, equal but for the schedule of that weight.

    python playground/kl_schedule.py                  # trains kl-constant, kl-monotonic, kl-cyclical; again: draws only

A VAE pays for every bit of its latent. If it pays the full price from the start, it may stop using latent numbers
before the decoder has learned what they are good for (posterior collapse). Constant pays in full all the time,
monotonic after half of the steps, cyclical starts anew four times (Fu et al. 2019). The models are those of
prestage_train.py at 64 pixels, with the same seed, slices, order and number of steps; the price is high, so that
collapse is a danger.

Printed for the whole validation split: SSIM of what the posterior mean decodes to; KL in bits per slice; the objective,
which is the training loss at the full price, lower is better; and how much of the latent is in use: channels, and
single numbers of the grid, whose posterior mean has a variance above 0.01 over the slices (Burda et al. 2016). SSIM
alone is no verdict: who pays for more bits keeps more. The picture shows the weights, SSIM and KL while training, the
variances, and heads drawn from the prior: one latent from N(0, 1), decoded at six z.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util
from dataset import Slices, find_data, load_slices, to_uint8
from logger import read_log
from model_VAE import VAE, load_first_stage
from pictures import sheets
from prestage_train import reconstruction_loss
from scores.metrics import ACTIVE, mean_scores, slice_scores

SCHEDULES = {"constant": "C0", "monotonic": "C1", "cyclical": "C3"}  # and the colour of each
SMALL = ["--model", "vae", "--preset", "demo", "--gan-weight", "0", "--patch", "4", "--channel-multipliers", "1"]
SHOWN = (4, 9, 14, 19, 24, 29)


def train(schedule: str, args: argparse.Namespace) -> VAE:
    """The VAE of one schedule, by the command line of prestage_train.py, which resumes and leaves finished runs alone.

    Raises UserError when the run failed or has not come to its end.
    """
    name = f"kl-{schedule}"
    flags = ["--name", name, "--kl-schedule", schedule, "--kl-weight", args.kl_weight, "--seed", args.seed]
    flags += ["--steps", args.steps, "--report-every", max(1, args.steps // 10), "--device", args.device]
    flags += ["--data", args.data] if args.data else []
    flags += ["--minutes", args.minutes] if args.minutes else []
    util.run_script("prestage_train.py", [*SMALL, *flags])
    model = load_first_stage(name, util.pick_device(args.device))
    done = model.description["step"]
    if done < args.steps:
        raise util.UserError(f"run {name} has {done} of {args.steps} steps; the same command continues")
    return model


@torch.no_grad()
def measure(model: VAE, data: Slices, device: torch.device, kl_weight: float) -> tuple[dict[str, float], Tensor]:
    """Scores over a whole split, and the variance over its slices of every number's posterior mean, [C, h, w]."""
    torch.manual_seed(0)  # of the posterior samples
    scores, means, kl, loss = [], [], 0.0, 0.0
    for index in torch.arange(len(data)).split(32):
        x, z, _ = data.batch(index, device)
        mean, _ = model.posterior(x, z)
        means.append(mean.cpu())
        decoded = to_uint8(model.decode(model.encode(x, z), z))[:, 0].cpu()
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
def draw_head(model: VAE, device: torch.device, seed: int) -> list:
    """uint8 slices at the z of SHOWN, all decoded from one latent that only `seed` decides."""
    latent = model.prior_latent(1, torch.Generator().manual_seed(seed)).expand(len(SHOWN), -1, -1, -1)
    return list(to_uint8(model.decode(latent.to(device), torch.tensor(SHOWN, device=device)))[:, 0].cpu().numpy())


def curve(lines: list[dict], scalar: str) -> tuple[list, list]:
    """Steps and values of one scalar of a log."""
    points = [(line["step"], line[scalar]) for line in lines if scalar in line]
    return tuple(zip(*points, strict=True)) if points else ([], [])


def draw(results: dict, variances: dict, heads: dict, real: list, args: argparse.Namespace):
    """The picture: four panels of curves, under them a row of slices per schedule and one of real slices."""
    figure = plt.figure(figsize=(14, 11.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3.2, 8))
    weight, similarity, price, active = above.subplots(1, 4)
    for schedule, colour in SCHEDULES.items():
        lines, style = read_log(Path("log") / f"kl-{schedule}"), {"color": colour, "label": schedule}
        steps, values = curve(lines, "weight/kl")
        weight.plot(steps, [value * args.pixels for value in values], **style)
        similarity.plot(*curve(lines, "validate/ssim"), marker=".", **style)
        price.plot(*curve(lines, "train/kl"), **style)
        active.plot(variances[schedule].flatten().sort(descending=True).values.clamp(min=1e-6), **style)
    weight.set(title="weight of the KL", ylabel="of the KL in bits per pixel", xlabel="step")
    similarity.set(title="SSIM of the decoded mean", ylabel="validation SSIM", xlabel="step")
    price.set(title="KL, what the latent says", ylabel="training KL, bits per slice", xlabel="step")
    price.set_ylim(bottom=0)
    count = next(iter(variances.values())).numel()
    active.set(title="numbers of the latent in use", ylabel="variance of the posterior mean", yscale="log")
    active.set(xlabel=f"the {count:,} numbers, most varied first")
    active.axhline(ACTIVE, color="grey", linestyle="--", linewidth=1)
    active.text(0, 0.8 * ACTIVE, f"in use above {ACTIVE}", va="top", color="grey", fontsize=9)
    for axis in (weight, similarity, price, active):
        axis.grid(alpha=0.3)
    price.legend()

    axes = below.subplots(len(SCHEDULES) + 1, len(SHOWN))
    for row, (name, pictures) in zip(axes, {**heads, "real": real}.items(), strict=True):
        for axis, picture, z in zip(row, pictures, SHOWN, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set(xticks=[], yticks=[], title=f"z = {z}" if name == next(iter(heads)) else "")
        words = "real slices\nof one case"
        if name in results:
            result, channels = results[name], len(variances[name])
            words = f"{name}\nSSIM {result['ssim']:.4f}\nKL {result['kl']:,.0f} bits\n"
            words += f"objective {result['objective']:.4f}\nin use: {result['channels']} of {channels} channels,\n"
            words += f"{result['numbers']:,} of {count:,} numbers"
        row[0].set_ylabel(
            words, rotation=0, ha="right", va="center", labelpad=10, color=SCHEDULES.get(name, "black"), fontsize=11
        )
    below.suptitle("Drawn from the prior: one latent from N(0, 1), the same for all three, decoded at six z")
    figure.suptitle(
        f"Three VAEs that differ in the schedule of the KL weight alone: {args.steps:,} steps, full weight "
        f"{args.kl_weight:g}, {args.pixels**0.5:.0f} px; numbers in the rows below: whole validation split"
    )
    return figure


def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=util.positive_int, default=500, help="of each run (default: %(default)s)")
    add("--minutes", type=util.positive_float, help="stop a run after so many; the same command continues it")
    add(
        "--kl-weight",
        type=util.positive_float,
        default=1.0,
        help="at its full, of the KL in bits per pixel (default: %(default)s)",
    )
    add("--seed", type=util.seed, default=0, help="of the runs and of the drawn latent (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/kl_schedule.png"), help="picture (default: %(default)s)")
    args = parser.parse_args()
    device, folder = util.pick_device(args.device), find_data(args.data)
    models = {schedule: train(schedule, args) for schedule in SCHEDULES}
    image_size = models["constant"].image_size
    args.pixels, data = image_size**2, load_slices(folder, "validate", image_size)

    results, variances, heads = {}, {}, {}
    for schedule, model in models.items():
        results[schedule], variances[schedule] = measure(model, data, device, args.kl_weight)
        heads[schedule] = draw_head(model, device, args.seed)
    channels, numbers = len(variances["constant"]), variances["constant"].numel()
    print(
        f"| schedule | SSIM | KL, bits | objective | channels in use, of {channels} | numbers in use, of {numbers:,} |"
    )
    print("|---|---|---|---|---|---|")
    for schedule, result in results.items():
        print(
            f"| {schedule} | {result['ssim']:.4f} | {result['kl']:,.0f} | {result['objective']:.4f} "
            f"| {result['channels']} | {result['numbers']:,} |"
        )
    case = (data.case == data.case[0]).nonzero()[:, 0]
    real = [data.images[case[data.z[case] == z][0]].cpu().numpy() for z in SHOWN]
    sheets.save_picture(args.out, draw(results, variances, heads, real, args))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
