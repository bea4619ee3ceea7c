"""How many evaluations of the network does a brain need?

    python playground/sampler_steps.py --run diffusion --brains 8

Draws the same brains (equal first noise) by each of --samplers, given as NAME:STEPS, and by ancestral sampling over all
1000 steps (ddpm), and scores them as evaluate.py --samples does, beside as many held-out ones. Printed and written
beside the picture as JSON: every score and its ratio to that of ancestral sampling, and the seconds for one brain. The
picture: six slices of the first brain by every sampler. Ancestral sampling adds fresh noise at every step, so it draws
other brains from the same distribution. Anterior is right.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import stable_diffusion
import util
from dataset import find_data, load_slices
from heads.people import draw_person
from model_diffusion import LatentDiffusion
from model_VAE import load_second_stage
from pictures import sheets
from scores.page import markdown_table
from scores.samples import SAMPLE_SCORES, score_samples
from scores.scorer import find_scorer
from stable_diffusion import decode_brain, sample_latents

SHOWN = [2, 7, 12, 17, 22, 27]


def sampler(text: str) -> tuple[str, int]:
    """argparse type: NAME:STEPS."""
    name, _, steps = text.partition(":")
    if name not in stable_diffusion.SAMPLERS or not steps.isdecimal() or not 1 <= int(steps) <= 1000:
        raise argparse.ArgumentTypeError(
            f"{text} is no NAME:STEPS with a name of {', '.join(stable_diffusion.SAMPLERS)}"
        )
    return name, int(steps)


def main() -> None:
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
    args = parser.parse_args()
    device, folder = util.pick_device(args.device), find_data(args.data)
    model, first_stage, description = load_second_stage(args.run, LatentDiffusion, device, decoder=None)
    train, held_out = (load_slices(folder, split, first_stage.image_size) for split in ("train", "validate"))
    scorer, described = find_scorer()

    scores, brains, seconds = {}, {}, {}
    for name, steps in [*args.samplers, ("ddpm", model.T)]:
        settings = stable_diffusion.flags().parse_args(["--sampler", name, "--sample-steps", str(steps)])
        settings.seed, title = args.seed, f"{name}, {steps} steps"
        drawn, began = [], time.monotonic()
        for i in range(args.brains):
            person = draw_person({}, description, args.seed, i)
            latent = sample_latents(model, range(i, i + 1), settings, device, person=person)[-1]
            drawn.append(torch.from_numpy(decode_brain(first_stage, latent, args.seed, i)))
        seconds[title], brains[title] = (time.monotonic() - began) / args.brains, torch.stack(drawn)
        print(f"{title}: {seconds[title]:.0f} s a brain", flush=True)
        scores[title] = score_samples(brains[title], train, held_out, scorer, described["digest"])[0]

    *fewer, all_steps = scores
    rows = []
    for score, (what, unit, _) in SAMPLE_SCORES.items():
        values = {title: result["samples"][score] for title, result in scores.items()}
        cells = [f"{values[title]:.4g}" for title in scores] + [f"{scores[all_steps]['real'][score]:.4g}"]
        ratios = [f"{values[title] / values[all_steps]:.2f}" if values[all_steps] else "-" for title in fewer]
        rows.append([f"{what}{f', {unit}' if unit else ''}", *cells, *ratios])
    print(markdown_table(["score", *scores, "real", *(f"{title} / {all_steps}" for title in fewer)], rows))
    report = {
        "run": args.run,
        "steps": description["step"],
        "brains": args.brains,
        "seconds": seconds,
        "scores": scores,
    }
    util.write_file(args.out.with_suffix(".json"), json.dumps(report, indent=2).encode())
    page = sheets.sheet(
        [group[0][SHOWN].numpy() for group in brains.values()],
        title=f"one brain by each sampler, {description['step']} training steps, seed {args.seed}; anterior right",
        row_names=list(brains),
        captions=[f"z = {z}" for _ in brains for z in SHOWN],
        zoom=max(1, 256 // first_stage.image_size),
    )
    sheets.save_picture(args.out, page)
    print(f"picture: {args.out}, scores: {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    util.command(main)
