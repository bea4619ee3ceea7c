"""The critic of the first stage: a PatchGAN that knows the slice index, and its losses."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import util
from module import Embedding

BEYOND, FINEST = 8.0, 24.0  # times which the critic sees differences from the faithful picture, and finest detail
LEVEL = 2 / 255  # a grey level of pictures in [-1, 1]


def smooth(x: Tensor, sd: float) -> Tensor:
    """[B, 1, H, W] of pictures of that shape, with a gaussian of `sd` pixels; around them is black."""
    reach = math.ceil(3 * sd)
    kernel = torch.exp(-torch.arange(-reach, reach + 1, device=x.device).square() / (2 * sd**2))
    kernel = (kernel / kernel.sum()).to(x)
    x = F.conv2d(F.pad(x, (reach,) * 4, value=-1.0), kernel[None, None, :, None])
    return F.conv2d(x, kernel[None, None, None])


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of a slice beside its faithful picture (Isola et al. 2017, section 3.2), given z.

    It sees the slice, what that has beyond the faithful picture, and its finest detail, each about as strong as the
    others: texture of two grey levels would not be heard beside edges of a hundred. No normalisation, in which slices
    of a batch would see each other. z is added after every strided convolution, and the logit has the term
    <E(z), phi(x)> (Miyato and Koyama 2018): anatomy that is right at z = 3 may be wrong at z = 28.

    Args:
        channels: at full resolution, and after each of the strided 4x4 convolutions.
    """

    def __init__(self, *, channels: tuple[int, ...] = (16, 32, 64, 128)):
        super().__init__()
        first, last = channels[0], channels[-1]
        self.embed_z = Embedding(64)
        self.first = nn.Conv2d(3, first, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairwise(channels))
        self.shifts = nn.ModuleList(nn.Linear(64, b) for b in channels[1:])
        self.last = nn.Conv2d(last, last, 3, padding=1)
        self.head, self.project = nn.Conv2d(last, 1, 1), nn.Linear(64, last, bias=False)

    @staticmethod
    def planes(x: Tensor, faithful: Tensor) -> Tensor:
        """What it sees, [B, 3, H, W], of slices and their faithful pictures [B, 1, H, W] in [-1, 1].

        Random numbers of one grey level hide that real slices have whole levels.
        """
        x = x + (util.draw_together(torch.rand_like, x) - 0.5) * LEVEL
        return torch.cat([x, BEYOND * (x - faithful), FINEST * (x - smooth(x, 0.8))], 1)

    def forward(self, planes: Tensor, z: Tensor) -> Tensor:
        """Logits [B, 1, h', w'], higher for real, of `planes` and z int64 [B]."""
        embedding = F.silu(self.embed_z(z))
        h = F.leaky_relu(self.first(planes), 0.2)
        for conv, shift in zip(self.convs, self.shifts):
            h = F.leaky_relu(conv(h) + shift(embedding)[:, :, None, None], 0.2)
        h = F.leaky_relu(self.last(h), 0.2)
        agreement = (self.project(embedding)[:, :, None, None] * h).mean(1, keepdim=True)
        return (self.head(h) + agreement).float()


def relativistic_loss(better: Tensor, worse: Tensor) -> Tensor:
    """E[ln(1 + exp(-(D(better) - D(worse))))] of logits in pairs (Jolicoeur-Martineau 2019, eq. 8).

    The critic wants real slices to be better than drawn ones of the same code, the decoder the other way round.
    """
    return F.softplus(worse - better).mean()


def gradient_penalty(logits: Tensor, planes: Tensor) -> Tensor:
    """E[||d D / d x||^2] of real and of drawn slices (Mescheder et al. 2018, eq. 9 and 10), for a logit.

    It keeps the critic from being surer than it needs to be; with both, the game converges (Huang et al. 2024, "The
    GAN is dead; long live the GAN!", section 2).
    """
    (gradient,) = torch.autograd.grad(logits.sum(), planes, create_graph=True)
    return gradient.float().square().sum((1, 2, 3)).mean() / logits[0].numel()
