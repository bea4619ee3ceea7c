"""How many processor minutes does a recipe of stage two need, from random weights, to which quality?

    python playground/speedrun.py --run plain --steps 2000                        # trains, draws and scores 16 brains
    python playground/speedrun.py --run wide --steps 1500 --flags "--widths 96 192 288"
    python playground/speedrun.py                                                 # the table of all that has run

A run is stable_diffusion.py with those flags on one fixed first stage; the same command goes on where it stopped.
Processor minutes are those of all threads together, in training steps alone: they compare recipes on one machine, not
machines. The figure has the validation loss of all runs over processor minutes; the table what their brains score, out
of the page of evaluate.py --samples, beside what real people score.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch

import util
from dataset import find_data, load_slices
from logger import read_log
from pictures import sheets
from scores.page import markdown_table, verdict
from scores.samples import SAMPLE_SCORES, score_samples
from scores.scorer import find_scorer
from stable_diffusion import MODELS, Sampling, draw_brains
from training.checkpoints import RELEASED
from training.stages import load_second_stage
from util import UserError

SHOWN = ("ribbon", "judge_small", "coherence_in_8", "coherence_outside_8", "symmetry", "spread_first", "spread_later",
         "spread_grey", "haze")  # fmt: skip
FOLDER = Path("playground_vis/speedrun")


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--run", metavar="NAME", help="to train, or go on with, and to score; default: the table of those that ran")
    add("--steps", type=util.positive_int, default=1000, help="of the run (default: %(default)s)")
    add("--flags", default="", metavar='"FLAGS"', help="further ones of stable_diffusion.py")
    add("--first-stage", default=str(RELEASED / "vqvae_f8.safetensors"), metavar="RUN",
        help="run name, folder or weights file (default: the released vqvae_f8)")  # fmt: skip
    add("--brains", type=util.positive_int, default=16, help="to draw and score (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of the run and of its brains (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    return parser


def train(args: argparse.Namespace) -> str:
    """Trains a run, or goes on with it; returns its name."""
    name = f"speedrun-{args.run}-{args.seed}"
    flags = ["--name", name, "--first-stage", args.first_stage, "--steps", args.steps, "--seed", args.seed]
    flags += ["--device", args.device, *(["--data", args.data] if args.data else []), *shlex.split(args.flags)]
    util.run_script("stable_diffusion.py", flags)
    return name


def score(run: str, brains: int, seed: int, data: str | None, device: str) -> dict[str, dict]:
    """{score: {"value", "low", "high"}} of SHOWN, of new brains and of what real people score.

    run: its name, or a file of weights; the rest as typed on the command line.
    """
    model, first_stage = load_second_stage(run, MODELS, util.pick_device(device))
    drawn = list(draw_brains(model, first_stage, Sampling(seed=seed), range(brains)))
    slices = torch.stack([torch.from_numpy(brain) for brain, _, _ in drawn])
    ages = torch.tensor([person.get("age", torch.nan) for _, person, _ in drawn])
    real = [load_slices(find_data(data), split, first_stage.image_size) for split in ("train", "validate")]
    scorer, described = find_scorer()
    result, _ = score_samples(slices, *real, scorer, described["digest"], 20, ages=ages)
    there = [shown for shown in SHOWN if shown in result["samples"]]
    return {shown: {"value": result["samples"][shown], **result["allowed"].get(shown, {})} for shown in there}


def losses(name: str) -> list[tuple[float, float]]:
    """(processor minutes, validation loss) at every report of a run."""
    log = [line for line in read_log(Path("log") / name) if "validate/loss" in line]
    return [(line["processor_seconds"] / 60, line["validate/loss"]) for line in log]


def show() -> None:
    """Prints the table of all that has run, the least loss first, and draws the losses."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
    if not runs:
        raise UserError(f"{FOLDER} has no runs yet; train one with: python playground/speedrun.py --run plain")
    runs = dict(sorted(runs.items(), key=lambda item: item[1]["losses"][-1][1]))
    rows = []
    for name, run in runs.items():
        minutes, loss = run["losses"][-1]
        cells = [name, run["flags"] or "-", str(run["steps"]), f"{minutes:.0f}", f"{loss:.4f}"]
        found = [run["scores"].get(shown) for shown in SHOWN]
        cells += ["-" if one is None else f"{one['value']:.3f} {verdict(one['value'], one)}" for one in found]
        rows.append(cells)
    known = next(iter(runs.values()))["scores"]
    ranges = [f"{known[s]['low']:.3f} to {known[s]['high']:.3f}" if "low" in known.get(s, {}) else "-" for s in SHOWN]
    titles = [SAMPLE_SCORES[shown].title for shown in SHOWN]
    header = ["run and seed", "flags", "steps", "processor minutes", "validation loss", *titles]
    print(markdown_table(header, [*rows, ["real people", "", "", "", "", *ranges]]))
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, run in runs.items():
        axis.plot(*zip(*run["losses"]), marker=".", label=f"{name} {run['flags']}".strip())
    axis.set(xlabel="processor minutes of training", ylabel="validation loss", title="stage two from random weights")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    sheets.save_picture(FOLDER / "losses.png", figure)
    print(f"picture: {FOLDER}/losses.png, numbers: {FOLDER}/*.json")


def main() -> None:
    args = flags().parse_args()
    if args.run:
        name = train(args)
        run = {"flags": args.flags, "steps": args.steps, "seed": args.seed, "commit": util.commit_of_code()}
        run |= {"losses": losses(name), "scores": score(name, args.brains, args.seed, args.data, args.device)}
        util.write_file(FOLDER / f"{args.run}-{args.seed}.json", json.dumps(run, indent=2).encode())
    show()


if __name__ == "__main__":
    util.command(main)
