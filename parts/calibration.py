"""Calibration: samples get as much of every spatial frequency as training heads have.

An exact denoiser obeys a law that a trained one breaks a little. Since the noise of x_t = alpha x_0 + sigma noise is
independent of x_0, and E[x_0 | x_t] a function of x_t,

    E[ E[x_0 | x_t] x_t ] = E[x_0 x_t] = alpha E[x_0^2]                                                       (1)

for every linear part of x_0, of its guess and of x_t, after their means m, m and alpha m have been subtracted. On this
depends how strong that part of x_t becomes on its way from noise, since dx / dln sigma contains x_t and the guess. A
network that errs, or that sees only some slices of the brain, guesses too small or follows the noise too far; each step
begins with the error of the steps before, and in the end heads are too much alike in slow changes, and too different in
faster ones. Pang et al. 2023, "On calibrating diffusion probabilistic models", correct the mean of a score by such a
law; Ning et al. 2024, "Elucidating the exposure bias in diffusion models", scale the guess at each step. Here (1) is
restored in 36 bands of frequency and each channel, by numbers measured on the way that samples take.
"""

import torch
from torch import Tensor, nn

from module import cosines

LEVELS = 20  # of noise, those of sampling in 20 steps; between them the numbers are interpolated
FARTHEST = 10.0  # of these levels: pure noise has an infinite one
ALONG_Z = (1 / 64, 1 / 16, 1 / 8, 3 / 16, 5 / 16)  # cycles per slice at which the second and later bands begin
IN_PLANE = (0.06, 0.12, 0.2, 0.3, 0.42)  # cycles per latent pixel, likewise
BANDS = (len(ALONG_Z) + 1) * (len(IN_PLANE) + 1)


class Calibration(nn.Module):
    """x_0 = guess + w (x_t - alpha mean), with a w for each level of noise, channel and band; w = 0 until measured.

    Args:
        latent_shape: (C, h, w).
        slices_per_brain: Z.
    """

    def __init__(self, latent_shape: tuple[int, int, int], slices_per_brain: int):
        super().__init__()
        C, h, w = latent_shape
        Z = slices_per_brain
        self.register_buffer("power", torch.zeros(C, BANDS))  # of the training brains
        self.register_buffer("levels", torch.linspace(4, -4, LEVELS))  # ln(sigma / alpha), falling
        self.register_buffer("weight", torch.zeros(LEVELS, C, BANDS))
        for name, count in (("along_z", Z), ("rows", h), ("columns", w)):  # of the cosine transform
            self.register_buffer(name, cosines(count, count), persistent=False)
        y, x = torch.arange(h)[:, None] / (2 * h), torch.arange(w) / (2 * w)
        ring = torch.bucketize(torch.hypot(y, x), torch.tensor(IN_PLANE), right=True)
        along = torch.bucketize(torch.arange(Z) / (2 * Z), torch.tensor(ALONG_Z), right=True)
        band = along[:, None, None] * (len(IN_PLANE) + 1) + ring
        self.register_buffer("band", band, persistent=False)  # [Z, h, w]
        size = (band.flatten() == torch.arange(BANDS)[:, None]).sum(1)
        self.register_buffer("band_size", size.clamp(min=1), persistent=False)

    def reset(self, levels: Tensor) -> None:
        """Forgets all measurements; the next are for these levels ln(sigma / alpha) [LEVELS], falling."""
        self.levels.copy_(levels.clamp(max=FARTHEST))
        self.weight.zero_()

    @property
    def measured(self) -> bool:
        """Whether there is anything to correct by."""
        return bool((self.weight != 0).any())

    def transform(self, brains: Tensor) -> Tensor:
        """The orthonormal cosine transform float32 [n, Z, C, h, w] of brains of that shape, along z and in plane."""
        with torch.autocast(brains.device.type, enabled=False):
            return torch.einsum("qa,nacyx->nqcyx", self.along_z, self.rows @ brains.float() @ self.columns.T)

    def back(self, coefficients: Tensor) -> Tensor:
        """The inverse of transform."""
        with torch.autocast(coefficients.device.type, enabled=False):
            return torch.einsum("qa,nqcyx->nacyx", self.along_z, self.rows.T @ coefficients @ self.columns)

    def mean_product(self, a: Tensor, b: Tensor) -> Tensor:
        """[C, BANDS]: mean of a b over brains and the coefficients of each band, of transformed [n, Z, C, h, w]."""
        product = (a * b).mean(0).transpose(0, 1).flatten(1)
        total = product.new_zeros(len(product), BANDS).index_add_(1, self.band.flatten(), product)
        return total / self.band_size

    def measure_power(self, difference: Tensor) -> None:
        """Takes E[x_0^2] from n >= 2 training brains minus their mean, [n, Z, C, h, w]."""
        parts = (self.transform(part) for part in difference.split(8))
        self.power.copy_(sum(self.mean_product(part, part) * len(part) for part in parts) / (len(difference) - 1))

    def measure(self, level: int, alpha: Tensor, x: Tensor, guess: Tensor) -> None:
        """Sets w of one level so that (1) holds for these brains.

        x: x_t - alpha mean; guess: the guess at x_0 - mean; [n, Z, C, h, w] each.
        """
        product, square = torch.zeros_like(self.power), torch.zeros_like(self.power)
        for x_part, guess_part in zip(x.split(8), guess.split(8), strict=True):
            x_bands, guess_bands = self.transform(x_part), self.transform(guess_part)
            product += self.mean_product(guess_bands, x_bands) * len(x_part) / len(x)
            square += self.mean_product(x_bands, x_bands) * len(x_part) / len(x)
        self.weight[level] = (alpha * self.power - product) / square.clamp(min=1e-12)

    def weight_at(self, level: Tensor) -> Tensor:
        """w [C, BANDS] at ln(sigma / alpha), a tensor of one number: linear between the levels, constant beyond."""
        level = level.clamp(max=FARTHEST).view(1)
        below = (self.levels > level).sum(0, keepdim=True).clamp(1, LEVELS - 1)  # levels fall: the next lower one
        high, low = self.levels[below - 1], self.levels[below]
        share = ((high - level) / (high - low)).clamp(0, 1)
        return self.weight[below - 1].lerp(self.weight[below], share[:, None, None])[0]

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """The correction of the guess, [n, Z, C, h, w], for x = x_t - alpha mean of that shape."""
        weight = self.weight_at(level)[:, self.band].transpose(0, 1)
        return self.back(weight * self.transform(x))
