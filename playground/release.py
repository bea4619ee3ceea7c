"""How does a finished run become a weights file small enough to give away?

    python playground/release.py vqvae pretrained/vqvae.safetensors           # a run, first or second stage, and a file
    python playground/release.py diffusion NEW.safetensors --first-stage FILE          # with this released first stage

Weights are rounded to fp16, which halves the file. Linear path, scale of the latents and quantiser stay in float32:
they fix the codes, a rounding could choose another code, and they are few bytes. The metadata keep the description that
rebuilds the model and add how it was trained, from log/RUN; of folders only the last name goes along. Printed: the
effect of the rounding on 64 validation slices, and the rows of a model card in Markdown.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import pixelCNN
import stable_diffusion
import util
from dataset import Slices, find_data, load_slices, to_uint8
from logger import read_log
from model_VAE import MODELS
from parts.autoencoder import Autoencoder
from scores.metrics import slice_scores
from training.checkpoints import file_digest, find_weights, load_weights, save_weights
from training.stages import build_first_stage, latent_digest, load_first_stage, load_second_stage
from util import UserError

PRIORS = stable_diffusion.MODELS | pixelCNN.PRIORS
EXACT = re.compile(r"(^|\.)(latent_mean|latent_sd|correlation|linear(_top)?\.\w+\.weight|quantizer(_top)?\.\w+)$")
COMPARED_SLICES = 64
FILE_COLUMNS = "| file | bytes | digest | weights | model | a slice takes |"
TRAINING_COLUMNS = "| file | commit | seed | steps | device | minutes | PyTorch |"


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="name of a finished run, model_ckpt/RUN and log/RUN, or a released file")
    add("file", metavar="FILE", type=Path, help="the .safetensors file to write")
    add("--first-stage", metavar="RUN", help="of a second stage: carry this one, whose latents are the same, instead")
    add("--without-encoder", action="store_true", help="of a second stage: leave out what decoding does not need")
    add("--data", metavar="FOLDER", help="as in training; its validation slices are compared")
    return parser


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights in fp16, but for those that fix the codes and those beyond fp16's range of 65,504."""
    weights = model.state_dict()
    halves = {name: tensor if EXACT.search(name) else tensor.half() for name, tensor in weights.items()}
    return {name: half if torch.isfinite(half).all() else weights[name] for name, half in halves.items()}


def without_folders(value):
    """A JSON value in which every absolute path is cut down to its last name: it says nothing elsewhere."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
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


@torch.no_grad()
def print_change(before: Autoencoder, after: Autoencoder, data: Slices) -> None:
    """Prints how two versions of one autoencoder differ on validation slices."""
    changed, total, ssim = 0, 0, [[], []]
    for index in torch.linspace(0, len(data) - 1, min(COMPARED_SLICES, len(data))).round().long().split(16):
        x, z, _ = data.batch(index)
        if hasattr(before, "encode_indices"):
            for grids in zip(*(pixelCNN.grids_of(model.encode_indices(x, z)) for model in (before, after))):
                changed, total = changed + int((grids[0] != grids[1]).sum()), total + grids[0].numel()
        for model, score in zip((before, after), ssim):
            score.append(slice_scores(to_uint8(model.reconstruct(x, z))[:, 0], data.images[index], None)["ssim"])
    old, new = (torch.cat(score) for score in ssim)
    codes = f"{changed} of {total} codes change" if total else "no codes"
    print(f"rounding, on {len(old)} validation slices: {codes}; SSIM {old.mean():.5f} before, {new.mean():.5f} after, "
          f"of one slice at most {(new - old).abs().max():.1e} apart")  # fmt: skip


def file_row(path: Path) -> str:
    """A released file's row in the card's first table, see FILE_COLUMNS; all of it is read from the file."""
    weights, described = load_weights(path)
    first_stage, model, price = None, described["kind"], "-"  # as of a scorer
    if model in PRIORS:
        _, first_stage = load_second_stage(path, PRIORS)
        model += f" on {first_stage.kind}"
    elif model in MODELS:
        first_stage = load_first_stage(path, decoder=None)
    if first_stage:
        price = f"{math.prod(first_stage.latent_shape):,} numbers"
        if hasattr(first_stage, "fixed_bits") and described["kind"] not in stable_diffusion.MODELS:
            price = f"{first_stage.fixed_bits:,.0f} bits"
        model += f", {first_stage.image_size} px" + (", two decoders" if first_stage.texture else "")
    count = sum(tensor.numel() for tensor in weights.values())
    return f"| `{path.name}` | {path.stat().st_size:,} | `{file_digest(path)}` | {count:,} | {model} | {price} |"


def training_row(path: Path) -> str:
    """A released file's row in the card's second table, see TRAINING_COLUMNS; "; " parts the runs of training_runs."""
    runs = training_runs(load_weights(path)[1])
    columns = [
        [run["commit"] for run in runs],
        {str(run["seed"]): None for run in runs},  # once, where it is the same in all
        [f"{run['step']:,}" for run in runs],
        {run.get("device", "-"): None for run in runs},
        [f"{run['seconds'] / 60:.0f}" if "seconds" in run else "-" for run in runs],
        {run["versions"]["torch"].split("+")[0] if "versions" in run else "-": None for run in runs},
    ]
    return f"| `{path.name}` | {' | '.join('; '.join(column) for column in columns)} |"


def training_runs(described: dict) -> list[dict]:
    """The records, see training_record, of the runs that made a file, each with its "step".

    Two, where the file tells of a run that made its codec and of one that trained its texture. Runs that trained one
    in between count for nothing: each began again with the codec.
    """
    codec = described
    while "training" in codec.get("started_from", {}):
        codec = codec["started_from"]
    made_by = [codec, described] if codec is not described else [described]
    return [made.get("training", made) | {"step": made["step"]} for made in made_by]  # a scorer has it all in one


def card_tables(files: list[Path]) -> str:
    """The model card's tables of files, and of how they were made, in Markdown."""
    tables = []
    for columns, row in ((FILE_COLUMNS, file_row), (TRAINING_COLUMNS, training_row)):
        tables.append("\n".join([columns, "|---" * (columns.count("|") - 1) + "|", *map(row, files)]))
    return "\n\n".join(tables) + "\n"


def print_rows(file: Path) -> None:
    """Says what was written, and prints its rows of the model card."""
    print(f"\nwritten: {file}\n\nfor the model card, pretrained/README.md:\n\n{card_tables([file])}")


def main() -> None:
    args = flags().parse_args()
    if args.file.suffix != ".safetensors":
        raise UserError(f"{args.file} must end in .safetensors")
    path = find_weights(args.run, "python prestage_train.py, stable_diffusion.py or pixelCNN.py")
    weights, described = load_weights(path)
    record = described.get("training") or training_record(path.parent.name)
    if described["kind"] == "scorer":
        halves = {name: tensor.half() for name, tensor in weights.items()}  # as they were before they were loaded
        save_weights(args.file, halves, without_folders(described | {"training": record}))
        print_rows(args.file)
        return
    is_first = described["kind"] in MODELS
    if is_first and (args.first_stage or args.without_encoder):
        raise UserError("--first-stage and --without-encoder are for second stages: this is a first stage itself")
    prior, before = (None, load_first_stage(path)) if is_first else load_second_stage(path, PRIORS, decoder="fidelity")
    described = (before if is_first else prior).description
    if args.first_stage:
        carried, before = before, load_first_stage(args.first_stage)
        if before.description["digest"] != carried.description["digest"]:
            raise UserError(f"--first-stage {args.first_stage} has other latents than those that {args.run} learned")
    if before.encoder is None:
        raise UserError(f"{path} has no encoder to compare with; name its first stage with --first-stage")

    # the weights, and what rounding does to them
    weights = rounded(before)
    after = build_first_stage(before.description, {name: half.float() for name, half in weights.items()}, path)
    print_change(before, after, load_slices(find_data(args.data), "validate", after.image_size))
    own = before.description | {"digest": latent_digest(after.state_dict())}  # as of the first stage's released file
    if not is_first:
        left_out = ("encoder.", "encoder_top.") if args.without_encoder else ()
        weights = {f"first_stage.{name}": half for name, half in weights.items() if not name.startswith(left_out)}
        weights |= {f"prior.{name}": half for name, half in rounded(prior).items()}
    description = without_folders((own if is_first else described | {"first_stage": own}) | {"training": record})
    save_weights(args.file, weights, description)

    print_rows(args.file)


if __name__ == "__main__":
    util.command(main)
