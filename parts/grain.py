"""Grain: the texture that a decoder leaves out, as a random field whose strength is learned."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module import gaussian_window, norm, zero

# Grain is smooth along z: half of its variance is smoothed by a gaussian of the first sd in slices, half by one of the
# second. So its power along z is the one that pictures decoded from latents of 8x8 pixels lack, within .15 dB.
SMOOTHING = (0.7, 1.8)
GAMMA = 0.7  # of compand
KNEE = 2 * 190 / 255 - 1  # of bend_white: grey 190


def lapped_transform(size: int) -> Tensor:
    """[size^2, 1, 2 size, 2 size]: the modulated lapped transform in two dimensions, frequencies in reading order.

    Cosines over windows that are twice as wide as a block and fade out into each other (Malvar 1990, "Lapped transforms
    for efficient transform/subband coding"). As a convolution of stride `size` it is orthonormal; unlike cosines of
    blocks side by side, it shows no edges of blocks.
    """
    n, k = torch.arange(2 * size) + 0.5, torch.arange(size)[:, None] + 0.5
    rows = (n * math.pi / (2 * size)).sin() * (2 / size) ** 0.5 * ((n + size / 2) * k * math.pi / size).cos()
    return torch.einsum("ay,bx->abyx", rows, rows).reshape(size**2, 1, 2 * size, 2 * size)


def compand(x: Tensor) -> Tensor:
    """Brightness [0, 2] of x [-1, 1], in which texture is as strong in dark tissue as in bright: a power of grey."""
    return 2 * ((x.float() + 1) / 2).clamp(min=0) ** GAMMA


def expand(brightness: Tensor) -> Tensor:
    """The inverse of compand."""
    return 2 * (brightness / 2).clamp(min=0) ** (1 / GAMMA) - 1


def bend_white(x: Tensor) -> Tensor:
    """x [-1, 1] or beyond, with values above KNEE bent towards white as film does it, not cut off at white.

    Every real slice is scaled to its own maximum, so next to no pixel of it is above 240 of 255. Sampled slices, whose
    errors are symmetrical, have three times as many, and a cut would pile them up at white.
    """
    room = 1 - KNEE
    return torch.where(x > KNEE, KNEE + room * ((x - KNEE) / room).tanh(), x)


class Grain(nn.Module):
    """The power that decoded pictures lack, as a random field: N(0, sd^2) in each coefficient of a lapped transform.

    The sd of each block and frequency is read from the decoder's last features, and is such that pictures with grain
    have the power of real slices, in companded grey. Where all is black, it is next to zero.

    Args:
        channels: of the features.
        patch: pixels a side for which one position of the features stands.
    """

    FLOOR = (2 / 255) ** 2 / 12  # keeps variance above 0 in black; about what rounding to 8 bits adds to a coefficient

    def __init__(self, channels: int, patch: int):
        super().__init__()
        self.patch = patch
        self.strength = nn.Sequential(
            norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            zero(nn.Conv2d(channels, patch**2, 3, padding=1)),
        )
        nn.init.constant_(self.strength[-1].bias, -4)  # two grey levels
        self.register_buffer("basis", lapped_transform(patch), persistent=False)

    def log_sd(self, features: Tensor) -> Tensor:
        """float32 [B, patch^2, h, w] of features [B, channels, h, w], to which no gradient goes."""
        # contiguous: PyTorch 2.9 crashes in the backward pass of a group norm over channels-last input without gradient
        return self.strength(features.detach().contiguous()).float().clamp(-10, 1)

    def analysis(self, picture: Tensor) -> Tensor:
        """Coefficients [B, patch^2, h, w] of a picture [B, 1, H, W] with 0 around it."""
        before, after = (self.patch + 1) // 2, self.patch // 2
        return F.conv2d(F.pad(picture, (before, after) * 2), self.basis, stride=self.patch)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        """The picture [B, 1, H, W] of coefficients [B, patch^2, h, w]."""
        before, (h, w) = (self.patch + 1) // 2, coefficients.shape[2:]
        field = F.conv_transpose2d(coefficients, self.basis, stride=self.patch)
        return field[..., before : before + h * self.patch, before : before + w * self.patch]

    def loss(self, real: Tensor, decoded: Tensor, log_sd: Tensor) -> Tensor:
        """-log N(real; 0, decoded^2 + sd^2 + FLOOR) in nats a coefficient of companded grey, up to a constant.

        Args:
            real: slices [B, 1, H, W] in [-1, 1].
            decoded: the same slices coded and decoded, [B, 1, H, W], without grain.
            log_sd: [B, patch^2, h, w].
        """
        with torch.autocast(real.device.type, enabled=False):
            with torch.no_grad():
                power, known = (self.analysis(compand(x)).square() for x in (real, bend_white(decoded)))
            variance = known + (2 * log_sd).exp() + self.FLOOR
            return 0.5 * (variance.log() + power / variance).mean()

    def add(self, decoded: Tensor, white: Tensor, log_sd: Tensor) -> Tensor:
        """A decoded picture with grain made of white noise, all three [B, 1, H, W]; log_sd [B, patch^2, h, w]."""
        with torch.autocast(white.device.type, enabled=False):
            field = self.synthesis(log_sd.exp() * F.pixel_unshuffle(white, self.patch))
            return bend_white(expand(compand(decoded) + field))


def noise_of_slices(slices: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Noise for `Grain.add`, of neighbouring slices of one brain: float32 [slices, 1, height, width] on the CPU.

    White and N(0, 1) within every slice; smooth along z as SMOOTHING says, at both ends too.
    """
    beyond = math.ceil(3 * max(SMOOTHING))  # slices that are drawn at both ends, smoothed with the others, and dropped
    noise = torch.zeros(slices, 1, height, width)
    for sd in SMOOTHING:
        white = torch.randn(slices + 2 * beyond, 1, height, width, generator=generator)
        window = gaussian_window(len(white), sd)[beyond:-beyond]
        noise += torch.tensordot(F.normalize(window), white, 1)
    return noise / len(SMOOTHING) ** 0.5
