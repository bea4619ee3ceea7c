"""Texture: from a faithful picture and noise, a picture as a scan may look. The perceptual decoder of a first stage.

What a code does not tell is lost, and a decoder that has to be faithful draws its mean, which is smooth. This network
draws it: folds and grain that fit the faithful picture, others for other noise. It learns from a critic alone what
fits (model_discriminator.py).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module import Downsample, Embedding, ResBlock, Upsample, gaussian_window, norm, zero

# Noise is smooth along z: half of its variance is smoothed by a gaussian of the first sd in slices, half by one of the
# second. So its power along z is the one that pictures decoded from latents of 8x8 pixels lack, within .15 dB.
SMOOTHING = (0.7, 1.8)
WIDTHS = (32, 64)  # channels at a half and at a quarter of the pixels a side


class Texture(nn.Module):
    """A picture [B, 1, H, W] from a faithful one, the features it was read from, noise, and z; H and W are even.

    Before training the picture comes out as it went in. Noise enters where pixels do, so it decides on grain; and what
    the quarter makes of it, on folds.

    Args:
        features: channels of the decoder's last features.
    """

    def __init__(self, features: int):
        super().__init__()
        fine, coarse = WIDTHS
        self.embed_z = Embedding(2 * fine)
        self.stem = nn.Conv2d(8, fine, 3, padding=1)
        self.before = ResBlock(fine, fine, 2 * fine)
        self.down, self.read = Downsample(fine, coarse), nn.Conv2d(features, coarse, 1)
        self.middle = nn.ModuleList(ResBlock(coarse, coarse, 2 * fine) for _ in range(2))
        self.up = Upsample(coarse, fine)
        self.after = nn.ModuleList(ResBlock(fine, fine, 2 * fine) for _ in range(2))
        self.out = nn.Sequential(norm(fine), nn.SiLU(), zero(nn.Conv2d(fine, 4, 3, padding=1)))

    def forward(self, faithful: Tensor, features: Tensor, white: Tensor, z: Tensor) -> Tensor:
        """float32 [B, 1, H, W], which may leave [-1, 1] a little.

        Args:
            faithful: [B, 1, H, W] in [-1, 1].
            features: [B, features, h, w] of any size, to which no gradient goes.
            white: noise N(0, 1), [B, 1, H, W].
            z: int64 [B].
        """
        embedding = self.embed_z(z)
        fine = self.before(self.stem(F.pixel_unshuffle(torch.cat([faithful, white], 1), 2)), embedding)
        h = self.down(fine)
        h = h + F.interpolate(self.read(features.detach()), size=h.shape[-2:], mode="nearest")
        for block in self.middle:
            h = block(h, embedding)
        h = self.up(h, fine.shape[-2:]) + fine
        for block in self.after:
            h = block(h, embedding)
        return faithful + F.pixel_shuffle(self.out(h), 2).float()


def noise_of_slices(slices: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Noise for a Texture, of neighbouring slices of one brain: float32 [slices, 1, height, width] on the CPU.

    White and N(0, 1) within every slice; smooth along z as SMOOTHING says, at both ends too.
    """
    beyond = math.ceil(3 * max(SMOOTHING))  # slices that are drawn at both ends, smoothed with the others, and dropped
    noise = torch.zeros(slices, 1, height, width)
    for sd in SMOOTHING:
        white = torch.randn(slices + 2 * beyond, 1, height, width, generator=generator)
        window = gaussian_window(len(white), sd)[beyond:-beyond]
        noise += torch.tensordot(F.normalize(window), white, 1)
    return noise / len(SMOOTHING) ** 0.5
