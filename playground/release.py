"""How does a finished run become a weights file small enough to give away?

    python playground/release.py vqvae pretrained/vqvae.safetensors           # a run, first or second stage, and a file
    python playground/release.py diffusion NEW.safetensors --first-stage FILE          # with this released first stage

Weights are rounded to fp16, which halves the file. What fixes the codes stays in float32, since there a rounding can
choose another code and costs few bytes to avoid: linear path, scale of the latents, quantiser. The metadata keep the
description that rebuilds the model and add how it was trained, from log/RUN; of folders only the last name goes along.
No picture. Printed: what the rounding changes on 64 validation slices, first the codes, then the decoded pictures; the
largest single change of SSIM; and the row of a model card in Markdown.
"""

import json
import math
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util
from dataset import Slices, find_data, load_slices, to_uint8
from logger import read_log
from model_VAE import MODELS, build_first_stage, latent_digest, load_first_stage
from parts.autoencoder import Autoencoder
from scores.metrics import slice_scores
from training import checkpoints
from util import UserError

EXACT = re.compile(r"(^|\.)(latent_mean|latent_sd|slice_correlation|linear(_top)?\.\w+\.weight|quantizer(_top)?\.\w+)$")
COMPARED_SLICES = 64
ENCODER = re.compile(r"^first_stage\.encoder(_top)?\.")
PERCEPTUAL = re.compile(r"^(first_stage\.)?perceptual\.")


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in fp16, but for those that fix the codes and those beyond fp16's range of 65,504."""
    halves = {name: tensor if EXACT.search(name) else tensor.half() for name, tensor in weights.items()}
    return {name: half if torch.isfinite(half).all() else weights[name] for name, half in halves.items()}


def without_folders(value):
    """A JSON value in which every absolute path is cut down to its last name: it says nothing elsewhere."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def training_record(name: str) -> dict:
    """How run `name` was trained, from log/NAME: run.json, and the seconds of training over all its starts."""
    path = Path("log") / name / "run.json"
    try:
        run = json.loads(path.read_text())
        record = {key: run[key] for key in ("script", "settings", "commit", "versions", "machine", "device")}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a file is released together with the log of its run") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no description of a run; restore it, or train the run anew") from None
    lines = read_log(path.parent)
    return record | {"seed": run["settings"]["seed"], "seconds": lines[-1]["seconds"] if lines else 0.0}


def first_stage_of(weights: dict[str, Tensor], description: dict, path: Path) -> Autoencoder:
    """The autoencoder of a first stage's weights, or of a second stage's, which hold their first stage."""
    if description["kind"] not in MODELS:
        weights, description = checkpoints.part_of(weights, "first_stage."), description["first_stage"]
    return build_first_stage(dict(description), {name: tensor.float() for name, tensor in weights.items()}, path)


def with_first_stage(weights: dict[str, Tensor], description: dict, run: str) -> tuple[dict[str, Tensor], dict]:
    """A second stage that carries the first stage `run` instead of its own. Raises UserError where latents differ."""
    if description["kind"] in MODELS:
        raise UserError("--first-stage is for second stages: this is a first stage itself")
    other = load_first_stage(run)
    if other.description["digest"] != description["first_stage"]["digest"]:
        raise UserError(f"--first-stage {run} has other latents than the one that this prior was trained on")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("first_stage.")}
    weights |= {f"first_stage.{name}": tensor for name, tensor in other.state_dict().items()}
    return weights, description | {"first_stage": other.description}


@torch.no_grad()
def print_change(before: Autoencoder, after: Autoencoder, data: Slices) -> None:
    """Prints what two versions of one autoencoder do differently to validation slices, each by itself."""
    scores, changed, total, moved = [[], []], 0, 0, 0.0
    for index in torch.linspace(0, len(data) - 1, min(COMPARED_SLICES, len(data))).round().long().split(16):
        x, z, _ = data.batch(index)
        if hasattr(before, "encode_indices"):
            grids = [m.encode_indices(x, z) for m in (before, after)]
            pairs = list(zip(*(g if isinstance(g, tuple) else (g,) for g in grids), strict=True))
            changed += sum(int((a != b).sum()) for a, b in pairs)
            total += sum(a.numel() for a, _ in pairs)
        latents = [m.encode(x, z) for m in (before, after)]
        moved = max(moved, float((latents[1] - latents[0]).abs().max()))
        for model, score in zip((before, after), scores, strict=True):
            decoded = to_uint8(model.reconstruct(x, z))[:, 0]
            score.append(slice_scores(decoded, data.images[index], None)["ssim"])
    ssim = [torch.cat(score) for score in scores]
    codes = f"{changed} of {total} codes change ({changed / total:.4%})" if total else "no codes"
    print(f"rounding, on {len(ssim[0])} validation slices: {codes}, latents move by at most {moved:.2g} sd")
    print(
        f"SSIM {ssim[0].mean():.5f} before, {ssim[1].mean():.5f} after, difference "
        f"{ssim[1].mean() - ssim[0].mean():+.1e}; of one slice at most {(ssim[1] - ssim[0]).abs().max():.1e}"
    )


def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="name of a finished run, model_ckpt/RUN and log/RUN, or a released file")
    add("file", metavar="FILE", type=Path, help="the .safetensors file to write")
    add("--limit", type=util.positive_float, default=16, metavar="MB", help="largest size in MB (default: %(default)s)")
    add(
        "--first-stage",
        metavar="RUN",
        help="of a second stage: carry this run or file instead, which has equal latents",
    )
    add("--without-encoder", action="store_true", help="of a second stage: leave out what decoding does not need")
    add("--without-perceptual", action="store_true", help="leave the first stage's perceptual decoder out")
    add("--data", metavar="FOLDER", help="as in training; its validation slices are compared")
    args = parser.parse_args()
    if args.file.suffix != ".safetensors":
        raise UserError(f"{args.file} must end in .safetensors")
    path = Path(args.run) if Path(args.run).is_file() else Path("model_ckpt") / args.run / "model.safetensors"
    weights, description = checkpoints.load_weights(path)
    record = description.get("training") or training_record(args.run)
    if args.first_stage:
        weights, description = with_first_stage(weights, description, args.first_stage)

    # the description, and which weights go
    own = description if description["kind"] in MODELS else description["first_stage"]  # of the first stage
    if args.without_perceptual:
        weights = {name: tensor for name, tensor in weights.items() if not PERCEPTUAL.match(name)}
        own["model_kwargs"]["perceptual"] = False
    if args.without_encoder and description["kind"] in MODELS:
        raise UserError("--without-encoder is for second stages: a first stage has to encode")
    before = first_stage_of(weights, description, path)
    if before.encoder is None:
        raise UserError(f"{path} has no encoder to compare with; name its first stage with --first-stage")
    released = rounded(weights)
    after = first_stage_of(released, description, path)
    if args.without_encoder:
        released = {name: tensor for name, tensor in released.items() if not ENCODER.match(name)}
    description = without_folders(description | {"training": record})
    if description["kind"] not in MODELS:  # it must match the first stage's own file, released in the same way
        description["first_stage"]["digest"] = latent_digest(after.state_dict())

    # its size, what the rounding did, and the file
    megabytes = sum(tensor.nbytes for tensor in released.values()) / 1e6
    if megabytes > args.limit:
        raise UserError(
            f"{path} has {megabytes:.1f} MB after rounding, above --limit {args.limit:g}; "
            "raise it, train a smaller model, or leave the perceptual decoder out with --without-perceptual"
        )
    print_change(before, after, load_slices(find_data(args.data), "validate", after.image_size))
    checkpoints.save_weights(args.file, released, description)

    # the card
    shape = after.latent_shape
    price = f"{after.fixed_bits:,.0f} bits" if hasattr(after, "fixed_bits") else f"{math.prod(shape):,} numbers"
    kind = description["kind"] + ("" if description["kind"] in MODELS else f" on {own['kind']}")
    kind += f", {after.image_size} px" + (", two decoders" if after.perceptual is not None else "")
    print(f"\nwritten: {args.file}\n")
    print("| file | MB | model | per slice | commit | seed | steps | device | minutes |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| `{args.file.name}` | {args.file.stat().st_size / 1e6:.1f} | {kind} | {price} | {record['commit']} "
        f"| {record['seed']} | {description['step']:,} | {record['device']} | {record['seconds'] / 60:.0f} |"
    )


if __name__ == "__main__":
    util.command(main)
