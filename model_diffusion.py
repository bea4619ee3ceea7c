"""Diffusion over latents: noise schedules, the denoising UNet, the training loss, and samplers as free functions.

Everything follows from x_t = alpha_t x_0 + sigma_t noise with alpha_t^2 + sigma_t^2 = 1 and t = 0 .. T - 1 (Ho et al.
2020, eq. 4, where alpha_t^2 is written alpha-bar_t). The latents have unit variance, so x_t has too. Processes that are
written otherwise, rectified flow and EDM, are the same one after a division of x_t by sqrt(alpha_t^2 + sigma_t^2).
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

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
from parts.gaussian_prior import LinearDenoiser

SCHEDULES = ("cosine", "linear", "cosine-zero", "linear-zero", "flow", "edm")
PREDICTIONS = ("v", "eps", "x0", "flow")
WEIGHTINGS = ("plain", "min-snr")
SLICE_NOISE = ("matched", "shared", "own")
# Where training draws t: evenly, or with ln(sigma / alpha) ~ N(mean, 1). Since sigma / (alpha + sigma) is the time u of
# rectified flow, mean 0 is u = sigmoid(N(0, 1)).
TIMES = {"uniform": None, "logit-normal": 0.0, "log-normal": -0.4}
# What published methods chose, as (schedule, prediction, weighting, times).
RECIPES = {
    "v": ("cosine", "v", "plain", "uniform"),  # Salimans and Ho 2022
    "min-snr": ("cosine", "v", "min-snr", "uniform"),  # Hang et al. 2023, with v
    "ddpm": ("linear", "eps", "plain", "uniform"),  # Ho et al. 2020
    "flow": ("flow", "flow", "plain", "logit-normal"),  # Liu et al. 2023; times of Esser et al. 2024
    "edm": ("edm", "v", "plain", "log-normal"),  # Karras et al. 2022 and 2024
}

Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (x_t, t) -> (x_0, noise)
MOVES = 4  # numbers that say how training moved a head, see dataset.move

# ---------------------------------------------------------------------------------------------------- noise schedules


def noise_levels(schedule: str, T: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), [T] each, of the forward process; alpha falls, and alpha^2 + sigma^2 = 1.

    linear: beta_t from 1e-4 to 0.02 at T = 1000, scaled for other T (Ho et al. 2020, section 4).
    cosine: alpha_t^2 = cos^2(pi/2 (u + s) / (1 + s)), s = 0.008, beta_t <= 0.999 (Nichol and Dhariwal 2021, eq. 17).
    linear-zero, cosine-zero: alpha shifted and scaled, so that its last value is 0 and its first as it was: the last
        x_t is nothing but noise, in training as in sampling (Lin et al. 2024, algorithm 1).
    flow: (1 - u) x_0 + u noise with u from 1/T to 1, rescaled (rectified flow, Liu et al. 2023).
    edm: x_0 + s noise with s from 0.002 to 80 at rho = 7, rescaled (Karras et al. 2022, eq. 5).
    """
    if schedule in ("linear", "linear-zero"):
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
        alpha = torch.cumprod(1 - beta.clamp(max=0.999), 0).sqrt()
    elif schedule in ("cosine", "cosine-zero"):
        u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
        squared = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = 1 - squared[1:] / squared[:-1]
        alpha = torch.cumprod(1 - beta.clamp(max=0.999), 0).sqrt()
    elif schedule == "flow":
        u = torch.linspace(1 / T, 1, T, dtype=torch.float64)
        alpha = (1 - u) / torch.hypot(1 - u, u)
    elif schedule == "edm":
        s = torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), T, dtype=torch.float64) ** 7
        alpha = (1 + s**2).rsqrt()
    else:
        raise ValueError(f"schedule must be one of {SCHEDULES}, not {schedule}")
    if schedule.endswith("-zero"):
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return alpha.to(dtype), ((1 - alpha) * (1 + alpha)).sqrt().to(dtype)


# ----------------------------------------------------------------------------------------------------------- the UNet


def embed_condition(dim: int, name: str) -> nn.Module:
    """The embedding of a condition's numbers [B], which may be NaN, as vectors [B, dim]."""
    if CONDITIONS[name] is None:
        return Embedding(dim, unknown=True)
    return CategoryEmbedding(dim, CONDITIONS[name])


class UNet(nn.Module):
    """[B, C, h, w] at time t and slice index z to [B, C, h, w]; the sum of both embeddings enters every block.

    The first layer also sees the `guess` at x_0 of a linear denoiser, without effect at the start. `conditions` names
    what else is known, and embedded, of the person.
    With `mixing`, slices of one brain hear of each other in every block; it starts as the network without.
    With `moved`, training moves heads and says how far, so that samples are of heads where they are (augmentation
    conditioning, Karras et al. 2022, appendix F.2); it starts without effect.
    """

    def __init__(
        self,
        latent_channels: int,
        channels: int,
        channel_multipliers: tuple[int, ...],
        blocks: int,
        unknown_z: bool = False,
        mixing: bool = False,
        conditions: tuple[str, ...] = (),
        moved: bool = False,
    ):
        super().__init__()
        width = [channels * m for m in channel_multipliers]
        embedding_dim = 4 * channels
        self.embed_t, self.embed_z = Embedding(embedding_dim), Embedding(embedding_dim, unknown=unknown_z)
        self.embed_people = nn.ModuleDict({name: embed_condition(embedding_dim, name) for name in conditions})
        self.embed_moves = zero(nn.Linear(MOVES, embedding_dim, bias=False)) if moved else None
        self.stem = nn.Conv2d(latent_channels, width[0], 3, padding=1)
        self.stem_guess = zero(nn.Conv2d(latent_channels, width[0], 3, padding=1, bias=False))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, current = [width[0]], width[0]
        for level, w in enumerate(width):
            if level:
                self.down.append(Downsample(current, current))
                skips.append(current)
            for _ in range(blocks):
                self.down.append(Level(current, w, embedding_dim, attention=level > 0, mixing=mixing))
                skips.append(current := w)
        self.mid = Level(current, current, embedding_dim, attention=True, mixing=mixing)
        for level, w in reversed(list(enumerate(width))):
            for _ in range(blocks + 1):
                self.up.append(Level(current + skips.pop(), w, embedding_dim, attention=level > 0, mixing=mixing))
                current = w
            if level:
                self.up.append(Upsample(current, current))
        self.out = nn.Sequential(norm(current), nn.SiLU(), zero(nn.Conv2d(current, latent_channels, 3, padding=1)))

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
        """x and guess [B, C, h, w]; t [B], steps 0 .. T - 1; z [B], slice index, or NaN with unknown_z.

        With mixing, every `slices` of the batch are contiguous slices of one brain. `people` [B, conditions] holds the
        conditions in their order, NaN where one is not known; None if none is. moves: [B, 4] as in dataset.move, or
        None for heads that were not moved.
        """
        embedding = self.embed_t(t) + self.embed_z(z)
        for k, (name, embed) in enumerate(self.embed_people.items()):
            value = torch.full_like(t, math.nan, dtype=torch.float32) if people is None else people[:, k]
            # in decades: the sines of single years would tell every person of a small data set from all others
            embedding = embedding + embed(value / 10 if name == "age" else value)
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
        return h if self.mixing is None else self.mixing(h, slices)


# -------------------------------------------------------------------------------------------------- the diffusion model


class LatentDiffusion(nn.Module):
    """p(latent | z): the UNet together with what it predicts and how its loss is weighted.

    Args:
        latent_shape: (C, h, w) of the first stage's latents.
        channels, channel_multipliers, blocks: of the UNet.
        schedule: of the noise, one of SCHEDULES.
        prediction: what the UNet's output means: "v" = alpha noise - sigma x_0 (Salimans and Ho 2022), "eps" the noise
            (Ho et al. 2020), "x0" the clean latent, "flow" = noise - x_0 (Liu et al. 2023).
        weighting: "plain" counts the squared error of the output once; "min-snr" that of x_0 min(SNR, 5) times, with
            SNR = alpha^2 / sigma^2 (Hang et al. 2023), whatever the prediction.
        times: where training draws t, a key of TIMES.
        drop_z: how often training hides z; such a model also denoises without z, that is z = NaN, for guidance.
        slices: S, how many contiguous slices of a brain training shows together. With 1 the model sees every slice by
            itself; with more, neighbours hear of each other, and S may be another one in sampling.
        modes: of the LinearDenoiser, whose guess at x_0 the UNet sees; they need matched noise.
        slice_noise: how the noise of a brain's slices hangs together, one of SLICE_NOISE: "matched" is correlated
            along z as `slice_correlation` says, "shared" the same in all, "own" independent.
        slices_per_brain: Z, how many slices there are of a brain.
        conditions: what the model knows of people, keys of CONDITIONS. Training hides each from a share
            drop_conditions of the brains, from as many all of them, and from a share drop_z all of them and z.
        moved: whether training shows moved heads too, and the UNet hears how far they were.
        T: number of steps of the forward process.
    Raises ValueError for a choice that there is not, and for "eps" with a schedule that ends at alpha = 0.
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
        weighting: str = "plain",
        times: str = "uniform",
        drop_z: float = 0.0,
        slices: int = 1,
        slice_noise: str = "matched",
        slices_per_brain: int = 32,
        modes: int = 0,
        conditions: tuple[str, ...] = (),
        drop_conditions: float = 0.1,
        moved: bool = False,
        T: int = 1000,
    ):
        super().__init__()
        choices = (
            ("prediction", prediction, PREDICTIONS),
            ("weighting", weighting, WEIGHTINGS),
            ("times", times, TIMES),
            ("slice_noise", slice_noise, SLICE_NOISE),
            *(("conditions", name, CONDITIONS) for name in conditions),
        )
        for name, value, possible in choices:
            if value not in possible:
                raise ValueError(f"{name} must be one of {tuple(possible)}, not {value}")
        alpha, sigma = noise_levels(schedule, T, torch.float64)  # differences of neighbours matter to samplers
        if prediction == "eps" and alpha[-1] == 0:
            raise ValueError(f"prediction eps says nothing about x_0 where schedule {schedule} ends, at alpha = 0")
        self.latent_shape, self.schedule, self.T = tuple(latent_shape), schedule, T
        self.prediction, self.weighting, self.times, self.drop_z = prediction, weighting, times, drop_z
        self.slices, self.slice_noise = slices, slice_noise
        self.conditions, self.drop_conditions = tuple(conditions), drop_conditions
        self.linear = LinearDenoiser(self.latent_shape, modes, slices_per_brain, len(self.conditions))
        self.calibration = Calibration(self.latent_shape, slices_per_brain)
        self.unet = UNet(
            latent_shape[0],
            channels,
            tuple(channel_multipliers),
            blocks,
            unknown_z=drop_z > 0,
            mixing=slices > 1,
            conditions=self.conditions,
            moved=moved,
        )
        self.register_buffer("alpha", alpha, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)
        # of the squared error; training sets it to what each channel does to a picture
        self.register_buffer("channel_weight", torch.ones(latent_shape[0], 1, 1), persistent=False)
        # until it is measured, all are one
        self.register_buffer("slice_correlation", torch.ones(latent_shape[0], slices_per_brain, slices_per_brain))

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha[t].float().view(-1, 1, 1, 1), self.sigma[t].float().view(-1, 1, 1, 1)

    def draw_times(self, count: int) -> Tensor:
        """int64 [count]: random steps t, distributed as `times` says.

        They are `count` quantiles at even distances from one random number (Kingma et al. 2021, "Variational diffusion
        models", appendix I), so that the loss of a batch depends less on which steps it happened to draw.
        """
        device, mean = self.alpha.device, TIMES[self.times]
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
        shown: Tensor | None = None,
        moves: Tensor | None = None,
        linear: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Loss of each latent, float32 [B], at random steps and noise unless given.

        Args:
            latent: [B, C, h, w], every `slices` of them contiguous slices of one brain; default: as in training.
            z: int64 [B].
            t: int64 [B], the same for all slices of a brain.
            noise: [B, C, h, w]; default: as slice_noise says.
            people: [B, conditions], the same for all slices of a brain; see UNet.
            shown: int64 [n], what the UNet sees of the batch, and n losses are of: as many slices, one after the
                other, of each brain. Of what it does not see it has the linear denoiser's guess. Default: all.
            moves: [B, 4], how far each was moved; default: not at all.
            linear: what guesses at x_0 in place of the model's linear denoiser, which has seen all training brains; see
                linear_denoiser.CrossFitted.
        """
        slices = slices or self.slices
        brains = len(latent) // slices
        t = self.draw_times(brains).repeat_interleave(slices) if t is None else t
        noise = self.correlate(torch.randn_like(latent), z, slices) if noise is None else noise
        if self.training:
            z, people = self.hide(z, people, slices)
        alpha, sigma = self._levels(t)
        x = alpha * latent + sigma * noise
        guess = (linear or self.linear)(x, alpha, sigma, z, slices, self.slice_correlation, people)
        seen = [latent, noise, alpha, sigma, x, guess, t, z, people, moves]
        if shown is not None:
            seen = [None if part is None else part[shown] for part in seen]
        latent, noise, alpha, sigma, x, guess, t, z, people, moves = seen
        output = self.unet(x, guess, t, z, len(x) // brains, people, moves).float()
        target = {
            "v": alpha * noise - sigma * latent,
            "eps": noise,
            "x0": latent,
            "flow": noise - latent,
        }[self.prediction]
        loss = ((output - target).square() * self.channel_weight).mean((1, 2, 3))
        return loss if self.weighting == "plain" else loss * self.min_snr_weight(t)

    def correlate(self, white: Tensor, z: Tensor, slices: int, how: str | None = None) -> Tensor:
        """Noise float32 [B, C, h, w] of unit variance, made of white noise of that shape.

        Every `slices` of the batch are of one brain, at z int64 [B]; `how` is one of SLICE_NOISE, default: slice_noise.
        """
        how = how or self.slice_noise
        if slices == 1 or how == "own":
            return white
        K = self.slice_correlation if how == "matched" else torch.ones_like(self.slice_correlation)
        z = z.view(-1, slices)
        value, vector = torch.linalg.eigh(K.double()[:, z[:, :, None], z[:, None, :]])  # [C, n, slices, slices]
        root = ((vector * value.clamp(min=0).sqrt()[..., None, :]) @ vector.mT).float()
        with torch.autocast(white.device.type, enabled=False):
            return torch.einsum("cnab,nbchw->nachw", root, white.unflatten(0, (-1, slices))).flatten(0, 1)

    def hide(self, z: Tensor, people: Tensor | None, slices: int) -> tuple[Tensor, Tensor | None]:
        """z and people with NaN where training, brain by brain and at random, does without them."""

        def drawn(share: float, *shape: int) -> Tensor:
            return (torch.rand(len(z) // slices, *shape, device=z.device) < share).repeat_interleave(slices, 0)

        nothing = drawn(self.drop_z) if self.drop_z else torch.zeros_like(z, dtype=torch.bool)
        if self.drop_z:
            z = z.float().masked_fill(nothing, math.nan)
        if people is not None and self.conditions:
            nobody = nothing | drawn(self.drop_conditions)
            people = people.masked_fill(nobody[:, None] | drawn(self.drop_conditions, len(self.conditions)), math.nan)
        return z, people

    def min_snr_weight(self, t: Tensor) -> Tensor:
        """[B]: what makes min(SNR, 5) times the squared error of x_0 of the squared error of the output at t [B]."""
        alpha, sigma = self.alpha[t], self.sigma[t]
        gain = {  # error of x_0 over error of the output, at a given x_t
            "v": sigma,
            "eps": sigma / alpha,
            "x0": 1,
            "flow": sigma / (alpha + sigma),
        }[self.prediction]
        return ((alpha / sigma).square().clamp(max=5) * gain**2).float()

    def denoise(
        self, x: Tensor, t: int, z: Tensor, slices: int | None = None, people: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The model's (x_0, noise), float32 [B, C, h, w] each, of x_t = x [B, C, h, w] at step t and z [B].

        Every `slices` of the batch are contiguous slices of one brain; default: all are of one. `people` as in UNet.
        """
        t = torch.full((len(x),), t, device=x.device)
        alpha, sigma = self._levels(t)
        slices = slices or len(x)
        guess = self.linear(x, alpha, sigma, z, slices, self.slice_correlation, people)
        output = self.unet(x, guess, t, z, slices, people).float()
        if self.prediction == "v":
            return alpha * x - sigma * output, sigma * x + alpha * output
        if self.prediction == "eps":
            return (x - sigma * output) / alpha, output
        if self.prediction == "flow":
            return (x - sigma * output) / (alpha + sigma), (x + alpha * output) / (alpha + sigma)
        return output, (x - alpha * output) / sigma

    def calibrated(self, denoise: Denoise, z: Tensor) -> Denoise:
        """`denoise`, which may be guided, with what self.calibration adds for whole brains, at z [n Z]."""

        def corrected(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            x0, noise = denoise(x, t)
            alpha, sigma = self.alpha[t].float(), self.sigma[t].float()
            more = self.calibration(self.less_mean(x, alpha, z), (sigma / alpha).log()).flatten(0, 1)
            return x0 + more, noise - alpha / sigma * more

        return corrected

    def less_mean(self, latent: Tensor, alpha: Tensor | float, z: Tensor) -> Tensor:
        """Whole brains [n, Z, C, h, w] of latents or x_t [n Z, C, h, w], less alpha times the mean head at z."""
        return (latent - alpha * self.linear.mean_at(z)).unflatten(0, (-1, len(self.linear.mean)))

    def sampling_levels(self) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the steps that samplers walk: all, or for eps those with alpha of at least 0.006.

        Below, as at the end of the cosine schedule, dividing by alpha would turn errors of the noise into any x_0.
        """
        last = int((self.alpha >= 0.006).sum()) if self.prediction == "eps" else self.T
        return self.alpha[:last], self.sigma[:last]


# ----------------------------------------------------------------------------------------------------------- samplers


def guide(denoise: Denoise, weak: Denoise, weight: float) -> Denoise:
    """weak + weight (denoise - weak): beyond the model, away from one that knows or can less. Two evaluations a step.

    With the same model without its condition as `weak` this is classifier-free guidance (Ho and Salimans 2022, where
    the weight is counted from 0), with a smaller or less trained model autoguidance (Karras et al. 2024, eq. 3).
    """

    def guided(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        pairs = zip(denoise(x, t), weak(x, t), strict=True)
        x0, noise = (poor.lerp(good, weight) for good, poor in pairs)
        return x0, noise

    return guided


def sampling_times(alpha: Tensor, sigma: Tensor, steps: int) -> list[int]:
    """`steps` of the T times of alpha, sigma [T], counted down from the last. Raises ValueError if T is less.

    Their sigma / alpha falls from 80 as in Karras et al. 2022, eq. 5, with rho = 7, whatever the schedule. What whole
    heads differ in most, in thousands of numbers at once, is told from the noise long before any one number is: even
    steps in t would pass that by in the first, and make heads too much alike.
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
    """DDIM (Song et al. 2021, eq. 12 and 16) over `steps` of the T times.

    eta = 0 is deterministic, an Euler step of the probability flow; eta = 1 over all T times is ancestral sampling.
    Arguments and yields as sample_ddpm.
    """
    times = sampling_times(alpha, sigma, steps)
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


def sample_heun(denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, steps: int = 10) -> Iterator[Tensor]:
    """Heun's method on the probability flow (Karras et al. 2022, algorithm 1): 2 steps - 1 evaluations of second order.

    In the angle of (alpha, sigma) = (cos, sin) the flow is dx / dangle = v = alpha noise - sigma x_0, which is smooth
    at both ends, also where alpha is 0. Arguments and yields as sample_ddpm.
    """
    times, angle = sampling_times(alpha, sigma, steps), torch.atan2(sigma, alpha)
    for t, s in zip(times, [*times[1:], None], strict=True):
        x0, noise = denoise(x, t)
        if s is None:
            yield x0
            return
        slope, turn = alpha[t] * noise - sigma[t] * x0, angle[s] - angle[t]
        x0, noise = denoise(x + turn * slope, s)
        x = x + turn * (slope + alpha[s] * noise - sigma[s] * x0) / 2
        yield x


def sample_dpm(denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, steps: int = 20) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2): second order with one evaluation a step.

    x_0 is extrapolated from the last two evaluations, linearly in lambda = ln(alpha / sigma); the first step has but
    one. Arguments and yields as sample_ddpm.
    """
    times, lambdas = sampling_times(alpha, sigma, steps), (alpha / sigma).log()
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
