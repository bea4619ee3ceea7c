"""The critic of the first stage: a PatchGAN that knows the slice index, its losses, and their balancing weight."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import util
from module import Embedding


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of a slice, given its index z (Isola et al. 2017; projection: Miyato and Koyama 2018).

    Three strided 4x4 convolutions, spectrally normalised; no batch norm, which would let real and fake slices see each
    other. z is added after every convolution, and the logit has the term <E(z), phi(x)>: anatomy that is right at z = 3
    may be wrong at z = 28.
    """

    def __init__(self, *, channels: int = 32, layers: int = 3):
        super().__init__()
        width = [1] + [channels * 2**n for n in range(layers)]
        self.embed_z = Embedding(2 * channels)
        self.convs = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, 4, 2, 1)) for a, b in pairwise(width))
        self.shifts = nn.ModuleList(nn.Linear(2 * channels, b) for b in width[1:])
        self.head = spectral_norm(nn.Conv2d(width[-1], 1, 4, 1, 1))
        self.project = nn.Linear(2 * channels, width[-1], bias=False)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, 1, h', w'], positive for real, and the features of every layer; x [B, 1, H, W], z int64 [B]."""
        embedding = F.silu(self.embed_z(z))
        h, features = x, []
        for conv, shift in zip(self.convs, self.shifts):
            h = F.leaky_relu(conv(h) + shift(embedding)[:, :, None, None], 0.2)
            features.append(h)
        agreement = F.avg_pool2d((self.project(embedding)[:, :, None, None] * h).mean(1, keepdim=True), 4, 1, 1)
        return (self.head(h) + agreement).float(), features


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss E[max(0, 1 - D(x))] + E[max(0, 1 + D(x'))] (Lim and Ye 2017, eq. 4) of logits of any shape."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """-E[D(x')] of logits of any shape."""
    return -fake.mean()


def feature_matching_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Mean L1 distance of the discriminator's features, VAE-GAN's learned similarity (Larsen et al. 2016, eq. 8)."""
    return sum(F.l1_loss(f.float(), r.detach().float()) for r, f in zip(real, fake)) / len(real)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, limit: float = 10.0) -> Tensor:
    """||d reconstruction / d w|| / (||d adversarial / d w|| + 1e-4), clipped to [0, limit] (Esser et al. 2021, eq. 7).

    Makes the two losses pull equally hard at the decoder's last layer w. The published clip of 10^4 lets one unlucky
    step ruin the reconstruction. The gradients are those of all of torchrun's processes together.
    """
    scale = 1024  # of both losses, a power of two: the gradient of one pixel alone may be 0 in float16
    gradients = (torch.autograd.grad(scale * loss, last_layer, retain_graph=True)[0].float()
                 for loss in (reconstruction, adversarial))  # fmt: skip
    ours, theirs = (util.mean_of_processes(gradient).norm() / scale for gradient in gradients)
    return (ours / (theirs + 1e-4)).clamp(0, limit).detach()
