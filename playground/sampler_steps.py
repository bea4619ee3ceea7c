"""How many evaluations of the network does a brain need?

    python playground/sampler_steps.py --run diffusion --brains 8

Draws the same brains (equal first noise) by each of --samplers, given as NAME:STEPS, and by ancestral sampling over all
steps of the process (ddpm), and scores them as evaluate.py --samples does, beside as many held-out ones. Printed, and
written beside the picture as JSON: every score, its ratio to that of ancestral sampling, and the seconds for one brain.
The picture: slices of the first brain by every sampler. Ancestral sampling adds fresh noise at every step, so it draws
other brains from the same distribution. Anterior is right.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import util
from dataset import find_data, load_slices
from model_diffusion import SAMPLERS
from pictures import sheets
from scores.page import markdown_table
from scores.samples import SAMPLE_SCORES, score_samples
from scores.scorer import find_scorer
from stable_diffusion import MODELS, Sampling, draw_brains
from training.stages import load_second_stage


def sampler(text: str) -> tuple[str, int]:
    """argparse type: NAME:STEPS."""
    name, _, steps = text.partition(":")
    if name not in SAMPLERS or not steps.isdecimal() or not 1 <= int(steps) <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is no NAME:STEPS with a name of {', '.join(SAMPLERS)}")
    return name, int(steps)


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--run", default="diffusion", help="second stage: run name, folder or weights file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--brains", type=util.positive_int, default=8, help="by each sampler, at least 2 (default: %(default)s)")
    add("--samplers", type=sampler, nargs="+", default=[("dpm", 20), ("ddim", 50)], metavar="NAME:STEPS",
        help="default: dpm:20 ddim:50")  # fmt: skip
    add("--seed", type=util.seed, default=0, help="of the noise (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/sampler_steps.png"), help="picture (default: %(default)s)")
    return parser


def main() -> None:
    args = flags().parse_args()
    if args.brains < 2:
        raise util.UserError("--brains 1: scores of samples need two brains")
    folder = find_data(args.data)
    model, first_stage = load_second_stage(args.run, MODELS, util.pick_device(args.device))
    train, held_out = (load_slices(folder, split, first_stage.image_size) for split in ("train", "validate"))
    scorer, described = find_scorer()

    scores, first, seconds = {}, {}, {}
    for name, steps in [*args.samplers, ("ddpm", model.T)]:
        how, began = f"{name}, {steps} steps", time.monotonic()
        sampling = Sampling(seed=args.seed, sampler=name, steps=steps)
        drawn = [slices for slices, _, _ in draw_brains(model, first_stage, sampling, range(args.brains))]
        first[how], seconds[how] = drawn[0], (time.monotonic() - began) / args.brains
        print(f"{how}: {seconds[how]:.0f} s a brain", flush=True)
        brains = torch.stack([torch.from_numpy(slices) for slices in drawn])
        scores[how] = score_samples(brains, train, held_out, scorer, described["digest"])[0]

    *fewer, all_steps = scores
    rows = []
    for name, score in ((name, score) for name, score in SAMPLE_SCORES.items() if name in scores[all_steps]["real"]):
        values = {how: result["samples"][name] for how, result in scores.items()}
        cells = [f"{value:.4g}" for value in [*values.values(), scores[all_steps]["real"][name]]]
        ratios = [f"{values[how] / values[all_steps]:.2f}" if values[all_steps] else "-" for how in fewer]
        rows.append([f"{score.title}, {score.unit}" if score.unit else score.title, *cells, *ratios])
    print(markdown_table(["score", *scores, "real", *(f"{how} / {all_steps}" for how in fewer)], rows))
    report = {"run": args.run, "brains": args.brains, "seconds": seconds, "scores": scores}
    util.write_file(args.out.with_suffix(".json"), json.dumps(report, indent=2).encode())

    Z = model.slices_per_brain
    shown = list(range(Z))[Z // 12 :: max(1, Z // 6)]
    page = sheets.sheet(
        sheets.heads([slices[shown] for slices in first.values()]),
        title=f"a brain by each sampler, {model.description['step']:,} training steps, seed {args.seed}; "
        "anterior right",
        row_names=list(first),
        captions=[f"z = {z}" for _ in first for z in shown],
        zoom=max(1, 256 // first_stage.image_size),
    )
    sheets.save_picture(args.out, page)
    print(f"picture: {args.out}, scores: {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    util.command(main)
