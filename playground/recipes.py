"""Which recipe of diffusion learns most in the same time? One small network by each of RECIPES, equal but for that.

    python playground/recipes.py --first-stage vqvae          # trains the runs recipe-*; again: scores only

A recipe is a noise schedule, what the network predicts, how the squared error is weighted, and where steps are drawn
(model_diffusion.py). Every step costs the same, so equal steps are equal time. The networks are those of --preset demo
that see slices one by one; a name that begins with "--" is passed on to stable_diffusion.py, which resumes.

Losses of different recipes cannot be compared. The denoised latent can: the left panel shows the squared error of x_0
on validation slices at equal noise, over that of the best recipe there, from little noise (texture) to nearly nothing
else (size and age of the head). The right panel and the table show scores of brains drawn by the same 20 steps of dpm,
over those of as many held-out heads.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stable_diffusion
import util
from dataset import find_data, load_slices
from model_diffusion import RECIPES, LatentDiffusion
from model_VAE import load_second_stage
from parts.autoencoder import Autoencoder
from pictures import sheets
from scores.page import markdown_table
from scores.samples import SAMPLE_SCORES, score_samples
from scores.scorer import find_scorer
from stable_diffusion import decode_brain, encode_all, sample_latents

SMALL = ["--preset", "demo", "--slices", "1", "--batch-size", "32", "--learning-rate", "1e-3"]
NOISE = torch.arange(-4.0, 5.0)  # ln(sigma / alpha) where x_0 is compared; 0 is as much noise as latent
SHOWN = {
    "frechet_trained": "Frechet,\ntrained\nencoder",
    "frechet_random": "Frechet,\nrandom\nnetwork",
    "frechet_texture": "Frechet,\nhistogram,\ntexture",
    "sliced_wasserstein": "sliced\nWasserstein",
    "csf_wasserstein": "CSF\narea",
    "grey_wasserstein": "grey\nmatter\narea",
    "white_wasserstein": "white\nmatter\narea",
    "z_error": "error\nof z",
}


def train(recipe: str, args: argparse.Namespace, more: list[str]) -> tuple[LatentDiffusion, Autoencoder]:
    """The model of one recipe and its first stage, trained by stable_diffusion.py, which leaves finished runs alone.

    Raises UserError when the run failed or has not come to its end.
    """
    name = f"recipe-{recipe}"
    flags = ["--name", name, "--recipe", recipe, "--first-stage", args.first_stage, "--seed", args.seed, *SMALL]
    flags += ["--steps", args.steps, "--report-every", max(1, args.steps // 4), "--device", args.device]
    flags += ["--data", args.data] if args.data else []
    util.run_script("stable_diffusion.py", [*flags, *more])
    model, first_stage, description = load_second_stage(name, LatentDiffusion, util.pick_device(args.device), None)
    if description["step"] < args.steps:
        raise util.UserError(f"run {name} has {description['step']} of {args.steps} steps; the same command continues")
    return model, first_stage


@torch.no_grad()
def denoising_error(model: LatentDiffusion, latents: Tensor, z: Tensor) -> list[float]:
    """Mean squared error of x_0 of latents [N, C, h, w] of unit variance at every level of NOISE; noise is the same."""
    torch.manual_seed(0)
    errors, noise = [], torch.randn_like(latents)
    for wanted in NOISE.to(latents.device):
        t = int(((model.sigma / model.alpha).log() - wanted).abs().argmin())
        x = (model.alpha[t] * latents + model.sigma[t] * noise).float()
        people = torch.full((len(x), len(model.conditions)), math.nan, device=x.device)
        parts = [model.denoise(x[n], t, z[n], 1, people[n])[0] for n in torch.arange(len(x)).split(64)]
        errors.append(float((torch.cat(parts) - latents).square().mean()))
    return errors


def draw_brains(model: LatentDiffusion, first_stage: Autoencoder, args: argparse.Namespace) -> Tensor:
    """uint8 [n, 32, S, S]: brains of the default sampler, their noise the same for all recipes."""
    settings, device = stable_diffusion.flags().parse_args([]), model.alpha.device
    settings.seed = args.seed
    latents = [sample_latents(model, range(i, i + 1), settings, device)[-1] for i in range(args.brains)]
    return torch.stack([torch.from_numpy(decode_brain(first_stage, x, args.seed, i)) for i, x in enumerate(latents)])


def draw(errors: dict[str, list[float]], scores: dict[str, dict], args: argparse.Namespace):
    """The picture: error of x_0 against noise, and scores over those of real heads."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained", width_ratios=(1, 1.5))
    best = torch.tensor(list(errors.values())).amin(0)
    for number, recipe in enumerate(errors):
        left.plot(NOISE, torch.tensor(errors[recipe]) / best, marker=".", color=f"C{number}", label=recipe)
        ratios = [scores[recipe]["samples"][score] / scores[recipe]["real"][score] for score in SHOWN]
        places = torch.arange(len(SHOWN)) + (number - (len(errors) - 1) / 2) * 0.8 / len(errors)
        right.bar(places, ratios, width=0.8 / len(errors), color=f"C{number}", label=recipe)
    left.set(
        xlabel="noise, ln(sigma / alpha)", ylabel="squared error of $x_0$ over the best recipe's", ylim=(0.98, 1.5)
    )
    left.set_title("Denoising, validation slices")
    right.set_xticks(range(len(SHOWN)), SHOWN.values(), fontsize=8)
    right.set(ylabel="samples / real heads", yscale="log", title=f"Scores of {args.brains} brains: lower is better")
    right.set_ylim(0.7, 10)
    right.axhline(1, color="black", linewidth=1)
    for axis in (left, right):
        axis.grid(alpha=0.3, axis="y")
    left.legend(title="recipe")
    title = f"{len(errors)} recipes for one network and equal time: {args.steps:,} steps, seed {args.seed}"
    figure.suptitle(f"{title}; what leaves a frame is worse than it shows")
    return figure


def main() -> None:
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
    args, more = parser.parse_known_args()
    if args.brains < 2:
        raise util.UserError("--brains 1: scores of samples need two brains")
    device, folder = util.pick_device(args.device), find_data(args.data)
    models = {recipe: train(recipe, args, more) for recipe in args.recipes}
    first_stage = next(iter(models.values()))[1]
    known, held_out = (load_slices(folder, split, first_stage.image_size) for split in ("train", "validate"))
    scorer, described = find_scorer()
    latents, z = (part[::4] for part in encode_all(first_stage, held_out, device, "auto"))  # every fourth slice will do

    errors, scores = {}, {}
    for recipe, (model, first_stage) in models.items():
        errors[recipe] = denoising_error(model, latents, z)
        brains = draw_brains(model, first_stage, args)
        scores[recipe] = score_samples(brains, known, held_out, scorer, described["digest"])[0]
        sheets.save_picture(
            args.out.with_name(f"{args.out.stem}_{recipe}.png"),
            sheets.brain_sheet(brains[0].numpy(), f"recipe {recipe} after {args.steps} steps"),
        )
    rows = []
    for score, (what, unit, _) in SAMPLE_SCORES.items():
        cells = [f"{scores[recipe]['samples'][score]:.4g}" for recipe in scores]
        rows.append(
            [f"{what}{f', {unit}' if unit else ''}", *cells, f"{next(iter(scores.values()))['real'][score]:.4g}"]
        )
    for level, *values in zip(NOISE.tolist(), *errors.values(), strict=True):
        rows.append([f"squared error of x_0 at ln(sigma / alpha) = {level:.0f}", *(f"{v:.4f}" for v in values), "-"])
    print(markdown_table(["score", *scores, "real"], rows))
    report = {"steps": args.steps, "brains": args.brains, "noise": NOISE.tolist(), "errors": errors, "scores": scores}
    util.write_file(args.out.with_suffix(".json"), json.dumps(report, indent=2).encode())
    sheets.save_picture(args.out, draw(errors, scores, args))
    print(f"picture: {args.out}, scores: {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    util.command(main)
