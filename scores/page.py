"""The page of the scores of new brains: tables, plots, nearest training slices."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import util
from dataset import Slices
from pictures import sheets
from scores.metrics import RINGS, decibel, with_interval
from scores.samples import GROUPS, SAMPLE_SCORES, score_samples, whole_brains
from scores.scorer import TISSUES, Scorer

COLOURS = dict(zip(("real", "through", "samples"), sheets.COLOURS[::2]))
SIGNS = {"real": "o", "through": "^", "samples": "D"}
LABELS = {"real": "held-out people", "samples": "samples", "through": "these people through stage one"}
FARTHEST = 50  # half widths of what is allowed; what is beyond stands at the edge
MIDDLE = torch.tensor([0.025, 0.975], dtype=torch.float64)  # ends of the middle 95 %


def write_page(
    brains: Tensor,
    numbers: list[int],
    folder: Path,
    splits: tuple[Slices, Slices],
    scorer: Scorer,
    description: dict,
    out: Path,
    **more,
) -> dict:
    """Scores sampled brains and writes out/samples_SPLIT.json, .md (the page), .png, _curves.png and _nearest.png.

    Args:
        brains, numbers, folder: from samples.load_samples.
        splits: training and held-out slices of the samples' size.
        scorer, description: from find_scorer.
        more: of score_samples.
    Returns what the JSON file holds. Raises UserError as score_samples.
    """
    train, held_out = splits
    result, measures = score_samples(brains, train, held_out, scorer, description["digest"], **more)
    name, limit = f"samples_{held_out.split}", result["samples"]["copies_limit"]
    pairs = nearest_pairs(measures["near"], numbers, train.case[whole_brains(train)[:, 0]], limit)
    report = {
        "samples": {
            "folder": str(folder),
            "cases": numbers[: result["brains"]],
            "brains": len(brains),
            "slices": brains.shape[1],
            "digest": hashlib.blake2b(brains.numpy(), digest_size=8).hexdigest(),
        },
        "data": {"train": train.describe(), "held_out": held_out.describe()},
        "scorer": {key: description[key] for key in ("path", "digest", "data", "accuracy", "step")},
        "result": result,
        "nearest": pairs,
        "nearest_real": measures["near_real"]["relative"].amin(1).sort().values[: len(pairs)].tolist(),
    }
    title = f"{result['brains']} brains of {folder} beside as many real ones ({held_out.split})"
    util.write_file(out / f"{name}.json", json.dumps(report, indent=2, allow_nan=False).encode())
    sheets.save_picture(out / f"{name}.png", draw_scores(result, title))
    sheets.save_picture(out / f"{name}_curves.png", draw_samples(result, measures, title))
    sheets.save_picture(out / f"{name}_nearest.png", draw_nearest(pairs, brains, numbers, train, limit))
    util.write_file(out / f"{name}.md", page(report, name).encode())
    return report


# --------------------------------------------------------------------------------------------------------------- words


def verdict(value: float, allowed: dict | None) -> str:
    """ "inside" the range of real people, "above" or "below" it; "-" where the range is not known."""
    if not allowed or "low" not in allowed or math.isnan(value):
        return "-"
    return "above" if value > allowed["high"] else "below" if value < allowed["low"] else "inside"


def copy_verdict(samples: dict, real: dict, name: str) -> str:
    """ "above" if the whole interval of a share of copies is above that of held-out people, else "inside"."""
    return "above" if samples[f"{name}_interval"][0] > real[f"{name}_interval"][1] else "inside"


def sample_rows(result: dict) -> dict[str, list[list[str]]]:
    """{group: rows of [score, samples, held-out, through, allowed, least difference, verdict]} of score_samples."""
    samples, real, through, rows = result["samples"], result["real"], result.get("through", {}), {}
    for name, score in SAMPLE_SCORES.items():
        if name not in samples:
            continue
        range_ = result["allowed"].get(name)
        ends = [abs(samples[name]), abs(real.get(name, 0))]
        form = ".2%" if score.group == "copies" else ".3f" if max(ends) < 10 else ".1f"
        cells = [f"{score.title}, {score.unit}" if score.unit else score.title]
        cells += [with_interval(part, name, form) if name in part else "-" for part in (samples, real, through)]
        cells += [f"{range_['low']:{form}} to {range_['high']:{form}}" if range_ else "-"]
        cells += [format(range_["least"], form) if range_ else "-"]
        cells += [copy_verdict(samples, real, name) if score.group == "copies" else verdict(samples[name], range_)]
        rows.setdefault(score.group, []).append(cells)
    return rows


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown of cells."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def sample_table(report: dict) -> str:
    """All scores of a report of write_page as one table in Markdown."""
    rows = [row for group in sample_rows(report["result"]).values() for row in group]
    return markdown_table(["score", *_columns(report)], rows)


def _columns(report: dict) -> list[str]:
    held_out = f"held-out people ({report['data']['held_out']['split']})"
    return ["samples", held_out, "these through stage one", "real people", "least difference", "verdict"]


def page(report: dict, name: str) -> str:
    """The page on samples: what was compared, tables, pictures, how to read it."""
    result, scorer, samples = report["result"], report["scorer"], report["samples"]
    rows, columns, n = sample_rows(result), _columns(report), result["brains"]
    inside = sum(row[-1] == "inside" for group in rows.values() for row in group)
    read = scorer["accuracy"]["validate"]
    dice = ", ".join(f"{read[f'dice_{tissue}']:.2f} {tissue}" for tissue in TISSUES)
    nearest_of_all = ", ".join(format(pair["relative_distance"], ".2f") for pair in report["nearest"][:3])
    tables = "\n\n".join(
        f"## {GROUPS[group]}\n\n{markdown_table(['score', *columns], rows[group])}" for group in GROUPS if group in rows
    )
    return f"""# Scores of samples

{n} brains of {samples["slices"]} slices from `{samples["folder"]}`, beside {n} held-out people
(`{report["data"]["held_out"]["split"]}`), and, where the first stage is known, beside these after they went through it:
what the first stage does to a head is no fault of the second. All are compared with the {result["training_brains"]}
training people. Brackets hold 95 % intervals over brains.

The column "real people" says what is allowed. {result["draws"]} times, {result["drawn_brains"]} training people of the
samples' ages took the place of the samples, and were compared with all other training people; it holds the middle 90 %
of what they scored. A true difference of "least difference" from their middle would be seen, at the level of 5 %, in
four of five such sets; a smaller one may be there although the verdict is "inside". Of real people one score in ten is
outside. The range of the error of z is that of held-out people, as the scorer has learned z from the training people.
Inside are {inside} of {sum(map(len, rows.values()))} scores.

![Scores]({name}.png)

*All scores on one scale: the grey band is the middle 90 % of real people.*

{tables}

![Curves]({name}_curves.png)

*Bands hold the middle 95 % of brains.*

The linear judge is trained on half of the brains of both kinds and judges the others; .5 means that it cannot tell.
Copies are looked for in {samples["brains"]} brains. The relative distance of a slice is its distance to the nearest
training brain over the mean of its distances to the next five: near 1 for a new brain, 0 for a copy. New real brains
have 1 % of their slices below the limit, the 1st percentile of held-out slices, here \
{result["samples"]["copies_limit"]:.2f}; the samples have {result["samples"]["copies_excess"]:.1%} more than that. The
relative distances of the nearest samples are {nearest_of_all}.

![Nearest pairs]({name}_nearest.png)

## What measured it

`{scorer["path"]}` (digest {scorer["digest"]}), trained on {scorer["data"]["cases"]} brains, reads tissue, z and the
features "trained encoder". On its validation slices it has Dice {dice}, and errs in z by {read["z_error"]:.2f} slices.
Scores of two runs can be compared where scorer, split and number of brains are the same. All numbers are in
`{name}.json`; report.md, Scores of samples, defines each.
"""


# -------------------------------------------------------------------------------------------------------------- plots


def draw_samples(result: dict, measures: dict[str, dict[str, Tensor]], title: str):
    """Five panels: power by frequency; tissues, neighbours and power along z; distances to nearest brains."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10, 11), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplot_mosaic([["power", "tissues"], ["neighbours", "along"], ["near", "near"]])
    power, tissues, neighbours, along, near = axes.values()
    both, reference = {name: measures[name] for name in ("real", "samples")}, measures["reference"]
    Z = reference["reslice"].shape[1]

    known, frequency = reference["spectrum"].mean(0), [(k + 0.5) * 0.5 / RINGS for k in range(RINGS)]
    _draw_bands(power, frequency, {name: decibel(part["spectrum"], known) for name, part in both.items()})
    noise = f"scanner noise {result['samples']['noise']:.2f}, real {result['real']['noise']:.2f}"
    power.set(xlabel="spatial frequency, cycles per pixel", ylabel="dB over training brains", title=f"power; {noise}")
    for k, (tissue, style) in enumerate(zip(TISSUES, (":", "--", "-"))):
        areas = {name: part["areas"][..., k] / 100 for name, part in both.items()}
        _draw_bands(tissues, range(Z), areas, f"{tissue}, ", style, alpha=0.12)
    tissues.set(xlabel="slice index z", ylabel="area, cm²", title="tissue areas as read by the scorer")
    tissues.set_ylim(bottom=0)
    _draw_bands(neighbours, range(Z - 1), {name: part["adjacent"] for name, part in both.items()})
    neighbours.set(xlabel="slice index z", ylabel="SSIM of slices z and z + 1", title="neighbouring slices")
    known, cycles = reference["reslice"].mean(0), torch.arange(1, Z) / (2 * Z)
    _draw_bands(along, cycles, {name: decibel(part["reslice"], known)[:, 1:] for name, part in both.items()})
    along.set(xlabel="frequency along z, cycles per slice", ylabel="dB over training brains", title="power along z")
    _draw_distances(near, result, measures)
    for axis in axes.values():
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    near.legend(fontsize=9, loc="upper left")
    tissues.set_ylim(top=1.45 * tissues.get_ylim()[1])  # room for the legend
    tissues.legend(fontsize=9, loc="upper center", ncols=2)
    return figure


def draw_scores(result: dict, title: str):
    """Every score, in units in which real people lie between -1 and 1."""
    import matplotlib.pyplot as plt

    names = [name for name in SAMPLE_SCORES if name in result["allowed"] and name in result["samples"]][::-1]

    def place(name: str, value: float) -> float:
        known = result["allowed"][name]
        away = value - known["middle"]
        end = known["high"] - known["middle"] if away > 0 else known["middle"] - known["low"]
        return max(-FARTHEST, min(FARTHEST, away / max(end, 1e-9)))

    figure, axis = plt.subplots(figsize=(9, 1 + 0.21 * len(names)), layout="constrained")
    axis.axvspan(-1, 1, color="grey", alpha=0.25, linewidth=0, label="the middle 90 % of real people")
    for part in ("through", "real", "samples"):
        if part in result:
            rows = [row for row, name in enumerate(names) if name in result[part]]
            at = [place(names[row], result[part][names[row]]) for row in rows]
            full = "full" if part == "samples" else "none"  # so that none hides another
            axis.plot(at, rows, SIGNS[part], color=COLOURS[part], label=LABELS[part], markersize=7, fillstyle=full)
    ticks = [-30, -10, -3, -1, 0, 1, 3, 10, 30]
    axis.set_xscale("symlog", linthresh=1, linscale=0.7)
    axis.set(xlim=(-1.3 * FARTHEST, 1.3 * FARTHEST), ylim=(-1, len(names)))
    axis.set(xlabel=f"in half widths of the band, from the middle of real people;\nbeyond {FARTHEST} at the edge")
    figure.suptitle(title)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(names)), [SAMPLE_SCORES[name].title for name in names], fontsize=9)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=4)
    return figure


def _draw_bands(axis, x, values: dict[str, Tensor], label: str = "", style: str = "-", alpha: float = 0.2) -> None:
    """Mean over brains and the middle 95 % of them, of {"real" | "samples": [n, K]} at x [K]."""
    for name, known in values.items():
        low, high = known.double().quantile(MIDDLE, dim=0)
        axis.plot(x, known.double().mean(0), style, color=COLOURS[name], label=label + name)
        axis.fill_between(x, low, high, color=COLOURS[name], alpha=alpha, linewidth=0)


def _draw_distances(axis, result: dict, measures: dict[str, dict[str, Tensor]]) -> None:
    """Histograms of the relative distances of held-out and of sampled slices, and the limit."""
    for label, near, part in (("held-out slices", "near_real", "real"), ("samples", "near", "samples")):
        distance, filled = measures[near]["relative"].flatten(), {"histtype": "stepfilled", "alpha": 0.5}
        axis.hist(distance, 60, range=(0, 1.05), density=True, color=COLOURS[part], label=label, **filled)
    limit, share = result["samples"]["copies_limit"], result["samples"]["copies"]
    label = f"limit {limit:.3f}: {share:.1%} of samples below"
    axis.axvline(limit, color="k", linestyle="--", linewidth=1, label=label)
    axis.set(xlabel="distance to nearest brain / to the next five; 0: a copy", ylabel="density", title="copies")


# ------------------------------------------------------------------------------------------------------ nearest slices


def nearest_pairs(
    near: dict[str, Tensor], numbers: list[int], known: Tensor, limit: float, count: int = 8
) -> list[dict]:
    """The samples nearest to a training slice, of as many brains as possible, the nearest first.

    Args:
        near: metrics.nearest of the samples.
        numbers: of the sampled brains.
        known: int64 [m], cases of the training brains.
        limit: of copies.
    Returns {"case", "z", "relative_distance", "distance", "below_limit", "training_case", "training_z"} of each.
    """
    distance, z = near["relative"].min(1)
    pairs = [(i, int(z[i])) for i in distance.argsort()[:count].tolist()]
    in_order = near["relative"].flatten().argsort().tolist()  # where there are few brains, several slices of one
    more = [divmod(n, near["relative"].shape[1]) for n in in_order]
    pairs += [pair for pair in more if pair not in pairs][: count - len(pairs)]
    described = [
        {
            "case": numbers[i],
            "z": at,
            "relative_distance": float(near["relative"][i, at]),
            "distance": float(near["distance"][i, at]),
            "below_limit": bool(near["relative"][i, at] < limit),
            "training_case": int(known[near["brain"][i, at]]),
            "training_z": int(near["z"][i, at]),
        }
        for i, at in pairs
    ]
    return sorted(described, key=lambda pair: pair["relative_distance"])


def draw_nearest(pairs: list[dict], brains: Tensor, numbers: list[int], train: Slices, limit: float):
    """Three rows, a pair per column: the sample, the nearest training slice, their difference around grey."""
    rows, captions = [[], [], []], [[], [], []]
    for pair in pairs:
        ours = brains[numbers.index(pair["case"]), pair["z"]]
        theirs = train.images[(train.case == pair["training_case"]) & (train.z == pair["training_z"])][0].cpu()
        apart = (128 + (ours.float() - theirs.float()) / 2).round().to(torch.uint8)
        for row, picture in zip(rows, (ours, theirs, apart)):
            row.append(picture.numpy())
        captions[0].append(f"sample {pair['case']}, z = {pair['z']}: {pair['relative_distance']:.2f}")
        captions[1].append(f"training {pair['training_case']}, z = {pair['training_z']}")
        captions[2].append("BELOW THE LIMIT" if pair["below_limit"] else "")
    below = sum(pair["below_limit"] for pair in pairs)
    title = "the samples nearest to a training slice, by distance over that to the next five brains "
    title += f"(0: a copy, 1: a new brain); limit {limit:.2f}, {below} of those shown are below"
    return sheets.sheet(
        sheets.heads([np.stack(row) for row in rows]),
        title=title,
        row_names=["sample", "nearest", "difference / 2"],
        captions=[caption for row in captions for caption in row],
        zoom=max(1, 192 // brains.shape[-1]),
    )
