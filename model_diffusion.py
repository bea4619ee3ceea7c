"""Diffusion over latents: noise schedules, the denoising UNet, the training loss, and samplers as free functions.

Everything follows from x_t = alpha_t x_0 + sigma_t noise with alpha_t^2 + sigma_t^2 = 1 and t = 0 .. T - 1 (Ho et al.
2020, eq. 4, where alpha_t^2 is written alpha-bar_t). The latents have unit variance, so x_t has too. Processes that are
written otherwise, rectified flow and EDM, are the same one after a division of x_t by sqrt(alpha_t^2 + sigma_t^2).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import util
from heads.people import CONDITIONS
from module import (
    CategoryEmbedding,
    Downsample,
    Embedding,
    ResBlock,
    SelfAttention,
    SliceMixing,
    Upsample,
    norm,
    zero,
)
from parts.calibration import Calibration
from parts.gaussian_prior import GaussianPrior, Noisy

Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (x_t, t) -> (x_0, noise)
Draw = Callable[[], Tensor]  # fresh noise of the shape of x_t
MOVES = 4  # numbers that say how training moved a head, see dataset.move


# ------------------------------------------------------------------------------------------ noise schedules and recipes


def _cosine(T: int) -> Tensor:
    """alpha_t^2 = cos^2(pi/2 (u + s) / (1 + s)), s = 0.008, beta_t <= 0.999 (Nichol and Dhariwal 2021, eq. 17)."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    squared = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = 1 - squared[1:] / squared[:-1]
    return torch.cumprod(1 - beta.clamp(max=0.999), 0).sqrt()


def _linear(T: int) -> Tensor:
    """beta_t from 1e-4 to 0.02 at T = 1000, scaled for other T (Ho et al. 2020, section 4)."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
    return torch.cumprod(1 - beta.clamp(max=0.999), 0).sqrt()


def _flow(T: int) -> Tensor:
    """(1 - u) x_0 + u noise with u from 1/T to 1, rescaled (rectified flow, Liu et al. 2023)."""
    u = torch.linspace(1 / T, 1, T, dtype=torch.float64)
    return (1 - u) / torch.hypot(1 - u, u)


def _edm(T: int) -> Tensor:
    """x_0 + s noise with s from 0.002 to 80 at rho = 7, rescaled (Karras et al. 2022, eq. 5)."""
    s = torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), T, dtype=torch.float64) ** 7
    return (1 + s**2).rsqrt()


SCHEDULES: dict[str, Callable[[int], Tensor]] = {"cosine": _cosine, "linear": _linear, "flow": _flow, "edm": _edm}
# How much the squared error of x_0 counts at (alpha, sigma). The first three are the squared errors of what other
# networks predict: v = alpha noise - sigma x_0, the noise, and noise - x_0; "min-snr" is min(alpha^2 / sigma^2, 5).
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "v": lambda alpha, sigma: sigma**-2,
    "eps": lambda alpha, sigma: (alpha / sigma) ** 2,
    "flow": lambda alpha, sigma: ((alpha + sigma) / sigma) ** 2,
    "min-snr": lambda alpha, sigma: ((alpha / sigma) ** 2).clamp(max=5),
}
# Where training draws t: evenly, or with ln(sigma / alpha) ~ N(mean, 1). Since sigma / (alpha + sigma) is the time u of
# rectified flow, mean 0 is u = sigmoid(N(0, 1)).
TIMES = {"uniform": None, "logit-normal": 0.0, "log-normal": -0.4}


class Recipe(NamedTuple):
    """The choices of a published method: keys of SCHEDULES, WEIGHTS and TIMES."""

    schedule: str
    weight: str
    times: str = "uniform"


RECIPES = {
    "v": Recipe("cosine", "v"),  # Salimans and Ho 2022
    "min-snr": Recipe("cosine", "min-snr"),  # Hang et al. 2023
    "ddpm": Recipe("linear", "eps"),  # Ho et al. 2020
    "flow": Recipe("flow", "flow", "logit-normal"),  # Liu et al. 2023; times of Esser et al. 2024
    "edm": Recipe("edm", "v", "log-normal"),  # Karras et al. 2022 and 2024
}


def noise_levels(schedule: str, T: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), [T] each, of a schedule; alpha falls, and alpha^2 + sigma^2 = 1."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {tuple(SCHEDULES)}, not {schedule}")
    alpha = SCHEDULES[schedule](T)
    return alpha.to(dtype), ((1 - alpha) * (1 + alpha)).sqrt().to(dtype)


# ----------------------------------------------------------------------------------------------------------- the UNet


def embed_condition(dim: int, name: str) -> nn.Module:
    """The embedding of a condition's numbers [B], which may be NaN, as vectors [B, dim]."""
    values = CONDITIONS[name].values
    return CategoryEmbedding(dim, tuple(values.values())) if values else Embedding(dim, unknown=True)


class UNet(nn.Module):
    """[B, C, h, w] at time t and slice index z to [B, C, h, w]; the sum of all embeddings enters every block.

    The first layer also sees the guess at x_0 of the Gaussian prior. Training begins at output 0, and at the network
    without the guess, without `mixing` and without `moved`: their layers are zero.

    Args:
        latent_channels: C.
        widths: channels of each level; every level but the first halves the sides.
        blocks: residual blocks a level.
        unknown_z: whether z may be NaN, not known.
        mixing: whether every block mixes neighbouring slices of a brain.
        conditions: numbers that are embedded too, keys of CONDITIONS.
        moved: whether the network is told how far training moved a head, so that samples are of heads that were not
            moved (augmentation conditioning, Karras et al. 2022, appendix F.2).
    """

    def __init__(
        self,
        latent_channels: int,
        widths: tuple[int, ...],
        blocks: int,
        unknown_z: bool = False,
        mixing: bool = False,
        conditions: tuple[str, ...] = (),
        moved: bool = False,
    ):
        super().__init__()
        first, embedding_dim = widths[0], 4 * widths[0]
        self.embed_t, self.embed_z = Embedding(embedding_dim), Embedding(embedding_dim, unknown=unknown_z)
        self.embed_people = nn.ModuleDict({name: embed_condition(embedding_dim, name) for name in conditions})
        self.embed_moves = zero(nn.Linear(MOVES, embedding_dim, bias=False)) if moved else None
        self.stem = nn.Conv2d(latent_channels, first, 3, padding=1)
        self.stem_guess = zero(nn.Conv2d(latent_channels, first, 3, padding=1, bias=False))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, current = [first], first
        for level, width in enumerate(widths):
            if level:
                self.down.append(Downsample(current, current))
                skips.append(current)
            for _ in range(blocks):
                self.down.append(Level(current, width, embedding_dim, attention=level > 0, mixing=mixing))
                skips.append(current := width)
        self.mid = Level(current, current, embedding_dim, attention=True, mixing=mixing)
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(Level(current + skips.pop(), width, embedding_dim, attention=level > 0, mixing=mixing))
                current = width
            if level:
                self.up.append(Upsample(current, current))
        self.out = nn.Sequential(norm(current), nn.SiLU(), zero(nn.Conv2d(current, latent_channels, 3, padding=1)))

    def matrices(self) -> list[nn.Parameter]:
        """The weights of all layers but the first, the last and the embeddings."""
        inside = [*self.down.parameters(), *self.mid.parameters(), *self.up.parameters()]
        return [weight for weight in inside if weight.dim() > 1]

    def forward(
        self,
        x: Tensor,
        guess: Tensor,
        t: Tensor,
        z: Tensor,
        slices: int = 1,
        people: Tensor | None = None,
        moves: Tensor | None = None,
    ) -> Tensor:
        """The output [B, C, h, w] at step t.

        Args:
            x, guess: what is seen of x_t, and the guess at x_0, [B, C, h, w].
            t: [B], steps 0 .. T - 1.
            z: [B], slice index, or NaN with unknown_z.
            slices: with mixing, every so many of the batch are contiguous slices of one brain.
            people: [B, conditions], in their order, NaN where one is not known; None if none is.
            moves: [B, 4] as in dataset.move; None for heads that were not moved.
        """
        embedding = self.embed_t(t) + self.embed_z(z)
        for k, (name, embed) in enumerate(self.embed_people.items()):
            number = torch.full_like(t, math.nan, dtype=torch.float32) if people is None else people[:, k]
            embedding = embedding + embed(number / CONDITIONS[name].scale)
        if moves is not None and self.embed_moves is not None:
            embedding = embedding + self.embed_moves(moves)
        h = self.stem(x) + self.stem_guess(guess)
        skips = [h]
        for part in self.down:
            h = part(h, embedding, slices) if isinstance(part, Level) else part(h)
            skips.append(h)
        h = self.mid(h, embedding, slices)
        for part in self.up:
            if isinstance(part, Level):
                h = part(torch.cat([h, skips.pop()], dim=1), embedding, slices)
            else:
                h = part(h, skips[-1].shape[-2:])  # odd sides lost half a pixel on the way down
        return self.out(h)


class Level(nn.Module):
    """A residual block and, if asked, self-attention and mixing of slices."""

    def __init__(self, channels_in: int, channels_out: int, embedding_dim: int, attention: bool, mixing: bool):
        super().__init__()
        self.block = ResBlock(channels_in, channels_out, embedding_dim)
        self.attention = SelfAttention(channels_out) if attention else nn.Identity()
        self.mixing = SliceMixing(channels_out) if mixing else None

    def forward(self, x: Tensor, embedding: Tensor, slices: int) -> Tensor:
        h = self.attention(self.block(x, embedding))
        return h if self.mixing is None or slices == 1 else self.mixing(h, slices)


# -------------------------------------------------------------------------------------------------- the diffusion model


class LatentDiffusion(nn.Module):
    """p(latent | z): the UNet, the Gaussian prior that it begins with, the loss, and the calibration of samples.

    The denoiser is E[x_0 | x_t] = guess + sd UNet(seen, guess, t, ...). The Gaussian prior gives the guess at x_0 and
    its sd at each place, and what is seen: x_t about its mean, in units of its sd. So training begins at the best
    denoiser of that prior, and what the network sees and learns has unit variance at all places and all levels of
    noise (Karras et al. 2022, eq. 7, have one variance for all places).

    Args:
        latent_shape: (C, h, w) of the first stage's latents.
        widths, blocks: of the UNet.
        recipe: a key of RECIPES.
        drop_z: how often training hides z; such a model also denoises without z, that is z = NaN, for guidance.
        slices: how many contiguous slices of a brain the UNet sees at once, at most, in training. With 1 it sees every
            slice by itself; with more its blocks mix neighbours, and sampling may show it another number.
        slices_per_brain: Z.
        modes: of the Gaussian prior.
        conditions: numbers that are known of people, keys of CONDITIONS. Training hides each from a share
            drop_conditions of the brains, all of them from as many, and all of them and z from a share drop_z.
        moved: whether training shows moved heads too, and tells the UNet how far they were moved.
        T: number of steps of the forward process.
    Raises ValueError for an unknown recipe or condition.
    """

    kind, script = "diffusion", "stable_diffusion.py"

    def __init__(
        self,
        *,
        latent_shape: tuple[int, int, int],
        widths: tuple[int, ...],
        blocks: int,
        recipe: str = "v",
        drop_z: float = 0.1,
        slices: int = 1,
        slices_per_brain: int = 32,
        modes: int = 0,
        conditions: tuple[str, ...] = (),
        drop_conditions: float = 0.1,
        moved: bool = False,
        T: int = 1000,
    ):
        super().__init__()
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {tuple(RECIPES)}, not {recipe}")
        for name in conditions:
            if name not in CONDITIONS:
                raise ValueError(f"conditions must be among {tuple(CONDITIONS)}, not {name}")
        self.latent_shape, self.recipe, self.T = tuple(latent_shape), RECIPES[recipe], T
        self.slices, self.slices_per_brain, self.drop_z = slices, slices_per_brain, drop_z
        self.conditions, self.drop_conditions = tuple(conditions), drop_conditions
        self.gaussian = GaussianPrior(self.latent_shape, modes, slices_per_brain, len(self.conditions))
        self.calibration = Calibration(self.latent_shape, slices_per_brain)
        self.unet = UNet(
            latent_shape[0],
            tuple(widths),
            blocks,
            unknown_z=drop_z > 0,
            mixing=slices > 1,
            conditions=self.conditions,
            moved=moved,
        )
        # in double precision, since samplers work with differences of neighbours
        alpha, sigma = noise_levels(self.recipe.schedule, T, torch.float64)
        self.register_buffer("alpha", alpha, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)
        # of the squared error; training sets it to the effect of each channel on a picture
        self.register_buffer("channel_weight", torch.ones(latent_shape[0], 1, 1), persistent=False)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha[t].float().view(-1, 1, 1, 1), self.sigma[t].float().view(-1, 1, 1, 1)

    def draw_times(self, count: int) -> Tensor:
        """int64 [count]: random steps t, distributed as the recipe says.

        They are `count` quantiles at even distances from one random number (Kingma et al. 2021, "Variational diffusion
        models", appendix I), so that the loss of a batch depends less on which steps it happened to draw.
        """
        device, mean = self.alpha.device, TIMES[self.recipe.times]
        u = (torch.rand((), device=device) + torch.arange(count, device=device) / count) % 1
        if mean is None:
            return (u * self.T).long().clamp(max=self.T - 1)
        wanted = mean + torch.special.ndtri(u)  # of ln(sigma / alpha)
        return torch.searchsorted((self.sigma / self.alpha).log().float(), wanted).clamp(max=self.T - 1)

    def forward(
        self,
        latent: Tensor,
        z: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        slices: int | None = None,
        people: Tensor | None = None,
        moves: Tensor | None = None,
        projections: Tensor | None = None,
    ) -> Tensor:
        """The loss of every latent, float32 [B], at random steps and noise unless given.

        A batch consists of brains, or of windows of neighbouring slices, `slices` of each.

        Args:
            latent: [B, C, h, w], the slices of one brain after those of the other.
            z: int64 [B].
            t: int64 [B], the same for all slices of a brain.
            noise: [B, C, h, w]; default: random, correlated along z.
            slices: how many of the batch are of one brain; default: as many as the UNet sees at once in training.
            people: [B, conditions], the same for all slices of a brain; see UNet.
            moves: [B, 4], how far each head was moved; default: not at all.
            projections: [n, K], GaussianPrior.project of the whole brains that n windows are of: so the prior knows
                what it would know of these. Whole brains need none; without, g of a window is the mean.
        """
        slices = slices or self.slices
        if t is None:
            t = util.draw_together(lambda heads: self.draw_times(len(heads)), z[::slices]).repeat_interleave(slices)
        if noise is None:
            noise = self.gaussian.correlate(util.draw_together(torch.randn_like, latent), z, slices)
        alpha, sigma = self._levels(t)
        products = None
        if projections is not None:
            of_noise = self.gaussian.project_noise(noise.unflatten(0, (-1, slices)), z.view(-1, slices))
            products = alpha[::slices].flatten(1) * projections + sigma[::slices].flatten(1) * of_noise
        if self.training:
            z, people = self.hide(z, people, slices)
        x = alpha * latent + sigma * noise
        guess, sd, seen = self.gaussian(Noisy(x, alpha, sigma, z, slices, people, products))
        x0 = guess + sd * self.unet(seen, guess, t, z, slices, people, moves).float()
        loss = ((x0 - latent).square() * self.channel_weight).mean((1, 2, 3))
        return loss * WEIGHTS[self.recipe.weight](self.alpha[t], self.sigma[t]).float()

    def hide(self, z: Tensor, people: Tensor | None, slices: int) -> tuple[Tensor, Tensor | None]:
        """z and people with NaN where training hides them, at random and alike in all slices of a brain."""

        def chosen(share: float, *shape: int) -> Tensor:
            brains = torch.empty(len(z) // slices, *shape, device=z.device)
            return (util.draw_together(torch.rand_like, brains) < share).repeat_interleave(slices, 0)

        nothing = chosen(self.drop_z) if self.drop_z else torch.zeros_like(z, dtype=torch.bool)
        if self.drop_z:
            z = z.float().masked_fill(nothing, math.nan)
        if people is not None and self.conditions:
            nobody = nothing | chosen(self.drop_conditions)
            people = people.masked_fill(nobody[:, None] | chosen(self.drop_conditions, len(self.conditions)), math.nan)
        return z, people

    def denoise(
        self,
        x: Tensor,
        t: int,
        z: Tensor,
        slices: int | None = None,
        people: Tensor | None = None,
        away: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The model's (x_0, noise), float32 [B, C, h, w] each, of x_t = x [B, C, h, w] at step t and z [B].

        Every `slices` of the batch are contiguous slices of one brain; default: all are of one. `people` as in UNet.
        With `away` above 1, x_0 lies so many times as far from the Gaussian prior's guess as the network's own.
        """
        t = torch.full((len(x),), t, device=x.device)
        alpha, sigma = self._levels(t)
        slices = slices or len(x)
        guess, sd, seen = self.gaussian(Noisy(x, alpha, sigma, z, slices, people))
        x0 = guess + away * sd * self.unet(seen, guess, t, z, slices, people).float()
        return x0, (x - alpha * x0) / sigma

    def calibrated(self, denoise: Denoise, z: Tensor) -> Denoise:
        """`denoise`, which may be guided, with the correction by self.calibration, for whole brains at z [n Z]."""

        def corrected(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            x0, noise = denoise(x, t)
            alpha, sigma = self.alpha[t].float(), self.sigma[t].float()
            more = self.calibration(self.minus_mean(x, alpha, z), (sigma / alpha).log()).flatten(0, 1)
            return x0 + more, noise - alpha / sigma * more

        return corrected

    def minus_mean(self, latent: Tensor, alpha: Tensor | float, z: Tensor) -> Tensor:
        """Whole brains [n, Z, C, h, w]: latents or x_t [n Z, C, h, w] minus alpha times the mean head at z."""
        return (latent - alpha * self.gaussian.mean_at(z)).unflatten(0, (-1, self.slices_per_brain))


# ----------------------------------------------------------------------------------------------------------- samplers


def guide(denoise: Denoise, unconditional: Denoise, weight: float) -> Denoise:
    """unconditional + weight (denoise - unconditional): beyond the model, away from itself without its condition.

    Classifier-free guidance (Ho and Salimans 2022, where the weight is counted from 0). Two evaluations a step.
    """

    def guided(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        pairs = zip(unconditional(x, t), denoise(x, t), strict=True)
        x0, noise = (without.lerp(known, weight) for without, known in pairs)
        return x0, noise

    return guided


def sampling_times(alpha: Tensor, sigma: Tensor, steps: int) -> list[int]:
    """`steps` of the T times of alpha, sigma [T], from T - 1 downwards. Raises ValueError if T is less than `steps`.

    The noise level sigma / alpha falls from 80 to its least as in Karras et al. 2022, eq. 5, with rho = 7, whatever the
    schedule. That spends many steps where nearly all of x_t is noise, and there whole heads take shape: their common
    differences, such as size, are in thousands of numbers at once, and stand out of the noise long before any one
    number does. Steps that are even in t would pass most of these levels in the first step, and make heads too much
    alike.
    """
    T, ratio = len(alpha), sigma / alpha
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be between 1 and {T}, not {steps}")
    first, last = float(ratio[-1].clamp(max=80)) ** (1 / 7), float(ratio[0]) ** (1 / 7)
    wanted = first + (last - first) * torch.arange(steps, dtype=ratio.dtype, device=ratio.device) / max(1, steps - 1)
    nearest = (ratio.log() - 7 * wanted.log()[:, None]).abs().argmin(1).tolist()
    times = [T]
    for n, t in enumerate([T - 1, *nearest[1:]]):
        times.append(max(min(t, times[-1] - 1), steps - 1 - n))  # all different, however many
    return times[1:]


def sample_ddpm(
    denoise: Denoise, noise: Tensor, alpha: Tensor, sigma: Tensor, steps: int | None = None, draw: Draw | None = None
) -> Iterator[Tensor]:
    """Ancestral sampling, one step of q(x_{t-1} | x_t, x_0) for every t (Ho et al. 2020, eq. 6 and 7).

    All samplers have these arguments:
        denoise: gives x_0 and noise of x_t.
        noise: x_T [B, C, h, w].
        alpha, sigma: [T].
        steps: how many of the T times are visited; this sampler visits all.
        draw: gives fresh noise of the shape of x_T; the other samplers, which are deterministic, need none.
    They yield x after every step; the last one, x_0, is the sample.
    """
    x = noise
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
    denoise: Denoise, noise: Tensor, alpha: Tensor, sigma: Tensor, steps: int = 50, draw: Draw | None = None
) -> Iterator[Tensor]:
    """DDIM (Song et al. 2021, eq. 12 with eta = 0), an Euler step of the probability flow. As sample_ddpm."""
    x, times = noise, sampling_times(alpha, sigma, steps)
    for t, s in zip(times, [*times[1:], None], strict=True):
        x0, noise = denoise(x, t)
        if s is None:
            yield x0
            return
        x = alpha[s] * x0 + sigma[s] * noise
        yield x


def sample_heun(
    denoise: Denoise, noise: Tensor, alpha: Tensor, sigma: Tensor, steps: int = 10, draw: Draw | None = None
) -> Iterator[Tensor]:
    """Heun's method on the probability flow (Karras et al. 2022, algorithm 1): 2 steps - 1 evaluations of second order.

    In the angle of (alpha, sigma) = (cos, sin) the flow is dx / dangle = v = alpha noise - sigma x_0, which is smooth
    at both ends, also where alpha is 0. As sample_ddpm.
    """
    x, times, angle = noise, sampling_times(alpha, sigma, steps), torch.atan2(sigma, alpha)
    for t, s in zip(times, [*times[1:], None], strict=True):
        x0, noise = denoise(x, t)
        if s is None:
            yield x0
            return
        slope, turn = alpha[t] * noise - sigma[t] * x0, angle[s] - angle[t]
        x0, noise = denoise(x + turn * slope, s)
        x = x + turn * (slope + alpha[s] * noise - sigma[s] * x0) / 2
        yield x


def sample_dpm(
    denoise: Denoise, noise: Tensor, alpha: Tensor, sigma: Tensor, steps: int = 20, draw: Draw | None = None
) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2): second order with one evaluation a step.

    x_0 is extrapolated from the last two evaluations, linearly in lambda = ln(alpha / sigma); the first step has but
    one. As sample_ddpm.
    """
    x, times, lambdas = noise, sampling_times(alpha, sigma, steps), (alpha / sigma).log()
    before, stride = None, None
    for t, s in zip(times, [*times[1:], None], strict=True):
        x0, _ = denoise(x, t)
        if s is None:
            yield x0
            return
        last_stride, stride = stride, lambdas[s] - lambdas[t]  # the first is infinite where alpha ends at 0
        estimate = x0 if before is None else x0 + stride / last_stride / 2 * (x0 - before)
        x = sigma[s] / sigma[t] * x + (alpha[s] - alpha[t] * sigma[s] / sigma[t]) * estimate
        before = x0
        yield x


SAMPLERS = {"dpm": sample_dpm, "ddim": sample_ddim, "heun": sample_heun, "ddpm": sample_ddpm}
