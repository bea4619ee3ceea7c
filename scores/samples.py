"""Scores of new brains, each computed twice in the same way: of sampled brains, and of as many held-out real ones.

Both are compared with the same training brains, so the second score is the floor: what real people differ by. No
network pretrained on photographs is needed. realism_page.py makes their tables and page.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

import util
from dataset import SLICES_PER_CASE, Slices
from scores.metrics import (
    adjacent_ssim,
    bootstrap_interval,
    centred_interval,
    decibel,
    diversity,
    frechet_distance,
    kernel_means,
    manifold_scores,
    mmd2,
    nearest,
    noise_level,
    patch_histograms,
    radial_spectrum,
    random_features,
    reslice_spectrum,
    sliced_wasserstein,
    texture_features,
    thumbnails,
    wasserstein,
)
from scores.scorer import TISSUES, Scorer, read_slices
from util import UserError

SPACES = {"trained": "trained encoder", "random": "random network", "texture": "histogram and texture"}
# name: (what it is called, unit, group on the page); the order is that of the page
SAMPLE_SCORES = {
    **{f"frechet_{space}": (f"Frechet distance, {name}", "", "distance") for space, name in SPACES.items()},
    **{f"mmd2_{space}": (f"MMD², {name}, x 1000", "", "distance") for space, name in SPACES.items()},
    "sliced_wasserstein": ("sliced Wasserstein, mean of levels, x 1000", "", "distance"),
    "sliced_wasserstein_finest": ("sliced Wasserstein, finest level, x 1000", "", "distance"),
    "spectrum": ("power spectrum, rms difference", "dB", "distance"),
    "csf_wasserstein": ("CSF area, 1-Wasserstein", "mm²", "distance"),
    "grey_wasserstein": ("grey-matter area, 1-Wasserstein", "mm²", "distance"),
    "white_wasserstein": ("white-matter area, 1-Wasserstein", "mm²", "distance"),
    "adjacent_profile": ("SSIM of neighbouring slices, mean difference of 31 pairs", "", "distance"),
    "reslice_spectrum": ("spectrum along z, rms difference", "dB", "distance"),
    "precision": ("precision", "", "value"),
    "recall": ("recall", "", "value"),
    "density": ("density", "", "value"),
    "coverage": ("coverage", "", "value"),
    "diversity": ("MS-SSIM of different brains", "", "value"),
    "noise": ("noise level", "grey levels", "value"),
    "z_error": ("error of z", "slices", "value"),
    "adjacent_ssim": ("SSIM of neighbouring slices", "", "value"),
    "copies": ("slices nearer to training than 99 % of held-out ones", "share", "copies"),
    "copied_brains": ("brains nearer to training than any held-out one", "share", "copies"),
}


def measure(brains: Tensor, scorer: Scorer, title: str) -> dict[str, Tensor]:
    """Everything about each brain by itself that scores are made of, [n, ...] each, of uint8 [n, 32, S, S]."""
    found = []
    for brain in tqdm(brains, desc=f"measure {title}", unit="brain", disable=None):
        seen = read_slices(scorer, brain)
        found.append(
            {
                "trained": seen["features"],
                "random": random_features(brain),
                "texture": texture_features(brain),
                "areas": seen["areas"],
                "z_error": (seen["z"] - torch.arange(len(brain))).abs(),
                "noise": noise_level(brain),
                "spectrum": radial_spectrum(brain).mean(0).float(),
                "adjacent": adjacent_ssim(brain[None])[0].float(),
                "reslice": reslice_spectrum(brain[None])[0].float(),
                "patches": patch_histograms(brain),
            }
        )
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def measure_real(data: Slices, cases: Tensor, scorer: Scorer, digest: str) -> dict[str, Tensor]:
    """measure of the given cases of a split, and their "diversity"; kept in data/cache, since real brains stay.

    The key holds the slices, the scorer (by its digest) and the code that measures.
    """
    code = [Path(__file__).parent / name for name in ("metrics.py", "scorer.py")]
    key = hashlib.blake2b(f"{data.digest} {cases.tolist()} {digest}".encode(), digest_size=8)
    for path in code:
        key.update(path.read_bytes())
    cache = Path("data/cache") / f"{data.split}_measures_{data.images.shape[-1]}_{key.hexdigest()}.safetensors"
    if cache.is_file():
        return safetensors.torch.load_file(cache)
    brains = torch.stack([data.images[data.case == case] for case in cases])
    found = measure(brains, scorer, data.split) | {"diversity": diversity(brains)}
    util.write_file(cache, safetensors.torch.save(found))
    return found


def statistics_of(x: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, tuple[Callable, int]]:
    """Scores as functions of brain indices (of a bootstrap resample), and how many brains these count.

    x, reference: measure of the brains scored, also with "diversity", and of those they are compared with. Features
    are in units of the reference's standard deviations.
    """
    n, scores = len(x["areas"]), {}
    for space in SPACES:
        mean, sd = reference[space].flatten(0, 1).mean(0), reference[space].flatten(0, 1).std(0).clamp(min=1e-6)
        a, b = ((part[space] - mean) / sd for part in (x, reference))
        width = float(torch.pdist(b.flatten(0, 1)[:: max(1, len(b) // 16)]).median())
        blocks = [kernel_means(*pair, width) for pair in ((a, a), (a, b), (b, b))]
        scores[f"frechet_{space}"] = lambda i, a=a, b=b: frechet_distance(a[i].flatten(0, 1), b.flatten(0, 1)), n
        scores[f"mmd2_{space}"] = lambda i, blocks=blocks: 1000 * mmd2(*blocks, i), n
        if space == "trained":
            as_many = spread_evenly(b, n)
            for name, values in manifold_scores(a, as_many).items():
                scores[name] = lambda i, values=values: float(values[i].mean()), len(values)

    patches, spectrum, reslice = (reference[name].mean(0) for name in ("patches", "spectrum", "reslice"))
    scores["sliced_wasserstein"] = (
        lambda i: float(sliced_wasserstein(x["patches"][i].mean(0), patches).mean()), n)  # fmt: skip
    scores["sliced_wasserstein_finest"] = (
        lambda i: float(sliced_wasserstein(x["patches"][i].mean(0), patches)[0]), n)  # fmt: skip
    for name, known in (("spectrum", spectrum), ("reslice", reslice)):
        key = "reslice_spectrum" if name == "reslice" else name
        scores[key] = (
            lambda i, name=name, known=known: float(decibel(x[name][i].mean(0), known).square().mean().sqrt()), n,
        )  # fmt: skip
    for k, tissue in enumerate(TISSUES):
        scores[f"{tissue}_wasserstein"] = (
            lambda i, k=k: float(wasserstein(x["areas"][i, :, k], reference["areas"][:, :, k]).mean()), n,
        )  # fmt: skip
    profile = reference["adjacent"].mean(0)
    scores["adjacent_profile"] = lambda i: float((x["adjacent"][i].mean(0) - profile).abs().mean()), n
    for name, key in (("noise", "noise"), ("z_error", "z_error"), ("adjacent_ssim", "adjacent"), ("diversity",) * 2):
        scores[name] = lambda i, key=key: float(x[key][i].mean()), n
    return scores


def with_intervals(scores: dict[str, tuple[Callable, int]], resamples: int) -> dict:
    """{name: value, name_interval: 95 %} of statistics_of."""
    result = {}
    for name, (statistic, count) in tqdm(scores.items(), desc="bootstrap", unit="score", disable=None):
        result[name] = statistic(torch.arange(count))
        least = -math.inf if name.startswith("mmd2") else 0.0
        result[f"{name}_interval"] = centred_interval(statistic, count, resamples, least=least)
    return result


def copy_scores(near: dict[str, Tensor], near_real: dict[str, Tensor]) -> dict:
    """Shares of slices and brains that lie nearer to training ones than held-out ones do, and the limits.

    By relative distance (metrics.nearest). "copies" are below the 1st percentile of held-out slices, so 1 in 100 of
    new ones is too; "copies_excess" is the share beyond that. "copied_brains" are below all held-out brains.
    """
    limit = float(near_real["relative"].quantile(0.01))
    brain_limit = float(near_real["brain_relative"].min())
    result = {"copies_limit": limit, "brain_limit": brain_limit}
    for name, values in (
        ("copies", (near["relative"] < limit).double().mean(1)),
        ("copied_brains", (near["brain_relative"] < brain_limit).double()),
    ):
        interval = bootstrap_interval(values, torch.arange(len(values)))
        result |= {name: float(values.mean()), f"{name}_interval": interval}
    return result | {"copies_excess": max(0.0, (result["copies"] - 0.01) / 0.99)}


def score_samples(
    brains: Tensor, train: Slices, held_out: Slices, scorer: Scorer, digest: str, resamples: int = 200
) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """All scores of sampled brains uint8 [n, 32, S, S], beside those of as many held-out ones.

    Args:
        train, held_out: real slices of the samples' size.
        digest: of the scorer's weights.
        resamples: of the bootstrap over brains.
    Returns (scores, measures): {"brains", "training_brains", "samples", "real": {score: value, score_interval}}, and
    {"samples", "real", "reference", "near", "near_real"}, what the pictures are drawn of.
    """
    known, real_cases = (whole_cases(data) for data in (train, held_out))
    n = min(len(brains), len(real_cases))
    if n < len(brains):
        print(f"{n} of {len(brains)} brains are scored: there are no more held-out ones to set beside them")
    chosen = {"reference": (train, known), "real": (held_out, spread_evenly(real_cases, n))}
    measures = {name: measure_real(data, cases, scorer, digest) for name, (data, cases) in chosen.items()}
    measures["samples"] = measure(brains[:n], scorer, "samples") | {"diversity": diversity(brains[:n])}
    small = torch.stack([thumbnails(train.images[train.case == case]) for case in known])
    everyone = torch.stack([held_out.images[held_out.case == case] for case in real_cases])
    measures["near"], measures["near_real"] = (nearest(part.cpu(), small.cpu()) for part in (brains[:n], everyone))
    result = {"brains": n, "training_brains": len(known)}
    for name in ("samples", "real"):
        result[name] = with_intervals(statistics_of(measures[name], measures["reference"]), resamples)
        near = measures["near" if name == "samples" else "near_real"]
        result[name] |= copy_scores(near, measures["near_real"])
    return result, measures


def whole_cases(data: Slices) -> Tensor:
    """int64: the cases of a split that have all 32 slices. Raises UserError where fewer than two have."""
    cases, count = data.case.unique(return_counts=True)
    if (count == SLICES_PER_CASE).sum() < 2:
        raise UserError(f"{data.split} in {data.folder} has fewer than two whole brains; give more with --data")
    return cases[count == SLICES_PER_CASE]


def spread_evenly(cases: Tensor, count: int) -> Tensor:
    """`count` of cases [n, ...] at even distances, the first and the last among them; all where n is less."""
    return cases[torch.linspace(0, len(cases) - 1, min(count, len(cases))).long()]
