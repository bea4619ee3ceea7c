"""Grain: the texture that a decoder leaves out, as a random field whose strength it learns."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module import cosines, gaussian_window, norm, zero

# Grain is smooth along z by a gaussian of this sd in slices, which correlates it by .78, .37, .02 over 1, 2, 4 slices.
# What codes of 8x8 pixels leave out of real slices has .64, .43 and .24, but part of that is the codes' own flicker.
SMOOTHING = 1.0


def cosine_transform(size: int) -> Tensor:
    """[size^2, size^2]: the orthonormal cosine transform of type II of size x size pixels, both in reading order."""
    rows = cosines(size, size)
    return torch.kron(rows, rows)


class Grain(nn.Module):
    """What a decoder leaves out, as a random field: N(0, sd^2) in every cosine coefficient of patch x patch pixels.

    The sd of each block and frequency is read from the decoder's last features, but teaches the decoder nothing. It is
    such that draws are as far from the faithful picture as real slices are, neither nearer nor farther. Where that is
    sure, as where all is black, sd is next to zero.
    """

    ROUNDING = (2 / 255) ** 2 / 12  # variance that rounding x to 8 bits adds to a pixel, and so to a coefficient

    def __init__(self, channels: int, patch: int):
        super().__init__()
        self.patch = patch
        self.head = nn.Sequential(
            norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            zero(nn.Conv2d(channels, patch**2, 3, padding=1)),
        )
        nn.init.constant_(self.head[-1].bias, -4)  # two grey levels
        self.register_buffer("basis", cosine_transform(patch), persistent=False)

    def log_sd(self, features: Tensor) -> Tensor:
        """float32 [B, patch^2, h, w] of features [B, channels, h, w]."""
        return self.head(features.detach()).float().clamp(-10, 1)

    def loss(self, missed: Tensor, added: Tensor, log_sd: Tensor) -> Tensor:
        """-log N(missed; 0, added^2 + sd^2 + rounding) in nats a coefficient, less a constant.

        Args:
            missed: [B, 1, H, W], real slices less their faithful pictures.
            added: [B, 1, H, W], the decoder's pictures less the faithful ones: what it makes up without noise.
        """

        def power(picture: Tensor) -> Tensor:
            blocks = F.pixel_unshuffle(picture.detach().float(), self.patch)
            return torch.einsum("kj,bjhw->bkhw", self.basis, blocks).square()

        with torch.autocast(missed.device.type, enabled=False):
            variance = power(added) + (2 * log_sd).exp() + self.ROUNDING
            return 0.5 * (variance.log() + power(missed) / variance).mean()

    def draw(self, noise: Tensor, log_sd: Tensor) -> Tensor:
        """The field [B, 1, H, W] of white noise [B, 1, H, W]."""
        with torch.autocast(noise.device.type, enabled=False):
            coefficients = log_sd.exp() * F.pixel_unshuffle(noise, self.patch)
            return F.pixel_shuffle(torch.einsum("kj,bkhw->bjhw", self.basis, coefficients), self.patch)


def noise_of_slices(slices: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """What `Grain.draw` takes for neighbouring slices of one brain, float32 [slices, 1, height, width] on the CPU.

    N(0, 1) in every slice, smooth along z by SMOOTHING, at both ends too: the white noise goes on beyond them.
    """
    beyond = math.ceil(3 * SMOOTHING)
    white = torch.randn(slices + 2 * beyond, 1, height, width, generator=generator)
    window = gaussian_window(len(white), SMOOTHING)[beyond:-beyond]
    return torch.tensordot(F.normalize(window), white, 1)
