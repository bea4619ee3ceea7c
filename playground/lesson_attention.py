"""What does self-attention compute? For every position a mean of all values, by how well keys match its query.

    python playground/lesson_attention.py     # needs no data and no training

    attention(q, k, v) = softmax(q k^T / sqrt(d)) v        Vaswani et al. 2017, eq. 1

Every position i has a query q_i, a key k_i and a value v_i. Row i of the softmax are the weights, which sum to 1, of
all values in the output at i. `module.SelfAttention` makes q, k and v by three learned matrices. Here nothing is
learned, so that the weights have a meaning: q and k are the patch of 5x5 pixels around a position and v is its pixel,
so a pixel becomes the mean of the pixels whose surroundings look like its own. That removes noise, and is known as
non-local means (Buades et al. 2005). The phantom's slice is used, a head drawn by a formula.

The picture: the slice with noise, the weights of the position in the circle (brightest where surroundings are most
alike, however far away they are), and the output. Where a position lies plays no part: if the positions are shuffled,
the output is shuffled in the same way (permutation equivariance).
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

import util
from heads.phantom import phantom_case
from module import SelfAttention
from pictures import sheets

NOISE = 0.1  # sd, where black is 0 and white is 1
PATCH, SIZE = 5, 64
QUERY = (26, 32)  # row and column of the position whose weights are drawn


def weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) [..., n, n] of queries and keys [..., n, d]; every row sums to 1."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[..., n, D] of queries and keys [..., n, d] and values [..., n, D]."""
    return weights(q, k) @ v


def by_hand(layer: SelfAttention, x: Tensor) -> Tensor:
    """The output of the project's layer for x [B, C, H, W], from its weights."""
    heads = layer.qkv(layer.norm(x)).flatten(2).unflatten(1, (3, layer.heads, -1)).mT
    out = attention(*heads.unbind(1))  # [B, heads, H * W, C / heads]
    return x + layer.project(out.mT.flatten(1, 2).view_as(x))


def phantom_slice() -> Tensor:
    """A slice of the phantom, float32 [1, 1, SIZE, SIZE] in [0, 1]."""
    images, _ = phantom_case(0, 1, 3)
    return F.adaptive_avg_pool2d(torch.from_numpy(images[1]).float()[None, None] / 255, SIZE)


def patch_queries(x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [n, d] of the n positions of x [1, 1, H, W], whose weights say how alike two patches are.

    softmax over j of -|p_i - p_j|^2 / (2 h^2) is softmax of (p_i p_j - |p_j|^2 / 2) / h^2, since |p_i|^2 is the same
    for all j. So the key gets |p_j|^2 / 2 as one more number, which the query multiplies by -1.
    """
    p = F.unfold(F.pad(x, [PATCH // 2] * 4, mode="replicate"), PATCH)[0].T
    h2 = 2 * PATCH**2 * NOISE**2 / 4  # |p_i - p_j|^2 of equal patches is 2 PATCH^2 NOISE^2 by noise alone
    k = torch.cat([p, p.square().sum(1, keepdim=True) / 2], dim=1)
    q = torch.cat([p, -torch.ones(len(p), 1)], dim=1)
    return q * math.sqrt(q.shape[1]) / h2, k


def error(x: Tensor, clean: Tensor) -> float:
    """Root of the mean squared error."""
    return float((x - clean).square().mean().sqrt())


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    parser.add_argument("--seed", type=util.seed, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("playground_vis/lesson_attention.png"),
                        help="picture (default: %(default)s)")  # fmt: skip
    return parser


def main() -> None:
    args = flags().parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    clean = phantom_slice()
    x = clean + NOISE * torch.randn(clean.shape, generator=generator)
    (q, k), v = patch_queries(x), x.view(-1, 1)
    out = attention(q, k, v)
    order = torch.randperm(len(v), generator=generator)
    apart = (attention(q[order], k[order], v[order]) - out[order]).abs().max()
    print(f"attention over {len(v)} positions; the weights of each sum to 1")
    print(f"positions shuffled, then attention, or the other way round: the outputs differ by {apart:.0e} at most")
    before, after = error(x, clean), error(out.view_as(x), clean)
    print(f"root mean squared error of the slice with noise {before:.3f}, after attention {after:.3f}")

    figure, axes = plt.subplots(1, 3, figsize=(7.6, 3.2), layout="constrained")
    of_query = weights(q, k)[QUERY[0] * SIZE + QUERY[1]]
    pictures = {
        f"the slice with noise:\nerror {before:.3f}": (x, 1),
        "weights of the position\nin the circle": (of_query, of_query.quantile(0.995)),
        f"after attention:\nerror {after:.3f}": (out, 1),
    }
    for axis, (title, (picture, white)) in zip(axes, pictures.items()):
        axis.imshow(picture.view(SIZE, SIZE).numpy(), cmap="gray", vmin=0, vmax=white)
        axis.plot(*QUERY[::-1], "o", markersize=9, markerfacecolor="none", markeredgecolor="orange", markeredgewidth=2)
        axis.set(title=title, xticks=[], yticks=[])
    sheets.save_picture(args.out, figure)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
