"""Diffusion over latents: noise schedules, the denoising UNet, the training loss, and samplers as free functions.

Everything follows from x_t = alpha_t x_0 + sigma_t noise with alpha_t^2 + sigma_t^2 = 1 and t = 0 .. T - 1 (Ho et al.
2020, eq. 4, where alpha_t^2 is written alpha-bar_t). The latents have unit variance, so x_t has too.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from module import Downsample, Embedding, ResBlock, SelfAttention, Upsample, norm, zero

SCHEDULES = ("cosine", "linear")
PREDICTIONS = ("v", "eps", "x0")

# ---------------------------------------------------------------------------------------------------- noise schedules


def noise_levels(schedule: str, T: int) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), float32 [T] each, of the forward process.

    linear: beta_t from 1e-4 to 0.02 at T = 1000, scaled for other T (Ho et al. 2020, section 4).
    cosine: alpha_t^2 = cos^2(pi/2 (u + s) / (1 + s)), s = 0.008, beta_t <= 0.999 (Nichol and Dhariwal 2021, eq. 17).
    """
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    elif schedule == "cosine":
        u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
        squared = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = 1 - squared[1:] / squared[:-1]
    else:
        raise ValueError(f"schedule must be one of {SCHEDULES}, not {schedule}")
    alpha_squared = torch.cumprod(1 - beta.clamp(max=0.999), 0)
    return alpha_squared.sqrt().float(), (1 - alpha_squared).sqrt().float()


# ----------------------------------------------------------------------------------------------------------- the UNet


class UNet(nn.Module):
    """[B, C, h, w] at time t and slice index z to [B, C, h, w]; the sum of both embeddings enters every block."""

    def __init__(self, latent_channels: int, channels: int, channel_multipliers: tuple[int, ...], blocks: int):
        super().__init__()
        width = [channels * m for m in channel_multipliers]
        embedding_dim = 4 * channels
        self.embed_t, self.embed_z = Embedding(embedding_dim), Embedding(embedding_dim)
        self.stem = nn.Conv2d(latent_channels, width[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, current = [width[0]], width[0]
        for level, w in enumerate(width):
            if level:
                self.down.append(Downsample(current, current))
                skips.append(current)
            for _ in range(blocks):
                self.down.append(Level(current, w, embedding_dim, attention=level > 0))
                skips.append(current := w)
        self.mid = Level(current, current, embedding_dim, attention=True)
        for level, w in reversed(list(enumerate(width))):
            for _ in range(blocks + 1):
                self.up.append(Level(current + skips.pop(), w, embedding_dim, attention=level > 0))
                current = w
            if level:
                self.up.append(Upsample(current, current))
        self.out = nn.Sequential(norm(current), nn.SiLU(), zero(nn.Conv2d(current, latent_channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x [B, C, h, w]; t [B], steps 0 .. T - 1; z [B], slice index."""
        embedding = self.embed_t(t) + self.embed_z(z)
        h = self.stem(x)
        skips = [h]
        for part in self.down:
            h = part(h, embedding) if isinstance(part, Level) else part(h)
            skips.append(h)
        h = self.mid(h, embedding)
        for part in self.up:
            if isinstance(part, Level):
                h = part(torch.cat([h, skips.pop()], dim=1), embedding)
            else:
                h = part(h, skips[-1].shape[-2:])  # odd sides lost half a pixel on the way down
        return self.out(h)


class Level(nn.Module):
    """A residual block and, if asked, self-attention."""

    def __init__(self, channels_in: int, channels_out: int, embedding_dim: int, attention: bool):
        super().__init__()
        self.block = ResBlock(channels_in, channels_out, embedding_dim)
        self.attention = SelfAttention(channels_out) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.block(x, embedding))


# -------------------------------------------------------------------------------------------------- the diffusion model


class LatentDiffusion(nn.Module):
    """p(latent | z): the UNet together with what it predicts and how its loss is weighted.

    Args:
        latent_shape: (C, h, w) of the first stage's latents.
        channels, channel_multipliers, blocks: of the UNet.
        schedule: "cosine" or "linear".
        prediction: what the UNet's output means: "v" = alpha noise - sigma x_0 (Salimans and Ho 2022), "eps" the noise
            (Ho et al. 2020), or "x0" the clean latent.
        T: number of steps of the forward process.
    """

    kind, script = "diffusion", "stable_diffusion.py"

    def __init__(
        self,
        *,
        latent_shape: tuple[int, int, int],
        channels: int,
        channel_multipliers: tuple[int, ...],
        blocks: int,
        schedule: str = "cosine",
        prediction: str = "v",
        T: int = 1000,
    ):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, not {prediction}")
        self.latent_shape, self.prediction, self.T = tuple(latent_shape), prediction, T
        self.unet = UNet(latent_shape[0], channels, tuple(channel_multipliers), blocks)
        for name, level in zip(("alpha", "sigma"), noise_levels(schedule, T), strict=True):
            self.register_buffer(name, level, persistent=False)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def forward(self, latent: Tensor, z: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Loss of each latent [B, C, h, w], float32 [B], at random steps t int64 [B] and noise unless given.

        The squared error of the prediction, weighted so that the error of x_0 counts min(SNR, 5) with SNR = alpha^2 /
        sigma^2 (Hang et al. 2023): divided by SNR for eps, by SNR + 1 for v.
        """
        t = torch.randint(self.T, (len(latent),), device=latent.device) if t is None else t
        noise = torch.randn_like(latent) if noise is None else noise
        alpha, sigma = self._levels(t)
        output = self.unet(alpha * latent + sigma * noise, t, z).float()
        target = {"v": alpha * noise - sigma * latent, "eps": noise, "x0": latent}[self.prediction]
        snr = (alpha / sigma).square().flatten()
        weight = snr.clamp(max=5) / {"v": snr + 1, "eps": snr, "x0": 1}[self.prediction]
        return weight * (output - target).square().mean((1, 2, 3))

    def denoise(self, x: Tensor, t: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """The model's (x_0, noise), float32 [B, C, h, w] each, of x_t = x [B, C, h, w] at step t and z int64 [B]."""
        t = torch.full((len(x),), t, device=x.device)
        alpha, sigma = self._levels(t)
        output = self.unet(x, t, z).float()
        if self.prediction == "v":
            return alpha * x - sigma * output, sigma * x + alpha * output
        if self.prediction == "eps":
            return (x - sigma * output) / alpha, output
        return output, (x - alpha * output) / sigma


# ----------------------------------------------------------------------------------------------------------- samplers

Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (x_t, t) -> (x_0, noise)


def sample_ddpm(
    denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, draw: Callable[[], Tensor]
) -> Iterator[Tensor]:
    """Ancestral sampling, one step of q(x_{t-1} | x_t, x_0) for every t (Ho et al. 2020, eq. 6 and 7).

    Args:
        x: noise, x_T [B, C, h, w].
        alpha, sigma: [T].
        draw: gives fresh noise of the shape of x.
    Yields x after every step; the last one, x_0, is the sample.
    """
    for t in range(len(alpha) - 1, -1, -1):
        x0, _ = denoise(x, t)
        if t == 0:
            yield x0
            return
        keep = alpha[t] / alpha[t - 1]  # sqrt(1 - beta_t)
        beta = 1 - keep**2
        mean = alpha[t - 1] * beta / sigma[t] ** 2 * x0 + keep * sigma[t - 1] ** 2 / sigma[t] ** 2 * x
        x = mean + beta.sqrt() * sigma[t - 1] / sigma[t] * draw()
        yield x


def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    draw: Callable[[], Tensor],
    steps: int = 50,
    eta: float = 0.0,
) -> Iterator[Tensor]:
    """DDIM (Song et al. 2021, eq. 12 and 16) over `steps` of the T times, counted down from the last.

    eta = 0 is deterministic, an Euler step of the probability flow; eta = 1 over all T times is ancestral sampling.
    Arguments and yields as sample_ddpm.
    """
    if not 1 <= steps <= len(alpha):
        raise ValueError(f"steps must be between 1 and {len(alpha)}, not {steps}")
    times = [round(len(alpha) * (1 - n / steps)) - 1 for n in range(steps)]  # from T - 1, evenly, towards 0
    for t, s in zip(times, [*times[1:], None], strict=True):
        x0, noise = denoise(x, t)
        if s is None:
            yield x0
            return
        fresh = eta * sigma[s] / sigma[t] * (1 - (alpha[t] / alpha[s]) ** 2).clamp(min=0).sqrt()
        x = alpha[s] * x0 + (sigma[s] ** 2 - fresh**2).clamp(min=0).sqrt() * noise
        if eta > 0:
            x = x + fresh * draw()
        yield x
