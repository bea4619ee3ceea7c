"""Scores of new brains, each computed twice in the same way: of sampled brains, and of as many held-out real ones.

Both are compared with the same training brains, so the second score is the floor: what real people differ by. No
network pretrained on photographs is needed. evaluate.py --samples prints the table and writes the page of them.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

import sheets
import util
from dataset import SLICES_PER_CASE, Slices, find_data, list_slices, load_slices, read_png
from metrics import (
    RINGS,
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
    with_interval,
)
from scorer import OWN, TISSUES, Scorer, find_scorer, read_slices
from util import UserError

# ------------------------------------------------------------------------------------------------------- sampled brains

SPACES = {"trained": "trained encoder", "random": "random network", "texture": "histogram and texture"}
REFERENCE = 64  # training brains, evenly spread, that both sampled and held-out ones are compared with
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


def load_samples(run: str, limit: int | None) -> tuple[Tensor, list[int], Path]:
    """Whole brains uint8 [n, 32, S, S], their numbers, and the folder, of a second stage's run or a folder of slices.

    Cases that lack slices are left out, and said. Raises UserError where fewer than two brains are left.
    """
    folder = Path(run) if Path(run).is_dir() else Path(f"{run}_vis") / "samples"
    if not folder.is_dir():
        raise UserError(
            f"--samples {run}: neither a folder nor a run with {folder}; "
            f"draw some with: python stable_diffusion.py --name {Path(run).name} --sample --brains 35"
        )
    files: dict[int, dict[int, Path]] = {}
    for case, z, path in list_slices(folder, "samples"):
        files.setdefault(case, {})[z] = path
    whole = {case: of for case, of in files.items() if of.keys() == set(range(SLICES_PER_CASE))}
    if len(whole) < len(files):
        print(f"{len(files) - len(whole)} of {len(files)} brains have not all 32 slices and are left out")
    cases = list(whole)[:limit]
    if len(cases) < 2:
        raise UserError(f"{folder} has {len(cases)} whole brains; scores of samples need two, and trust needs dozens")
    pictures = [[read_png(whole[case][z]) for z in range(SLICES_PER_CASE)] for case in cases]
    shapes = {picture.shape for brain in pictures for picture in brain}
    if len(shapes) > 1 or len(set(*shapes)) > 1:
        raise UserError(f"{folder} has pictures of {sorted(shapes)} pixels; squares of one size are expected")
    return torch.from_numpy(np.array(pictures)), cases, folder


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
    Returns (scores, measures): {"brains", "reference_brains", "samples", "real": {score: value, score_interval}}, and
    {"samples", "real", "reference", "near", "near_real"}, what the pictures are drawn of.
    """
    known, real_cases = (whole_cases(data) for data in (train, held_out))
    n = min(len(brains), len(real_cases))
    if n < len(brains):
        print(f"{n} of {len(brains)} brains are scored: there are no more held-out ones to set beside them")
    chosen = {
        "reference": (train, spread_evenly(known, REFERENCE)),
        "real": (held_out, spread_evenly(real_cases, n)),
    }
    measures = {name: measure_real(data, cases, scorer, digest) for name, (data, cases) in chosen.items()}
    measures["samples"] = measure(brains[:n], scorer, "samples") | {"diversity": diversity(brains[:n])}
    small = torch.stack([thumbnails(train.images[train.case == case]) for case in known])
    everyone = torch.stack([held_out.images[held_out.case == case] for case in real_cases])
    measures["near"], measures["near_real"] = (nearest(part.cpu(), small.cpu()) for part in (brains[:n], everyone))
    result = {"brains": n, "reference_brains": len(chosen["reference"][1]), "training_brains": len(known)}
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


# ------------------------------------------------------------------------------------------------- report on samples


def verdict(samples: dict, real: dict, name: str) -> str:
    """Whether the intervals of a score of samples and of real brains overlap."""
    (low, high), (real_low, real_high) = (part[f"{name}_interval"] for part in (samples, real))
    return "as real" if low <= real_high and real_low <= high else "differs"


def sample_rows(result: dict) -> dict[str, list[list[str]]]:
    """{group: rows of [score, samples, real, samples / real, verdict]} of a result of score_samples."""
    samples, real, rows = result["samples"], result["real"], {}
    for name, (title, unit, group) in SAMPLE_SCORES.items():
        form = ".2%" if group == "copies" else ".3f" if max(abs(samples[name]), abs(real[name])) < 10 else ".1f"
        ratio = samples[name] / real[name] if real[name] > 0 and not name.startswith("mmd2") else math.nan
        cells = [
            f"{title}{f', {unit}' if unit else ''}",
            *(with_interval(part, name, form) for part in (samples, real)),
        ]
        cells += ["-" if math.isnan(ratio) else f"{ratio:.2f}"]
        rows.setdefault(group, []).append([*cells, verdict(samples, real, name)])
    return rows


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown of cells."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def page(report: dict, name: str) -> str:
    """The page on samples: what was compared, tables, pictures, how to read it."""
    result, scorer = report["result"], report["scorer"]
    rows, n, split = sample_rows(result), result["brains"], report["data"]["held_out"]["split"]
    columns = ["samples", f"real ({split})", "samples / real", "verdict"]
    alike = sum(row[-1] == "as real" for group in rows.values() for row in group)
    seen = scorer["accuracy"]["validate"]
    dice = ", ".join(f"{seen[f'dice_{tissue}']:.2f} {tissue}" for tissue in TISSUES)
    nearest_of_all = ", ".join(format(pair["relative_distance"], ".2f") for pair in report["nearest"][:3])
    return f"""# Scores of samples

{n} brains of 32 slices from `{report["samples"]["folder"]}`, beside {n} held-out real ones (`{split}`). Both are
compared in the same way with the same {result["reference_brains"]} training brains; copies are looked for among all
{result["training_brains"]}. Brackets hold 95 % intervals over brains. "as real" means that the intervals of samples and
of real brains overlap; that is so in {alike} of {len(SAMPLE_SCORES)} scores.

## Distance from training brains

Lower is nearer. The column "real" is the floor: so much do new people differ from those trained on. A ratio of 1 is as
good as real; far below 1 is no merit but a sign of copies or of too little variety. MMD² is unbiased, so it lies around
0 for real brains and has no ratio.

{markdown_table(["distance", *columns], rows["distance"])}

## Values

None is better high or low: right is what real brains have.

{markdown_table(["score", *columns], rows["value"])}

![Plots]({name}.png)

*Blue: real held-out brains; red: samples. Bands hold the middle 95 % of brains, bars 95 % intervals of the score.*

## Copies

{markdown_table(["copies", *columns], rows["copies"])}

Compared are distances to the nearest training brain over the mean of those to the next five: near 1 for a new head, 0
for a copy. New heads have 1 % of their slices below the limit, the 1st percentile of held-out slices, here
{result["samples"]["copies_limit"]:.2f}; beyond that are {result["samples"]["copies_excess"]:.1%} of the samples. The
nearest have {nearest_of_all}.

![Nearest pairs]({name}_nearest.png)

## What measured it

Tissue, z and the features "trained encoder" are read by `{scorer["path"]}` (digest {scorer["digest"]}), trained on
{scorer["data"]["cases"]} cases. On the held-out slices it was tested on it has Dice {dice}, and errs in z by
{seen["z_error"]:.2f} slices. Scores of two runs can be compared where scorer, split and number of brains are the same.
All numbers are in `{name}.json`; README.md, Scores of samples, defines each.
"""


def draw_samples(result: dict, measures: dict[str, dict[str, Tensor]], title: str):
    """Six panels: scores over their floors; power by frequency; tissues, neighbours and power along z; nearest ones."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(17, 10), layout="constrained")
    figure.suptitle(title)
    samples, real, reference = (measures[name] for name in ("samples", "real", "reference"))
    forest, power, areas, neighbours, along, near = axes.flat

    names = [
        name
        for name, (_, _, group) in SAMPLE_SCORES.items()
        if group == "distance" and not name.startswith("mmd2") and result["real"][name] > 0
    ]
    for part, color, shift in (("real", "C0", 0.15), ("samples", "C3", -0.15)):
        for row, name in enumerate(reversed(names)):
            floor, (low, high) = result["real"][name], result[part][f"{name}_interval"]
            value, low, high = (max(number / floor, 0.05) for number in (result[part][name], low, high))
            label = f"{part} (interval over brains)" if row == 0 else None
            forest.plot([low, high], [row + shift] * 2, color=color, linewidth=2)
            forest.plot(value, row + shift, "o", color=color, label=label)
    forest.axvline(1, color="grey", linestyle="--", linewidth=1)
    forest.set(
        xscale="log", xlabel="score over that of real brains (1: as real)", title="distance from training brains"
    )
    ticks = [
        tick
        for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
        if forest.get_xlim()[0] <= tick <= forest.get_xlim()[1]
    ]
    forest.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    forest.minorticks_off()
    forest.set_yticks(range(len(names)), [SAMPLE_SCORES[name][0] for name in reversed(names)], fontsize=8)

    def curves(axis, x, values: dict[str, Tensor]) -> None:
        """Mean over brains and the middle 95 % of them, of [n, K]."""
        for (label, known), color in zip(values.items(), ("C0", "C3")):
            low, high = known.double().quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
            axis.plot(x, known.mean(0), color=color, label=label)
            axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)

    both = {"real": real, "samples": samples}
    frequency = [(k + 0.5) * 0.5 / RINGS for k in range(RINGS)]
    mean = reference["spectrum"].mean(0)
    curves(power, frequency, {label: decibel(part["spectrum"], mean) for label, part in both.items()})
    noise = f"noise level {result['samples']['noise']:.2f}, real {result['real']['noise']:.2f}"
    power.set(xlabel="spatial frequency, cycles per pixel", ylabel="dB over training brains", title=f"power; {noise}")
    for k, (tissue, style) in enumerate(zip(TISSUES, (":", "--", "-"))):
        for (label, part), color in zip(both.items(), ("C0", "C3")):
            spread = part["areas"][..., k].double()
            areas.plot(spread.mean(0) / 100, style, color=color, label=f"{tissue}, {label}")
            low, high = spread.quantile(torch.tensor([0.025, 0.975]).double(), dim=0) / 100
            areas.fill_between(range(SLICES_PER_CASE), low, high, color=color, alpha=0.12, linewidth=0)
    areas.set(xlabel="slice index z", ylabel="area, cm²", title="tissue areas as read by the scorer")
    areas.set_ylim(bottom=0)
    curves(neighbours, range(SLICES_PER_CASE - 1), {label: part["adjacent"] for label, part in both.items()})
    neighbours.set(xlabel="slice index z", ylabel="SSIM of slices z and z + 1", title="neighbouring slices")
    mean, cycles = reference["reslice"].mean(0), torch.arange(1, SLICES_PER_CASE) / (2 * SLICES_PER_CASE)
    curves(along, cycles, {label: decibel(part["reslice"], mean)[:, 1:] for label, part in both.items()})
    along.set(xlabel="frequency along z, cycles per slice", ylabel="dB over training brains", title="power along z")
    for label, key, color in (("held-out slices", "near_real", "C0"), ("samples", "near", "C3")):
        distance = measures[key]["relative"].flatten()
        near.hist(distance, 60, range=(0, 1.05), density=True,
                  histtype="stepfilled", alpha=0.5, color=color, label=label)  # fmt: skip
    limit, share = result["samples"]["copies_limit"], result["samples"]["copies"]
    near.axvline(
        limit, color="k", linestyle="--", linewidth=1, label=f"limit {limit:.3f}: {share:.1%} of samples below"
    )
    near.set(xlabel="distance to nearest brain / to the next five; 0: a copy", ylabel="density", title="copies")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    near.legend(fontsize=8, loc="upper left")
    areas.legend(fontsize=8, loc="lower center", ncols=3)
    return figure


def nearest_pairs(near: dict[str, Tensor], cases: list[int], known: Tensor, limit: float, count: int = 8) -> list[dict]:
    """The samples nearest to a training slice, of as many brains as possible: {"case", "z",
    "relative_distance", "distance", "below_limit", "training_case", "training_z"}, the nearest first."""
    distance, z = near["relative"].min(1)
    order = distance.argsort()[:count].tolist()
    pairs = [(i, int(z[i])) for i in order]
    more = near["relative"].flatten().argsort().tolist()  # where there are few brains, several of one
    pairs += [pair for n in more if (pair := divmod(n, SLICES_PER_CASE)) not in pairs][: count - len(pairs)]
    return sorted(
        (
            {
                "case": cases[i],
                "z": at,
                "relative_distance": float(near["relative"][i, at]),
                "distance": float(near["distance"][i, at]),
                "below_limit": bool(near["relative"][i, at] < limit),
                "training_case": int(known[near["brain"][i, at]]),
                "training_z": int(near["z"][i, at]),
            }
            for i, at in pairs
        ),
        key=lambda pair: pair["relative_distance"],
    )


def draw_nearest(pairs: list[dict], brains: Tensor, cases: list[int], train: Slices, limit: float):
    """Three rows, a pair per column: the sample, the nearest training slice, their difference around grey."""
    rows, captions = [[], [], []], [[], [], []]
    for pair in pairs:
        ours = brains[cases.index(pair["case"]), pair["z"]]
        theirs = train.images[(train.case == pair["training_case"]) & (train.z == pair["training_z"])][0]
        apart = (128 + (ours.float() - theirs.float()) / 2).round().to(torch.uint8)
        for row, picture in zip(rows, (ours, theirs, apart)):
            row.append(picture.numpy())
        captions[0].append(f"sample {pair['case']}, z = {pair['z']}: {pair['relative_distance']:.2f}")
        captions[1].append(f"training {pair['training_case']}, z = {pair['training_z']}")
        captions[2].append("BELOW THE LIMIT" if pair["below_limit"] else "")
    copies = sum(pair["below_limit"] for pair in pairs)
    title = "the samples nearest to a training slice, by distance over that to the next five brains "
    title += f"(0: a copy, 1: a new head); limit {limit:.2f}, {copies} of those shown are below"
    zoom = max(1, 192 // brains.shape[-1])
    return sheets.sheet(
        [np.stack(row) for row in rows],
        title=title,
        row_names=["sample", "nearest", "difference"],
        captions=[caption for row in captions for caption in row],
        zoom=zoom,
    )


def evaluate_samples(args: argparse.Namespace) -> None:
    """The command with --samples."""
    began = time.monotonic()
    if args.split == "train":
        raise UserError("--split train: samples are set beside held-out brains; choose validate (or, once, test)")
    brains, cases, samples = load_samples(args.samples, args.limit_brains)
    folder, size = find_data(args.data), brains.shape[-1]
    train, held_out = (load_slices(folder, split, size) for split in ("train", args.split))
    scorer, description = find_scorer(args.scorer)
    seen = description["accuracy"]["validate"]
    print(
        f"scorer: {description['path']}, Dice of CSF {seen['dice_csf']:.2f}, grey {seen['dice_grey']:.2f}, white "
        f"{seen['dice_white']:.2f}, error of z {seen['z_error']:.2f} slices"
        + ("" if Path(description["path"]) == OWN else "; train one on your data with: python scorer.py")
    )
    scorer.to(util.pick_device(args.device))
    result, measures = score_samples(brains, train, held_out, scorer, description["digest"])

    limit = result["samples"]["copies_limit"]
    pairs = nearest_pairs(measures["near"], cases, whole_cases(train), limit)
    kept = ("path", "digest", "data", "accuracy", "step")
    report = {
        "samples": {
            "folder": str(samples),
            "cases": cases[: result["brains"]],
            "digest": hashlib.blake2b(brains.numpy(), digest_size=8).hexdigest(),
        },
        "data": {"train": train.describe(), "held_out": held_out.describe()},
        "scorer": {key: description[key] for key in kept},
        "result": result,
        "nearest": pairs,
    }
    out, name = args.out or samples, f"samples_{args.split}"
    util.write_file(out / f"{name}.json", json.dumps(report, indent=2, allow_nan=False).encode())
    sheets.save_picture(
        out / f"{name}.png",
        draw_samples(
            result, measures, f"{result['brains']} brains of {samples} beside as many real ones ({args.split})"
        ),
    )
    sheets.save_picture(out / f"{name}_nearest.png", draw_nearest(pairs, brains, cases, train, limit))
    util.write_file(out / f"{name}.md", page(report, name).encode())
    rows = [row for group in sample_rows(result).values() for row in group]
    print(markdown_table(["score", "samples", f"real ({args.split})", "samples / real", "verdict"], rows))
    print(f"page: {out}/{name}.md, with .json, .png and _nearest.png; {time.monotonic() - began:.0f} s")
