"""Files of tensors: checkpoints for resuming, and weights that carry their description.

A run NAME keeps them in model_ckpt/NAME: last.pt (and one for each further phase), and model.safetensors for use.
"""

import hashlib
import io
import json
import pickle
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import util
from util import UserError

RELEASED = Path(__file__).parents[1] / "pretrained"  # weights that come with the project


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
    """Writes a safetensors file whose metadata holds `description` (JSON values: the model's kind, keywords, ...).

    Raises UserError, and writes nothing, where a weight is not finite.
    """
    if broken := not_finite(weights):
        raise UserError(f"{broken} is not finite any more, so {path} is not written; train with another --name and a "
                        "lower --learning-rate, or --precision fp32")  # fmt: skip
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata = {"project": "stable-diffusion-on-oasis", "description": json.dumps(description)}
    util.write_file(path, safetensors.torch.save(weights, metadata))


def not_finite(weights: dict[str, Tensor]) -> str:
    """The name of a tensor that is not finite; none is an empty one."""
    return next((name for name, tensor in weights.items() if not torch.isfinite(tensor).all()), "")


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Reads (weights, description) from a file of save_weights. Raises UserError when it is not one, or not finite."""
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
    try:
        description = json.loads(metadata["description"])
        description["kind"], description["model_kwargs"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not say which model it is of; train it anew, or copy it again") from None
    if broken := not_finite(weights):
        raise UserError(f"{path}: {broken} is not finite; train it anew, or copy it again")
    return weights, description


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
