"""Files of tensors: checkpoints for resuming, and weights that carry their description.

A run NAME keeps them in model_ckpt/NAME: last.pt (and one for each further phase), and model.safetensors for use.
What takes long to make and can be made again is kept in data/cache.
"""

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import util
from dataset import CACHE, tidy_cache
from util import UserError

PROJECT = "stable-diffusion-on-oasis"  # which has written a file
RELEASED = Path(__file__).parents[1] / "pretrained"  # weights that come with the project


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes a training state of tensors, numbers, strings and containers of these."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    util.write_file(path, buffer.getvalue())


def load_checkpoint(path: Path, script: str) -> dict:
    """Reads what `script` saved, never running code from the file. Raises UserError on anything else."""
    try:
        with zipfile.ZipFile(path) as parts:
            if damaged := parts.testzip():  # torch.load does not look at the checksums
                raise ValueError(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train the run first, or name another") from None
    except (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError,
            TypeError, NotImplementedError) as error:  # fmt: skip
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__}); move it elsewhere, or give "
                        "the run another name") from None  # fmt: skip
    if not isinstance(state, dict) or state.get("script") != script:
        raise UserError(f"{path} is no checkpoint of {script}; give the run another name")
    return state


def save_weights(path: Path, weights: dict[str, Tensor], description: dict) -> None:
    """Writes a safetensors file whose metadata holds `description` (JSON values: the model's kind, keywords, ...).

    Raises UserError, and writes nothing, where a weight is not finite.
    """
    if broken := not_finite(weights):
        raise UserError(f"{broken} is not finite any more, so {path} is not written; train with another --name and a "
                        "lower --learning-rate, or --precision fp32")  # fmt: skip
    _write(path, weights, description)


def _write(path: Path, tensors: dict[str, Tensor], description: dict) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = json.loads(json.dumps(description)) | {"project": PROJECT}
    description["seal"] = _seal(tensors, description)
    # one entry, since the library writes several in any order: the same weights make the same file
    util.write_file(path, safetensors.torch.save(tensors, {"description": json.dumps(description)}))


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What _write wrote. Raises ValueError, which ends a sentence on the file, where that is anything else."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        description = {"project": metadata.get("project")} | json.loads(metadata.get("description", "{}"))
    except (safetensors.SafetensorError, ValueError, TypeError):
        raise ValueError("is no whole safetensors file") from None
    seal = description.pop("seal", None)
    if description["project"] != PROJECT:
        raise ValueError("was not written by this project")
    if seal not in (None, _seal(tensors, description)):  # release 1 has none
        raise ValueError("is damaged: it does not hold what was written")
    del description["project"]
    return tensors, description


def _seal(tensors: dict[str, Tensor], description: dict) -> str:
    """A digest of all that a file holds."""
    content = digest_of(tensors) + json.dumps(description, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def not_finite(weights: dict[str, Tensor]) -> str:
    """The name of a tensor that is not finite; none is an empty one."""
    return next((name for name, tensor in weights.items() if not torch.isfinite(tensor).all()), "")


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Reads (weights, description) from a file of save_weights. Raises UserError when it is not one, or not finite."""
    try:
        weights, description = _read(path)
        weights = {name: tensor.float() for name, tensor in weights.items()}
        if not isinstance(description["kind"], str) or not isinstance(description["model_kwargs"], dict):
            raise KeyError("kind")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train one first, or give the path of a .safetensors file") from None
    except KeyError:
        raise UserError(f"{path} does not say which model it is of; train it anew, or copy it again") from None
    except ValueError as error:
        raise UserError(
            f"{path} {error}; copy it again, or give a model.safetensors from model_ckpt/ or pretrained/"
        ) from None
    if broken := not_finite(weights):
        raise UserError(f"{path}: {broken} is not finite; train it anew, or copy it again")
    return weights, description


def cached(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What make() returns: from data/cache/NAME.safetensors if it is there and whole, else made and kept there."""
    path = CACHE / f"{name}.safetensors"
    if path.is_file():
        try:
            found = _read(path)[0]
            os.utime(path)  # for tidy_cache
            return found
        except ValueError:
            print(f"{path} is damaged: making it again")
    made = {name: tensor.cpu().contiguous() for name, tensor in make().items()}  # laid out as when it is read
    with util.alone(CACHE):
        _write(path, made, {})
        tidy_cache()
    return made


def run_weights(name: str) -> Path:
    """Where run `name` keeps its weights."""
    return Path("model_ckpt") / name / "model.safetensors"


def is_path(run: str | Path) -> bool:
    """Whether this looks like the path of a file or folder, and not like the name of a run."""
    return Path(run).name != str(run) or str(run).endswith(".safetensors")


def find_weights(run: str | Path, train_with: str) -> Path:
    """The weights meant by a file, a run's folder or a run's name (model_ckpt/NAME/model.safetensors).

    Raises UserError, for the name of a run advising the command `train_with`, when there are none.
    """
    path = Path(run)
    if path.is_file():
        return path
    for weights in (path / "model.safetensors", run_weights(run)):
        if weights.is_file():
            return weights
    if is_path(run):
        raise UserError(f"there are no weights at {run}: no such file or folder; mend the path, or give a run's name")
    raise UserError(
        f"there are no weights at {run}: no such file, and no {run_weights(run)}; train them with: {train_with}"
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
