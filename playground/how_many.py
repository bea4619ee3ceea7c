"""How many people does stage two need, and when should its training stop?

    python playground/how_many.py                                         # 50, 100 and 200 people, 5 lengths
    python playground/how_many.py --people 10 20 --steps 50 100           # a quick look

Data folders with the first people of the training split are written, a small VAE of 64 px is trained on the largest,
and on its latents one diffusion model for each number of people and each length of training; all else is equal. Each
draws brains. The same command goes on where it stopped. The picture: the loss on validation latents, which falls while
more is learned and turns where the training people are learned by heart; and the share of new slices that are nearer to
one of the training people than 99 % of held-out slices are, 1 % where nothing is copied (scores/samples.py).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch

import util
from dataset import find_data, load_slices, write_subset
from logger import read_log
from pictures import sheets
from scores.metrics import nearest, thumbnails
from scores.page import markdown_table
from scores.samples import copy_scores
from stable_diffusion import MODELS, Sampling, draw_brains
from training.stages import load_second_stage

HERE = Path("playground_vis/how_many")
FIRST = ["--model", "vae", "--preset", "demo", "--name", "how_many-vae"]


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--people", type=util.positive_int, nargs="+", default=[50, 100, 200], metavar="N",
        help="to learn from (default: 50 100 200)")  # fmt: skip
    add("--steps", type=util.positive_int, nargs="+", default=[250, 500, 1000, 2000, 4000], metavar="N",
        help="lengths of training (default: 250 500 1000 2000 4000)")  # fmt: skip
    add("--first-steps", type=util.positive_int, default=3000, help="of the VAE (default: %(default)s)")
    add("--brains", type=util.positive_int, default=32, help="to draw from each (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="of training and brains (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    return parser


def subset(people: int, data: str | None) -> Path:
    """A data folder with so many training people."""
    folder = HERE / f"{people}_people"
    if not folder.is_dir():
        HERE.mkdir(parents=True, exist_ok=True)
        write_subset(find_data(data), people, folder)
    return folder


def measure(people: int, steps: int, args: argparse.Namespace) -> dict[str, float]:
    """{"loss", "copies", "copied_brains"} of a diffusion model that is trained here unless it is there."""
    name, folder = f"how_many-{people}-{steps}-{args.seed}", subset(people, args.data)
    known = HERE / f"{name}.json"
    if known.is_file():
        return json.loads(known.read_text())
    util.run_script("stable_diffusion.py", ["--data", folder, "--name", name, "--first-stage", FIRST[-1], "--steps",
                    steps, "--seed", args.seed, "--device", args.device])  # fmt: skip
    model, first_stage = load_second_stage(name, MODELS, util.pick_device(args.device))
    drawn = draw_brains(model, first_stage, Sampling(seed=args.seed), range(args.brains))
    brains = torch.stack([torch.from_numpy(slices) for slices, _, _ in drawn])
    train, held_out = (load_slices(folder, split, first_stage.image_size) for split in ("train", "validate"))
    reference = torch.stack([thumbnails(brain) for brain in train.whole_brains().cpu()])
    near, near_real = (nearest(part, reference) for part in (brains, held_out.whole_brains().cpu()))
    found = copy_scores(near, near_real)
    losses = [line["validate/loss"] for line in read_log(Path("log") / name) if "validate/loss" in line]
    result = {"loss": losses[-1], "copies": found["copies"], "copied_brains": found["copied_brains"]}
    util.write_file(known, json.dumps(result, indent=2).encode())
    return result


def draw(results: dict[int, dict[int, dict[str, float]]], brains: int):
    """The figure: loss and copies by length of training, a line for each number of people."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for (people, of), colour, marker in zip(results.items(), sheets.COLOURS, sheets.MARKERS):
        look = {"color": colour, "marker": marker, "label": f"{people} people"}
        axes[0].plot(of.keys(), [found["loss"] for found in of.values()], **look)
        axes[1].plot(of.keys(), [100 * found["copies"] for found in of.values()], **look)
    axes[1].axhline(1, color="grey", linestyle="--", label="held-out slices")
    axes[0].set(title="loss on people not trained on", ylabel="validation loss")
    axes[1].set(title=f"slices of {brains} new brains near to a training slice", ylabel="share, %")
    for axis in axes:
        axis.set(xscale="log", xlabel="steps of training")
        axis.set_xticks(list(of), list(map(str, of)))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    return figure


def main() -> None:
    args = flags().parse_args()
    people, lengths = (sorted(set(numbers)) for numbers in (args.people, args.steps))
    util.run_script("prestage_train.py", [*FIRST, "--data", subset(people[-1], args.data), "--steps", args.first_steps,
                    "--seed", args.seed, "--device", args.device])  # fmt: skip
    results = {n: {steps: measure(n, steps, args) for steps in lengths} for n in people}
    rows = [[str(n), str(steps), f"{found['loss']:.4f}", f"{found['copies']:.1%}", f"{found['copied_brains']:.0%}"]
            for n, of in results.items() for steps, found in of.items()]  # fmt: skip
    header = ["people", "steps", "validation loss", "slices near to training", "brains near to training"]
    print(markdown_table(header, rows))
    sheets.save_picture(HERE / "how_many.png", draw(results, args.brains))
    print(f"picture: {HERE}/how_many.png")


if __name__ == "__main__":
    util.command(main)
