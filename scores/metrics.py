"""Scores as pure functions of tensors: of reconstructions, whole brains, sets of brains, codes and latents.

Every function names its equation. Nothing here knows a model, a folder or a flag.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import util
from module import cosines

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # finest scale first; Wang et al. 2003, section 3.2
COUNTABLE = 2**14  # codes; the 750,000 positions of a validation split are too few to count more of them
RINGS = 16  # of spatial frequency; at 64 px none of them is empty
DARK = 15  # grey level of 0..255 up to which a pixel is background: decoders leave a few levels on black
PATCH, PATCHES = 7, 32  # pixels a side of the patches of sliced Wasserstein; patches per slice and level
DIRECTIONS, BINS = 64, 320  # onto which patches are projected; of the histogram of each projection
FINEST_BIN = 1e-4  # width of the bins around 0, grey 0..1; bins widen towards +-PATCH by a constant factor
ACTIVE = 0.01  # variance of the mean above which a latent number carries something (Burda et al. 2016, section 3)

# ------------------------------------------------------------------------------------------------- pictures, compared


def slice_scores(x_hat: Tensor, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Scores of each slice.

    Args:
        x_hat, x: uint8 [B, H, W], reconstructed and real.
        mask: uint8 [B, H, W], non-zero on the brain, or None.
    Returns {"ssim", "psnr" in dB, and with masks "brain_ssim", NaN where no brain is}, each float64 [B].
    """
    a, b = (image.double()[:, None] / 255 for image in (x_hat, x))
    similarity = util.ssim_map(a, b)
    error = (a - b).square().mean((1, 2, 3)).clamp(min=1e-10)
    scores = {"ssim": similarity.mean((1, 2, 3)), "psnr": -10 * error.log10()}
    if mask is not None:
        brain = (mask[:, None, 5:-5, 5:-5] > 0).to(similarity)
        scores["brain_ssim"] = (similarity * brain).sum((1, 2, 3)) / brain.sum((1, 2, 3))
    return scores


def mean_scores(scores: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over all slices of a list of slice_scores; NaN, as of slices without brain, is left out."""
    return {name: float(torch.cat([s[name] for s in scores]).nanmean()) for name in scores[0]}


def luminance_map(x: Tensor, y: Tensor) -> Tensor:
    """The luminance term of util.ssim_map (Wang et al. 2004, eq. 6); arguments and shape as there."""
    height, width = (util.window_matrix(size, x) for size in x.shape[-2:])
    mean_x, mean_y = (height @ image @ width.T for image in (x, y))
    c1 = 0.01**2
    return (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale SSIM (Wang, Simoncelli, Bovik 2003, eq. 7): contrast and structure at every scale, luminance at the
    coarsest, each averaged over its map, to the power of its weight.

    The next scale is the mean over 2x2 pixels. There are five scales, or as many as the 11x11 window fits in (three at
    64 px), whose weights then are scaled to sum to 1. Negative averages count as 0, since they have no such power.

    Args:
        x, y: floating [B, 1, H, W] in [0, 1], at least 11 pixels a side; float64 where the pictures are mostly black.
    Returns [B].
    """
    scales = sum(min(x.shape[-2:]) >> n >= 11 for n in range(len(MS_SSIM_WEIGHTS)))
    if not scales:
        raise ValueError(f"x must have at least 11 pixels a side, not {list(x.shape)}")
    weights = MS_SSIM_WEIGHTS[:scales]
    whole = sum(weights) if scales < len(MS_SSIM_WEIGHTS) else 1  # the published five sum to 1.0001
    product = torch.ones(len(x), dtype=x.dtype, device=x.device)
    for n, weight in enumerate(weights, 1):
        similarity = util.ssim_map(x, y)
        if n < scales:
            similarity = similarity / luminance_map(x, y)  # leaves contrast and structure
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        product = product * similarity.mean((1, 2, 3)).clamp(min=0) ** (weight / whole)
    return product


def all_scores(x_hat: Tensor, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """slice_scores and "ms_ssim"; arguments as there."""
    a, b = (image.double()[:, None] / 255 for image in (x_hat, x))
    return slice_scores(x_hat, x, mask) | {"ms_ssim": ms_ssim(a, b)}


def radial_spectrum(pictures: Tensor, bands: int = RINGS) -> Tensor:
    """Mean power in rings of spatial frequency, float64 [B, bands], of grey 0..1.

    Ring k holds frequencies of k to k + 1 in units of 0.5 / bands cycles per pixel, without the constant; the corners
    above 0.5 belong to none. White noise of variance v has power v in every ring. No window: the pictures are black at
    the border, so their periodic continuation does not jump.

    pictures: uint8 [B, S, S].
    """
    B, S = pictures.shape[:2]
    power = torch.fft.fft2(pictures.double() / 255).abs().square() / S**2
    frequency = torch.fft.fftfreq(S, dtype=torch.float64, device=pictures.device)
    radius = (frequency[:, None].square() + frequency.square()).sqrt().flatten()
    ring = (radius * 2 * bands).long()
    inside = (radius > 0) & (ring < bands)
    total = power.new_zeros(B, bands).index_add_(1, ring[inside], power.flatten(1)[:, inside])
    return total / torch.bincount(ring[inside], minlength=bands).clamp(min=1)


# ------------------------------------------------------------------------------------------------------- whole brains


def adjacent_ssim(brains: Tensor) -> Tensor:
    """SSIM of the slices z and z + 1, over the whole picture: float64 [n, Z - 1] of brains uint8 [n, Z, S, S].

    Slices of different brains score low. A value above that of real brains is no merit: such slices change too little
    with z.
    """
    return torch.stack([slice_scores(brain[1:], brain[:-1], None)["ssim"] for brain in brains])


def reslice_spectrum(brains: Tensor) -> Tensor:
    """Mean power along z, by frequency: float64 [n, Z] of brains uint8 [n, Z, S, S], of grey 0..1.

    Entry k is the mean over all pixels of the squared k-th coefficient of the orthonormal cosine transform along z
    (DCT-II), of frequency k / (2 Z) cycles per slice; entry 0 is the constant. The cosine transform mirrors the brain
    at its lowest and highest slice, so nothing jumps there; a Fourier transform, which repeats the brain, would jump.
    White noise of variance v has power v at every k. Jitter from slice to slice shows at the high end.
    """
    Z = brains.shape[1]
    basis = cosines(Z, Z).to(brains.device, torch.float64)
    return torch.stack([(basis @ (brain.flatten(1).double() / 255)).square().mean(1) for brain in brains])


# ------------------------------------------------------------------------------------- features of slices, not learned


def random_features(pictures: Tensor, channels: int = 16, seed: int = 0) -> Tensor:
    """Activations of an untrained convolution network, float32 [B, 64], of uint8 [B, S, S].

    Four strided 5x5 convolutions with ReLU and seeded weights (He et al. 2015, eq. 10, no bias); each of their 4 x 16
    channels is averaged over the slice. Random filters see edges and texture at every scale and prefer no anatomy.
    """
    generator, features = torch.Generator().manual_seed(seed), []
    h = pictures[:, None].float() / 255
    for channels_in in (1, channels, channels, channels):
        weight = torch.randn(channels, channels_in, 5, 5, generator=generator) * math.sqrt(2 / (25 * channels_in))
        h = F.relu(F.conv2d(h, weight.to(h), stride=2, padding=2))
        features.append(h.mean((2, 3)))
    return torch.cat(features, 1)


def noise_level(pictures: Tensor) -> Tensor:
    """Standard deviation of noise, in grey levels 0..255, float32 [B], of uint8 [B, S, S] (Immerkaer 1996).

    The mean absolute response to a kernel that is blind to planes, over the pixels whose 3x3 neighbourhood is brighter
    than DARK. Fine texture counts as noise too, so blur lowers this number.
    """
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]], device=pictures.device)
    grey = pictures[:, None].float()
    response = F.conv2d(grey, kernel[None, None]).abs()
    lit = (-F.max_pool2d(-grey, 3, 1) > DARK).float()
    return math.sqrt(math.pi / 2) / 6 * (response * lit).sum((1, 2, 3)) / lit.sum((1, 2, 3)).clamp(min=1)


# --------------------------------------------------------------------------------------------- sets of slices, compared


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Frechet distance of the gaussians that fit features x [N, D] and y [M, D] (Heusel et al. 2017, eq. 6).

    |mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)). Estimated from N slices it is too large by a term in 1 / N,
    so only distances of equally many slices from one y can be compared (Chong and Forsyth 2020).
    """
    x, y = x.double(), y.double()
    root = _root(y.T.cov())
    cross = torch.linalg.eigvalsh(root @ x.T.cov() @ root).clamp(min=0).sqrt().sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return float(apart + x.var(0).sum() + y.var(0).sum() - 2 * cross)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def manifold_scores(x: Tensor, real: Tensor, k: int = 5) -> dict[str, Tensor]:
    """Precision, recall (Kynkaanniemi et al. 2019, eq. 1 and 2), density, coverage (Naeem et al. 2020, section 3).

    Around every slice lies a ball that reaches to its k-th nearest neighbour among the slices of other brains of its
    set; slices of its own brain do not count, since its neighbours there are nearly itself. Identical sets of slices,
    each slice a brain of its own, have 1 in all four; for two draws from one distribution density is 1 and coverage
    about 1 - 2^-k on average.

    Args:
        x, real: features [n, N, D] and [m, M, D] of brains.
    Returns per slice {"precision": it lies in a ball of real, "density": in how many of them, over k} float64 [n, N];
    {"recall": it lies in a ball of x, "coverage": its ball holds a slice of x} float64 [m, M].
    """
    apart = _distances(x, real)
    in_real, in_x = apart < _reach(real, k)[None], apart < _reach(x, k)[:, None]
    return {
        "precision": in_real.any(1).double().view(x.shape[:2]),
        "density": (in_real.double().sum(1) / k).view(x.shape[:2]),
        "recall": in_x.any(0).double().view(real.shape[:2]),
        "coverage": in_real.any(0).double().view(real.shape[:2]),
    }


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """float64 [n N, m M]: exact differences, so that a slice is at distance 0 from itself and ties stay ties."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.flatten(0, 1).double(), y.flatten(0, 1).double(), compute_mode=exact)


def _reach(x: Tensor, k: int) -> Tensor:
    """float64 [n N]: distance from every slice of x [n, N, D] to its k-th nearest of other brains."""
    brain = torch.arange(len(x)).repeat_interleave(x.shape[1])
    apart = _distances(x, x).masked_fill(brain[:, None] == brain, math.inf)
    return apart.kthvalue(k, dim=1).values


def wasserstein(x: Tensor, y: Tensor) -> Tensor:
    """1-Wasserstein distance between the columns of x [N, K] and y [M, K], float64 [K]: the area between the two
    distribution functions."""
    x, y = x.double(), y.double()
    values, order = torch.cat([x, y]).sort(0)
    step = torch.cat([x.new_full((len(x),), 1 / len(x)), y.new_full((len(y),), -1 / len(y))])
    between = step[order].cumsum(0)[:-1].abs()
    return (between * values.diff(dim=0)).sum(0)


def laplacian_pyramid(x: Tensor) -> list[Tensor]:
    """Levels of x [B, 1, S, S] from fine to coarse, S to 16 pixels (Burt and Adelson 1983).

    Each level is the detail that halving the picture removes; the last is the small picture that remains.
    """
    window = torch.tensor([1.0, 4, 6, 4, 1], device=x.device, dtype=x.dtype) / 16
    kernel, levels = (window[:, None] * window)[None, None], []
    while x.shape[-1] > 16:
        small = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2)
        wider = F.pad(small, (1, 1, 1, 1), mode="replicate")  # else a border that is not black would jump
        back = F.conv_transpose2d(wider, 4 * kernel, stride=2, padding=4, output_padding=1)
        levels.append(x - back)
        x = small
    return [*levels, x]


def bin_edges() -> Tensor:
    """float64 [BINS - 1]: edges between the bins of patch_histograms, fine around 0 and wide at the ends."""
    end = math.asinh(PATCH / FINEST_BIN)
    return FINEST_BIN * torch.sinh(torch.linspace(-end, end, BINS - 1, dtype=torch.float64))


def patch_histograms(brain: Tensor, seed: int = 0) -> Tensor:
    """Projections of the patches of a brain's Laplacian pyramids, float32 [levels, DIRECTIONS, BINS], sum 1 per row.

    PATCHES patches of 7x7 pixels from every slice of uint8 [Z, S, S] and level, at places that are random but the same
    in every brain, along random unit vectors. The histogram of a set of brains is the mean of theirs.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    edges, offset = bin_edges().to(brain.device, torch.float32), torch.arange(PATCH)
    for level in laplacian_pyramid(brain[:, None].float() / 255):
        Z, _, S, _ = level.shape
        direction = F.normalize(torch.randn(PATCH**2, DIRECTIONS, generator=generator), dim=0).to(level)
        row, column = torch.randint(0, S - PATCH + 1, (2, Z, PATCHES, 1, 1), generator=generator)
        slot = torch.arange(Z)[:, None, None, None]
        patches = level[slot, 0, row + offset[:, None], column + offset].reshape(-1, PATCH**2)
        bins = torch.bucketize(patches @ direction, edges) + BINS * torch.arange(DIRECTIONS, device=level.device)
        count = torch.bincount(bins.flatten(), minlength=BINS * DIRECTIONS).view(DIRECTIONS, BINS)
        found.append(count.float() / len(patches))
    return torch.stack(found)


def sliced_wasserstein(x: Tensor, y: Tensor) -> Tensor:
    """Sliced Wasserstein distance by pyramid level, fine to coarse, times 1000 (Karras et al. 2018, section 5).

    x, y: patch_histograms [levels, DIRECTIONS, BINS] of two sets. The mean over directions of the 1-Wasserstein
    distance of the projections, in units of the sd of y's. Unlike the paper, both sets are divided by the same sd:
    dividing each by its own would hide a loss of contrast.
    """
    edges = bin_edges()
    middle = torch.cat([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]])
    x, y = x.double(), y.double()
    between = (x.cumsum(-1) - y.cumsum(-1))[..., :-2].abs() @ edges.diff()
    mean = y @ middle
    sd = ((y @ middle.square() - mean.square()).mean(1)).sqrt().clamp(min=1e-12)
    return 1000 * between.mean(1) / sd


def decibel(power: Tensor, reference: Tensor) -> Tensor:
    """10 log10 of a ratio of powers; 0 where they are equal, -3 where half is left."""
    return 10 * (power.clamp(min=1e-12) / reference.clamp(min=1e-12)).log10()


# ----------------------------------------------------------------------------------------------------- copies, variety


def thumbnails(pictures: Tensor, size: int = 64) -> Tensor:
    """uint8 [B, size, size], means over squares of pixels, of uint8 [B, S, S]; S a multiple of size, or smaller."""
    small = F.adaptive_avg_pool2d(pictures[:, None].float(), min(size, pictures.shape[-1]))
    return small[:, 0].round().to(torch.uint8)


def nearest(brains: Tensor, reference: Tensor, next_ones: int = 5) -> dict[str, Tensor]:
    """The most similar training slice of every slice, and the most similar training brain of every brain.

    The distance of two slices is sqrt(2 - 2 r), with r the correlation of their thumbnails over all pixels, which does
    not depend on brightness and contrast. It is the smallest over shifts of up to one pixel of the thumbnails, in steps
    of half a pixel, and over the training slices z - 1, z and z + 1. Blurred slices have small distances to all others;
    so what counts is the relative distance, that to the nearest brain over the mean of those to the next few (Carlini
    et al. 2023, adaptive threshold): near 1 for a new brain, near 0 for a copy, sharp or not.

    Args:
        brains: uint8 [n, Z, S, S] in the order of z.
        reference: thumbnails uint8 [m, Z, s, s] of training brains, more than two.
    Returns {"distance", "relative" float32 [n, Z], "brain", "z" int64 [n, Z]: to and of the nearest slice,
    "brain_relative" float32 [n], "nearest_brain" int64 [n]: of whole brains, by the mean distance over equal z}.
    """
    n, Z, size = brains.shape[:3]
    m, step = len(reference), max(1, size // 128)

    def unit(pictures: Tensor) -> Tensor:
        flat = pictures.flatten(-2).float()
        return F.normalize(flat - flat.mean(-1, keepdim=True), dim=-1)

    known = unit(reference)
    shifts = [(step * down, step * right) for down in range(-2, 3) for right in range(-2, 3)]
    apart, at = torch.empty(n, Z, m), torch.empty(n, Z, m, dtype=torch.int64)
    same = torch.zeros(n, m)
    for z in util.progress(range(Z), "nearest training slices", unit="z"):
        # borders are black, so a picture can be shifted by rolling it
        moved = torch.cat([unit(thumbnails(brains[:, z].roll(by, (1, 2)))) for by in shifts])
        others = range(max(0, z - 1), min(Z, z + 2))
        r = torch.stack([(moved @ known[:, other].T).view(-1, n, m).amax(0) for other in others])
        distance, which = (2 - 2 * r).clamp(min=0).sqrt().min(0)
        apart[:, z], at[:, z] = distance, which + others[0]
        same += (2 - 2 * r[z - others[0]]).clamp(min=0).sqrt() / Z

    def relative(distance: Tensor) -> Tensor:
        close = distance.topk(min(m, 1 + next_ones), largest=False).values
        return close[..., 0] / close[..., 1:].mean(-1)

    brain = apart.argmin(2, keepdim=True)
    return {
        "distance": apart.amin(2),
        "relative": relative(apart),
        "brain": brain[..., 0],
        "z": at.gather(2, brain)[..., 0],
        "brain_relative": relative(same),
        "nearest_brain": same.argmin(1),
    }


def diversity(brains: Tensor, step: int = 4) -> Tensor:
    """MS-SSIM of slices of two different brains at one z: float64 [n, Z / step] of uint8 [n, Z, S, S], n >= 2.

    At every step-th z each brain is compared with one other brain, and the other one changes with z. High values mean
    little variety.
    """
    n, scores = len(brains), []
    for turn, z in enumerate(range(step // 2, brains.shape[1], step)):
        slices = brains[:, z, None].double() / 255
        scores.append(ms_ssim(slices, slices.roll(-1 - turn % (n - 1), 0)))
    return torch.stack(scores, 1)


# ------------------------------------------------------------------------------------------------ means and intervals


def bootstrap_interval(values: Tensor, brain: Tensor, resamples: int = 1000, seed: int = 0) -> list[float] | None:
    """95 % interval [low, high] of the mean of values [N], NaN left out, by percentiles of a bootstrap over brains.

    Whole brains (`brain`, int [N], says to which a value belongs) are drawn with replacement, each with all its slices,
    since slices of one brain are alike (Efron and Tibshirani 1993, chapter 13, with clusters). None below two brains.
    """
    values = values.double().numpy()
    owner = np.unique(brain.numpy(), return_inverse=True)[1]
    known = ~np.isnan(values)
    total, count = np.bincount(owner, np.where(known, values, 0)), np.bincount(owner, known)
    total, count = total[count > 0], count[count > 0]
    if len(count) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(count), size=(resamples, len(count)))
    return np.percentile(total[drawn].sum(1) / count[drawn].sum(1), [2.5, 97.5]).tolist()


def with_interval(row: dict, name: str, form: str = ".4f") -> str:
    """A mean and, where it is known, its interval, such as 0.9513 [0.9490, 0.9534]; a dash where it is missing."""
    if name not in row:
        return "-"
    interval = row.get(f"{name}_interval")
    return f"{row[name]:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def centred_interval(
    statistic: Callable[[Tensor], float], count: int, resamples: int = 200, seed: int = 0, least: float = 0.0
) -> list[float] | None:
    """95 % interval of a statistic of `count` brains, by a bootstrap over brains; None for fewer than two.

    A resample repeats brains, so its variety is too small, and its distance from another distribution too large on
    average. Therefore only the spread of the resamples about their own mean is taken, and laid around the value.

    Args:
        statistic: of int64 [count] indices of brains, with repetitions; NaN where these do not suffice.
        least: no score is lower, so no interval is.
    """
    if count < 2:
        return None
    draws = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    values = np.array([statistic(draw) for draw in draws])
    low, high = statistic(torch.arange(count)) + np.nanpercentile(values, [2.5, 97.5]) - np.nanmean(values)
    return [max(least, float(low)), float(high)]


def summarise(scores: dict[str, Tensor], brain: Tensor) -> dict:
    """{name: mean, name_interval: 95 % interval over brains or None} of scores [N]; NaN is left out.

    A score that is NaN on every slice has no entries.
    """
    result = {}
    for name, values in scores.items():
        if not values.isnan().all():
            result |= {name: float(values.nanmean()), f"{name}_interval": bootstrap_interval(values, brain)}
    return result


def curve_over_z(values: Tensor, z: Tensor, brain: Tensor) -> tuple[dict[int, float], dict[int, list[float] | None]]:
    """Mean, and interval over brains, of values [N] at every slice index that has any."""
    mean, interval = {}, {}
    for at in z[~values.isnan()].unique().tolist():
        mean[at] = float(values[z == at].nanmean())
        interval[at] = bootstrap_interval(values[z == at], brain[z == at])
    return mean, interval


def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One dictionary of [N] of the dictionaries of all batches."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# -------------------------------------------------------------------------------------------------- codes and latents


def entropy_bits(idx: np.ndarray) -> float:
    """Zero-order entropy, bits per code, of integers idx of any shape."""
    share = np.unique(idx, return_counts=True)[1] / idx.size
    return float(-(share * np.log2(share)).sum()) + 0.0  # no -0.0


def code_usage(idx: np.ndarray, codebook_size: int) -> dict[str, float]:
    """{"usage": share of codes that occur, "perplexity": 2^entropy} of integers idx of any shape."""
    return {"usage": len(np.unique(idx)) / codebook_size, "perplexity": 2 ** entropy_bits(idx)}


def latent_statistics(mean: Tensor, square: Tensor, variance: Tensor) -> dict:
    """How much of a VAE's latent is noise, and how many of its channels carry anything.

    Args:
        mean, square, variance: float64 [C], averages over positions of the posterior mean, of its square, and of the
            posterior variance. Over all positions Var(mean) is large and hides the noise, since half of them are black
            and far from the rest; averages over the head, or brain, say more.
    Returns {"noise_share": Var(sigma eps) / Var(latent) = E[sigma^2] / (Var(mean) + E[sigma^2]), averaged over the
    channels, "noise_share_per_channel", "active_channels": those with Var(mean) > 0.01 (Burda et al. 2016)}.
    """
    of_means = square - mean.square()
    share = variance / (of_means + variance)
    return {
        "noise_share": float(share.mean()),
        "noise_share_per_channel": share.tolist(),
        "active_channels": int((of_means > ACTIVE).sum()),
    }
