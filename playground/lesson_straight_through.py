"""How can a network learn through rounding, whose gradient is zero? By the straight-through gradient.

    python playground/lesson_straight_through.py     # needs no data

A VQ-VAE rounds latent numbers to codes. Rounding is a staircase: flat at nearly every point, so its gradient is 0 and
nothing before it learns. The remedy keeps the staircase in the forward pass, and in the backward pass takes the
rounding for the identity (Bengio et al. 2013; van den Oord et al. 2017):

    q = e + sg[round(e) - e]        sg, the stop-gradient, is Tensor.detach()

The value is round(e), the gradient is that of e. It is no derivative, but right about the direction: a larger e gives a
larger code. Shown by the smallest quantiser: one number e moves by gradient descent on (q - TARGET)^2 until its code is
TARGET. Without the remedy it stands still. VectorQuantizer of this project does the same, here with whole numbers as
codes. FiniteScalarQuantizer rounds tanh(e) and goes back by the inverse of tanh: straight-through is the rounding
alone, and the slopes of tanh, at e, and of its inverse, at the rounded place, multiply the gradient.

The picture, left: rounding, its own gradient and that of straight-through. Middle: the code of the number while it
learns. Right: the output of FiniteScalarQuantizer and its gradient, which fades where tanh saturates.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import util
from parts.quantizer import FiniteScalarQuantizer, VectorQuantizer
from pictures import sheets

TARGET, STEPS, RATE = 3.0, 30, 0.05


def straight_through(e: Tensor) -> Tensor:
    """round(e), with the gradient of e."""
    return e + (e.round() - e).detach()


def of_project(quantizer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A quantiser of vectors of one number, as a function of numbers [N]."""
    return lambda e: quantizer(e.view(-1, 1, 1, 1))[0].flatten()


def whole_numbers() -> VectorQuantizer:
    """The project's quantiser with the codes -5 .. 5, which stay."""
    quantizer = VectorQuantizer(11, 1).eval()
    quantizer.codebook.copy_(torch.arange(-5.0, 6.0)[:, None])
    return quantizer


def gradient(quantise: Callable[[Tensor], Tensor], e: Tensor) -> Tensor:
    """The derivative [N] of a quantiser at numbers e [N]."""
    e = e.clone().requires_grad_()
    return torch.autograd.grad(quantise(e).sum(), e)[0]


def learn(quantise: Callable[[Tensor], Tensor]) -> list[float]:
    """The code of one number, from 0.2 on, while gradient descent on (code - TARGET)^2 moves the number."""
    e, codes = torch.tensor([0.2], requires_grad=True), []
    for _ in range(STEPS):
        code = quantise(e)
        codes.append(code.item())
        (slope,) = torch.autograd.grad((code - TARGET).square().sum(), e)
        e = (e - RATE * slope).detach().requires_grad_()
    return codes


def draw(codes: dict[str, list[float]]):
    """The picture: rounding, learning, and the project's finite scalar quantiser."""
    figure, (rounding, learning, scalar) = plt.subplots(1, 3, figsize=(7.6, 3.4), layout="constrained")
    e = torch.linspace(-2.5, 2.5, 1001)
    rounding.plot(e, e.round(), color="black", label="round(e)")
    rounding.plot(e, gradient(torch.round, e), "--", color="C3", label="its gradient")
    rounding.plot(e, gradient(straight_through, e), ":", linewidth=2.5, color="C0", label="straight-through")
    rounding.set(title="rounding", xlabel="e")
    for (name, path), style, colour in zip(codes.items(), ("--", "-", ":"), ("C3", "C0", "orange")):
        learning.step(range(STEPS), path, style, where="post", linewidth=2.5, color=colour, label=name)
    learning.set(title=f"a number learns, target {TARGET:g}", xlabel="step", ylabel="code")
    quantise = of_project(FiniteScalarQuantizer((5,)))
    scalar.plot(e, quantise(e), color="black", label="code")
    scalar.plot(e, gradient(quantise, e), ":", linewidth=2.5, color="C0", label="gradient")
    scalar.set(title="finite scalar, 5 levels", xlabel="e")
    for axis in (rounding, learning, scalar):
        axis.legend(loc="upper left", fontsize=9)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.35 * (high - low))
    return figure


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("playground_vis/lesson_straight_through.png"),
                        help="picture (default: %(default)s)")  # fmt: skip
    return parser


def main() -> None:
    args = flags().parse_args()
    quantisers = {"round": torch.round, "straight-through": straight_through}
    quantisers["VectorQuantizer"] = of_project(whole_numbers())
    codes = {name: learn(quantise) for name, quantise in quantisers.items()}
    for name, quantise in quantisers.items():
        slope = gradient(quantise, torch.tensor([0.2])).item()
        print(f"{name}: gradient {slope:.0f} at 0.2; code {codes[name][0]:.0f} before, {codes[name][-1]:.0f} after")
    sheets.save_picture(args.out, draw(codes))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
