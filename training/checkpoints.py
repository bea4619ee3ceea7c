"""What a run leaves on disk: checkpoints, weights that carry their description, and the record of its settings.

A run NAME is model_ckpt/NAME (last.pt for resuming, model.safetensors for use), log/NAME (run.json and scalars) and
NAME_vis (pictures). The same command resumes it, so its settings come from run.json, and a typed one that differs is
refused.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import util
from util import UserError

RELEASED = Path(__file__).parents[1] / "pretrained"  # weights that come with the project

# What belongs to one start of a script and not to the run: neither recorded nor inherited by the next start.
OF_ONE_START = {
    "minutes",
    "device",
    "compile",
    "sample",
    "out",
    "brains",
    "sampler",
    "sample_steps",
    "eta",
    "guidance",
    "weak",
    "age",
    "sex",
    "cdr",
    "unknown_person",
    "temperature",
    "top_p",
    "decoder",
}
# What a run has and --sample may change.
FREE_IN_SAMPLING = {"seed", "precision", "slice_noise"}
# What may change from start to start without making the run another experiment.
FREE_ON_RESUME = OF_ONE_START | {"data", "steps", "report_every", "patience"}


# ---------------------------------------------------------------------------------------------- checkpoints and weights


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes a training state of tensors, numbers, strings and containers of these."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    util.write_file(path, buffer.getvalue())


def load_checkpoint(path: Path, script: str) -> dict:
    """Reads what `script` saved, never running code from the file. Raises UserError on anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train the run first, or name another") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} is no readable checkpoint ({type(error).__name__}); delete it or choose another --name"
        ) from None
    if not isinstance(state, dict) or state.get("script") != script:
        raise UserError(f"{path} is no checkpoint of {script}; delete it or choose another --name")
    return state


def save_weights(path: Path, weights: dict[str, Tensor], description: dict) -> None:
    """Writes a safetensors file whose metadata holds `description` (JSON values: the model's kind, keywords, ...)."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata = {"project": "stable-diffusion-on-oasis", "description": json.dumps(description)}
    util.write_file(path, safetensors.torch.save(weights, metadata))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Reads (weights, description) from a file of save_weights. Raises UserError when it is not one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.offset_keys()}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train one first, or give the path of a .safetensors file") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is no readable safetensors file ({type(error).__name__}); is the copy whole?"
        ) from None
    if metadata.get("project") != "stable-diffusion-on-oasis" or "description" not in metadata:
        raise UserError(
            f"{path} was not written by this project; give a model.safetensors from model_ckpt/ or pretrained/"
        )
    return weights, json.loads(metadata["description"])


def run_weights(name: str) -> Path:
    """Where run `name` keeps its weights."""
    return Path("model_ckpt") / name / "model.safetensors"


def find_weights(run: str | Path, train_with: str) -> Path:
    """The weights meant by a file, a run's folder or a run's name (model_ckpt/NAME/model.safetensors).

    Raises UserError, advising the command `train_with`, when there are none.
    """
    path = Path(run)
    if path.is_file():
        return path
    for weights in (path / "model.safetensors", run_weights(run)):
        if weights.is_file():
            return weights
    raise UserError(
        f"there are no weights at {run}: no such file, and no model_ckpt/{path.name}/model.safetensors; "
        f"train them with: {train_with}"
    )


def fill_model(model: nn.Module, weights: dict[str, Tensor], path: Path) -> nn.Module:
    """Loads weights into a model, every key and shape, or raises UserError."""
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{path} holds weights of another model; name the run that fits this script") from None
    return model


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def digest_of(weights: dict[str, Tensor]) -> str:
    """16 hexadecimal digits that tell one set of weights from another."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """A digest, 16 hexadecimal digits, of the bytes of a file."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


# ------------------------------------------------------------------------------------------ what a run was started with


def read_run(script: str, name: str, typed: dict) -> dict | None:
    """The recorded settings of run `name`, None if there is no such run.

    Raises UserError when log/NAME belongs to something else or a typed setting contradicts the run.
    """
    if Path(name).name != name:
        raise UserError(f"--name {name} is no plain name; it becomes part of model_ckpt/NAME, log/NAME and NAME_vis")
    log = Path("log") / name
    if not (log / "run.json").is_file():
        for folder in (log, Path("model_ckpt") / name):
            if folder.exists() and any(folder.iterdir()):
                raise UserError(
                    f"{folder} is not empty and no run of ours (log/{name}/run.json is missing); "
                    "choose another --name or remove the folder"
                )
        return None
    try:
        recorded = json.loads((log / "run.json").read_text())
        settings, owner = recorded["settings"], recorded["script"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{log}/run.json is no description of a run; choose another --name or remove {log}") from None
    if owner != script:
        raise UserError(f"{log} is a run of {owner}; choose another --name")
    for flag, value in typed.items():
        value = list(value) if isinstance(value, tuple) else value
        if flag not in FREE_ON_RESUME and flag in settings and settings[flag] != value:
            raise UserError(
                f"--{flag.replace('_', '-')} {value} contradicts the run in {log}, which has "
                f"{settings[flag]}; leave the flag out, or choose another --name"
            )
    return settings


def open_run(
    script: str, args: argparse.Namespace, typed: dict, preset: Callable[[argparse.Namespace], str]
) -> argparse.Namespace:
    """Completes the settings of a training run: those typed, else the existing run's, else the preset's, else plain.

    Args:
        script: file name of the training script, which owns the run.
        args, typed: from parse_flags; args.name is set.
        preset: gives the default of --preset for a new run.
    Raises UserError as read_run.
    """
    recorded = read_run(script, args.name, typed)
    if recorded is None:
        recorded = {"preset": args.preset or preset(args)}
    settings = util.preset_settings(script, recorded["preset"]) | recorded
    settings = {flag: value for flag, value in settings.items() if flag in vars(args).keys() - OF_ONE_START}
    return argparse.Namespace(**vars(args) | settings | typed)


def weights_to_sample(script: str, args: argparse.Namespace, typed: dict, released: Path) -> Path | None:
    """What --sample draws from: the weights of run args.name, or the file that --name is.

    Where nothing of one's own was trained, neither this run nor its first stage, and no setting of training is typed,
    the `released` weights. None otherwise: training comes first. Says which. Raises UserError when a setting of
    training is typed that the trained run does not have.
    """
    settings = {flag: value for flag, value in typed.items() if flag not in OF_ONE_START | FREE_IN_SAMPLING}
    if Path(args.name).is_file():
        return Path(args.name)
    if run_weights(args.name).is_file():
        if (Path("log") / args.name / "run.json").is_file():  # weights alone are enough to sample
            read_run(script, args.name, settings)
        return run_weights(args.name)
    if not settings and not run_weights(args.first_stage).is_file() and released.is_file():
        print(f"nothing was trained here yet: sampling the released weights, pretrained/{released.name}")
        return released
    print(f"there is no trained run {args.name} yet: training it first, then sampling")
    return None


def check_same_data(name: str, data: dict[str, dict]) -> None:
    """Raises UserError when run NAME was started on other slices than `data`, {split: Slices.describe()}."""
    path = Path("log") / name / "run.json"
    recorded = json.loads(path.read_text())["data"] if path.is_file() else data
    for split in data:
        if recorded[split]["digest"] != data[split]["digest"]:
            raise UserError(
                f"run {name} was trained on other {split} slices, those of {recorded[split]['folder']}; "
                "give them with --data, or choose another --name"
            )


def check_same_first_stage(name: str, trained_on: str, given: str) -> None:
    """Raises UserError when a second stage's checkpoint was made with another first stage than the one given."""
    if trained_on != given:
        raise UserError(
            f"run {name} was trained on another first stage than --first-stage names now; choose another --name"
        )


def versions() -> dict[str, str]:
    """Versions of Python, PyTorch and NumPy, which decide about the last digits of results."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def commit_of_code() -> str:
    """The commit of these files, with -dirty where they were changed since."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        here = Path(__file__).parents[1]
        commit = subprocess.run(describe, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return commit or "not a git checkout"


def describe_run(script: str, args: argparse.Namespace, data: dict, **more) -> dict:
    """What run.json records: settings, data digest, versions, commit and machine."""
    return {
        "script": script,
        "settings": {flag: value for flag, value in vars(args).items() if flag not in OF_ONE_START},
        "data": data,
        **more,
        "commit": commit_of_code(),
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": util.describe_device(util.pick_device(args.device)),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def describe_samples(weights: Path, args: argparse.Namespace) -> dict:
    """What decides how sampled brain i looks: the digests of the weights, and the settings of sampling."""
    of_the_start = {"minutes", "device", "compile", "sample", "out", "brains"}
    names = (OF_ONE_START | FREE_IN_SAMPLING) - of_the_start
    settings = {name: value for name, value in sorted(vars(args).items()) if name in names}
    if settings.get("weak"):
        settings["weak"] = file_digest(find_weights(settings["weak"], "--weak"))
    return {"weights": file_digest(weights), "settings": settings}
