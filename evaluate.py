"""Scores of a first stage, or of new brains, on a split.

    python evaluate.py --reconstruction vqvae               # a run, its folder, or a weights file
    python evaluate.py --reconstruction vqvae --no-floors   # without k-means, block KLT and AVIF, which take minutes
    python evaluate.py --samples diffusion                  # samples of a second stage's run: NAME_vis/samples
    python evaluate.py --samples FOLDER                     # any data folder, or one of case_NNN_slice_Z.nii.png
    python evaluate.py --utility FOLDER                     # new brains with masks, as those of --sample
    python evaluate.py --train-scorer                       # the network that reads samples, on your own data

Reconstructions. SSIM over the whole picture and over the tissue mask, beside their price in bits, and beside codecs
without a network (scores/ledger.py). Writes DIR/reconstruction_SPLIT.json and .png.

Samples. Every score is computed in the same way of the sampled brains, of as many held-out people, of these after they
went through the first stage, and of draws of training people, which say what is allowed (scores/samples.py). Writes
DIR/samples_SPLIT.md, a page with its pictures, and .json; and scores and copies into README.md of a folder of samples.

Utility. A small network learns to find tissue from new brains, from as many real ones, and from both, and is tested on
real brains: nine trainings, half an hour on a CPU core (scores/utility.py). Writes DIR/utility_SPLIT.md and .json. The
same command goes on after an interruption.

Brackets hold 95 % intervals, by bootstrap over brains: the slices of one brain are no independent observations.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import util
from dataset import find_data, has_masks, load_slices, to_float, to_slices
from model_diffusion import LatentDiffusion
from parts.autoencoder import Autoencoder
from pictures.volume import RECORD, read_record, write_index
from pixelCNN import PRIORS, PixelCNN, PixelCNN2
from scores.card import write_card
from scores.ledger import ledger_lines, table, write_ledger
from scores.page import sample_table, write_page
from scores.samples import load_samples
from scores.scorer import COMMAND, NAME, STEPS, find_scorer, train_scorer
from scores.scorer import RELEASED as RELEASED_SCORER
from scores.utility import HEADS, load_heads, utility_table, write_utility
from training.checkpoints import RELEASED, file_digest, find_weights, load_weights, run_weights
from training.stages import allow_brains, find_encoder, load_first_stage, load_second_stage, weights_here
from util import UserError


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--reconstruction", metavar="RUN", default="vqvae",
        help="first stage: run name, folder or weights file (default: %(default)s)")  # fmt: skip
    add("--samples", metavar="RUN", help="score new brains instead: a second stage's run, or a folder of slices")
    add("--utility", type=Path, metavar="FOLDER", help="train a segmentation network on a folder of new brains with "
        "masks instead, and on real ones, and compare them")  # fmt: skip
    add("--train-scorer", type=util.positive_int, nargs="?", const=STEPS, metavar="STEPS", help="train the scorer of "
        f"samples instead, {STEPS} steps, half an hour on a CPU core; the same command resumes")  # fmt: skip
    add("--limit-brains", type=util.positive_int, metavar="N", help="of the samples, the first N; default: all, "
        f"for --utility at most {HEADS}")  # fmt: skip
    add("--scorer", metavar="RUN", help="reads the samples: run or file; default: the run scorer, else the released "
        "one; with --train-scorer the name of the run to train")  # fmt: skip
    util.add_decoder_flag(parser, "fidelity", "fidelity")
    add("--data", metavar="FOLDER", help="as in training")
    add("--split", choices=("train", "validate", "test"), default="validate",
        help="tune on validate, open test once (default: %(default)s)")  # fmt: skip
    add("--prior", metavar="RUN", help="PixelCNN that prices the codes: run name, folder or weights file; default: the "
        "run pixelcnn, if it was trained on this first stage")  # fmt: skip
    add("--no-floors", action="store_true", help="leave out k-means, block KLT and AVIF, which take minutes")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="default: the folder of the weights, or of the samples")
    return parser


def find_prior(run: str | None, model: Autoencoder, device: torch.device) -> PixelCNN | PixelCNN2 | None:
    """The PixelCNN of a run; by default the run pixelcnn, else the released one, if trained on this first stage.

    Prints how to get one when there is none. Raises UserError when a named one does not fit.
    """
    if not hasattr(model, "encode_indices"):
        if run is not None:
            raise UserError(f"--prior {run}: a {model.kind} has no codes; leave --prior out")
        return None

    def fits(description: dict) -> bool:
        trained_on = description.get("first_stage", {}).get("digest")
        return description["kind"] in PRIORS and trained_on == model.description["digest"]

    if run is None:
        own, released = run_weights("pixelcnn"), RELEASED / "pixelcnn.safetensors"
        there = [path for path in (own, released) if path.is_file()]
        run = next((path for path in there if fits(load_weights(path)[1])), None)
    command = f"python pixelCNN.py --first-stage {model.description['path']}"
    if run is None:
        if own.is_file():
            command += " --name NEW, and give --prior NEW"
        print(f"bits under a prior: left out; train one with: {command}")
        return None
    prior, _ = load_second_stage(find_weights(run, f"{command} --name {run}"), PRIORS, device)
    if not fits(prior.description):
        raise UserError(f"--prior {run} was trained on another first stage; name one trained on this, or leave it out")
    return prior


def evaluate_reconstruction(args: argparse.Namespace) -> None:
    """The command with --reconstruction."""
    device = util.pick_device(args.device)
    model = load_first_stage(args.reconstruction, device, args.decoder)
    prior = find_prior(args.prior, model, device)
    folder = find_data(args.data)
    data = load_slices(folder, args.split, model.image_size, masks=has_masks(folder, args.split))
    allow_brains(model, data)
    train = None if args.no_floors else load_slices(folder, "train", model.image_size)
    out = args.out or Path(model.description["path"]).parent
    out /= f"reconstruction_{args.split}{'_perceptual' if args.decoder == 'perceptual' else ''}"
    result, rows = write_ledger(model, data, train, out, prior=prior, device=device)
    print(f"{table(rows)}\n\n{ledger_lines(result)}")
    print(f"scores: {out}.json and .png")


def first_stage_of(record: dict, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Brains uint8 [n, Z, S, S] to the same after the first stage of some samples; None, with a line, if unknown.

    record: from read_record. The weights it names by their digest are those of a run here, or released ones.
    """
    wanted = record["made_by"].get("weights")
    path = next((file for file in weights_here() if wanted and file_digest(file) == wanted), None)
    if path is None:
        print("the weights of these samples are not here: no heads that only went through their first stage")
        return None
    prior, decoder = load_second_stage(path, {LatentDiffusion.kind: LatentDiffusion, **PRIORS}, device)
    encoder = find_encoder(decoder)
    if encoder is None:
        print(f"the encoder of {path} is not here: no heads that only went through its first stage")
        return None

    def through(brains: Tensor) -> Tensor:
        z, done = torch.arange(brains.shape[1], device=device), []
        for i, brain in enumerate(util.progress(brains, "through the first stage", unit="brain")):
            x = to_float(brain.to(device))[:, None]
            diffused = prior.kind == LatentDiffusion.kind
            latent = encoder.encode(x, z) if diffused else encoder.dequantise(encoder.encode_indices(x, z))
            done.append(to_slices(decoder.draw(latent, z, util.brain_generator(0, i, "texture"))).cpu())
        return torch.stack(done)

    return through


def ages_of_samples(folder: Path, record: dict, numbers: list[int]) -> Tensor | None:
    """float32 [n]: the age of each person of a folder of samples, NaN where it is not known; None where no age is."""
    people = [record["brains"].get(str(number), {}) for number in numbers]
    try:
        ages = torch.tensor([float(person.get("age", "nan")) for person in people])
    except (TypeError, ValueError):
        raise UserError(f"{folder / RECORD} has an age that is no number; mend it, or move it elsewhere") from None
    return None if ages.isnan().all() else ages


def evaluate_samples(args: argparse.Namespace) -> None:
    """The command with --samples."""
    began = time.monotonic()
    brains, numbers, samples = load_samples(args.samples, args.limit_brains)
    folder = find_data(args.data)
    splits = tuple(load_slices(folder, split, brains.shape[-1]) for split in ("train", args.split))
    scorer, description = find_scorer(args.scorer)
    read = description["accuracy"]["validate"]
    print(
        f"scorer: {description['path']}, Dice of CSF {read['dice_csf']:.2f}, grey {read['dice_grey']:.2f}, white "
        f"{read['dice_white']:.2f}, error of z {read['z_error']:.2f} slices"
        + (f"; train one on your data with: {COMMAND}" if description["path"] == str(RELEASED_SCORER) else "")
    )
    scorer.to(util.pick_device(args.device))
    out = args.out or samples
    record = read_record(samples)
    through = first_stage_of(record, util.pick_device(args.device))
    report = write_page(brains, numbers, samples, splits, scorer, description, out,
                        ages=ages_of_samples(samples, record, numbers), through=through)  # fmt: skip
    print(sample_table(report))
    if out == samples:
        write_card(samples)  # with the scores
        write_index(samples)  # with links to them
    print(f"page: {out}/samples_{args.split}.md, and .json and .png beside it; {time.monotonic() - began:.0f} s")


def evaluate_utility(args: argparse.Namespace) -> None:
    """The command with --utility."""
    began, out = time.monotonic(), args.out or args.utility
    splits = load_heads(args.utility, args.data, args.split)
    report = write_utility(args.utility, splits, out, args.limit_brains or HEADS, util.pick_device(args.device))
    print(utility_table(report))
    print(f"page: {out}/utility_{args.split}.md, and .json beside it; {util.duration(time.monotonic() - began)}")


def main() -> None:
    args = flags().parse_args()
    if args.split == "train" and (args.samples or args.utility):
        raise UserError("--split train: samples are set beside held-out brains; choose validate (or, once, test)")
    if args.train_scorer:
        train_scorer(find_data(args.data), args.device, name=args.scorer or NAME, steps=args.train_scorer)
    elif args.utility:
        evaluate_utility(args)
    elif args.samples:
        evaluate_samples(args)
    else:
        evaluate_reconstruction(args)


if __name__ == "__main__":
    util.command(main, "close other programs, or take --device cpu")
