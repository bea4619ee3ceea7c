"""Which recipe of diffusion learns most in the same time? One small network by each of RECIPES, equal but for that.

    python playground/recipes.py --first-stage vqvae          # trains the runs recipe-*; again: scores only

A recipe is a noise schedule, the weight of the squared error at each of its levels, and where steps are drawn
(model_diffusion.py). Every step costs the same, so equal steps are equal time. The networks are those of --preset demo
that see slices one by one.

Losses of different recipes cannot be compared. The denoised latent can: the upper panel shows the squared error of x_0
on validation slices at equal noise, over that of the best recipe there, from little noise (texture) to nearly nothing
else (size and age of the head). The lower panel and the table show scores of brains drawn by the default sampler, over
those of as many held-out heads.
"""

import argparse
import json
import math
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import util
from dataset import find_data, load_slices
from model_diffusion import RECIPES, LatentDiffusion
from parts.autoencoder import Autoencoder
from pictures import sheets
from scores.page import markdown_table
from scores.samples import SAMPLE_SCORES, score_samples
from scores.scorer import find_scorer
from stable_diffusion import MODELS, Sampling, draw_brains
from training.latents import encode_all
from training.stages import load_second_stage

NOISE = torch.arange(-4.0, 5.0)  # ln(sigma / alpha) where x_0 is compared; 0 is as much noise as latent
DISTANCES = {name: score.title for name, score in SAMPLE_SCORES.items() if score.group == "distance"}


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", default="vqvae", metavar="RUN", help="run name, folder or weights file (default: %(default)s)")
    add("--recipes", choices=RECIPES, nargs="+", default=list(RECIPES), help="default: all")
    add("--steps", type=util.positive_int, default=1200, help="of each run (default: %(default)s)")
    add("--brains", type=util.positive_int, default=8, help="of each run, at least 2 (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of the runs and of the noise (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/recipes.png"), help="picture (default: %(default)s)")
    return parser


def train(recipe: str, args: argparse.Namespace) -> tuple[LatentDiffusion, Autoencoder]:
    """The model of one recipe and its first stage, trained by stable_diffusion.py, which leaves finished runs alone."""
    flags = ["--name", f"recipe-{recipe}", "--recipe", recipe, "--first-stage", args.first_stage, "--seed", args.seed]
    flags += ["--preset", "demo", "--slices", 1, "--batch-size", 32, "--steps", args.steps, "--device", args.device]
    util.run_script("stable_diffusion.py", flags + (["--data", args.data] if args.data else []))
    return load_second_stage(f"recipe-{recipe}", MODELS, util.pick_device(args.device))


@torch.no_grad()
def denoising_error(model: LatentDiffusion, latents: Tensor, z: Tensor) -> list[float]:
    """Mean squared error of x_0 of latents [N, C, h, w] of unit variance at every level of NOISE; noise is the same."""
    torch.manual_seed(0)
    errors, noise = [], torch.randn_like(latents)
    nobody = torch.full((len(latents), len(model.conditions)), math.nan, device=latents.device)
    for wanted in NOISE.to(latents.device):
        t = int(((model.sigma / model.alpha).log() - wanted).abs().argmin())
        x = (model.alpha[t] * latents + model.sigma[t] * noise).float()
        parts = [model.denoise(x[n], t, z[n], 1, nobody[n])[0] for n in torch.arange(len(x)).split(64)]
        errors.append(float((torch.cat(parts) - latents).square().mean()))
    return errors


def draw(errors: dict[str, list[float]], scores: dict[str, dict], title: str):
    """The picture: error of x_0 against noise, and distances over those of real heads."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(10.5, 9), layout="constrained")
    best, width = torch.tensor(list(errors.values())).amin(0), 0.8 / len(errors)
    for n, recipe in enumerate(errors):
        colour, style = sheets.COLOURS[n], {"marker": sheets.MARKERS[n], "markersize": 5, "label": recipe}
        upper.plot(NOISE, torch.tensor(errors[recipe]) / best, color=colour, **style)
        ratios = [scores[recipe]["samples"][name] / scores[recipe]["real"][name] for name in DISTANCES]
        lower.bar(torch.arange(len(ratios)) + (n - (len(errors) - 1) / 2) * width, ratios, width, color=colour)
    upper.set(xlabel="noise, ln(sigma / alpha)", ylabel="squared error of $x_0$ over the best recipe's")
    upper.set(title="Denoising, validation slices", ylim=(0.98, 1.5))
    handles, names = upper.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), title="recipes; bars in this order")
    lower.set_xticks(range(len(DISTANCES)), [textwrap.fill(words, 13, break_on_hyphens=False)
                     for words in DISTANCES.values()], fontsize=9)  # fmt: skip
    lower.set(title="Drawn brains: lower is better", ylabel="samples / real heads", yscale="log", ylim=(0.5, 20))
    lower.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    lower.axhline(1, color="black", linewidth=1)
    for axis in (upper, lower):
        axis.grid(alpha=0.3, axis="y")
    figure.suptitle(f"{title}; values outside a frame are worse than it shows")
    return figure


def main() -> None:
    args = flags().parse_args()
    if args.brains < 2:
        raise util.UserError("--brains 1: scores of samples need two brains")
    folder = find_data(args.data)
    models = {recipe: train(recipe, args) for recipe in args.recipes}
    first_stage = next(iter(models.values()))[1]
    known, held_out = (load_slices(folder, split, first_stage.image_size) for split in ("train", "validate"))
    scorer, described = find_scorer()
    latents = encode_all(first_stage, held_out, "auto")[::4]  # every fourth slice will do
    z = held_out.z[::4].to(latents.device)

    errors, scores = {}, {}
    for recipe, (model, first_stage) in models.items():
        errors[recipe] = denoising_error(model, latents, z)
        drawn = draw_brains(model, first_stage, Sampling(seed=args.seed), range(args.brains))
        brains = torch.stack([torch.from_numpy(slices) for slices, _, _ in drawn])
        scores[recipe] = score_samples(brains, known, held_out, scorer, described["digest"])[0]
    real = next(iter(scores.values()))["real"]
    rows = []
    for name, score in ((name, score) for name, score in SAMPLE_SCORES.items() if name in real):
        cells = [f"{values[name]:.4g}" for values in [*(found["samples"] for found in scores.values()), real]]
        rows.append([f"{score.title}, {score.unit}" if score.unit else score.title, *cells])
    for level, *values in zip(NOISE.tolist(), *errors.values(), strict=True):
        rows.append([f"squared error of x_0 at ln(sigma / alpha) = {level:.0f}", *(f"{v:.4f}" for v in values), "-"])
    print(markdown_table(["score", *scores, "real"], rows))
    report = {"steps": args.steps, "brains": args.brains, "noise": NOISE.tolist(), "errors": errors, "scores": scores}
    util.write_file(args.out.with_suffix(".json"), json.dumps(report, indent=2).encode())
    title = f"One network, equal time: {args.steps:,} steps; {args.brains} brains of each recipe, seed {args.seed}"
    sheets.save_picture(args.out, draw(errors, scores, title))
    print(f"picture: {args.out}, scores: {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    util.command(main)
