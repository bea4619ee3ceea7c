"""How does the KL weight of a VAE move under cyclical annealing, beside a constant and a monotonic weight?

    python playground/kl_schedule.py            # needs no data and no run

The picture has one panel per schedule: the weight over the steps of a run, as prestage_train.py would apply it, and
dashed its mean. The panel with prestage_train.py's default cycles and ramp is drawn in red.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util
from prestage_train import cyclical_weight, flags

# title, cycles, ramp as a share of a cycle; a constant weight has no ramp, a monotonic one has a single cycle
SCHEDULES = [
    ("constant", 1, 0.0),
    ("monotonic: 1 cycle, ramp 0.5", 1, 0.5),
    ("2 cycles, ramp 0.5", 2, 0.5),
    ("4 cycles, ramp 0.5", 4, 0.5),
    ("8 cycles, ramp 0.5", 8, 0.5),
    ("4 cycles, ramp 0.25", 4, 0.25),
    ("4 cycles, ramp 0.75", 4, 0.75),
    ("4 cycles, ramp 1", 4, 1.0),
]


def main() -> None:
    trained = flags().parse_args([])  # the training script's defaults
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=util.positive_int, default=10_000, help="of the run (default: %(default)s)")
    add("--kl-weight", type=util.positive_float, default=trained.kl_weight, help="at its full (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/kl_schedule.png"), help="picture (default: %(default)s)")
    args = parser.parse_args()

    figure, axes = plt.subplots(2, 4, figsize=(13, 5), sharex=True, sharey=True, layout="constrained")
    for axis, (title, cycles, ramp) in zip(axes.flat, SCHEDULES, strict=True):
        weights = [args.kl_weight * cyclical_weight(step, args.steps, cycles, ramp) for step in range(args.steps)]
        mean, default = sum(weights) / args.steps, (cycles, ramp) == (trained.kl_cycles, trained.kl_ramp)
        axis.plot(weights, color="C3" if default else "C0")
        axis.axhline(mean, color="grey", linestyle="--", linewidth=1)
        axis.set_title(f"{title}{' (the default)' if default else ''}\nmean {mean:.3g}", fontsize=10)
        axis.grid(alpha=0.3)
        at_full = sum(weight == args.kl_weight for weight in weights) / args.steps
        print(f"{title:30s} mean {mean:.2e}   at its full in {at_full:.0%} of the steps")
    figure.supxlabel("step")
    figure.supylabel("weight of the KL in bits per pixel")
    figure.suptitle(f"KL weight over a run of {args.steps:,} steps, cyclical annealing of Fu et al. 2019; dashed: mean")
    util.save_picture(args.out, figure)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
