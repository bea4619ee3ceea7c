"""Scalars and pictures of a run on disk, and their curves.

    python logger.py log_dir [more dirs]          # draws log_dir/curves.png; several runs share the axes

A run's log is a folder: run.json says what was run, metrics.jsonl holds one JSON object per line with step (optimiser
steps done), seconds (of training, over all starts), images_per_second and any scalars, named group/quantity.
"""

import json
import math
import time
from collections import Counter
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

import util
from pictures import sheets
from util import UserError

UNITS = {
    "learning_rate": "learning rate",
    "images_per_second": "images / s",
    "train/kl": "train KL, bits per image",
    "train/bits": "train bits per image",
    "validate/bits": "validate bits per image",
    "validate/best_bits": "validate bits per image, best so far",
    "validate/ssim": "validate SSIM",
    "validate/brain_ssim": "validate brain SSIM",
    "validate/psnr": "validate PSNR, dB",
    "validate/perplexity": "validate codebook perplexity",
    "validate/usage": "validate share of codes in use",
    "weight/kl": "weight of the KL in bits per image",
}


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
        self.images, self.sums, self.counts = 0, {}, Counter()
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
        if step % self.every == 0:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Writes the means of the steps since the last line, if any."""
        if self.quiet or not self.images:
            return
        self._tick()
        means = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        self._write(step, images_per_second=round(self.images / max(self.elapsed, 1e-9), 2), **means)
        self.images, self.sums, self.counts = 0, {}, Counter()

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
        self.elapsed = time.monotonic() - self.began
        self.seconds += self.elapsed
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
        raise UserError(f"{folder} has no metrics.jsonl; give the log folder of a run, such as log/vqvae")
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


def draw_curves(runs: dict[str, list[dict]], x: str = "step", weight: float = 0.6):
    """A matplotlib figure with one panel per scalar: raw lines faint, smoothed lines strong, one colour per run."""
    import matplotlib.pyplot as plt

    scalars = list(dict.fromkeys(key for lines in runs.values() for line in lines for key in line))
    scalars = sorted(s for s in scalars if s not in ("step", "seconds"))
    columns = min(4, len(scalars))
    rows = math.ceil(len(scalars) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 2.7 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axis, scalar in zip(axes.flat, scalars):
        for colour, (name, lines) in enumerate(runs.items()):
            points = [(line[x], line[scalar]) for line in lines if scalar in line and math.isfinite(line[scalar])]
            if not points:
                continue
            at, values = zip(*points)
            few = len(values) < 12 or scalar.startswith(("weight/", "learning_rate"))
            axis.plot(at, values, color=f"C{colour}", alpha=1 if few else 0.25, marker="." if len(values) < 40 else "")
            if not few:
                axis.plot(at, smooth(values, weight), color=f"C{colour}")
        values = [line[scalar] for lines in runs.values() for line in lines if scalar in line]
        if not scalar.startswith("weight/") and min(values) > 0 and max(values) > 20 * min(values):
            axis.set_yscale("log")
        label = UNITS.get(scalar, scalar.replace("/", ": ").replace("_", " "))
        axis.set(title=label, xlabel="optimiser steps" if x == "step" else "seconds of training")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(scalars) :]:
        axis.axis("off")
    handles = [plt.Line2D([], [], color=f"C{colour}", label=name) for colour, name in enumerate(runs)]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(runs),
        title=f"faint: every report; strong: moving average, weight {weight}",
    )
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
    parser.add_argument("--out", type=Path, help="PNG to write; default: curves.png in the first folder")
    args = parser.parse_args()
    if args.smooth == 1:
        raise UserError("--smooth 1 would never move; choose a weight below 1")
    folders = []
    for folder in args.log_dirs:
        inner = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        folders += inner if inner and not (folder / "metrics.jsonl").exists() else [folder]
    runs = {str(folder): read_log(folder) for folder in folders}
    for name in [name for name, lines in runs.items() if not lines]:
        print(f"{name}/metrics.jsonl is empty: no report was written yet")
        del runs[name]
    if not runs:
        raise UserError(f"nothing to draw in {', '.join(map(str, args.log_dirs))}; train longer")
    out = args.out or args.log_dirs[0] / "curves.png"
    sheets.save_picture(out, draw_curves(runs, args.x, args.smooth))
    for name, lines in runs.items():
        print(f"{name}: {lines[-1]['step']} steps in {lines[-1]['seconds']:.0f} s")
    print(f"curves: {out}")

    import matplotlib
    import matplotlib.pyplot as plt

    if matplotlib.get_backend().lower() != "agg":  # matplotlib falls back to agg where there is no screen
        plt.show()


if __name__ == "__main__":
    util.command(main)
