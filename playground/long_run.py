"""How do the scores of new brains move while diffusion trains?

    python playground/long_run.py step_1000.safetensors step_4000.safetensors ... --seconds-per-step 1.5

The files are copies of model_ckpt/NAME/model.safetensors, taken while the run went on; each knows its step. From each
of them brains of equal seed and people are drawn and scored, which takes some ten minutes of one core a file. Scores
are kept in JSON files beside the picture. The picture has a panel per score; the grey band is the middle 90 % of what
sets of as many real people score.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt

import util
from pictures import sheets
from playground.speedrun import SHOWN, score
from scores.samples import SAMPLE_SCORES
from training.checkpoints import load_weights
from util import UserError

FOLDER = Path("playground_vis/long_run")


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("weights", nargs="*", metavar="WEIGHTS", help="files of one run; default: draw those scored before")
    add("--seconds-per-step", type=util.positive_float, help="processor time of a step, for an axis of hours")
    add("--brains", type=util.positive_int, default=16, help="to draw and score (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of the brains (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=FOLDER / "scores.png", help="picture (default: %(default)s)")
    return parser


def draw(found: dict[int, dict[str, dict]], seconds: float | None):
    """A panel per score over steps, or over hours where the seconds of a step are given; found: {step: scores}."""
    columns, rows = 3, -(-len(SHOWN) // 3)
    figure, axes = plt.subplots(rows, columns, figsize=(10.5, 2.9 * rows + 0.5), layout="constrained")
    scale, unit = (seconds / 3600, "processor hours of training") if seconds else (1.0, "optimiser steps")
    at = [step * scale for step in sorted(found)]
    for axis, name in zip(axes.flat, SHOWN):
        scores = [found[step][name] for step in sorted(found)]
        if "low" in scores[-1]:
            axis.axhspan(scores[-1]["low"], scores[-1]["high"], color="0.85")
        axis.plot(at, [one["value"] for one in scores], marker="o", color=sheets.COLOURS[0])
        axis.set_title(textwrap.fill(SAMPLE_SCORES[name].title, 36), fontsize=10.5)
        axis.set(xlabel=unit, ylabel=SAMPLE_SCORES[name].unit)
        axis.margins(x=0.04)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(SHOWN) :]:
        axis.axis("off")
    figure.suptitle("Scores of new brains while diffusion trains; grey: the middle 90 % of real people", fontsize=12)
    return figure


def main() -> None:
    args = flags().parse_args()
    drawn = f"seed_{args.seed}_brains_{args.brains}"  # scores of other brains are not on the same curve
    for weights in args.weights:
        step = load_weights(Path(weights))[1]["step"]
        file = FOLDER / f"step_{step}_{drawn}.json"
        if not file.is_file():
            print(f"{weights}: step {step}, drawing {args.brains} brains", flush=True)
            scores = score(weights, args.brains, args.seed, args.data, args.device)
            util.write_file(file, json.dumps(scores, indent=2).encode())
    files = FOLDER.glob(f"step_*_{drawn}.json")
    found = {int(file.stem.split("_")[1]): json.loads(file.read_text()) for file in files}
    if not found:
        raise UserError(f"{FOLDER} has no scores of {drawn} yet; give files of weights")
    sheets.save_picture(args.out, draw(found, args.seconds_per_step))
    print(f"picture: {args.out}, numbers: {FOLDER}/*.json")


if __name__ == "__main__":
    util.command(main)
