"""What does a latent number of a VAE cost, and is the formula of the KL divergence right? Closed form against samples.

    python playground/lesson_kl.py     # needs no data and no training

The encoder of a VAE says of every latent number a mean m and a standard deviation s. The loss charges for it

    KL(q || p) = E_q[log2 q(x) - log2 p(x)] bits,    q = N(m, s^2),  p = N(0, 1)          (1)
               = (m^2 + s^2 - 1 - ln s^2) / (2 ln 2)        `VAE.kl_bits`; Kingma and Welling 2014, appendix B

To test the closed form, draw n samples from q and take the mean of log2 q - log2 p, which is (1) itself. The mean is
off by chance, by its standard error sd / sqrt(n): a hundred times as many samples for one more decimal. That is why a
loss takes the closed form where there is one.

The picture, left: the price of one number. At m = 0 and s = 1 it says nothing and costs nothing; the more sharply it
is known, and the farther from 0, the more it costs. Right: the error of the estimate at growing n.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import util
from model_VAE import VAE
from pictures import sheets

COUNTS = [10, 30, 100, 300, 1000, 3000, 10_000]
REPEATS = 400  # estimates at each count


def closed_form(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL in bits of each number, of the shape of `mean`, by the project's function."""
    numbers = (level.reshape(-1, 1, 1, 1) for level in (mean, log_variance))
    return VAE.kl_bits(*numbers).view_as(mean)


def log_ratios(mean: Tensor, log_variance: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """log2 q(x) - log2 p(x) of n samples x of q = N(mean, exp(log_variance)), [n, numbers]: their mean is the KL.

    log2(1 / sqrt(2 pi)) is in both and drops out.
    """
    noise = torch.randn(n, len(mean), generator=generator, dtype=mean.dtype)
    x = mean + (0.5 * log_variance).exp() * noise
    return (-0.5 * (noise.square() + log_variance) + 0.5 * x.square()) / math.log(2)


def errors(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(error, sd): of all numbers together, the root mean squared error of the estimate at each of COUNTS, measured in
    REPEATS trials, and the sd of one sample."""
    truth, found = closed_form(mean, log_variance).sum(), []
    for n in COUNTS:
        estimates = torch.stack([log_ratios(mean, log_variance, n, generator).sum(1).mean() for _ in range(REPEATS)])
        found.append((estimates - truth).square().mean().sqrt())
    return torch.stack(found), log_ratios(mean, log_variance, max(COUNTS), generator).sum(1).std()


def draw(error: Tensor, sd: Tensor):
    """The picture: the price of a number, and the error of the estimate."""
    figure, (price, accuracy) = plt.subplots(1, 2, figsize=(7.6, 3.6), layout="constrained")
    s = torch.logspace(-2, 0.5, 100)
    for m, style in ((0.0, "-"), (1.0, "--"), (2.0, ":")):
        price.plot(s, closed_form(torch.full_like(s, m), 2 * s.log()), style, color="C0", label=f"m = {m:g}")
    price.set(xscale="log", xlabel="standard deviation s", ylabel="KL, bits", title="the price of one latent number")
    price.legend()
    accuracy.plot(COUNTS, error, "o", color="C0", label=f"measured, {REPEATS} trials")
    accuracy.plot(COUNTS, [float(sd) / math.sqrt(n) for n in COUNTS], "--", color="black", label="sd / $\\sqrt{n}$")
    accuracy.set(xscale="log", yscale="log", xlabel="samples n", ylabel="error, bits",
                 title="error of the sampled KL")  # fmt: skip
    accuracy.legend()
    return figure


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    parser.add_argument("--seed", type=util.seed, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("playground_vis/lesson_kl.png"),
                        help="picture (default: %(default)s)")  # fmt: skip
    return parser


def main() -> None:
    args = flags().parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    mean, log_variance = torch.tensor([0.0, 1.0, 0.0, -2.0]), torch.tensor([0.0, 0.0, -4.0, -2.0])
    ratios = log_ratios(mean, log_variance, max(COUNTS), generator)
    for m, v, bits, estimate, sd in zip(
        mean, log_variance, closed_form(mean, log_variance), ratios.mean(0), ratios.std(0)
    ):
        print(f"m {m:4.1f}, s {math.exp(v / 2):.2f}: {bits:.3f} bits, from {max(COUNTS):,} samples {estimate:.3f} "
              f"+- {sd / math.sqrt(max(COUNTS)):.3f}")  # fmt: skip
    error, sd = errors(mean, log_variance, generator)
    print(f"{COUNTS[-1] // COUNTS[0]:,} times as many samples: the error falls {error[0] / error[-1]:.0f}-fold, "
          f"sqrt({COUNTS[-1] // COUNTS[0]}) is {math.sqrt(COUNTS[-1] / COUNTS[0]):.0f}")  # fmt: skip
    sheets.save_picture(args.out, draw(error, sd))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
