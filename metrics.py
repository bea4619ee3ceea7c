"""Scores as pure functions of tensors: of pictures beside their reconstruction, of whole brains, of codes and latents.

Every function names its equation. Nothing here knows a model, a folder or a flag: evaluate.py does.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import util

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # finest scale first; Wang et al. 2003, section 3.2
COUNTABLE = 2**14  # codes; the 750,000 positions of a validation split are too few to count more of them
RINGS = 16  # of spatial frequency; at 64 px none of them is empty
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
    """Means over all slices of a list of slice_scores, leaving out slices without brain where that is asked."""
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
    """SSIM of the slices z and z + 1, over the whole picture: float64 [n, N - 1] of brains uint8 [n, N, S, S].

    Slices that belong to different heads score low. Above the value of real brains it is no merit either: the slices
    then change too little with z.
    """
    return torch.stack([slice_scores(brain[1:], brain[:-1], None)["ssim"] for brain in brains])


def reslice_spectrum(brains: Tensor) -> Tensor:
    """Mean power along z, by frequency: float64 [n, N] of brains uint8 [n, N, S, S], of grey 0..1.

    Entry k is the mean over all pixels of the squared k-th coefficient of the orthonormal cosine transform along z
    (DCT-II), of frequency k / (2 N) cycles per slice; entry 0 is the constant. The transform continues the brain
    mirrored at its lowest and highest slice, where it does not jump, which a Fourier transform's periodic continuation
    would. White noise of variance v has power v at every k. Jitter from slice to slice shows at the high end.
    """
    N = brains.shape[1]
    k, z = torch.arange(N, dtype=torch.float64)[:, None], torch.arange(N, dtype=torch.float64)
    basis = torch.cos(math.pi * k * (2 * z + 1) / (2 * N)) * math.sqrt(2 / N)
    basis[0] /= math.sqrt(2)
    basis = basis.to(brains.device)
    return torch.stack([(basis @ (brain.flatten(1).double() / 255)).square().mean(1) for brain in brains])


# ------------------------------------------------------------------------------------------------ means and intervals


def bootstrap_interval(values: Tensor, case: Tensor, resamples: int = 1000, seed: int = 0) -> list[float] | None:
    """95 % interval [low, high] of the mean of values [N], NaN left out, by percentiles of a bootstrap over cases.

    Whole cases (int [N]) are drawn with replacement, each with all its slices, since slices of one head are alike
    (Efron and Tibshirani 1993, chapter 13, with clusters). None where there are fewer than two cases.
    """
    values = values.double().numpy()
    owner = np.unique(case.numpy(), return_inverse=True)[1]
    known = ~np.isnan(values)
    total, count = np.bincount(owner, np.where(known, values, 0)), np.bincount(owner, known)
    total, count = total[count > 0], count[count > 0]
    if len(count) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(count), size=(resamples, len(count)))
    return np.percentile(total[drawn].sum(1) / count[drawn].sum(1), [2.5, 97.5]).tolist()


def summarise(scores: dict[str, Tensor], case: Tensor) -> dict:
    """{name: mean, name_interval: 95 % interval over cases or None} of scores [N], NaN, or a score of NaN, left out."""
    result = {}
    for name, values in scores.items():
        if values.isnan().all():  # masks without any brain
            continue
        result |= {name: float(values.nanmean()), f"{name}_interval": bootstrap_interval(values, case)}
    return result


def curve_over_z(values: Tensor, z: Tensor, case: Tensor) -> tuple[dict[int, float], dict[int, list[float] | None]]:
    """Mean, and interval over cases, of values [N] at every slice index that has any."""
    mean, interval = {}, {}
    for at in z[~values.isnan()].unique().tolist():
        mean[at] = float(values[z == at].nanmean())
        interval[at] = bootstrap_interval(values[z == at], case[z == at])
    return mean, interval


def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One dictionary of [N] of those of the batches."""
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
        mean, square, variance: float64 [C], averages over positions of the posterior mean, its square, and the
            posterior variance. Over all positions the black ones, which are half of a slice and far from the rest,
            widen Var(mean) and hide the noise; so ask over those that hold the head, or brain, as well.
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
