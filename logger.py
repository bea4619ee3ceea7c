"""Scalars and pictures of a run on disk, and their curves.

    python logger.py log/vqvae                    # draws log/vqvae/curves.png
    python logger.py log                          # all runs in it: a block of panels for each script, with all its runs

A run's log is a folder: run.json says what was run, metrics.jsonl holds one JSON object per line with step (optimiser
steps done), seconds (of training, over all starts), images_per_second and any scalars, named group/quantity.
"""

import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from tqdm import tqdm

import util
from pictures import sheets
from util import UserError

CLOCKS = ("step", "seconds", "processor_seconds")  # of every line, and no scalars
PHASES = {"train/kl": "codec", "train/codebook": "codec", "train/generator": "texture"}
ABSURD = 1e30  # numbers from here on are damage, and axes cannot hold them
MOST = 9  # panels of a picture, unless all are asked for
STYLES = {"solid": "-", "dashed": "--", "dotted": ":"}


class Panel(NamedTuple):
    """Axes of the picture: a title, the unit of the vertical axis, and {scalar: what its curve shows}."""

    title: str
    unit: str
    curves: dict[str, str]


# {script: (what it trains, its panels)}, what matters most first: quality on held-out slices, losses, weights
SCRIPTS = {
    "prestage_train.py": ("First stage", [
        Panel("Likeness of held-out slices", "SSIM, 1 if equal",
              {"validate/ssim": "whole slice", "validate/brain_ssim": "brain alone"}),
        Panel("Codes in use, held-out slices", "perplexity, codes", {"validate/perplexity": ""}),
        Panel("Reconstruction loss", "|error| + (1 - SSIM) / 2", {"train/reconstruction": ""}),
        Panel("Distance of latents to their codes", "squared distance / 4", {"train/codebook": ""}),
        Panel("Information in the latent (KL)", "bits per slice", {"train/kl": ""}),
        Panel("Spectrum of drawn held-out slices", "rms difference, dB", {"validate/spectrum": ""}),
        Panel("Critic against texture, even at .69", "nats", {"train/discriminator": "critic",
                                                              "train/generator": "texture"}),
        Panel("Blurred slices, real - drawn", "mean |difference|", {"train/likeness": ""}),
        Panel("Weight of the KL", "weight of a bit per slice", {"weight/kl": ""}),
    ]),
    "stable_diffusion.py": ("Diffusion", [
        Panel("Denoising loss", "weighted squared error", {"train/loss": "training", "validate/loss": "held-out"}),
        Panel("Likeness of neighbouring slices", "SSIM, 1 if equal",
              {"sample/adjacent_ssim": "a new brain", "real/adjacent_ssim": "real brains"}),
    ]),
    "pixelCNN.py": ("PixelCNN", [
        Panel("Price of a held-out slice", "bits per slice",
              {"validate/bits": "report", "validate/best_bits": "best, if lower"}),
        Panel("Training loss", "nats per code", {"train/loss": ""}),
        Panel("Price of each level of codes", "bits per slice",
              {"validate/bottom_bits": "bottom, fine", "validate/top_bits": "top, coarse"}),
    ]),
    "evaluate.py": ("Scorer", [
        Panel("Loss of tissues", "nats per pixel", {"train/tissue": ""}),
        Panel("Loss of areas", "|error|, tenths of the slice", {"train/areas": ""}),
        Panel("Loss of the height z", "nats per slice", {"train/z": ""}),
    ]),
}  # fmt: skip
REST = [  # of all scripts, after these
    Panel("Learning rate", "per step", {"learning_rate": ""}),
    Panel("Speed of training", "slices per second", {"images_per_second": ""}),
    Panel("Error of held-out slices", "PSNR, dB", {"validate/psnr": ""}),
    Panel("Codes used at least once", "share of the codebook", {"validate/usage": ""}),
]
RATES = ("weight/", "learning_rate", "images_per_second")  # drawn from 0 on
NOISY = ("train/", "images_per_second")  # means over a few batches, and so smoothed


class Logger:
    """Writes log/NAME/{run.json, metrics.jsonl} and NAME_vis/*; with quiet=True (other processes) nothing at all.

    Args:
        name: of the run.
        run: what run.json records.
        step: steps that the run has done already; later lines of the log, from a start that was lost, are dropped.
        every: a line is written each time this many further steps are done.
    """

    def __init__(self, name: str, run: dict, *, step: int, every: int, quiet: bool = False):
        self.folder, self.pictures = Path("log") / name, Path(f"{name}_vis")
        self.every, self.quiet = every, quiet
        self.images, self.elapsed, self.sums, self.counts = 0, 0.0, {}, Counter()
        if quiet:
            return
        kept = [line for line in read_log(self.folder) if line["step"] <= step] if step else []
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self.processor_seconds = kept[-1].get("processor_seconds", 0.0) if kept else 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pictures.mkdir(parents=True, exist_ok=True)
        util.write_file(self.folder / "run.json", json.dumps(run, indent=2).encode())
        util.write_file(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.pause()

    def add(self, step: int, scalars: dict[str, Tensor | float], images: int) -> None:
        """Takes the scalars of one step; after every `every` steps writes their means. `step` counts those done."""
        if self.quiet:
            return
        for name, value in scalars.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] += 1
        self.images += images
        self._tick()  # a checkpoint may follow, whose pause would forget this step
        if step % self.every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Writes the means of the steps since the last line, if any."""
        if self.quiet or not self.images:
            return
        self._tick()
        means = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        self._write(step, images_per_second=round(self.images / max(self.elapsed, 1e-9), 2), **means)
        self.images, self.elapsed, self.sums, self.counts = 0, 0.0, {}, Counter()

    def report(self, step: int, scalars: dict[str, float]) -> None:
        """Writes a line of its own, such as a validation, and prints it. Its time does not count as training."""
        if self.quiet:
            return
        self._write(step, **scalars)
        words = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        tqdm.write(f"step {step}  {self.seconds:.0f} s  {words}")
        self.pause()

    def picture(self, name: str, image: Image.Image) -> Path:
        """Saves NAME_vis/name.png and returns the path."""
        path = self.pictures / f"{name}.png"
        if not self.quiet:
            sheets.save_picture(path, image)
        return path

    def state_dict(self) -> dict:
        """What the next line will be made of, for a checkpoint between two lines."""
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"images": self.images, "sums": sums, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from there."""
        self.images, self.sums, self.counts = state["images"], dict(state["sums"]), Counter(state["counts"])

    def pause(self) -> None:
        """Call after work that is not training (pictures, checkpoints): the clocks start anew."""
        self.began, self.processor_began = time.monotonic(), time.process_time()

    def _tick(self) -> None:
        elapsed = time.monotonic() - self.began
        self.elapsed += elapsed  # since the last line
        self.seconds += elapsed
        self.processor_seconds += time.process_time() - self.processor_began  # of all threads of this process
        self.pause()

    def _write(self, step: int, **scalars: float) -> None:
        line = {"step": step, "seconds": round(self.seconds, 2)}
        line |= {"processor_seconds": round(self.processor_seconds, 2)}
        line |= {name: float(f"{value:.7g}") for name, value in scalars.items()}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def read_log(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last one cut off by a crash is left out. Raises UserError if there is no file."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        what = f"{folder} has no metrics.jsonl" if folder.is_dir() else f"there is no folder {folder}"
        raise UserError(f"{what}; give the log folder of a run, such as log/vqvae")
    try:
        lines = path.read_text().splitlines()
        records = [json.loads(line) for line in lines[:-1]] + [
            json.loads(line) for line in lines[-1:] if line[-1:] == "}"
        ]
        # a scalar that a line does not have is null where the log went through another program
        records = [{name: value for name, value in record.items() if value is not None} for record in records]
        valid = all({"step", "seconds"} < record.keys() for record in records)
        valid &= all(isinstance(value, int | float) for record in records for value in record.values())
    except (ValueError, AttributeError):
        valid = False
    if not valid:
        raise UserError(f"{path} holds lines that are no reports of ours; remove them, or give another folder")
    return records


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average without start-up bias: m_t = sum_i w^(t-i) v_i / sum_i w^(t-i)."""
    total, norm, out = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        out.append(total / norm)
    return out


class Curves(NamedTuple):
    """A run to draw: its name, what run.json says of it ({} if nothing), and the lines of its log, at least one."""

    name: str
    record: dict
    lines: list[dict]

    @property
    def script(self) -> str:
        """Which script trained it; "" if unknown."""
        script = self.record.get("script")
        return script if isinstance(script, str) else ""

    def points(self, scalar: str, x: str = "step") -> list[tuple[float, float]]:
        """(x, value) wherever both are finite and not absurd."""
        points = [(line[x], line[scalar]) for line in self.lines if scalar in line]
        return [point for point in points if all(abs(number) < ABSURD for number in point)]

    def phases(self, x: str) -> list[tuple[str, float]]:
        """(name, x at which it begins) of each phase, told by the losses that only this phase has."""
        phases, before = [], 0
        for line in self.lines:
            for name in {PHASES[scalar] for scalar in PHASES.keys() & line.keys()}:
                if not phases or phases[-1][0] != name:
                    phases.append((name, before))
            before = line[x]
        return phases

    def describe(self) -> str:
        """The run in a line: name, data, steps and time."""
        step, seconds = (self.lines[-1][clock] for clock in ("step", "seconds"))
        time_taken = util.duration(seconds) if abs(seconds) < ABSURD else f"{seconds} s"
        try:
            data = self.record["data"]["train"]
            slices = f"{data['slices']:,} slices of {data['cases']:,} brains at {data['image_size']} px"
            data = f"{Path(data['folder']).name}, {slices}; "
        except (LookupError, TypeError, ValueError):
            data = ""
        return f"run {self.name[-60:]}: {data}{step:,} steps in {time_taken}"


def read_record(folder: Path) -> dict:
    """run.json, or {} where it is missing or damaged: the curves are worth drawing without it."""
    try:
        record = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        record = None
    return record if isinstance(record, dict) else {}


def choose_panels(runs: list[Curves], most: int | None) -> list[Panel]:
    """The panels of runs of one script, best first, at most so many; none for scalars with a single point."""
    known = [*SCRIPTS.get(runs[0].script, ("", []))[1], *REST]
    named = {scalar for panel in known for scalar in panel.curves}
    others = {scalar for run in runs for line in run.lines for scalar in line} - named - set(CLOCKS)
    others = [Panel(scalar.replace("/", ": ").replace("_", " "), "value", {scalar: ""}) for scalar in sorted(others)]
    panels = []
    for title, unit, curves in known + others:
        counts = {scalar: max(len(run.points(scalar)) for run in runs) for scalar in curves}
        if max(counts.values()) > 1:
            panels.append(Panel(title, unit, {scalar: name for scalar, name in curves.items() if counts[scalar]}))
    return panels[:most]


def look_of(n: int) -> tuple[str, str]:
    """Colour and marker of run n of a block; two runs are far apart in grey too."""
    n = 2 * n % len(sheets.COLOURS)
    return sheets.COLOURS[n], sheets.MARKERS[n]


def draw_panel(axis, panel: Panel, runs: list[Curves], x: str, weight: float) -> None:
    """A colour per run, a style per scalar; means over few batches faint, with their moving average; phases marked."""
    drawn = []
    for (scalar, _), style in zip(panel.curves.items(), STYLES.values()):
        for n, run in enumerate(runs):
            points = run.points(scalar, x)
            if not points:
                continue
            at, values = zip(*points)
            colour, marker = look_of(n)
            noisy = scalar.startswith(NOISY) and len(values) >= 12
            look = {"color": colour, "linestyle": style}
            marked = len(values) < 40 and not noisy and not scalar.startswith(RATES)
            axis.plot(at, values, alpha=0.3 if noisy else 1, linewidth=1 if noisy else 1.7, markersize=4,
                      marker=marker if marked else "", **look)  # fmt: skip
            if noisy:
                axis.plot(at, smooth(values, weight), linewidth=1.7, **look)
            drawn += values
    axis.margins(x=0.02)
    axis.locator_params(axis="x", nbins=5)
    if all(scalar.startswith(RATES) for scalar in panel.curves):
        axis.set_ylim(bottom=min(0, *drawn))
    elif min(drawn) > 0 and max(drawn) > 5 * min(drawn):
        axis.set_yscale("log", subs=(2, 5))
        axis.yaxis.set_minor_formatter("{x:,.6g}")
    axis.xaxis.set_major_formatter("{x:,.6g}")
    axis.yaxis.set_major_formatter("{x:,.6g}")
    rows = mark_phases(axis, runs, x)
    names = [f"{style}: {name}" if len(panel.curves) > 1 else name
             for style, name in zip(STYLES, panel.curves.values()) if name]  # fmt: skip
    axis.set_title(
        "\n".join([panel.title, *filter(None, ["; ".join(names)])]), loc="left", pad=5 + 12 * rows, fontsize=10.5
    )
    axis.set(xlabel="optimiser steps" if x == "step" else "seconds of training", ylabel=panel.unit)
    axis.grid(alpha=0.3)


def mark_phases(axis, runs: list[Curves], x: str) -> int:
    """Dotted lines where phases begin, their names above the axes: a row for all runs that have the same. The rows."""
    first, last = axis.dataLim.intervalx
    rows = []
    for n, run in enumerate(runs):
        phases = run.phases(x)
        if len(phases) < 2 or phases in rows:
            continue
        colour = look_of(n)[0]
        for (name, begin), end in zip(phases, [begin for _, begin in phases[1:]] + [math.inf]):
            if begin < last and end > first:
                if begin > first:
                    axis.axvline(begin, color=colour, linestyle=":", linewidth=1)
                axis.annotate(name, (max(begin, first), 1), xycoords=axis.get_xaxis_transform(), color=colour,
                              xytext=(1, 3 + 12 * len(rows)), textcoords="offset points", fontsize=8.2)  # fmt: skip
        rows.append(phases)
    return len(rows)


def draw_curves(runs: list[Curves], x: str = "step", weight: float = 0.6, most: int | None = MOST):
    """A matplotlib figure with a block of panels for each script, at most so many together; a colour per run.

    Args:
        x: "step" or "seconds", the horizontal axis.
        weight: of the moving average.
    Raises UserError where no scalar has two points.
    """
    import matplotlib.pyplot as plt

    blocks = {}
    for run in runs:
        blocks.setdefault(run.script, []).append(run)
    order = [*SCRIPTS, *sorted(blocks.keys() - SCRIPTS.keys())]
    blocks = {script: blocks[script] for script in order if script in blocks and choose_panels(blocks[script], 1)}
    if not blocks:
        raise UserError(f"{runs[0].name} has a single report, and a curve needs two; train longer")
    share = max(1, most // len(blocks)) if most else None
    panels = [choose_panels(block, share) for block in blocks.values()]
    widest = max(map(len, panels))
    columns = 2 if widest == 4 else min(3, widest)
    rows = [math.ceil(len(part) / columns) for part in panels]
    heights = [2.6 * n + 0.5 + 0.22 * len(block) for n, block in zip(rows, blocks.values())]
    figure = plt.figure(figsize=(10.5, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (script, block), part, shown, n in zip(blocks.items(), parts, panels, rows):
        axes = part.subplots(n, columns, squeeze=False).ravel()
        for axis, panel in zip(axes, shown):
            draw_panel(axis, panel, block, x, weight)
        for axis in axes[len(shown) :]:
            axis.axis("off")
        keys = [plt.Line2D([], [], color=colour, marker=marker, label=run.describe().replace("$", "\\$"))
                for run, (colour, marker) in zip(block, map(look_of, range(len(block))))]  # fmt: skip
        note = f"faint: each line of the log; strong: their moving average, weight {weight}"
        keys += [plt.Line2D([], [], color="black", alpha=0.3, label=note)]
        title = f"{SCRIPTS[script][0]} ({script})" if script in SCRIPTS else script or "Runs without a run.json"
        part.legend(handles=keys, loc="outside upper left", title=title,
                    alignment="left", frameon=False, title_fontproperties={"weight": "bold", "size": 12})  # fmt: skip
    return figure


def main() -> None:
    parser = util.plain_parser(__doc__)
    parser.add_argument(
        "log_dirs",
        type=Path,
        nargs="*",
        default=[Path("log")],
        help="log folders of runs, or a folder of such folders (default: log)",
    )
    parser.add_argument(
        "--x", choices=("step", "seconds"), default="step", help="horizontal axis (default: %(default)s)"
    )
    parser.add_argument(
        "--smooth", type=util.fraction, default=0.6, help="weight of the moving average (default: %(default)s)"
    )
    parser.add_argument("--all", action="store_true", help=f"every scalar; else the {MOST} panels that matter most")
    parser.add_argument("--out", type=Path, help="PNG to write; default: curves.png in the first folder")
    args = parser.parse_args()
    if args.smooth == 1:
        raise UserError("--smooth 1 would never move; choose a weight below 1")
    folders = []
    for folder in args.log_dirs:
        inner = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        folders += inner if inner and not (folder / "metrics.jsonl").exists() else [folder]
    runs = [Curves(str(folder), read_record(folder), read_log(folder)) for folder in folders]
    for run in runs:
        if not run.lines:
            print(f"{run.name}/metrics.jsonl is empty: no report was written yet")
    runs = [run for run in runs if run.lines]
    if not runs:
        raise UserError(f"nothing to draw in {', '.join(map(str, args.log_dirs))}; train longer")
    out = args.out or args.log_dirs[0] / "curves.png"
    sheets.save_picture(out, draw_curves(runs, args.x, args.smooth, None if args.all else MOST))
    for run in runs:
        print(run.describe())
        once = Counter(scalar for line in run.lines for scalar in line)
        once = [f"{name} {line[name]:.4g}" for line in run.lines for name in line if once[name] == 1]
        if once and len(run.lines) > 1:
            print(f"  reported once, so no curves: {', '.join(once)}")
    print(f"curves: {out}")

    import matplotlib
    import matplotlib.pyplot as plt

    if matplotlib.get_backend().lower() != "agg":  # matplotlib falls back to agg where there is no screen
        plt.show()


if __name__ == "__main__":
    util.command(main)
