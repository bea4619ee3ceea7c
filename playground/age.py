"""Does a requested age change the brain as age does? One head from 20 to 90, and the CSF of many heads against age.

    python playground/age.py --run diffusion            # a run trained on people of known age, or a weights file

Above: one head, the same noise, only the requested age differs; three of its slices, anterior right. Below: the area of
cerebrospinal fluid (CSF), mean over the slices, against age, of real validation brains and of as many sampled heads,
each with the age, sex and CDR of one of those people and a noise of its own. Both are measured by the network of
scores/scorer.py, which knows no age. Printed: Pearson's correlation of either, with 95 % intervals by bootstrap over
heads. With --heads-to DIR, evaluate.py --samples DIR then scores heads of the very people that they are compared with.
With --page FILE.html the head above, at all its ages, becomes a page with an age slider.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np
import torch

import util
from dataset import find_data, load_slices, people_table
from heads.layout import write_slices
from heads.people import as_heard, read_people
from pictures import sheets
from pictures.page import page
from pictures.volume import to_series
from scores.scorer import csf_area, find_scorer
from stable_diffusion import MODELS, Sampling, decode_brain, sample_latents
from training.stages import load_second_stage
from util import UserError

AGES = range(20, 91, 10)
HEIGHTS = (0.2, 0.5, 0.8)  # of the slices shown, as shares of the brain's


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--run", default="diffusion", help="second stage: run name, folder or weights file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--heads", type=util.positive_int, default=35, help="to sample at most (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of the noise (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--heads-to", type=Path, metavar="DIR", help="write the sampled heads of the lower plot there as slices")
    add("--page", type=Path, metavar="FILE", help="write the head at all its ages there, as a page with an age slider")
    add("--out", type=Path, default=Path("playground_vis/age.png"), help="picture (default: %(default)s)")
    return parser


def correlation(age: np.ndarray, area: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, list[float]]:
    """Pearson's r of two [N], and its 95 % interval by bootstrap over heads."""
    picks = np.random.default_rng(seed).integers(len(age), size=(resamples, len(age)))
    with np.errstate(invalid="ignore"):  # a resample of one head alone has no correlation
        drawn = [np.corrcoef(age[pick], area[pick])[0, 1] for pick in picks]
    return float(np.corrcoef(age, area)[0, 1]), np.nanpercentile(drawn, (2.5, 97.5)).tolist()


def draw(one_head: dict[int, tuple[np.ndarray, float]], age: np.ndarray, areas: dict[str, np.ndarray], title: str):
    """The picture, of {age: (slices, area)} of one head, and the areas [N] of heads of these ages [N]."""
    figure = plt.figure(figsize=(10.5, 8.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    heads = dict(zip(one_head, sheets.heads([slices for slices, _ in one_head.values()])))
    for row, height in zip(above.subplots(len(HEIGHTS), len(heads), squeeze=False), HEIGHTS, strict=True):
        for cell, (years, slices) in zip(row, heads.items(), strict=True):
            cell.imshow(slices[int(height * len(slices))], "gray", vmin=0, vmax=255)
            cell.set(xticks=[], yticks=[])
            if height == HEIGHTS[0]:
                cell.set_title(f"{years} years\nCSF {one_head[years][1]:,.0f} mm²", fontsize=9.5)
        row[0].set_ylabel(f"z = {int(height * len(slices))}")
    above.suptitle(title)
    axis, line = below.subplots(), np.array([age.min(), age.max()])
    for (name, area), colour, marker in zip(areas.items(), sheets.COLOURS[::3], "o^", strict=True):
        r, (low, high) = correlation(age, area)
        print(f"{name:8s} correlation of CSF area with age {r:.3f} [{low:.3f}, {high:.3f}] over {len(age)} heads, "
              f"CSF {area.mean():.0f} mm^2, sd {area.std():.0f}")  # fmt: skip
        axis.scatter(age, area, color=colour, marker=marker, s=22, label=f"{name}: r = {r:.2f} [{low:.2f}, {high:.2f}]")
        axis.plot(line, np.polyval(np.polyfit(age, area, 1), line), color=colour)
    title = f"{len(age)} people of validate, and as many sampled heads of their ages; r is the correlation with age"
    axis.set(xlabel="age, years", ylabel="CSF per slice, mm²", title=title)
    axis.legend(loc="upper left")
    axis.grid(alpha=0.3)
    return figure


def main() -> None:
    args = flags().parse_args()
    if args.heads_to and args.heads_to.is_dir() and any(args.heads_to.iterdir()):
        raise UserError(f"--heads-to {args.heads_to} is not empty: heads would mix; choose another folder")
    device, folder = util.pick_device(args.device), find_data(args.data)
    table = people_table(folder)
    if table is None:
        raise UserError(f"the ages of the people in {folder} are not known; put oasis_cross-sectional.csv into it")
    model, first_stage = load_second_stage(args.run, MODELS, device)
    if "age" not in model.conditions:
        raise UserError(f"{args.run} was trained without ages; train one on data with oasis_cross-sectional.csv")
    scorer = find_scorer()[0].to(device)
    data, people = load_slices(folder, "validate", first_stage.image_size), read_people(table)
    whole = [row for row in data.whole_cases() if int(data.case[row[0]]) in people][: args.heads]
    if len(whole) < 2:
        raise UserError(f"{folder} has {len(whole)} whole validation brains of known age; two are needed")
    sampling = Sampling(seed=args.seed)

    def sample(number: int, person: dict[str, float]) -> np.ndarray:
        """Slices uint8 [Z, S, S] of head `number`, of a person."""
        *_, latent = sample_latents(model, sampling, range(number, number + 1), [person])
        return decode_brain(first_stage, latent, args.seed, number)

    def area(slices: np.ndarray) -> float:
        return float(csf_area(scorer, torch.from_numpy(slices)).mean())

    youngest, oldest = model.description["people"]["age"]
    one_head = {years: sample(0, {"age": years}) for years in AGES if youngest <= years <= oldest}
    persons, areas = [people[int(data.case[row[0]])] for row in whole], {"real": [], "sampled": []}
    for n, (row, person) in enumerate(zip(whole, persons, strict=True)):
        slices = sample(1 + n, as_heard(person, model.description, args.seed, 1 + n))
        areas["real"].append(area(data.images[row].cpu().numpy()))
        areas["sampled"].append(area(slices))
        if args.heads_to:
            write_slices(args.heads_to, n, slices)
    title = f"one head, one noise, the age alone differs; {model.description['step']:,} steps, seed {args.seed}"
    figure = draw(
        {years: (slices, area(slices)) for years, slices in one_head.items()},
        np.array([person["age"] for person in persons]),
        {name: np.array(values) for name, values in areas.items()},
        title,
    )
    sheets.save_picture(args.out, figure)
    print(f"picture: {args.out}")
    if args.page:
        heads = list(one_head.values())
        series, names = to_series(heads, sheets.head_box(heads)), [f"{years} years" for years in one_head]
        util.write_file(args.page, page("One head at all ages", f"Synthetic: {title}.", "age", names, series))
        print(f"page with an age slider: {args.page}")


if __name__ == "__main__":
    util.command(main)
