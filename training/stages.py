"""The files of trained stages: a first stage alone, or a second stage together with the first it was trained on."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset import Slices
from heads.layout import MOST_SLICES
from model_VAE import MODELS
from parts.autoencoder import Autoencoder
from training.checkpoints import RELEASED, digest_of, fill_model, find_weights, load_weights, part_of, save_weights
from util import UserError


def latent_digest(weights: dict[str, Tensor]) -> str:
    """16 hexadecimal digits of all that latents depend on: first stages that differ in their decoders share them."""
    decoding = ("decoder.", "texture.", "perceptual.", "grain.")  # the last two in files of release 1
    return digest_of({name: tensor for name, tensor in weights.items() if not name.startswith(decoding)})


def load_first_stage(
    run: str | Path, device: torch.device | str = "cpu", decoder: str | None = "fidelity"
) -> Autoencoder:
    """The frozen autoencoder of a weights file, a run's folder or a run's name, in evaluation mode on `device`.

    `decoder` is "fidelity", "perceptual", or None for the perceptual one where there is one. Raises UserError when
    there is no such file or no such decoder.
    """
    path = find_weights(run, f"python prestage_train.py --model {run if run in MODELS else f'vqvae --name {run}'}")
    weights, description = load_weights(path)
    if description["kind"] not in MODELS:
        raise UserError(f"{path} is a {description['kind']}, no first stage; give a run of prestage_train.py")
    with _understood(path):
        weights, description = in_words_of_today(weights, description)
        description |= {"digest": latent_digest(weights), "path": str(path)}
        model = build_first_stage(description, weights, path, decoder)
    return model.to(device)


def weights_here() -> list[Path]:
    """The files of weights of all runs here, those of a release made here, and those that are released."""
    runs, made = Path("model_ckpt").glob("*/model.safetensors"), Path(RELEASED.name).glob("*.safetensors")
    return [*sorted(runs), *sorted(made), *sorted(RELEASED.glob("*.safetensors"))]


def find_encoder(decoder: Autoencoder) -> Autoencoder | None:
    """A first stage that encodes into the latents that `decoder`, of a second stage, decodes; on the same device.

    It is the decoder itself, unless its encoder was left out, as in released second stages: then the first stage of a
    run here, or a released one, with the same latents. None where there is none.
    """
    if decoder.encoder is not None:
        return decoder
    for path in weights_here():
        with contextlib.suppress(UserError):  # a damaged file of another run is in nobody's way
            weights, description = load_weights(path)
            if description["kind"] in MODELS and latent_digest(weights) == decoder.description["digest"]:
                encoder = load_first_stage(path, decoder.latent_mean.device)
                encoder.slices_per_brain = decoder.slices_per_brain
                return encoder
    return None


def allow_brains(first_stage: Autoencoder, *data: Slices) -> None:
    """Lets a first stage take all z of these data, also where it was trained on brains of fewer slices.

    Says so where the first of the data, the training split, is not what the first stage was trained on.
    """
    if first_stage.description.get("data", {}).get("digest") not in (None, data[0].digest):
        print("the first stage was trained on other slices than these")
    first_stage.slices_per_brain = max(first_stage.slices_per_brain, *(part.slices_per_brain for part in data))


def preset_of_first_stage(args: argparse.Namespace) -> str:
    """The preset of a second stage, unless it is typed: that of its first."""
    return load_first_stage(args.first_stage).description["preset"]


def build_first_stage(
    description: dict, weights: dict[str, Tensor], path: Path, decoder: str | None = "fidelity"
) -> Autoencoder:
    """The frozen autoencoder of weights and their description {"kind", "model_kwargs", ...}; `path` is for messages.

    Weights without an encoder, as a released second stage has them, make a first stage that only decodes.
    The description stays on the model as `description`, for those who store it beside their own weights.
    """
    model = _untrained(description, MODELS, weights)
    model.description = description
    if not any(name.startswith("encoder.") for name in weights):
        model.keep_decoders()
    fill_model(model, weights, path)
    try:
        model.use_decoder(decoder or ("perceptual" if model.texture is not None else "fidelity"))
    except ValueError as error:
        command = f"python prestage_train.py --start-from {path} --name NEW"
        raise UserError(f"--decoder {decoder}: {error}; train one with: {command}") from None
    model.slices_per_brain = description.get("data", {}).get("slices_per_brain", MOST_SLICES)
    model.freeze()
    return model.to(memory_format=torch.channels_last)  # convolutions run twice as fast


def save_second_stage(path: Path, prior: nn.Module, first_stage: Autoencoder, description: dict) -> None:
    """Writes a prior and the first stage it was trained on into one file, so that sampling needs one path."""
    weights = {f"prior.{name}": tensor for name, tensor in prior.state_dict().items()}
    weights |= {f"first_stage.{name}": tensor for name, tensor in first_stage.state_dict().items()}
    described = {name: value for name, value in first_stage.description.items() if name != "path"}
    save_weights(path, weights, {"kind": prior.kind, **description, "first_stage": described})


def load_second_stage(
    run: str | Path, models: dict[str, type], device: torch.device | str = "cpu", decoder: str | None = None
) -> tuple[nn.Module, Autoencoder]:
    """(prior, first stage) of a run or file, frozen, in evaluation mode on `device`.

    Args:
        models: {kind: class} of the priors that may be in it.
        decoder: as in load_first_stage, but None by default.
    The description stays on the prior as `description`. Raises UserError if the prior is of no such kind.
    """
    script = next(iter(models.values())).script
    path = find_weights(run, f"python {script} --name {run}")
    weights, description = load_weights(path)
    if description["kind"] not in models:
        raise UserError(f"{path} is a {description['kind']}, none of {', '.join(models)}; name a run of {script}")
    with _understood(path):
        parts = {}
        for part, described in (("prior", description), ("first_stage", description["first_stage"])):
            parts[part] = in_words_of_today(part_of(weights, f"{part}."), described)
        weights, description = parts["prior"]
        description |= {"first_stage": parts["first_stage"][1], "path": str(path)}
        prior = fill_model(_untrained(description, models, weights), weights, path).eval().requires_grad_(False)
        prior.description = description
        weights, described = parts["first_stage"]
        first_stage = build_first_stage(described, weights, path, decoder)
        first_stage.slices_per_brain = max(first_stage.slices_per_brain, prior.slices_per_brain)
    return prior.to(device, memory_format=torch.channels_last), first_stage.to(device)  # as build_first_stage


@contextlib.contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a description that says something else than ours is a UserError."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError):
        raise UserError(f"{path} has settings that this version does not know; train it anew") from None


def _untrained(description: dict, models: dict[str, type], weights: dict[str, Tensor]) -> nn.Module:
    """The model that a description speaks of. Raises ValueError where it is far larger than its weights."""
    model, kwargs = models[description["kind"]], description["model_kwargs"]
    with torch.device("meta"):  # where a model takes no memory, whatever its size
        numbers = sum(tensor.numel() for tensor in model(**kwargs).state_dict().values())
    if numbers > 10 * sum(tensor.numel() for tensor in weights.values()):  # encoders may have been left out
        raise ValueError(f"a model of {numbers} numbers")
    return model(**kwargs)


def in_words_of_today(weights: dict[str, Tensor], description: dict) -> tuple[dict[str, Tensor], dict]:
    """Weights and description of a stage as this version names them; those of release 1 have other words for some."""
    kwargs, data = dict(description["model_kwargs"]), description.get("data", {})
    if {"slices", "cases"} <= data.keys() and "slices_per_brain" not in data:
        description = description | {"data": data | {"slices_per_brain": data["slices"] // data["cases"]}}
    if "channel_multipliers" in kwargs:
        channels, multipliers = kwargs.pop("channels"), kwargs.pop("channel_multipliers")
        kwargs["widths"] = tuple(channels * m for m in multipliers)
    gone = {"quantizer_options": {"ema": True, "sphere": False, "rotation": False}}
    kwargs = {name: value for name, value in kwargs.items() if name != "quantizer" and gone.get(name) != value}
    if "grain" in kwargs or any(name.startswith("perceptual.") for name in weights):
        # the perceptual decoder of release 1, which was another: what it decoded is decoded by the fidelity decoder
        kwargs = {name: value for name, value in kwargs.items() if name not in ("perceptual", "grain")}
        weights = {name: t for name, t in weights.items() if not name.startswith(("perceptual.", "grain."))}
    return weights, description | {"model_kwargs": kwargs}
