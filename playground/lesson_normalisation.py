"""What differs between batch, layer, instance and group normalisation? Only which numbers share a mean and a variance.

    python playground/lesson_normalisation.py     # needs no data and no training

All four are y = (x - mean) / sqrt(variance + eps) of x [B, C, H, W]; they differ in the axes that the mean and the
variance are taken over. A learned scale and shift of each channel may follow; here they are 1 and 0. Shown is batch
normalisation in training; afterwards it takes averages that training kept.

    batch     over B, H, W      one mean per channel, from all pictures of the batch      Ioffe and Szegedy 2015
    layer     over C, H, W      one mean per picture                                      Ba et al. 2016
    instance  over H, W         one mean per picture and channel                          Ulyanov et al. 2016
    group     over H, W and the channels of a group      one mean per picture and group   Wu and He 2018

The picture, above: which numbers share the mean and the variance of the one in the frame, found by the gradient of its
output. Below: how much the output for the first picture changes when something is done to the input. Only batch
normalisation lets a picture change its neighbours in the batch. The networks of this project normalise by groups
(`module.norm`): a slice is decoded alike, whichever slices are beside it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

import util
from pictures import sheets

B, C, H, W, GROUPS = 4, 8, 6, 6, 2
FRAMED = (1, 2)  # the picture and the channel whose sharing is drawn


def normalise(x: Tensor, axes: tuple[int, ...], eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps), both over `axes`; the variance is that of the population."""
    mean = x.mean(axes, keepdim=True)
    variance = (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


NORMALISATIONS = {  # each takes x [B, C, H, W] to the same shape
    "batch": lambda x: normalise(x, (0, 2, 3)),
    "layer": lambda x: normalise(x, (1, 2, 3)),
    "instance": lambda x: normalise(x, (2, 3)),
    "group": lambda x: normalise(x.unflatten(1, (GROUPS, -1)), (2, 3, 4)).flatten(1, 2),
}


def at(picture, channel) -> Tensor:
    """bool [B, C, 1, 1]: true at these pictures and channels."""
    chosen = torch.zeros(B, C, 1, 1, dtype=torch.bool)
    chosen[picture, channel] = True
    return chosen


CHANGES = {  # each changes x [B, C, H, W]; "brighter" is 3 x + 2
    "other pictures replaced": lambda x: torch.where(at(0, slice(None)), x, x.flip(-1).roll(1, 0) - 1),
    "this picture brighter": lambda x: torch.where(at(0, slice(None)), 3 * x + 2, x),
    "one channel brighter, in all pictures": lambda x: torch.where(at(slice(None), 0), 3 * x + 2, x),
    "one channel brighter, in this picture": lambda x: torch.where(at(0, 0), 3 * x + 2, x),
}


def shared_with(normalisation, x: Tensor) -> Tensor:
    """bool [B, C]: the pictures and channels of x that one output, at FRAMED, depends on."""
    x = x.clone().requires_grad_()
    normalisation(x)[FRAMED][0, 0].backward()
    return (x.grad != 0).any(-1).any(-1)


def effects(x: Tensor) -> Tensor:
    """[changes, normalisations]: mean absolute change of the output for the first picture of x."""
    return torch.stack([torch.stack([(f(change(x)) - f(x))[0].abs().mean() for f in NORMALISATIONS.values()])
                        for change in CHANGES.values()])  # fmt: skip


def draw(shared: dict[str, Tensor], changes: Tensor):
    """The picture: the sharing by picture and channel, and a table of the changes."""
    figure = plt.figure(figsize=(7.6, 4.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.4))
    above.suptitle("Dark: shares mean and variance with the number in the frame", fontsize=11)
    for axis, (name, mask) in zip(above.subplots(1, 4, sharey=True), shared.items()):
        axis.pcolormesh(mask, cmap="Blues", vmin=0, vmax=1.5, edgecolors="black", linewidth=0.5)
        axis.add_patch(Rectangle(FRAMED[::-1], 1, 1, fill=False, edgecolor="crimson", linewidth=3))
        axis.set(title=name, xlabel="channel", xticks=[], yticks=[], aspect="equal")
        axis.invert_yaxis()
    above.axes[0].set_ylabel("picture of the batch")
    below.suptitle("Mean change of the output for one picture (brighter: 3 x + 2; 0.00: not seen)", fontsize=11)
    axis = below.subplots()
    axis.imshow(changes.numpy(), cmap="Blues", vmin=0, vmax=2 * float(changes.max()), aspect="auto")
    axis.set_xticks(range(len(NORMALISATIONS)), NORMALISATIONS)
    axis.set_yticks(range(len(CHANGES)), CHANGES)
    for (row, column), value in zip(torch.cartesian_prod(*map(torch.arange, changes.shape)), changes.flatten()):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=12)
    return figure


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    parser.add_argument("--seed", type=util.seed, default=0, help="of the numbers (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("playground_vis/lesson_normalisation.png"),
                        help="picture (default: %(default)s)")  # fmt: skip
    return parser


def main() -> None:
    args = flags().parse_args()
    x = torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(args.seed))
    shared = {name: shared_with(normalisation, x) for name, normalisation in NORMALISATIONS.items()}
    changes = effects(x)
    for name, mask, column in zip(shared, shared.values(), changes.T):
        unseen = [change for change, effect in zip(CHANGES, column) if effect < 1e-3] or ["none of the changes"]
        print(f"{name}: a mean of {int(mask.sum()) * H * W} numbers; does not see: {'; '.join(unseen)}")
    sheets.save_picture(args.out, draw(shared, changes))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
