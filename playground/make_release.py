"""Can everything that is released be made again, from random weights, by one command?

    python playground/make_release.py RELEASE            # on OASIS, in the folder RELEASE; `make release` does this
    python playground/make_release.py RELEASE --small    # the same on the phantom of 64 px, in minutes

First stages, scorer, second stages, cards, samples and pictures are made one after the other, with fixed seeds. The
same command goes on where it was stopped; what is in RELEASE/pretrained is not made again. At the end the figures stand
beside those of the release, with what they may differ by on another processor, and a digest of every file's weights,
which two runs on one machine share. Exit status 1 where a figure is too far off.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import util
from dataset import PHANTOM, locate_data
from logger import read_log
from playground import release
from training.checkpoints import digest_of, load_weights
from util import UserError


class Part(NamedTuple):
    """A file of the release, RELEASE/pretrained/NAME.safetensors, of the run NAME.

    train is the command that trains it; release, further flags of playground/release.py; minutes, what both and its
    scores take on one thread of a two-core processor.
    """

    name: str
    minutes: float
    train: str
    release: str = ""


FIRST = "prestage_train.py --preset small --name"
FULL = (
    Part("vqvae_f8", 135, f"{FIRST} vqvae_f8"),
    Part("vqvae_2048bit", 65, f"{FIRST} vqvae_2048bit --patch 16 --widths 192 --batch-size 8 --codebook-size 4096 "
         "--latent-channels 32 --steps 3000 --gan-weight 0"),
    Part("vqvae_fidelity", 50, f"{FIRST} vqvae_fidelity --steps 10000 --gan-weight 0 "
         "--levels 64 32 32 32 16 16 16 16 16 8 8 8 8 8 8 4"),
    Part("vae_f8d4", 50, f"{FIRST} vae_f8d4 --model vae --latent-channels 4 --steps 10000 --gan-weight 0"),
    Part("vae_f8d8", 50, f"{FIRST} vae_f8d8 --model vae --steps 10000 --gan-weight 0"),
    Part("scorer", 35, "evaluate.py --train-scorer --scorer scorer"),
    Part("pixelcnn", 50, "pixelCNN.py --preset small --first-stage vqvae_f8 --name pixelcnn"),
    Part("stable_diffusion", 520, "stable_diffusion.py --preset small --first-stage vqvae_f8 --name stable_diffusion",
         "--without-encoder"),
)  # fmt: skip
TINY = "--preset demo --precision fp32 --steps 60 --name"
SMALL = (
    Part("vqvae_f8", 2, f"prestage_train.py {TINY} vqvae_f8 --gan-weight 1"),
    Part("vae_f8d8", 1, f"prestage_train.py {TINY} vae_f8d8 --model vae"),
    Part("scorer", 1, "evaluate.py --train-scorer 30 --scorer scorer"),
    Part("pixelcnn", 1, f"pixelCNN.py {TINY} pixelcnn --first-stage vqvae_f8"),
    Part("stable_diffusion", 2, f"stable_diffusion.py {TINY} stable_diffusion --first-stage vqvae_f8",
         "--without-encoder"),
)  # fmt: skip
DATA_OF_SMALL = "dataset.py phantom --phantom --cases 24 4 1"
SAMPLES = {False: 35, True: 4}  # brains, by --small; as many as are held out
F, D, P = (f"pretrained/{name}.safetensors" for name in ("vqvae_f8", "stable_diffusion", "pixelcnn"))
PICTURES = {  # {script of the playground: its flags}; each draws figures/SCRIPT.png
    "overview": f"--first-stage {F} --prior {D}",
    "real_reconstructed_sampled": f"--first-stage {F} --diffusion {D} --pixelcnn {P}",
    "power_spectrum": f"--first-stage {F}",
    "noise_sharing": f"--run {D}",
    "sampler_steps": f"--run {D}",
    "spread": f"--run {D} --first-stage {F}",
    "age": f"--run {D}",
}
# By the end of a figure's name, how far it may be from that of the release: other processors add in another order, and
# training makes more of it.
MAY_DIFFER = {"brain SSIM": 0.006, "SSIM": 0.004, "Dice": 0.01, "bits": 60.0, "loss": 0.01, "judge": 0.08}


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    parser.add_argument("folder", metavar="RELEASE", type=Path, help="for runs, weights, cards, samples and pictures")
    parser.add_argument("--small", action="store_true", help="the phantom of 64 px, and few steps of everything")
    return parser


def run(command: str, data: Path) -> None:
    """A script of this project on `data`, in the current folder. Ends this one with its exit status, unless that is 0.

    What it prints is printed; Ctrl-C and SIGTERM reach it, as all processes of a terminal.
    """
    script, *rest = shlex.split(command)
    print(f"\n+ python {command}", flush=True)
    command_line = [sys.executable, "-u", ROOT / script, *rest]
    status = subprocess.run(command_line, env=os.environ | {"OASIS_DATA": str(data)}, check=False).returncode
    if status:
        print(f"stopped in: python {command}", flush=True)
        sys.exit(status)


def figures() -> dict[str, float]:
    """The figures of the release in the current folder, by their names."""
    found = {}
    for card in sorted(Path("cards").glob("*/reconstruction_validate.json")):
        name, report = card.parent.name, json.loads(card.read_text())
        found |= {f"{name}, SSIM": report["rows"][0]["ssim"], f"{name}, brain SSIM": report["rows"][0]["brain_ssim"]}
        if "prior_bits" in report["result"]:
            found[f"{name} under pixelcnn, bits"] = report["result"]["prior_bits"]
    accuracy = load_weights(Path("pretrained/scorer.safetensors"))[1]["accuracy"]["validate"]
    found |= {f"scorer, {tissue}, Dice": accuracy[f"dice_{tissue}"] for tissue in ("csf", "grey", "white")}
    losses = [line["validate/loss"] for line in read_log(Path("log/stable_diffusion")) if "validate/loss" in line]
    samples = json.loads(Path("samples/samples_validate.json").read_text())["result"]["samples"]
    return found | {"stable_diffusion, loss": losses[-1], "samples at 64 px, judge": samples["judge_small"]}


def comparison(here: dict[str, float], released: dict[str, float]) -> tuple[list[list[str]], bool]:
    """Rows of a table of figures beside those of the release, and whether all are as near as they should be."""
    rows, fine = [["figure", "here", "release", "may differ by", ""]], True
    for name, value in here.items():
        allowed = next(limit for end, limit in MAY_DIFFER.items() if name.endswith(end))
        near = name in released and abs(value - released[name]) <= allowed
        fine &= near
        rows.append([name, f"{value:.4f}", f"{released[name]:.4f}" if name in released else "-", f"{allowed:g}",
                     "" if near else "too far"])  # fmt: skip
    return rows, fine


def main() -> None:
    args = flags().parse_args()
    parts = SMALL if args.small else FULL
    data, _ = locate_data(None)
    if not args.small and data == PHANTOM:
        raise UserError("a release is made of OASIS: name its folder by $OASIS_DATA; without it, take --small")
    args.folder.mkdir(parents=True, exist_ok=True)
    data = (args.folder / "phantom" if args.small else data).resolve()
    os.chdir(args.folder)
    print(f"{len(parts)} parts on {data}, minutes of one thread each, {sum(part.minutes for part in parts):g} in all:")
    print("\n".join(f"  {part.name:20s}{part.minutes:5g}   python {part.train}" for part in parts), flush=True)

    if args.small and not data.exists():
        run(DATA_OF_SMALL, data)
    for part in parts:
        file = Path("pretrained") / f"{part.name}.safetensors"
        if not file.exists():
            run(part.train, data)
            run(f"playground/release.py {part.name} {file} {part.release}", data)
    files = [Path("pretrained") / f"{part.name}.safetensors" for part in parts]
    for part, file in zip(parts, files):
        is_first = part.train.startswith("prestage_train.py")
        if is_first and not Path(f"cards/{part.name}/reconstruction_validate.json").exists():
            priced = f"--prior {P}" if str(file) == F else ""
            run(f"evaluate.py --reconstruction {file} --no-floors --out cards/{part.name} {priced}", data)
    if not Path("samples/samples_validate.json").exists():
        of = "stable_diffusion.py --sample --name pretrained/stable_diffusion.safetensors"
        run(f"{of} --brains {SAMPLES[args.small]} --out samples", data)
        run("evaluate.py --samples samples --scorer scorer", data)
    for script, its_flags in [] if args.small else PICTURES.items():
        if not Path(f"figures/{script}.png").exists():
            run(f"playground/{script}.py {its_flags} --out figures/{script}.png", data)

    here, kind = figures(), "small" if args.small else "full"
    util.write_file(Path(f"cards/{kind}.json"), json.dumps(here, indent=2).encode())
    util.write_file(Path("cards/tables.md"), release.card_tables(files).encode())
    known = ROOT / "pretrained" / "expected" / f"{kind}.json"
    rows, fine = comparison(here, json.loads(known.read_text()) if known.exists() else {})
    widths = [max(map(len, column)) for column in zip(*rows)]
    print("\n" + "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows))
    print("\n" + "\n".join(f"{digest_of(load_weights(file)[0])}  {file}" for file in files))
    print(f"the release: {Path.cwd()}: pretrained, cards (tables.md for the model card), samples"
          + ("" if args.small else ", figures"))  # fmt: skip
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    util.command(main)
