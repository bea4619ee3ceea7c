"""The page of the scores of new brains: tables, plots, nearest training slices. evaluate.py --samples writes it."""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import util
from dataset import SLICES_PER_CASE, Slices, find_data, list_slices, load_slices, read_png
from pictures import sheets
from scores.metrics import RINGS, decibel, with_interval
from scores.samples import SAMPLE_SCORES, score_samples, whole_cases
from scores.scorer import OWN, TISSUES, find_scorer
from util import UserError


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
compared in the same way with all {result["training_brains"]} training brains. Brackets hold 95 % intervals over brains.
"as real" means that the intervals of samples and of real brains overlap; that is so in {alike} of {len(SAMPLE_SCORES)}
scores.

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
