"""Do new heads differ as much as people do, and does the denoiser know soon enough what head it will be?

    python playground/spread.py --run diffusion --first-stage vqvae      # runs of one's own, or files

What heads differ in most are the principal components of the latents of whole training brains. Left: how far the guess
at x_0 moves along them when held-out brains do, at each noise; 1 is all of the way. Dashed is the linear denoiser
alone, solid the network that hears it. Where all is noise no guess can move; samples whose denoiser moves too late are
too much alike. Right: the spread of sampled brains along the components over that of held-out people. Printed: both,
and the squared error of the linear guess over that of the mean head, on held-out and on training heads.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

import stable_diffusion
import util
from dataset import SLICES_PER_CASE, find_data, load_slices
from heads.people import draw_person
from model_diffusion import LatentDiffusion
from model_VAE import load_first_stage, load_second_stage
from parts.gaussian_prior import CrossFitted
from pictures import sheets
from stable_diffusion import encode_all, sample_latents
from util import UserError

GROUPS = ((0, 1), (1, 3), (3, 6), (6, 12), (12, 24))  # of components, strongest first
RATIOS = (60, 30, 15, 9, 6, 4, 2.5, 1.5)  # sigma / alpha


def principal_components(brains: Tensor, count: int) -> Tensor:
    """Orthonormal [count, D] of brains [n, 32, C, h, w]."""
    difference = (brains - brains.mean(0)).flatten(1)
    value, vector = torch.linalg.eigh((difference @ difference.T).double())
    axes = vector.flip(1)[:, :count].to(difference).T @ difference
    return axes / value.flip(0)[:count].to(difference).sqrt()[:, None]


def slopes(guesses: Tensor, truth: Tensor) -> list[float]:
    """Of guesses against truth, [n, components] each, about their means, in each of GROUPS."""
    guesses, truth = (part - part.mean(0) for part in (guesses, truth))
    return [float((guesses * truth)[:, a:b].sum() / truth[:, a:b].square().sum()) for a, b in GROUPS]


@torch.no_grad()
def linear_guess(
    linear: Callable[..., Tensor], model: LatentDiffusion, brains: Tensor, t: int, people: Tensor
) -> tuple[Tensor, Tensor]:
    """(x_t, guess at x_0), [n, 32, C, h, w] each, of brains at step t, by `linear` alone; noise by the number."""
    z = torch.arange(SLICES_PER_CASE, device=brains.device).repeat(len(brains))
    white = [torch.randn(brains.shape[1:], generator=util.brain_generator(0, i)) for i in range(len(brains))]
    noise = model.correlate(torch.cat(white).to(brains.device), z, SLICES_PER_CASE)
    alpha, sigma = model._levels(torch.full(z.shape, t, device=z.device))
    x = alpha * brains.flatten(0, 1) + sigma * noise
    people = people[: len(brains)].repeat_interleave(SLICES_PER_CASE, 0)
    guess = linear(x, alpha, sigma, z, SLICES_PER_CASE, model.slice_correlation, people)
    return x.view_as(brains), guess.view_as(brains)


@torch.no_grad()
def network_guess(model: LatentDiffusion, x: Tensor, t: int, people: Tensor) -> Tensor:
    """The same by the network, from x_t [n, 32, C, h, w]."""
    z = torch.arange(SLICES_PER_CASE, device=x.device)
    with util.autocast(x.device, "auto"):
        return torch.stack([model.denoise(b, t, z, people=people[i].expand(len(z), -1))[0] for i, b in enumerate(x)])


def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--run", default="diffusion", help="second stage: run name, folder or weights file (default: %(default)s)")
    add("--first-stage", default="vqvae", metavar="RUN", help="what it was trained on (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--brains", type=util.positive_int, default=16, help="to sample, and to denoise (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/spread.png"), help="picture (default: %(default)s)")
    args = parser.parse_args()
    device = util.pick_device(args.device)
    model, _, description = load_second_stage(args.run, LatentDiffusion, device)
    first_stage = load_first_stage(args.first_stage, device)
    if first_stage.description["digest"] != description["first_stage"]["digest"]:
        raise UserError(f"--first-stage {args.first_stage}: {args.run} was trained on another")
    brains, people = [], []
    for split in ("train", "validate"):
        data = load_slices(find_data(args.data), split, first_stage.image_size, device)
        whole = data.whole_cases().to(device)
        brains.append(encode_all(first_stage, data, device, "auto")[0][whole])
        people.append(data.people(model.conditions).to(device)[whole[:, 0]])
    known, new = brains
    if len(known) <= GROUPS[-1][1] or len(new) < 2:
        raise UserError(f"{data.folder} has {len(known)} and {len(new)} whole cases; more than 24 and 2 are needed")
    axes = principal_components(known, GROUPS[-1][1])

    def along(latents: Tensor) -> Tensor:
        """[n, components] of [n, 32, C, h, w]."""
        return (latents - known.mean(0)).flatten(1) @ axes.T

    def over_the_mean(guess: Tensor, brains: Tensor) -> float:
        return float((guess - brains).square().mean() / (known.mean(0) - brains).square().mean())

    # how far guesses move
    some, familiar, moves = new[: args.brains], known[: args.brains], {"linear": [], "network": []}
    fitted = CrossFitted(model.linear, known, people[0], model.slice_correlation)
    cross_fitted = fitted.of(torch.arange(len(familiar)))
    for ratio in tqdm(RATIOS, desc="denoise", unit="level", disable=None):
        t = int((model.sigma / model.alpha).log().sub(torch.tensor(ratio).log()).abs().argmin())
        x, guess = linear_guess(model.linear, model, some, t, people[1])
        for name, of in (("linear", guess), ("network", network_guess(model, x, t, people[1]))):
            moves[name].append(slopes(along(of), along(some)))
        seen = [linear_guess(linear, model, familiar, t, people[0])[1] for linear in (model.linear, cross_fitted)]
        errors = (over_the_mean(guess, some), *(over_the_mean(of, familiar) for of in seen))
        words = "; ".join(f"{name} {' '.join(f'{v:.2f}' for v in moves[name][-1])}" for name in moves)
        tqdm.write(
            f"sigma / alpha {ratio:g}: moves {words}; error of the linear guess over the mean head's {errors[0]:.3f}, "
            f"on heads it was fitted on {errors[1]:.3f}, on these in training (cross-fitted) {errors[2]:.3f}"
        )

    # how far samples spread
    settings = stable_diffusion.flags().parse_args([])
    settings.seed = 0
    samples = []
    for i in tqdm(range(args.brains), desc="sample", unit="brain", disable=None):
        person = draw_person({}, description, settings.seed, i)
        samples.append(sample_latents(model, range(i, i + 1), settings, device, person=person)[-1])
    sampled, held_out = (along(group).var(0) for group in (torch.stack(samples), new))
    spread = [float((sampled[a:b].sum() / held_out[a:b].sum()).sqrt()) for a, b in GROUPS]
    names = [f"{a + 1}" if b == a + 1 else f"{a + 1} to {b}" for a, b in GROUPS]
    for name, value in zip(names, spread, strict=True):
        print(f"components {name}: {args.brains} samples spread {value:.2f} times as far as {len(new)} people")

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for g, name in enumerate(names):
        left.plot(RATIOS, [row[g] for row in moves["network"]], color=f"C{g}", label=f"component {name}")
        left.plot(RATIOS, [row[g] for row in moves["linear"]], color=f"C{g}", linestyle="--")
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(
        xscale="log", xlabel="sigma / alpha, from noise to latent", ylabel="move of the guess over that of the truth"
    )
    left.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    left.minorticks_off()
    left.invert_xaxis()
    left.set_title(f"Guesses at {len(some)} held-out brains; dashed: linear alone")
    left.legend(fontsize=8)
    right.bar(names, spread, color=[f"C{g}" for g in range(len(GROUPS))])
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xlabel="component of whole brains", ylabel="sd of samples over sd of people")
    right.set_title(f"Spread of {args.brains} sampled brains over that of {len(new)} held-out people")
    sheets.save_picture(args.out, figure)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
