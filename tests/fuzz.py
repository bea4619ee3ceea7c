"""Damaged files, settings and names for all that reads them: each is taken, or refused in one line with status 2.

    python tests/fuzz.py FOLDER --count 5000 --seed 1        # FOLDER is made anew; prints one line of JSON

Input i depends on the seed and i alone. What counts as a fault: a traceback, an error of several lines, more than ten
seconds, more than 2 GB, and code in a file that runs.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["MPLBACKEND"] = "agg"

import torch
from conftest import FIRST_STAGE, SECOND_STAGE, write_heads

import dataset
import logger
import prestage_train
import stable_diffusion
import util
from training.stages import load_first_stage

SECONDS, MEGABYTES = 10, 2000
HOSTILE = [None, True, -1, 0, 3, 1e308, 10**30, "", "x" * 1000, "\0", "../..", [], [[]], {}, {"a": 1}, float("nan")]
NAMES = ["", ".", "..", "/", "a/b", "../x", "x" * 300, "\udcff", "a\nb", "-x", "~", "con", " ", "%s%n", "{}"]
DIFFUSION = ["--data", "heads", "--first-stage", "codes", *map(str, SECOND_STAGE), "--steps", "2", "--slices", "2",
             "--widths", "8"]  # fmt: skip


class TooLong(BaseException):
    """An input took more than SECONDS."""


class Code:
    """Unpickling it makes a folder: what an attacker would do, only harmless."""

    def __reduce__(self):
        return os.mkdir, ("code_ran",)


# ----------------------------------------------------------------------------------------------------------- mutations


def bytes_of(content: bytes, dice: random.Random) -> bytes:
    """Flips, cuts, repeats, overwrites or replaces bytes."""
    at, to = sorted(dice.randrange(len(content) + 1) for _ in range(2))
    end = min(to, at + dice.choice([1, 8, 4096]))
    flipped = bytearray(content)
    for _ in range(dice.choice([1, 4, 32])):
        flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
    return dice.choice([
        bytes(flipped), content[:at], content[at:], content[:at] + content[to:], content[:to] + content[at:],
        content[:at] + dice.randbytes(end - at) + content[end:], content[:at] + bytes(end - at) + content[end:],
        dice.randbytes(100), b"", b"\xff\xfe" + content, content.replace(b",", b";"),
    ])  # fmt: skip


def value_of(value, dice: random.Random):
    """A copy of nested dictionaries and lists in which one thing, somewhere, is replaced, added or gone."""
    if isinstance(value, dict | list) and value and dice.random() < 0.8:
        copy = value.copy()
        key = dice.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        if dice.random() < 0.2:
            del copy[key]
        else:
            copy[key] = value_of(copy[key], dice)
        return copy
    return dice.choice(HOSTILE)


def json_of(content: bytes, dice: random.Random) -> bytes:
    """Changes a value in a JSON file, or in one of its lines."""
    lines = content.splitlines() if content.count(b"}\n{") else [content]
    at = dice.randrange(len(lines))
    lines[at] = json.dumps(value_of(json.loads(lines[at]), dice)).encode()
    return b"\n".join(lines)


def safetensors_of(content: bytes, dice: random.Random) -> bytes:
    """Changes the header, or the description that is text in it; mostly without the seal, as somebody else's file."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if dice.random() < 0.7:
        description = json.loads(header["__metadata__"]["description"])
        if dice.random() < 0.8:
            description.pop("seal")
        header["__metadata__"]["description"] = json.dumps(value_of(description, dice))
    else:
        header = value_of(header, dice)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def checkpoint_of(content: bytes, dice: random.Random) -> bytes:
    """Changes a value in a checkpoint, at times into code."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    state = {**state, "step": Code()} if dice.random() < 0.1 else value_of(dict(state), dice)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------------- inputs


class Input(NamedTuple):
    """A file to damage, how (besides its bytes), and what reads it."""

    path: str
    how: Callable | None
    read: Callable


def script(module, *flags: str) -> Callable:
    """Runs a script in this process."""

    def run() -> None:
        sys.argv = [module.__file__, *flags]
        module.main()

    return run


def look_at_people() -> None:
    """Reads a split with its table of people, as training does."""
    dataset.load_slices(Path("heads"), "train", 64, masks=True).people(("age", "sex", "cdr"))


def inputs() -> dict[str, Input]:
    """All kinds, by name, in a folder that `prepare` has filled."""
    latents, slices = (next(Path("data/cache").glob(kind)) for kind in ("train_latents*", "train_case*"))
    check, finished = script(dataset, "heads"), script(stable_diffusion, *DIFFUSION)
    draw = script(stable_diffusion, "--sample", "--sample-steps", "1", "--out", "drawn")
    picture, mask = (f"heads/keras_png_slices_{kind}_001_slice_3.nii.png" for kind in ("train/case", "seg_train/seg"))
    return {
        "slice": Input(picture, None, look_at_people),
        "slice, check-up": Input(picture, None, check),
        "mask": Input(mask, None, look_at_people),
        "people": Input("heads/oasis_cross-sectional.csv", None, look_at_people),
        "people, check-up": Input("heads/oasis_cross-sectional.csv", None, check),
        "log": Input("log/diffusion/metrics.jsonl", json_of, script(logger, "log/diffusion")),
        "log, resumed": Input("log/diffusion/metrics.jsonl", json_of, finished),
        "run.json": Input("log/diffusion/run.json", json_of, finished),
        "checkpoint": Input("model_ckpt/diffusion/last.pt", checkpoint_of, finished),
        "second stage": Input("model_ckpt/diffusion/model.safetensors", safetensors_of, draw),
        "first stage": Input("model_ckpt/codes/model.safetensors", safetensors_of, lambda: load_first_stage("codes")),
        "samples.json": Input("drawn/samples.json", json_of, draw),
        "latents": Input(str(latents), safetensors_of, finished),
        "decoded slices": Input(str(slices), None, look_at_people),
    }


def names(dice: random.Random) -> Callable:
    """A script with a strange name, or a strange $OASIS_DATA."""
    strange = dice.randbytes(dice.randrange(1, 40)).decode("latin1").replace("\0", "")
    name = dice.choice([*NAMES, *NAMES, strange])

    def find() -> None:
        os.environ["OASIS_DATA"] = name or "."  # an empty one is none
        dataset.find_data(None)

    flags = dice.choice([("--name",), ("--sample", "--name"), ("--first-stage",), ("--data",), ("--sample", "--out")])
    scripts = [script(logger, name), script(dataset, name), script(stable_diffusion, *DIFFUSION, *flags, name)]
    return dice.choice([find, *scripts])


def prepare() -> None:
    """A folder with data, a first stage, a finished run of diffusion, and what it drew."""
    write_heads(Path("heads"))
    rows = [f"OAS1_000{case}_MR1,F,R,{40 + case},2,1344,.7,1.3,N/A,29,,3" for case in range(1, 6)]
    header = "ID,M/F,Hand,Age,Educ,eTIV,nWBV,ASF,Delay,MMSE,CDR,SES"
    Path("heads/oasis_cross-sectional.csv").write_text("\n".join([header, *rows]))
    script(prestage_train, "--data", "heads", "--name", "codes", *map(str, FIRST_STAGE))()
    script(stable_diffusion, *DIFFUSION)()
    script(stable_diffusion, "--sample", "--sample-steps", "1", "--out", "drawn")()


# ------------------------------------------------------------------------------------------------------------- the loop


def outcome(read: Callable) -> str:
    """"taken", "refused", or what is wrong with how an input was read."""
    said, errors = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: other programs may be at work
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            util.command(read)
        return "taken"
    except SystemExit as ended:
        if not ended.code:
            return "taken"
        lines = errors.getvalue().strip().split("\n")
        if ended.code == 1 and said.tell():  # the check-up has found something, and said so
            return "taken"
        refused = ended.code == 2 and lines and (len(lines) == 1 or lines[0].startswith("usage"))
        return "refused" if refused else f"status {ended.code}: {lines[-3:]}"
    except TooLong:
        return f"more than {SECONDS} s of the processor: {sys.argv} {traceback.format_exc().splitlines()[-6:]}"
    except Exception as error:  # noqa: BLE001
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:100]} ({Path(where.filename).name}, {where.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.environ.pop("OASIS_DATA", None)


def too_long(*_) -> None:
    raise TooLong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=300, help="of inputs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    os.chdir(args.folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare()
    signal.signal(signal.SIGPROF, too_long)
    shutil.copytree(".", "../pristine", dirs_exist_ok=True)
    kinds, counted, faults = inputs(), {"taken": 0, "refused": 0}, []
    for i in range(args.count):
        dice = random.Random(f"{args.seed} {i}")
        kind = dice.choice([*kinds, "name", "name"])
        if kind == "name":
            result = outcome(names(dice))
        else:
            path, how, read = kinds[kind]
            path = Path(path)
            content = path.read_bytes()
            path.write_bytes((how if how and dice.random() < 0.6 else bytes_of)(content, dice))
            result = outcome(read)
        for made in Path().iterdir():
            shutil.rmtree(made) if made.is_dir() and not made.is_symlink() else made.unlink()
        shutil.copytree("../pristine", ".", dirs_exist_ok=True)
        if result in counted:
            counted[result] += 1
        else:
            faults.append(f"input {i}, {kind}: {result}")
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({**counted, "faults": faults, "megabytes": megabytes, "code ran": Path("code_ran").exists()}))


if __name__ == "__main__":
    main()
