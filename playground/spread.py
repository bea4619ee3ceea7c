"""Do new heads differ as much as people do, and does the denoiser know soon enough what head it will be?

    python playground/spread.py --run diffusion --first-stage vqvae      # runs of one's own, or files

Heads differ most along the principal components of the latents of whole training brains. Left: how far the guess at x_0
moves along these components when held-out brains do, at each noise; 1 is all of the way. Dashed is the Gaussian prior
alone, solid the network that sees its guess. Where all is noise no guess can move; with a denoiser that moves too late
samples are too much alike. Right: the spread of sampled brains along the components over that of held-out people.
Printed: both, and the squared error of the prior's guess over that of the mean head, on held-out and on training heads.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import util
from dataset import find_data, load_slices
from heads.people import as_heard, draw_person
from model_diffusion import LatentDiffusion
from parts.gaussian_prior import Noisy
from pictures import sheets
from stable_diffusion import MODELS, BrainNoise, Sampling, denoiser, sample_latents
from training.latents import encode_all
from training.stages import load_first_stage, load_second_stage
from util import UserError

GROUPS = ((0, 1), (1, 3), (3, 6), (6, 12), (12, 24))  # of components, strongest first
COMPONENTS = GROUPS[-1][1]
NAMES = [f"{a + 1}" if b == a + 1 else f"{a + 1} to {b}" for a, b in GROUPS]
RATIOS = (60, 30, 15, 9, 6, 4, 2.5, 1.5)  # sigma / alpha


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--run", default="diffusion", help="second stage: run name, folder or weights file (default: %(default)s)")
    add("--first-stage", default="vqvae", metavar="RUN", help="that it was trained on (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--brains", type=util.positive_int, default=16, help="to sample, and to denoise (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/spread.png"), help="picture (default: %(default)s)")
    return parser


def principal_components(brains: Tensor, count: int) -> Tensor:
    """Orthonormal [count, D] of brains [n, Z, C, h, w], with D = Z C h w; the one of most variance comes first."""
    difference = (brains - brains.mean(0)).flatten(1)
    value, vector = torch.linalg.eigh((difference @ difference.T).double())
    axes = vector.flip(1)[:, :count].to(difference).T @ difference
    return axes / value.flip(0)[:count].to(difference).sqrt()[:, None]


def slopes(guesses: Tensor, truth: Tensor) -> list[float]:
    """Of guesses against truth, [n, components] each, about their means, in each of GROUPS."""
    guesses, truth = (part - part.mean(0) for part in (guesses, truth))
    return [float((guesses * truth)[:, a:b].sum() / truth[:, a:b].square().sum()) for a, b in GROUPS]


@torch.no_grad()
def guesses(model: LatentDiffusion, brains: Tensor, people: Tensor, t: int) -> dict[str, Tensor]:
    """{"prior", "network": guess at x_0} of noised brains [n, Z, C, h, w] of people [n, K] at step t."""
    n, Z = brains.shape[:2]
    z = torch.arange(Z, device=brains.device)
    alpha, sigma = (level[t].float().expand(n * Z, 1, 1, 1) for level in (model.alpha, model.sigma))
    x = alpha * brains.flatten(0, 1) + sigma * BrainNoise(model, 0, range(n))()
    known = people.repeat_interleave(Z, 0)
    prior, _, _ = model.gaussian(Noisy(x, alpha, sigma, z.repeat(n), Z, known))
    network = [denoiser(model, person[None], z, Sampling())(part, t)[0] for person, part in zip(people, x.split(Z))]
    return {"prior": prior.view_as(brains), "network": torch.stack(network)}


def draw(moves: dict[str, list[list[float]]], spread: list[float], title: str):
    """The picture: slopes at each of RATIOS and in each of GROUPS, and the spread of samples in each of GROUPS."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 5), layout="constrained")
    for g, (name, colour, marker) in enumerate(zip(NAMES, sheets.COLOURS, sheets.MARKERS, strict=True)):
        style = {"color": colour, "marker": marker, "markersize": 5}
        left.plot(RATIOS, [row[g] for row in moves["network"]], label=f"component {name}", **style)
        left.plot(RATIOS, [row[g] for row in moves["prior"]], linestyle="--", fillstyle="none", **style)
    left.set(xscale="log", xlabel="sigma / alpha, from noise to latent", title="guesses; dashed: Gaussian prior alone")
    left.set(ylabel="move of the guess over that of the truth")
    left.set_ylim(top=1.6)  # room for the legend
    left.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    left.minorticks_off()
    left.invert_xaxis()
    left.legend(loc="upper left", ncols=2, fontsize=9)
    right.bar_label(right.bar(NAMES, spread, color=sheets.COLOURS), fmt="%.2f")
    right.set(
        xlabel="component of whole brains",
        ylabel="sd of samples over sd of people",
        title="sampled brains",
        ylim=(0, max(1.1, *spread) + 0.1),
    )
    for axis in (left, right):
        axis.axhline(1, color="grey", linewidth=0.8)
    figure.suptitle(title)
    return figure


def main() -> None:
    args = flags().parse_args()
    device, folder = util.pick_device(args.device), find_data(args.data)
    model, _ = load_second_stage(args.run, MODELS, device)
    first_stage = load_first_stage(args.first_stage, device)
    if first_stage.description["digest"] != model.description["first_stage"]["digest"]:
        raise UserError(f"--first-stage {args.first_stage}: {args.run} was trained on another")
    brains, people = [], []  # of the two splits
    for split in ("train", "validate"):
        data = load_slices(folder, split, first_stage.image_size, device)
        whole = data.whole_cases().to(device)
        brains.append(encode_all(first_stage, data, "auto")[whole])
        people.append(data.people(model.conditions).to(device)[whole[:, 0]])
    known, new = brains
    if len(known) <= COMPONENTS or len(new) < 2:
        raise UserError(f"{folder} has {len(known)} and {len(new)} whole brains; {COMPONENTS + 1} and 2 are needed")
    axes, head = principal_components(known, COMPONENTS), known.mean(0)

    def along(latents: Tensor) -> Tensor:
        """[n, components] of [n, Z, C, h, w]."""
        return (latents - head).flatten(1) @ axes.T

    # how far guesses move
    moves = {"prior": [], "network": []}
    for ratio in RATIOS:
        t, errors = int(((model.sigma / model.alpha).log() - torch.tensor(ratio).log()).abs().argmin()), []
        for group, persons in ((brains[1], people[1]), (brains[0], people[0])):
            some = group[: args.brains]
            found = guesses(model, some, persons[: args.brains], t)
            errors.append(float((found["prior"] - some).square().mean() / (head - some).square().mean()))
            if group is new:
                for name, guess in found.items():
                    moves[name].append(slopes(along(guess), along(some)))
        words = "; ".join(f"{name} {' '.join(f'{move:.2f}' for move in rows[-1])}" for name, rows in moves.items())
        print(f"sigma / alpha {ratio:g}: moves {words}; error of the prior over the mean head's {errors[0]:.3f}, "
              f"on training heads {errors[1]:.3f}", flush=True)  # fmt: skip

    # how far samples spread
    samples = []
    for i in range(args.brains):
        heard = as_heard(draw_person({}, model.description, 0, i), model.description, 0, i)
        *_, latent = sample_latents(model, Sampling(), range(i, i + 1), [heard])
        samples.append(latent)
    sampled, held_out = (along(group).var(0) for group in (torch.stack(samples), new))
    spread = [float((sampled[a:b].sum() / held_out[a:b].sum()).sqrt()) for a, b in GROUPS]
    for name, value in zip(NAMES, spread, strict=True):
        print(f"components {name}: {args.brains} samples spread {value:.2f} times as far as {len(new)} people")
    title = f"{args.brains} sampled brains and {len(new)} held-out people"
    sheets.save_picture(args.out, draw(moves, spread, title))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
