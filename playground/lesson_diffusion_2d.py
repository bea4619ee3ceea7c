"""How does diffusion make samples out of noise? On points of a plane, where all of it can be seen.

    python playground/lesson_diffusion_2d.py     # needs no data; trains for some ten seconds

The data are points x_0 on two half moons. Training takes a point to a random noise level t, x_t = alpha_t x_0 + sigma_t
noise, and a small network guesses x_0 from x_t. Noise levels, the weight of an error at each level and the samplers are
those of stable_diffusion.py with recipe "v", from model_diffusion.py. A sample begins as noise. The sampler goes down
through the levels, and at each takes away a part of the noise that the network sees (Ho et al. 2020; Song et al. 2021).

The picture, above: 1,000 samples on their way from noise to data, and data. Below: for Gaussian data the best guess at
x_0 is known, so all error of the samples' covariance is the sampler's. One of first order, ddim, has half the error
with twice as many steps; one of second order, dpm or heun, a quarter or less. Printed is the energy distance (Szekely
and Rizzo 2013) of samples to the data: 0, but for chance, if they have one distribution.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import util
from model_diffusion import RECIPES, SAMPLERS, WEIGHTS, Denoise, noise_levels
from module import Embedding
from pictures import sheets

RECIPE, T = RECIPES["v"], 1000
ALPHA, SIGMA = noise_levels(RECIPE.schedule, T, torch.float64)
COVARIANCE = torch.tensor([[1.5, 0.9], [0.9, 0.7]], dtype=torch.float64)  # of the Gaussian data
SAMPLER_STEPS = [10, 20, 40, 80, 160]
STYLES = {"ddim": "o-", "dpm": "s--", "heun": "k^:"}


def moons(n: int, generator: torch.Generator) -> Tensor:
    """n points [n, 2] on two half moons; each coordinate has mean 0 and variance 1."""
    angle, side = torch.rand(n, generator=generator) * math.pi, torch.randint(2, (n, 1), generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    points = torch.where(side == 0, upper, torch.tensor([1.0, 0.5]) - upper)
    points += 0.05 * torch.randn(n, 2, generator=generator)
    return (points - torch.tensor([0.5, 0.25])) / torch.tensor([0.868, 0.497])


class Network(nn.Module):
    """E[x_0 | x_t] of points x_t [n, 2] at steps t int64 [n], float32.

    x_0 = alpha x_t - sigma v, and a perceptron that is told t gives v (Salimans and Ho 2022).
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.stem, self.embed_t = nn.Linear(2, width), Embedding(width)
        hidden = [layer for _ in range(3) for layer in (nn.SiLU(), nn.Linear(width, width))]
        self.perceptron = nn.Sequential(*hidden, nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        v = self.perceptron(self.stem(x) + self.embed_t(t))
        return (ALPHA[t, None] * x - SIGMA[t, None] * v).float()


def loss(network: nn.Module, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The weighted squared error [n] of the guesses at x_0 [n, 2], at steps t [n] and with this noise [n, 2].

    With the weight of recipe "v" it is the squared error of v = alpha noise - sigma x_0.
    """
    x = ALPHA[t, None] * x0 + SIGMA[t, None] * noise
    error = (network(x.float(), t) - x0).square().mean(1)
    return WEIGHTS[RECIPE.weight](ALPHA[t], SIGMA[t]).float() * error


def train(steps: int, generator: torch.Generator, batch: int = 512) -> Network:
    """A network after training on fresh points in every step; the learning rate falls to 0."""
    network = Network()
    adam = torch.optim.Adam(network.parameters(), 5e-3)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        t, noise = torch.randint(T, (batch,), generator=generator), torch.randn(batch, 2, generator=generator)
        adam.zero_grad()
        loss(network, moons(batch, generator), t, noise).mean().backward()
        adam.step()
        fall.step()
    return network


def denoise_by(network: Network) -> Denoise:
    """The network as samplers call it: (x_t, t) to (x_0, noise)."""

    @torch.no_grad()
    def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        x0 = network(x.float(), torch.full((len(x),), t))
        return x0, (x - ALPHA[t] * x0) / SIGMA[t]

    return denoise


def denoise_gaussian(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The same, exactly, for data N(0, COVARIANCE): x_0 = alpha C (alpha^2 C + sigma^2 I)^-1 x_t."""
    of_x = ALPHA[t] ** 2 * COVARIANCE + SIGMA[t] ** 2 * torch.eye(2)
    x0 = x @ torch.linalg.solve(of_x, ALPHA[t] * COVARIANCE)
    return x0, (x - ALPHA[t] * x0) / SIGMA[t]


def sample(sampler: str, denoise: Denoise, noise: Tensor, steps: int) -> list[Tensor]:
    """x after every step of a sampler that begins with this noise [n, 2]; the last one is the sample."""
    return list(SAMPLERS[sampler](denoise, noise.double(), ALPHA, SIGMA, steps))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of points [n, 2] and [n, 2], over pairs of different points."""
    x, y, n = x.double(), y.double(), len(x)
    return float(2 * torch.cdist(x, y).mean() - (torch.cdist(x, x) + torch.cdist(y, y)).sum() / (n * (n - 1)))


def covariance_error(sampler: str, steps: int) -> float:
    """How far the covariance of samples is from COVARIANCE, over its size.

    The exact denoiser is linear, so samples are noise @ M, of covariance M^T M; M is what becomes of the unit vectors.
    """
    M = sample(sampler, denoise_gaussian, torch.eye(2), steps)[-1]
    return float((M.T @ M - COVARIANCE).norm() / COVARIANCE.norm())


def draw(way: list[Tensor], real: Tensor):
    """The picture: samples after each of 20 steps and real points, and the error for Gaussian data."""
    figure = plt.figure(figsize=(7.6, 4.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.4))
    shown = {"noise": way[0]} | {f"step {n}": way[n] for n in (11, 13, 15, 20)} | {"data": real}
    for axis, (title, points) in zip(above.subplots(1, len(shown)), shown.items()):
        axis.scatter(*points[:1000].T, s=1.5, color="black", linewidths=0)
        axis.set(title=title, xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
    axis = below.subplots()
    for sampler, style in STYLES.items():
        axis.plot(SAMPLER_STEPS, [covariance_error(sampler, steps) for steps in SAMPLER_STEPS], style, label=sampler)
    axis.set(xscale="log", yscale="log", xlabel="steps of the sampler", ylabel="error of the covariance",
             title="exact guesses for Gaussian data: the error of the sampler alone")  # fmt: skip
    axis.set_xticks(SAMPLER_STEPS, SAMPLER_STEPS)
    axis.minorticks_off()
    axis.legend(title="sampler")
    return figure


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=util.positive_int, default=1500, help="of training (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of everything random (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/lesson_diffusion_2d.png"),
        help="picture (default: %(default)s)")  # fmt: skip
    return parser


def main() -> None:
    args = flags().parse_args()
    torch.manual_seed(args.seed)  # of the network
    generator = torch.Generator().manual_seed(args.seed)
    denoise = denoise_by(train(args.steps, generator))
    noise, real = torch.randn(2000, 2, generator=generator), moons(2000, generator)
    way = [noise, *sample("dpm", denoise, noise, 20)]
    sets = {"noise": noise, "samples, 20 steps of dpm": way[-1], "other data": moons(2000, generator)}
    print(
        "energy distance to the data:", ", ".join(f"{name} {energy_distance(x, real):.4f}" for name, x in sets.items())
    )
    for name in STYLES:
        errors = ", ".join(f"{covariance_error(name, steps):.4f}" for steps in SAMPLER_STEPS)
        print(f"{name}, error of the covariance in {SAMPLER_STEPS} steps: {errors}")
    sheets.save_picture(args.out, draw(way, real))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
