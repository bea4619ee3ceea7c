"""What does a PixelCNN see when it predicts a code? Its past in reading order, all of it, and nothing else.

    python playground/lesson_causality.py     # needs no data and no training

A PixelCNN writes p(codes) = prod_i p(code_i | codes before i), so its output at a position must not depend on the code
there or on later ones, or it would read the answer in training and have nothing to read in sampling. Whether that holds
is asked of the gradient of the output at one position with respect to all input codes: 0 means not seen.

The first PixelCNN (van den Oord et al. 2016a) is one stack of convolutions with masked weights. It is causal, but with
3x3 kernels each layer goes at most one column to the right for every row that it goes up. Codes farther to the right
are never seen, however many layers there are: the blind spot. `pixelCNN.PixelCNN` has two stacks, one for the rows
above and one for the codes to the left (van den Oord et al. 2016b), and no blind spot.

The picture: how strongly the output at the framed position depends on every code, on a logarithmic scale; white is 0.
More layers see farther.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import util
from pictures import sheets
from pixelCNN import PixelCNN

GRID, CHANNELS = (9, 13), 32
FRAMED = (5, 6)  # row and column of the position whose output is asked
Network = Callable[[Tensor], Tensor]  # vectors of codes [B, CHANNELS, h, w] to outputs [B, D, h, w]


class MaskedConv(nn.Conv2d):
    """A 3x3 convolution that sees the row above, what is to the left, and its centre if asked."""

    def __init__(self, centre: bool):
        super().__init__(CHANNELS, CHANNELS, 3, padding=1)
        self.register_buffer("mask", torch.tensor([[1.0, 1, 1], [1, centre, 0], [0, 0, 0]]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


def one_stack(layers: int) -> Network:
    """Masked convolutions; only the first must not see its centre."""
    convolutions = [MaskedConv(centre=n > 0) for n in range(layers)]
    return nn.Sequential(*[layer for convolution in convolutions for layer in (convolution, nn.SiLU())])


def two_stacks(layers: int) -> Network:
    """The project's PixelCNN, with kernels of 3."""
    model = PixelCNN(codebook_size=16, grid=GRID, channels=CHANNELS, layers=layers, kernel=3).eval()
    model.embed_idx = nn.Identity()  # codes come as their vectors, which have a gradient
    return lambda vectors: model.logits(vectors, torch.zeros(len(vectors)))[0]


def influence(network: Network, position: tuple[int, int]) -> Tensor:
    """[h, w]: the mean absolute gradient of the output at a position with respect to the vector of every code."""
    vectors = torch.randn(16, CHANNELS, *GRID, requires_grad=True)
    output = network(vectors)[(..., *position)]
    (output * torch.randn_like(output)).sum().backward()
    return vectors.grad.abs().mean((0, 1))


def earlier(position: tuple[int, int]) -> Tensor:
    """bool [h, w]: which positions come before this one in reading order."""
    number = torch.arange(GRID[0] * GRID[1]).view(GRID)
    return number < number[position]


def draw(maps: dict[str, Tensor]):
    """The picture: a map of influence for each network."""
    figure, axes = plt.subplots(2, 2, figsize=(7.6, 5.8), layout="constrained")
    for axis, (title, seen) in zip(axes.flat, maps.items()):
        share = seen / seen.max()
        shown = axis.pcolormesh(share.where(share > 0, torch.nan), cmap="viridis_r", norm=LogNorm(1e-8, 1),
                                edgecolors="lightgrey", linewidth=0.3)  # fmt: skip
        axis.add_patch(Rectangle(FRAMED[::-1], 1, 1, fill=False, edgecolor="crimson", linewidth=3))
        axis.set(title=title, xticks=[], yticks=[], aspect="equal")
        axis.invert_yaxis()
    figure.colorbar(shown, ax=axes, label="influence on the framed position; 1: the strongest", shrink=0.8)
    return figure


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    parser.add_argument("--seed", type=util.seed, default=0, help="of weights and codes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("playground_vis/lesson_causality.png"),
                        help="picture (default: %(default)s)")  # fmt: skip
    return parser


def main() -> None:
    args = flags().parse_args()
    torch.manual_seed(args.seed)
    networks = {f"PixelCNN, {layers} layer{'s' * (layers > 1)}": two_stacks(layers) for layers in (1, 3, 6)}
    networks["one stack, 6 layers: blind spot"] = one_stack(6)
    maps, past = {name: influence(network, FRAMED) for name, network in networks.items()}, earlier(FRAMED)
    for name, seen in maps.items():
        print(f"{name}: sees {int((seen[past] > 0).sum())} of {int(past.sum())} codes before the position, "
              f"{int((seen[~past] > 0).sum())} of {int((~past).sum())} others")  # fmt: skip
    sheets.save_picture(args.out, draw(maps))
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
