"""Scores of new brains, each computed in the same way of several sets of brains: of the samples, of held-out people,
and, where the first stage is at hand, of the same held-out people after they went through it.

All are compared with the training people. What real people score is known from draws: as many training people as there
are samples, of their ages, take the place of the samples, and are compared with the other training people, again and
again (allowed). So each score has the range that real people keep to, and the least difference that so many brains
would show. No network pretrained on photographs is needed. Every score is one entry of SAMPLE_SCORES.
"""

import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import util
from dataset import Slices
from heads.layout import list_slices, read_slice, slices_of_splits
from scores import appearance
from scores.metrics import (
    adjacent_ssim,
    bootstrap_interval,
    centred_interval,
    decibel,
    diversity,
    frechet_distance,
    manifold_scores,
    nearest,
    noise_level,
    patch_histograms,
    radial_spectrum,
    random_features,
    reslice_spectrum,
    sliced_wasserstein,
    thumbnails,
    wasserstein,
)
from scores.scorer import TISSUES, Scorer, how_to_train, read_slices
from training.checkpoints import cached, is_path
from util import UserError

ROOT = Path(__file__).parents[1]
CODE = ("util.py", "module.py", "dataset.py", "scores/metrics.py", "scores/appearance.py", "scores/samples.py",
        "scores/scorer.py")  # which can run in `measure`; not the page's words  # fmt: skip
DRAWS = 60  # of real people, whose scores say what is allowed
NEAR_IN_AGE = 10  # a draw takes one of so many people nearest in age to a sample
POWER = 2.8  # sds of the draws: a difference so large is seen at 5 % in four of five sets of brains (1.96 + .84)
STEP = 4  # every fourth slice is kept as a thumbnail
COMPONENTS = 20  # of heads, along which the spread of people is compared

# ------------------------------------------------------------------------------------------- what is measured of brains


class Known(NamedTuple):
    """What the training people have in common: mean_head float32 [Z, S, S], grey levels; box, where heads lie."""

    mean_head: Tensor
    box: tuple[int, int, int, int]


# functions of one brain uint8 [Z, S, S], of what read_slices reads in it, and of what is Known
MEASURES: dict[str, Callable[[Tensor, dict[str, Tensor], Known], Tensor]] = {
    "trained": lambda brain, read, known: read["features"],  # [Z, 64]
    "random": lambda brain, read, known: random_features(brain),  # [Z, 64]
    "looks": lambda brain, read, known: appearance.looks(brain[::2]),  # [Z / 2, 185]
    "looks_small": lambda brain, read, known: appearance.looks(reduced(brain)),  # [Z, 185]
    "areas": lambda brain, read, known: read["areas"],  # mm^2 of TISSUES, [Z, 3]
    "z_error": lambda brain, read, known: (read["z"] - torch.arange(len(brain))).abs(),  # slices, [Z]
    "noise": lambda brain, read, known: noise_level(brain),  # grey levels, [Z]
    "spectrum": lambda brain, read, known: radial_spectrum(brain).mean(0).float(),  # [RINGS]
    "adjacent": lambda brain, read, known: adjacent_ssim(brain[None])[0].float(),  # [Z - 1]
    "reslice": lambda brain, read, known: reslice_spectrum(brain[None])[0].float(),  # [Z]
    "patches": lambda brain, read, known: patch_histograms(brain),  # [levels, DIRECTIONS, BINS]
    "ribbon": lambda brain, read, known: appearance.ribbon(brain, read["tissue"]),  # []
    "kurtosis": lambda brain, read, known: appearance.kurtosis(brain, read["tissue"]),  # []
    "coherence": lambda brain, read, known: appearance.coherence(brain, known.mean_head, read["tissue"]),  # [2, 3]
    "symmetry": lambda brain, read, known: appearance.symmetry(brain, read["tissue"]),  # []
    "extremes": lambda brain, read, known: appearance.extremes(brain, known.box),  # [Z, 3]
    "thumbnails": lambda brain, read, known: thumbnails(brain[STEP // 2 :: STEP]),  # uint8 [Z / STEP, 64, 64]
}


def reduced(brain: Tensor, side: int = 64) -> Tensor:
    """uint8 [Z, S, S] at `side` pixels a side, or half as many where it has no more: what survives of a small look."""
    return appearance.reduce(brain, max(2, brain.shape[-1] // side))


# ---------------------------------------------------------------------------------------------- how brains are compared
# Functions of one measure, of the scored brains [n, ...] and of the reference [m, ...]. They return a function from
# indices of brains (a bootstrap resample) to the score, and the number of brains to draw from.

Statistic = tuple[Callable[[Tensor], float], int]
Compare = Callable[[Tensor, Tensor], Statistic]


def mean(x: Tensor, reference: Tensor) -> Statistic:
    """The mean over brains and slices; the reference plays no part."""
    return lambda i: float(x[i].double().nanmean()), len(x)


def entry(*at: int) -> Compare:
    """The mean of one entry of each slice's or brain's numbers."""
    return lambda x, reference: mean(x[(..., *at)], reference)


def of_means(distance: Callable[[Tensor, Tensor], float]) -> Compare:
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


def frechet(columns: slice = slice(None)) -> Compare:
    """Frechet distance of the features of all slices, or of some columns of them."""

    def compare(x: Tensor, reference: Tensor) -> Statistic:
        a, b = standardised(x[..., columns], reference[..., columns])
        return lambda i: frechet_distance(a[i].flatten(0, 1), b.flatten(0, 1)), len(x)

    return compare


def manifold(name: str) -> Compare:
    """One of manifold_scores, against as many reference brains as are scored."""

    def compare(x: Tensor, reference: Tensor) -> Statistic:
        a, b = standardised(x, reference)
        return mean(manifold_scores(a, spread_evenly(b, len(a)))[name], reference)

    return compare


def area(tissue: str) -> Compare:
    """1-Wasserstein distance of the areas of a tissue at each z, mean over z."""
    k = TISSUES.index(tissue)
    return lambda x, reference: (lambda i: float(wasserstein(x[i, :, k], reference[:, :, k]).mean()), len(x))


def pairs(x: Tensor, reference: Tensor) -> Statistic:
    """MS-SSIM of pairs of brains in thumbnails [n, slices, 64, 64]."""
    return mean(diversity(x, 1), reference)


def judge(x: Tensor, reference: Tensor, shrink: float = 0.1) -> Statistic:
    """How well a linear classifier tells the slices of brains from real ones: the area under its curve, .5 is not at
    all.

    Features x [n, Z, D] against as many reference brains. Two-fold: the discriminant (Fisher 1936; the covariance
    shrunk towards a multiple of the identity) is learned of half of the brains of both kinds, and judges the others.
    """
    a, b = standardised(x, spread_evenly(reference, len(x)))
    parity = torch.arange(max(len(a), len(b))) % 2
    found = [torch.empty(part.shape[:2], dtype=torch.float64) for part in (a, b)]
    for fold in (0, 1):
        learn = [part[parity[: len(part)] != fold].flatten(0, 1).double() for part in (a, b)]
        means = [part.mean(0) for part in learn]
        spread = sum((part - m).T @ (part - m) for part, m in zip(learn, means)) / sum(map(len, learn))
        spread = (1 - shrink) * spread + shrink * spread.diagonal().mean() * torch.eye(len(spread)).to(spread)
        axis = torch.linalg.solve(spread, means[0] - means[1])
        for part, scores in zip((a, b), found):
            chosen = parity[: len(part)] == fold
            scores[chosen] = (part[chosen].double() - sum(means) / 2) @ axis / axis.norm()
    return lambda i: under_curve(found[0][i].flatten(), found[1].flatten()), len(x)


def under_curve(a: Tensor, b: Tensor) -> float:
    """The share of pairs of a number of a [N] and one of b [M] in which that of a is larger; ties count half."""
    b = b.sort().values
    below = torch.searchsorted(b, a) + torch.searchsorted(b, a, right=True)
    return float(below.double().mean() / (2 * len(b)))


# "people" [n, 4] holds mean areas of TISSUES over the slices of a brain, and the person's age


def at_equal_age(tissue: str, what: str) -> Compare:
    """Of the mean area of a tissue in people [n, 4] of known age, against its course over age in the reference.

    The course is a parabola. what: "spread" around it over that of the reference; "offset" from it, mm^2; "age", the
    correlation of area and age.
    """
    k = TISSUES.index(tissue)

    def compare(x: Tensor, reference: Tensor) -> Statistic:
        x, reference = x.double(), reference[~reference[:, 3].isnan()].double()
        centre, sd = reference[:, 3].mean(), reference[:, 3].std().clamp(min=1e-6)

        def powers(age: Tensor) -> Tensor:
            return torch.stack([(age - centre) ** 0, (age - centre) / sd, ((age - centre) / sd) ** 2], 1)

        course = torch.linalg.lstsq(powers(reference[:, 3]), reference[:, k, None], driver="gelsd").solution
        left, usual = (part[:, k] - (powers(part[:, 3]) @ course)[:, 0] for part in (x, reference))
        score = {
            "spread": lambda i: float(left[i].std() / usual.std().clamp(min=1e-6)),
            "offset": lambda i: float(left[i].mean()),
            "age": lambda i: float(torch.corrcoef(x[i][:, [k, 3]].T)[0, 1].nan_to_num()),
        }[what]
        return score, len(x)

    return compare


def spread_along(components: slice) -> Compare:
    """The sd of brains along some of the leading components of heads, over that of the reference, in rms.

    In thumbnails [n, slices, 64, 64], reduced to 32 px. The components are found in half of the reference, and its
    spread measured in the other half: along components of its own a set of few brains is spread widest.
    """

    def compare(x: Tensor, reference: Tensor) -> Statistic:
        x, reference = (F.avg_pool2d(part.float(), 2).flatten(1) for part in (x, reference))
        own, other = reference[::2], reference[1::2]
        if min(len(own) - 1, len(other)) < components.stop:  # too few people have so many components
            return lambda i: math.nan, len(x)
        centred = own - own.mean(0)
        _, vector = torch.linalg.eigh((centred @ centred.T).double())
        axes = F.normalize(vector.flip(1)[:, components].T.float() @ centred, dim=1)
        along, usual = x @ axes.T, (other @ axes.T).var(0).clamp(min=1e-6)
        return lambda i: float((along[i].var(0) / usual).mean().sqrt()), len(x)

    return compare


# ----------------------------------------------------------------------------------------------------------- the scores


class Score(NamedTuple):
    """A score of a set of brains.

    title, unit: its words on the page.
    group: its table there, a key of GROUPS.
    measure, compare: what it is made of, a name out of MEASURES or "people", and how, a function as above. None for
        copies, which copy_scores counts.
    """

    title: str
    unit: str
    group: str
    measure: str | None = None
    compare: Compare | None = None


GROUPS = {
    "distance": "Distance from training people",
    "look": "How a slice looks",
    "head": "How a head hangs together",
    "people": "How people differ",
    "copies": "Copies",
}
SPACES = {"trained": "trained encoder", "random": "random network"}
PATTERNS, EDGES = slice(0, 20), slice(20, 148)  # columns of appearance.looks
# by name; the order is that of the page
SAMPLE_SCORES = {
    **{f"frechet_{space}": Score(f"Frechet distance, {words}", "", "distance", space, frechet())
       for space, words in SPACES.items()},
    "frechet_patterns": Score("Frechet distance, local binary patterns", "", "distance", "looks", frechet(PATTERNS)),
    "frechet_edges": Score("Frechet distance, edges", "", "distance", "looks", frechet(EDGES)),
    "sliced_wasserstein": Score("sliced Wasserstein, x 1000", "", "distance", "patches",
                                of_means(lambda x, known: float(sliced_wasserstein(x, known).mean()))),
    "spectrum": Score("power spectrum, rms difference", "dB", "distance", "spectrum", of_means(rms_decibel)),
    **{f"{tissue}_wasserstein": Score(f"{words} area, 1-Wasserstein", "mm²", "distance", "areas", area(tissue))
       for tissue, words in zip(TISSUES, ("CSF", "grey-matter", "white-matter"))},
    "judge": Score("told from real slices by a linear judge, full size", "AUC", "look", "looks", judge),
    "judge_small": Score("told from real slices by a linear judge, 64 px", "AUC", "look", "looks_small", judge),
    "ribbon": Score("valley over grey peak of the histogram", "", "look", "ribbon", mean),
    "kurtosis": Score("kurtosis of the finest detail", "", "look", "kurtosis", mean),
    "noise": Score("scanner noise", "grey levels", "look", "noise", mean),
    "white": Score("slices with a pixel of 255", "share", "look", "extremes", entry(0)),
    "black": Score("exactly black in the box of heads", "share", "look", "extremes", entry(1)),
    "haze": Score("grey level 1 in the box of heads", "share", "look", "extremes", entry(2)),
    "z_error": Score("error of z", "slices", "look", "z_error", mean),
    "adjacent_ssim": Score("SSIM of neighbouring slices", "", "head", "adjacent", mean),
    "adjacent_profile": Score("the same, mean difference over z", "", "head", "adjacent",
                              of_means(lambda x, known: float((x - known).abs().mean()))),
    "reslice_spectrum": Score("spectrum along z, rms difference", "dB", "head", "reslice", of_means(rms_decibel)),
    **{f"coherence_{where}_{lag}": Score(f"coherence {where} the brain, {lag} slices apart", "r", "head", "coherence",
                                         entry(row, column))
       for row, where in enumerate(("in", "outside")) for column, lag in enumerate(appearance.LAGS)},
    "symmetry": Score("left half of the brain against right", "r", "head", "symmetry", mean),
    "density": Score("density", "", "people", "random", manifold("density")),
    "coverage": Score("coverage", "", "people", "random", manifold("coverage")),
    "diversity": Score("MS-SSIM of different brains at 64 px", "", "people", "thumbnails", pairs),
    "spread_first": Score("spread along components 1 to 10 of heads, over people's", "", "people", "thumbnails",
                          spread_along(slice(0, 10))),
    "spread_later": Score("spread along components 11 to 20 of heads, over people's", "", "people", "thumbnails",
                          spread_along(slice(10, 20))),
    **{f"{what}_{tissue}": Score(f"{words}: {title}", unit, "people", "people", at_equal_age(tissue, what))
       for what, title, unit in (("spread", "spread at equal age, over people's", ""),
                                 ("offset", "offset at equal age", "mm²"), ("age", "correlation of area with age", "r"))
       for tissue, words in zip(TISSUES, ("CSF", "grey matter", "white matter"))},
    "copies": Score("slices nearer to training than 99 % of held-out ones", "share", "copies"),
    "copied_brains": Score("brains nearer to training than any held-out one", "share", "copies"),
}  # fmt: skip


def score_samples(
    brains: Tensor,
    train: Slices,
    held_out: Slices,
    scorer: Scorer,
    digest: str,
    resamples: int = 200,
    *,
    ages: Tensor | None = None,
    through: Callable[[Tensor], Tensor] | None = None,
    draws: int = DRAWS,
) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """All scores of sampled brains uint8 [n, Z, S, S], beside those of as many held-out ones.

    Where there are fewer held-out brains, only as many of the first are scored; but copies are looked for in all.

    Args:
        train, held_out: real slices of the samples' size.
        digest: of the scorer's weights.
        resamples: of the bootstrap over brains.
        ages: float [n] of the people sampled, NaN where one is not known; None if none is.
        through: brains uint8 [n, Z, S, S] to the same after they went through the first stage; None leaves that out.
        draws: of real people.
    Returns (scores, measures). Scores: {"brains", "training_brains", "drawn_brains", "draws"; "samples", "real",
    "through": {score: value, score_interval}; "allowed": {score: {"low", "middle", "high", "least"}}}. Measures, of
    which the pictures are drawn: "samples", "real", "through", "reference", "near", "near_real". Scores of equal age
    are there where ages are known. Raises UserError where slices per brain differ, or a split has fewer than two
    whole brains.
    """
    check_slices(brains.shape[1], (train, held_out), scorer)
    positions, real = (whole_brains(data) for data in (train, held_out))
    n = min(len(brains), len(real))
    if n < len(brains):
        print(f"{n} of {len(brains)} brains are scored: there are no more held-out ones to set beside them; copies are "
              "looked for in all")  # fmt: skip
    real = spread_evenly(real, n)
    known, salt = know(train, positions), f"{digest} {train.digest}"
    measures = {
        "reference": measure_real(train, positions, scorer, known, salt),
        "real": measure_real(held_out, real, scorer, known, salt),
        "samples": measure(brains[:n], scorer, "samples", known),
    }
    if through:
        measures["through"] = measure(through(held_out.images[real].cpu()), scorer, "through the first stage", known)
    groups = {"reference": (train, positions), "real": (held_out, real), "through": (held_out, real)}
    for name, found in measures.items():
        age = ages_of(*groups[name]) if name in groups else ages[:n] if ages is not None else torch.full((n,), math.nan)
        if age.isnan().logical_not().sum() > COMPONENTS // 2:
            found["people"] = torch.cat([found["areas"].mean(1), age[:, None].float()], 1)
    result = {"brains": n, "training_brains": len(positions), "draws": draws}
    for name in ("samples", "real", "through"):
        if name in measures:
            result[name] = with_intervals(statistics_of(measures[name], measures["reference"]), resamples)
    wanted = measures["samples"].get("people", measures["real"].get("people"))
    result["drawn_brains"] = min(n, len(positions) // 2)
    result["allowed"] = allowed(measures["reference"], wanted, result["drawn_brains"], draws)
    # a scorer knows z of its training people by heart; what to expect of others, held-out people show
    unseen = statistics_of(measures["real"], measures["reference"])["z_error"]
    result["allowed"]["z_error"] = allowed_unseen(unseen, result["drawn_brains"], draws)
    small = torch.stack([thumbnails(train.images[at]) for at in positions]).cpu()
    measures["near"] = nearest(brains.cpu(), small)
    measures["near_real"] = nearest(held_out.images[real].cpu(), small)
    for name, near in (("samples", "near"), ("real", "near_real")):
        result[name] |= copy_scores(measures[near], measures["near_real"])
    return result, measures


# ------------------------------------------------------------------------------------------------------------- in steps


def know(train: Slices, positions: Tensor) -> Known:
    """What the whole training brains at positions [m, Z] have in common."""
    mean_head = sum(train.images[at].cpu().float() for at in positions) / len(positions)
    return Known(mean_head, train.content_box())


def ages_of(data: Slices, positions: Tensor) -> Tensor:
    """float32 [n]: ages of the people whose brains lie at positions [n, Z], NaN where one is not known."""
    return data.people(["age"])[positions[:, 0], 0]


def measure(brains: Tensor, scorer: Scorer, title: str, known: Known) -> dict[str, Tensor]:
    """All MEASURES of brains uint8 [n, Z, S, S], by name, [n, ...] each."""
    found = {name: [] for name in MEASURES}
    for brain in util.progress(brains, f"measure {title}", unit="brain"):
        read = read_slices(scorer, brain)
        for name, function in MEASURES.items():
            found[name].append(function(brain, read, known))
    return {name: torch.stack(values) for name, values in found.items()}


def measure_real(data: Slices, positions: Tensor, scorer: Scorer, known: Known, salt: str) -> dict[str, Tensor]:
    """measure of brains of a split, whose slices lie at positions int64 [n, Z]; kept in data/cache.

    The name of the cache depends on the slices, on the code that measures, and on `salt`: scorer and training data.
    """
    cases = data.case[positions[:, 0]].tolist()
    key = hashlib.blake2b(f"{data.digest} {cases} {salt} {digest_of_code()}".encode(), digest_size=8).hexdigest()
    name = f"{data.split}_measures_{data.images.shape[-1]}px_{key}"
    return cached(name, lambda: measure(data.images[positions].cpu(), scorer, data.split, known))


def digest_of_code(root: Path = ROOT, files: tuple[str, ...] = CODE) -> str:
    """16 hexadecimal digits of PyTorch's version and of files of the project; by default of those that `measure`."""
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=8)
    for name in files:
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def statistics_of(x: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Statistic]:
    """{score: (function of brain indices, number of brains)} from `measure` of scored brains and of the reference."""
    there = {name: score for name, score in SAMPLE_SCORES.items() if score.measure in x and score.measure in reference}
    return {name: score.compare(x[score.measure], reference[score.measure]) for name, score in there.items()}


def with_intervals(scores: dict[str, Statistic], resamples: int) -> dict:
    """{name: value, name_interval: 95 %} of statistics_of; without scores that these brains do not have."""
    result = {}
    for name, (statistic, count) in util.progress(scores.items(), "bootstrap", unit="score"):
        value = statistic(torch.arange(count))
        if math.isnan(value):  # such as of the outside of heads that have none
            continue
        result[name] = value
        result[f"{name}_interval"] = centred_interval(statistic, count, resamples, least=-math.inf)
    return result


def allowed(people: dict[str, Tensor], like: Tensor | None, count: int, draws: int, seed: int = 0) -> dict[str, dict]:
    """What real people score: {score: {"low", "middle", "high", "least"}} from `draws` sets of `count` of them.

    Each set is compared with all the other people. low and high hold the middle 90 % of the sets; a difference of
    `least` would be seen at the level of 5 % in four of five sets.

    Args:
        people: measures [m, ...] of real people.
        like: [n, 4] as "people"; a set has people of these ages. None: any people.
    """
    generator, values = torch.Generator().manual_seed(seed), {}
    everybody = torch.arange(len(next(iter(people.values()))))
    for _ in util.progress(range(draws), "real people", unit="draw"):
        chosen = draw_people(people.get("people"), like, len(everybody), count, generator)
        others = everybody[~torch.isin(everybody, chosen)]
        some, rest = ({name: part[i] for name, part in people.items()} for i in (chosen, others))
        for name, (statistic, size) in statistics_of(some, rest).items():
            values.setdefault(name, []).append(statistic(torch.arange(size)))
    return {name: middle_ninety(drawn) for name, drawn in values.items() if not any(map(math.isnan, drawn))}


def allowed_unseen(statistic: Statistic, count: int, draws: int, seed: int = 0) -> dict[str, float]:
    """As allowed, of one score of held-out people: `draws` sets of `count` of them, drawn with replacement."""
    generator, (score, n) = torch.Generator().manual_seed(seed), statistic
    return middle_ninety([score(torch.randint(n, (count,), generator=generator)) for _ in range(draws)])


def middle_ninety(drawn: list[float]) -> dict[str, float]:
    """{"low", "middle", "high", "least"} of what draws of people scored; see allowed."""
    drawn = torch.tensor(drawn, dtype=torch.float64)
    low, middle, high = drawn.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return {"low": low, "middle": middle, "high": high, "least": POWER * float(drawn.std())}


def draw_people(
    people: Tensor | None, like: Tensor | None, m: int, count: int, generator: torch.Generator
) -> Tensor:
    """int64 [count]: different ones out of m people [m, 4], as old as `count` of `like` [n, 4], where ages are known.

    For each age one of the NEAR_IN_AGE people nearest to it, of those that are left.
    """
    if people is None or like is None:
        return torch.randperm(m, generator=generator)[:count]
    ages, left = like[torch.randperm(len(like), generator=generator), 3], people[:, 3].clone()
    chosen = []
    for age in ages[:count]:
        near = (left - age).abs().nan_to_num(nan=math.inf).argsort()[:NEAR_IN_AGE]
        one = near[torch.randint(len(near), (), generator=generator)]
        chosen.append(one)
        left[one] = math.inf
    return torch.stack(chosen)


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

    Brains of all splits are taken, where there are splits. Z is 1 + the largest z there. Brains that lack slices are
    left out, and a line says so; of the others the first `limit` are taken. Raises UserError where fewer than two are
    left, or pictures differ in size.
    """
    folder = Path(run) if Path(run).is_dir() else Path(f"{run}_vis") / "samples"
    if not folder.is_dir() and is_path(run):
        raise UserError(f"--samples {run}: there is no such folder; mend the path, or give a run's name")
    if not folder.is_dir():
        raise UserError(
            f"--samples {run}: neither a folder nor a run with {folder}; "
            f"draw some with: python stable_diffusion.py --name {run} --sample --brains 35, or so with pixelCNN.py"
        )
    if limit == 1:
        raise UserError("--limit-brains 1: take more, since scores need two brains, and trust needs dozens")
    files: dict[int, dict[int, Path]] = {}
    found = sorted(itertools.chain(*slices_of_splits(folder).values()))
    for number, z, path in found or list_slices(folder, "train"):  # which says what is missing
        files.setdefault(number, {})[z] = path
    Z = 1 + max(z for brain in files.values() for z in brain)
    whole = {number: brain for number, brain in files.items() if len(brain) == Z}
    if len(whole) < len(files):
        print(f"{len(files) - len(whole)} of {len(files)} brains have not all {Z} slices and are left out")
    numbers = list(whole)[:limit]
    if len(numbers) < 2:
        raise UserError(f"{folder} has {len(numbers)} whole brains; draw more: scores need two, and trust needs dozens")
    pictures = [[read_slice(whole[number][z]) for z in range(Z)] for number in numbers]
    shapes = {picture.shape for brain in pictures for picture in brain}
    if len(shapes) > 1 or len(set(*shapes)) > 1:
        raise UserError(f"{folder} has pictures of {sorted(shapes)} pixels; give a folder of squares of one size")
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
            f"train one on your data with: {how_to_train()}"
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
