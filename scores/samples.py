"""Scores of new brains, each computed twice in the same way: of sampled brains, and of as many held-out real ones.

Both are compared with the same training brains, so the second value is the floor: how far real brains are apart. No
network pretrained on photographs is needed. Every score is one entry of SAMPLE_SCORES.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

import util
from dataset import Slices
from heads.layout import list_slices, read_slice
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
from scores.scorer import COMMAND, TISSUES, Scorer, read_slices
from util import UserError

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------- what is measured of brains

MEASURES = {  # functions of one brain uint8 [Z, S, S] and of what read_slices reads in it
    "trained": lambda brain, read: read["features"],  # [Z, 64]
    "random": lambda brain, read: random_features(brain),  # [Z, 64]
    "texture": lambda brain, read: texture_features(brain),  # [Z, 42]
    "areas": lambda brain, read: read["areas"],  # mm^2 of TISSUES, [Z, 3]
    "z_error": lambda brain, read: (read["z"] - torch.arange(len(brain))).abs(),  # slices, [Z]
    "noise": lambda brain, read: noise_level(brain),  # grey levels, [Z]
    "spectrum": lambda brain, read: radial_spectrum(brain).mean(0).float(),  # [RINGS]
    "adjacent": lambda brain, read: adjacent_ssim(brain[None])[0].float(),  # [Z - 1]
    "reslice": lambda brain, read: reslice_spectrum(brain[None])[0].float(),  # [Z]
    "patches": lambda brain, read: patch_histograms(brain),  # [levels, DIRECTIONS, BINS]
}
MEASURES_OF_SETS = {"diversity": diversity}  # functions of brains uint8 [n, Z, S, S], of each one beside others


# ---------------------------------------------------------------------------------------------- how brains are compared
# Functions of one measure, of the scored brains [n, ...] and of the reference [m, ...]. They return a function from
# indices of brains (a bootstrap resample) to the score, and the number of brains to draw from.

Statistic = tuple[Callable[[Tensor], float], int]


def mean(x: Tensor, reference: Tensor) -> Statistic:
    """The mean over brains and slices; the reference plays no part."""
    return lambda i: float(x[i].mean()), len(x)


def of_means(distance: Callable[[Tensor, Tensor], float]) -> Callable[[Tensor, Tensor], Statistic]:
    """The distance between the means over brains."""

    def compare(x: Tensor, reference: Tensor) -> Statistic:
        known = reference.mean(0)
        return lambda i: distance(x[i].mean(0), known), len(x)

    return compare


def rms_decibel(x: Tensor, reference: Tensor) -> float:
    """Root mean square over frequencies of the ratio of two power spectra in dB."""
    return float(decibel(x, reference).square().mean().sqrt())


def standardised(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of features [n, Z, D] in units of the reference's standard deviations."""
    slices = reference.flatten(0, 1)
    centre, sd = slices.mean(0), slices.std(0).clamp(min=1e-6)
    return (x - centre) / sd, (reference - centre) / sd


def frechet(x: Tensor, reference: Tensor) -> Statistic:
    """Frechet distance of the features of all slices."""
    a, b = standardised(x, reference)
    return lambda i: frechet_distance(a[i].flatten(0, 1), b.flatten(0, 1)), len(x)


def mmd(x: Tensor, reference: Tensor) -> Statistic:
    """Squared maximum mean discrepancy of the features, times 1000; the kernel's width is the median distance."""
    a, b = standardised(x, reference)
    width = float(torch.pdist(b.flatten(0, 1)[:: max(1, len(b) // 16)]).median())
    blocks = [kernel_means(*pair, width) for pair in ((a, a), (a, b), (b, b))]
    return lambda i: 1000 * mmd2(*blocks, i), len(x)


def manifold(name: str) -> Callable[[Tensor, Tensor], Statistic]:
    """One of manifold_scores, against as many reference brains as are scored."""

    def compare(x: Tensor, reference: Tensor) -> Statistic:
        a, b = standardised(x, reference)
        return mean(manifold_scores(a, spread_evenly(b, len(a)))[name], reference)

    return compare


def area(tissue: str) -> Callable[[Tensor, Tensor], Statistic]:
    """1-Wasserstein distance of the areas of a tissue at each z, mean over z."""
    k = TISSUES.index(tissue)
    return lambda x, reference: (lambda i: float(wasserstein(x[i, :, k], reference[:, :, k]).mean()), len(x))


# ----------------------------------------------------------------------------------------------------------- the scores


class Score(NamedTuple):
    """A score of a set of brains.

    title, unit: its words on the page.
    group: its table there: "distance" from training brains, lower is nearer; "value", of which real brains have the
        right one; "copies".
    measure, compare: what it is made of, a name out of MEASURES or MEASURES_OF_SETS, and how, a function as above.
        None for copies, which copy_scores counts.
    signed: it lies around 0 for real brains, and so may be negative.
    """

    title: str
    unit: str
    group: str
    measure: str | None = None
    compare: Callable[[Tensor, Tensor], Statistic] | None = None
    signed: bool = False


SPACES = {"trained": "trained encoder", "random": "random network", "texture": "histogram and texture"}
# by name; the order is that of the page
SAMPLE_SCORES = {
    **{f"frechet_{space}": Score(f"Frechet distance, {words}", "", "distance", space, frechet)
       for space, words in SPACES.items()},
    **{f"mmd2_{space}": Score(f"MMD², {words}, x 1000", "", "distance", space, mmd, signed=True)
       for space, words in SPACES.items()},
    "sliced_wasserstein": Score("sliced Wasserstein, mean of levels, x 1000", "", "distance", "patches",
                                of_means(lambda x, known: float(sliced_wasserstein(x, known).mean()))),
    "sliced_wasserstein_finest": Score("sliced Wasserstein, finest level, x 1000", "", "distance", "patches",
                                       of_means(lambda x, known: float(sliced_wasserstein(x, known)[0]))),
    "spectrum": Score("power spectrum, rms difference", "dB", "distance", "spectrum", of_means(rms_decibel)),
    "csf_wasserstein": Score("CSF area, 1-Wasserstein", "mm²", "distance", "areas", area("csf")),
    "grey_wasserstein": Score("grey-matter area, 1-Wasserstein", "mm²", "distance", "areas", area("grey")),
    "white_wasserstein": Score("white-matter area, 1-Wasserstein", "mm²", "distance", "areas", area("white")),
    "adjacent_profile": Score("SSIM of neighbouring slices, mean difference over z", "", "distance", "adjacent",
                              of_means(lambda x, known: float((x - known).abs().mean()))),
    "reslice_spectrum": Score("spectrum along z, rms difference", "dB", "distance", "reslice", of_means(rms_decibel)),
    "precision": Score("precision", "", "value", "trained", manifold("precision")),
    "recall": Score("recall", "", "value", "trained", manifold("recall")),
    "density": Score("density", "", "value", "trained", manifold("density")),
    "coverage": Score("coverage", "", "value", "trained", manifold("coverage")),
    "diversity": Score("MS-SSIM of different brains", "", "value", "diversity", mean),
    "noise": Score("noise level", "grey levels", "value", "noise", mean),
    "z_error": Score("error of z", "slices", "value", "z_error", mean),
    "adjacent_ssim": Score("SSIM of neighbouring slices", "", "value", "adjacent", mean),
    "copies": Score("slices nearer to training than 99 % of held-out ones", "share", "copies"),
    "copied_brains": Score("brains nearer to training than any held-out one", "share", "copies"),
}  # fmt: skip


def score_samples(
    brains: Tensor, train: Slices, held_out: Slices, scorer: Scorer, digest: str, resamples: int = 200
) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """All scores of sampled brains uint8 [n, Z, S, S], beside those of as many held-out ones.

    Args:
        train, held_out: real slices of the samples' size.
        digest: of the scorer's weights.
        resamples: of the bootstrap over brains.
    Returns (scores, measures): {"brains", "training_brains", "samples", "real": {score: value, score_interval}}, and
    {"samples", "real", "reference", "near", "near_real"}, of which the pictures are drawn. Raises UserError where
    slices per brain differ, or a split has fewer than two whole brains.
    """
    check_slices(brains.shape[1], (train, held_out), scorer)
    known, real = (whole_brains(data) for data in (train, held_out))
    n = min(len(brains), len(real))
    if n < len(brains):
        print(f"{n} of {len(brains)} brains are scored: there are no more held-out ones to set beside them")
    measures = {
        "reference": measure_real(train, known, scorer, digest),
        "real": measure_real(held_out, spread_evenly(real, n), scorer, digest),
        "samples": measure(brains[:n], scorer, "samples"),
    }
    small = torch.stack([thumbnails(train.images[positions]) for positions in known]).cpu()
    measures["near"] = nearest(brains[:n].cpu(), small)
    measures["near_real"] = nearest(held_out.images[real].cpu(), small)
    result = {"brains": n, "training_brains": len(known)}
    for name, near in (("samples", "near"), ("real", "near_real")):
        result[name] = with_intervals(statistics_of(measures[name], measures["reference"]), resamples)
        result[name] |= copy_scores(measures[near], measures["near_real"])
    return result, measures


# ------------------------------------------------------------------------------------------------------------- in steps


def measure(brains: Tensor, scorer: Scorer, title: str) -> dict[str, Tensor]:
    """All MEASURES of brains uint8 [n, Z, S, S], by name, [n, ...] each."""
    found = {name: [] for name in MEASURES}
    for brain in util.progress(brains, f"measure {title}", unit="brain"):
        read = read_slices(scorer, brain)
        for name, function in MEASURES.items():
            found[name].append(function(brain, read))
    of_sets = {name: function(brains) for name, function in MEASURES_OF_SETS.items()}
    return {name: torch.stack(values) for name, values in found.items()} | of_sets


def measure_real(data: Slices, positions: Tensor, scorer: Scorer, digest: str) -> dict[str, Tensor]:
    """measure of brains of a split, whose slices lie at positions int64 [n, Z]; kept in data/cache.

    The name of the cache depends on the slices, the scorer (by its digest), and the code that measures.
    """
    cases = data.case[positions[:, 0]].tolist()
    key = hashlib.blake2b(f"{data.digest} {cases} {digest} {digest_of_code()}".encode(), digest_size=8).hexdigest()
    cache = Path("data/cache") / f"{data.split}_measures_{data.images.shape[-1]}_{key}.safetensors"
    if cache.is_file():
        return safetensors.torch.load_file(cache)
    found = measure(data.images[positions].cpu(), scorer, data.split)
    util.write_file(cache, safetensors.torch.save(found))
    return found


def digest_of_code(root: Path = ROOT) -> str:
    """16 hexadecimal digits of PyTorch's version and of all files of the project whose code can run in `measure`."""
    files = [root / name for name in ("util.py", "module.py", "dataset.py")] + sorted((root / "scores").glob("*.py"))
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=8)
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def statistics_of(x: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Statistic]:
    """{score: (function of brain indices, number of brains)} from `measure` of scored brains and of the reference."""
    compared = {name: score for name, score in SAMPLE_SCORES.items() if score.compare}
    return {name: score.compare(x[score.measure], reference[score.measure]) for name, score in compared.items()}


def with_intervals(scores: dict[str, Statistic], resamples: int) -> dict:
    """{name: value, name_interval: 95 %} of statistics_of."""
    result = {}
    for name, (statistic, count) in util.progress(scores.items(), "bootstrap", unit="score"):
        result[name] = statistic(torch.arange(count))
        least = -math.inf if SAMPLE_SCORES[name].signed else 0.0
        result[f"{name}_interval"] = centred_interval(statistic, count, resamples, least=least)
    return result


def copy_scores(near: dict[str, Tensor], near_real: dict[str, Tensor]) -> dict:
    """Shares of slices and brains that are nearer to training ones than held-out ones are, and the limits.

    What counts is the relative distance of metrics.nearest. "copies" are below the 1st percentile of held-out slices,
    so 1 in 100 new ones is too; "copies_excess" is the share beyond that. "copied_brains" are below all held-out ones.
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


# -------------------------------------------------------------------------------------------------------- whole brains


def load_samples(run: str, limit: int | None = None) -> tuple[Tensor, list[int], Path]:
    """Whole brains uint8 [n, Z, S, S], their numbers, and the folder, of a second stage's run or a folder of slices.

    Z is 1 + the largest z there. Brains that lack slices are left out, and a line says so; of the others the first
    `limit` are taken. Raises UserError where fewer than two are left, or pictures differ in size.
    """
    folder = Path(run) if Path(run).is_dir() else Path(f"{run}_vis") / "samples"
    if not folder.is_dir():
        raise UserError(
            f"--samples {run}: neither a folder nor a run with {folder}; "
            f"draw some with: python stable_diffusion.py --name {Path(run).name} --sample --brains 35"
        )
    files: dict[int, dict[int, Path]] = {}
    for number, z, path in list_slices(folder, "samples"):
        files.setdefault(number, {})[z] = path
    Z = 1 + max(z for brain in files.values() for z in brain)
    whole = {number: brain for number, brain in files.items() if len(brain) == Z}
    if len(whole) < len(files):
        print(f"{len(files) - len(whole)} of {len(files)} brains have not all {Z} slices and are left out")
    numbers = list(whole)[:limit]
    if len(numbers) < 2:
        raise UserError(f"{folder} has {len(numbers)} whole brains; scores of samples need two, and trust needs dozens")
    pictures = [[read_slice(whole[number][z]) for z in range(Z)] for number in numbers]
    shapes = {picture.shape for brain in pictures for picture in brain}
    if len(shapes) > 1 or len(set(*shapes)) > 1:
        raise UserError(f"{folder} has pictures of {sorted(shapes)} pixels; squares of one size are expected")
    return torch.from_numpy(np.array(pictures)), numbers, folder


def check_slices(Z: int, splits: tuple[Slices, ...], scorer: Scorer) -> None:
    """Raises UserError unless brains of the splits have Z slices, as the samples have, and the scorer reads Z."""
    for data in splits:
        if data.slices_per_brain != Z:
            raise UserError(
                f"samples have {Z} slices a brain, {data.split} in {data.folder} has {data.slices_per_brain}; "
                "give the data they were trained on with --data"
            )
    if scorer.slices_per_brain != Z:
        raise UserError(
            f"the scorer was trained on brains of {scorer.slices_per_brain} slices, these have {Z}; "
            f"train one on your data with: {COMMAND}"
        )


def whole_brains(data: Slices) -> Tensor:
    """int64 [n, Z]: the positions of a split's whole brains. Raises UserError where there are fewer than two."""
    positions = data.whole_cases()
    if len(positions) < 2:
        raise UserError(f"{data.split} in {data.folder} has fewer than two whole brains; give more with --data")
    return positions


def spread_evenly(brains: Tensor, count: int) -> Tensor:
    """`count` of brains [n, ...] at even distances, the first and the last among them; all of them if n is less."""
    return brains[torch.linspace(0, len(brains) - 1, min(count, len(brains))).long()]
