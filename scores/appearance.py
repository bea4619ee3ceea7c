"""What a reader sees in new brains, as numbers: the ribbon of the cortex, the texture, black, symmetry, folds along z.

Pure functions of one brain, uint8 [Z, S, S] in the order of z, and of where its tissues are as the scorer reads them:
`tissue`, uint8 [Z, S, S], 0 none, 1 CSF, 2 grey, 3 white matter.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scores.metrics import DARK

PERCENT = 200  # bins of the histogram of grey, a hundredth of white matter's each
LAGS = (4, 8, 16)  # slices, and in OASIS millimetres, from which coherence is asked
CELLS, DIRECTIONS = 4, 8  # a side, of the histograms of edges; of the edges
FEWEST = 200  # pixels; a slice with less of a tissue says nothing of it


def gaussian(sd: float) -> Tensor:
    """float32 [k]: weights of sum 1, to four sd on both sides."""
    reach = math.ceil(4 * sd)
    weights = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sd**2))
    return weights / weights.sum()


def blur(pictures: Tensor, sd: float) -> Tensor:
    """float32 [B, H, W] of pictures [B, H, W], with a gaussian of so many pixels; outside is black."""
    kernel = gaussian(sd).to(pictures.device)
    rows = F.conv2d(pictures[:, None].float(), kernel[None, None, :, None], padding=(len(kernel) // 2, 0))
    return F.conv2d(rows, kernel[None, None, None], padding=(0, len(kernel) // 2))[:, 0]


def reduce(pictures: Tensor, factor: int) -> Tensor:
    """Means over squares of factor x factor pixels, float32 [B, H / factor, W / factor], of [B, H, W]."""
    return F.avg_pool2d(pictures[:, None].float(), factor)[:, 0]


# -------------------------------------------------------------------------------------------------------- the ribbon


def ribbon(brain: Tensor, tissue: Tensor) -> Tensor:
    """Valley over grey peak, a scalar: how far grey and white matter are apart in the histogram of a brain.

    A cortex that is a ribbon has many pixels that are grey matter and nothing else, so the histogram has a peak of its
    own for it, and a valley before that of white matter. 1 means that there is no valley. The pictures are blurred by
    1 pixel, which noise does not survive; each slice is divided by the median of its white matter, since every slice of
    the release has a brightness of its own.
    """
    soft, counts = blur(brain, 1.0), torch.zeros(PERCENT)
    for picture, kind in zip(soft, tissue):
        white = picture[kind == 3]
        if len(white) >= FEWEST * picture.numel() / 256**2 and (middle := white.median()) > 0:
            counts += torch.histc((picture[kind > 0] / middle * 100).cpu(), PERCENT, 0, PERCENT)
    if not counts.any():
        return torch.tensor(1.0)
    smooth = gaussian(2.0)
    counts = F.conv1d(counts[None, None], smooth[None, None], padding=len(smooth) // 2)[0, 0]
    white = 90 + int(counts[90:111].argmax())  # hundredths
    grey = 40 + int(counts[40 : 40 + (white - 40) * 2 // 3].argmax())
    return counts[grey:white].min() / counts[grey].clamp(min=1e-6)


# ---------------------------------------------------------------------------------------------------------- texture


def kurtosis(brain: Tensor, tissue: Tensor) -> Tensor:
    """E[d^4] / E[d^2]^2 of the finest diagonal detail d = (a - b - c + d) / 2 of 2x2 pixels, in the brain; a scalar.

    3 for Gaussian noise; more for real slices, where edges stand out of little noise.
    """
    x, inside = brain.double(), tissue > 0
    detail = (x[:, :-1, :-1] - x[:, :-1, 1:] - x[:, 1:, :-1] + x[:, 1:, 1:]) / 2
    square = detail[inside[:, :-1, :-1] & inside[:, 1:, 1:]].square()
    return (square.square().mean() / square.mean().square().clamp(min=1e-12)).nan_to_num().float()


def local_patterns(pictures: Tensor) -> Tensor:
    """Shares of local binary patterns, float32 [B, 20], of uint8 or float [B, S, S] (Ojala et al. 2002, eq. 10).

    Which of the eight neighbours of a pixel, at a distance of 1 and of 2 pixels, are at least as bright as it is: the
    patterns with at most two changes around the circle by how many are (9), and all others together (1), over the
    head. Of the neighbours of diagonals the nearest pixel is taken, without interpolation.
    """
    x, found = pictures.float(), []
    head = x > DARK
    for distance in (1, 2):
        ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
        bits = torch.stack([x.roll((-distance * dy, -distance * dx), (1, 2)) >= x for dy, dx in ring]).to(torch.uint8)
        changes = (bits != bits.roll(1, 0)).sum(0)
        kind = torch.where(changes <= 2, bits.sum(0).long(), 9)
        slot = 10 * torch.arange(len(x), device=x.device)[:, None, None] + kind
        counts = torch.bincount(slot[head], minlength=10 * len(x)).view(-1, 10).float()
        found.append(counts / counts.sum(1, keepdim=True).clamp(min=1))
    return torch.cat(found, 1)


def edge_histograms(pictures: Tensor) -> Tensor:
    """Where edges of which direction are, float32 [B, 128], of [B, S, S] (Dalal and Triggs 2005).

    The strength of the gradient in 8 directions (of 180 degrees, each pixel shared by the two nearest) in 4 x 4 cells;
    of each slice the sum of squares is 1, of strengths cut at .2 before that.
    """
    x = pictures.float()
    down, right = (F.pad(x.diff(dim=d), (0, d == 2, 0, d == 1)) for d in (1, 2))
    strength, angle = torch.hypot(down, right), torch.atan2(down, right) / math.pi % 1 * DIRECTIONS
    below, share = angle.long() % DIRECTIONS, angle % 1
    planes = x.new_zeros(len(x), DIRECTIONS, *x.shape[1:])
    planes.scatter_add_(1, below[:, None], (strength * (1 - share))[:, None])
    planes.scatter_add_(1, ((below + 1) % DIRECTIONS)[:, None], (strength * share)[:, None])
    cells = F.adaptive_avg_pool2d(planes, CELLS).flatten(1)
    return F.normalize(F.normalize(cells, dim=1).clamp(max=0.2), dim=1)


def band_moments(pictures: Tensor, levels: int = 3) -> Tensor:
    """Of each difference of blurs by 1, 2, 4 pixels from the next finer: ln of its sd, and its kurtosis over the head.

    float32 [B, 2 levels] of [B, S, S].
    """
    x, found = pictures.float(), []
    head = (x > DARK).float()
    area = head.sum((1, 2)).clamp(min=1)
    for level in range(levels):
        softer = blur(x, 2.0**level / 2)
        square = ((x - softer) * head).square()
        power = (square.sum((1, 2)) / area).clamp(min=1e-6)
        found += [power.log() / 2, (square.square().sum((1, 2)) / area / power.square()).log()]
        x = softer
    return torch.stack(found, 1)


def looks(pictures: Tensor) -> Tensor:
    """All that the linear judge of samples.py is told of slices: float32 [B, 185] of [B, S, S].

    local_patterns, edge_histograms, band_moments, and the histogram of grey in 31 bins.
    """
    level = (pictures.float() / 8).long().clamp(0, 31)
    slot = 32 * torch.arange(len(pictures), device=pictures.device)[:, None, None] + level
    counts = torch.bincount(slot.flatten(), minlength=32 * len(pictures)).view(-1, 32).float()
    grey = (counts[:, 1:] / counts[:, 1:].sum(1, keepdim=True).clamp(min=1)).sqrt()
    return torch.cat([local_patterns(pictures), edge_histograms(pictures), band_moments(pictures), grey], 1)


# -------------------------------------------------------------------------------------------------- along z, left-right


def coherence(brain: Tensor, mean_head: Tensor, tissue: Tensor) -> Tensor:
    """Correlation of a head's deviation from the mean head with itself at LAGS slices along z, float32 [2, 3].

    In the brain and outside of it, over the pixels that are so in both slices. Real folds run on through a few slices;
    the outline of the head through many.

    mean_head: float32 [Z, S, S], grey levels, of training brains. It may contain this brain: that only makes all
        deviations smaller by one factor.
    """
    apart, inside = brain.float() - mean_head, tissue > 0
    near = (mean_head > DARK) | (brain > DARK)
    result = torch.full((2, len(LAGS)), math.nan)
    for row, region in enumerate((inside, ~inside & near)):
        for column, lag in enumerate(LAGS):
            both = region[:-lag] & region[lag:]
            if lag < len(brain) and both.sum() > 2:
                result[row, column] = torch.corrcoef(torch.stack([apart[:-lag][both], apart[lag:][both]]))[0, 1]
    return result


def symmetry(brain: Tensor, tissue: Tensor) -> Tensor:
    """Correlation of the brain's left half with its right half, both softened by 2 pixels; a scalar.

    The midline is the middle of the rows, which in OASIS is that of the atlas.
    """
    soft, inside = blur(brain, 2.0), tissue > 0
    both = (inside & inside.flip(1))[:, : brain.shape[1] // 2]
    if both.sum() < 3:
        return torch.tensor(math.nan)
    left, right = soft[:, : brain.shape[1] // 2][both], soft.flip(1)[:, : brain.shape[1] // 2][both]
    return torch.corrcoef(torch.stack([left, right]))[0, 1]


# ------------------------------------------------------------------------------------------------------ black and white


def extremes(brain: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """float32 [Z, 3]: whether the slice has a pixel of 255; the shares of its box that are 0, and that are 1.

    The release scales every slice to 255, and its heads stand out of exact black.

    box: (top, left, height, width) of the part in which heads lie.
    """
    top, left, height, width = box
    part = brain[:, top : top + height, left : left + width].flatten(1)
    shares = [(part == level).float().mean(1) for level in (0, 1)]
    return torch.stack([(brain.flatten(1).amax(1) == 255).float(), *shares], 1)
