"""Second stage: latent diffusion. Learns the latents of a first stage, and decodes new brains.

    python stable_diffusion.py                       # trains on model_ckpt/vqvae; the same command resumes
    python stable_diffusion.py --sample --brains 4   # new brains; from the released weights if nothing was trained here
    python stable_diffusion.py --complete FOLDER     # whole brains from those of their slices that are in a folder

The slices of a brain are denoised together: their noise is correlated along z as their latents are. Training shows the
network slices one by one, and later, unless --slices is 1, windows of so many neighbouring slices, which hear of each
other.

Training writes model_ckpt/NAME (the weights carry their first stage), log/NAME and NAME_vis. Sampling writes, into
NAME_vis/samples or --out DIR, per brain a sheet of all slices, a GIF through z, reslices, a NIfTI volume and PNG
slices, both also as masks of tissue (pictures/volume.py); process.gif, one slice on its way from noise; samples.json,
what they come from; README.md, a card that says so in words; and index.html, a page that shows them in three planes.
The folder is a data folder: dataset.py checks it and trainers take it as --data. The same command goes on after a kill,
and with more --brains.
"""

import argparse
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import util
from dataset import Slices, find_data, load_slices, people_table, to_float, to_slices, to_uint8
from heads.layout import MASK_VALUES, has_splits, list_slices, read_slice
from heads.people import CONDITIONS, as_heard, draw_person, in_letters, in_numbers, person_of, read_people, words_for
from model_diffusion import RECIPES, SAMPLERS, Denoise, LatentDiffusion, guide, sample_dpm, sampling_times
from parts import calibration
from parts.autoencoder import Autoencoder
from parts.completion import complete
from parts.gaussian_prior import moments_at_each_z
from pictures import sheets
from pictures.volume import Samples, samples_folder, write_index
from scores.card import write_card
from scores.metrics import adjacent_ssim
from scores.scorer import find_scorer, read_masks
from training.checkpoints import RELEASED, cached, digest_of, load_weights, run_weights
from training.latents import TrainingLatents
from training.run import Run
from training.settings import LESS_MEMORY, Flags, describe_samples, open_run, weights_to_sample
from training.stages import (
    allow_brains,
    find_encoder,
    load_first_stage,
    load_second_stage,
    preset_of_first_stage,
    save_second_stage,
)
from util import UserError

SCRIPT = Path(__file__).name
MODELS = {LatentDiffusion.kind: LatentDiffusion}
BLOCKS = 2  # residual blocks a level of the UNet
ALONE = 0.6  # of the steps, in which slices are seen one by one before windows of neighbours
MODES = 24  # of the Gaussian prior, or a quarter of the brains where these are few
AWAY = 1.3  # times as far from the Gaussian prior's guess as the network's own are the guesses of calibrated samples
CALIBRATION_BRAINS = 64  # drawn after training at most, or a quarter of the whole training brains;
CALIBRATION_LEAST = 8  # with fewer of these nothing says what power heads have
FRAMES = 24  # of process.gif


def flags() -> Flags:
    """This script's command line."""
    flags = Flags(SCRIPT, __doc__)
    train, sample, positive = flags.train, flags.sample, util.positive_int
    train("--first-stage", default="vqvae", metavar="RUN", help="run name, folder or weights file")
    train("--steps", type=positive, changeable=True, help="optimiser steps")
    train("--batch-size", type=positive, help="slices per step and process")
    train("--learning-rate", type=util.positive_float, help="Adam's, after warm-up")
    train("--widths", type=positive, nargs="+", metavar="W",
          help="channels of each level of the UNet")  # fmt: skip
    train("--recipe", choices=tuple(RECIPES), default="v", help="noise schedule, weight of its levels, times")
    train("--slices", type=positive, metavar="S", help="neighbouring slices of a brain that "
          "training shows together after single ones; 1 is a 2-D model")  # fmt: skip
    train("--moved-heads", type=util.whole_number, metavar="N", help="times that training sees "
          "every head turned, scaled and shifted, beside once as it is; the network is told how")  # fmt: skip
    flags.add_sampling("NAME_vis/samples")
    sample("--complete", type=Path, metavar="FOLDER", decides=False, help="draw the missing slices of the brains of "
           "which some are in FOLDER, as case_NNN_slice_Z.nii.png")  # fmt: skip
    sample("--sampler", choices=tuple(SAMPLERS), default="dpm", help="dpm and ddim evaluate the network once a step, "
           "heun twice; ddpm takes all 1000 steps")  # fmt: skip
    sample("--sample-steps", type=positive, default=20, metavar="N", help="of the sampler")
    sample("--guidance", type=util.number, default=1.0, metavar="W", help="above 1: away from what the model makes "
           "without z and person; 2 evaluations a step")  # fmt: skip
    for name, condition in CONDITIONS.items():
        kind = {"choices": tuple(condition.values)} if condition.values else {"type": util.number, "metavar": "N"}
        sample(f"--{name}", **kind, help=f"{condition.help} of the people to draw; default: as in training")
    return flags


# ------------------------------------------------------------------------------------------------------------ sampling


class Sampling:
    """How brains are drawn. Brain i is a function of the weights and (seed, i), whatever is drawn beside it.

    Args:
        seed: all randomness follows from it.
        sampler, steps: a name in SAMPLERS, and how many steps it takes.
        guidance: 1 is off; above, samples move away from what the model makes without z and person.
        precision: as the flag --precision.
        person: what is asked of the people, by names in CONDITIONS: age=75, sex="F", cdr=0.5. The rest is drawn as the
            people of the training set have it.
    Raises ValueError for a sampler or a condition that there is not.
    """

    def __init__(self, *, seed: int = 0, sampler: str = "dpm", steps: int = 20, guidance: float = 1.0,
                 precision: str = "auto", **person):  # fmt: skip
        for name, value, possible in [("sampler", sampler, SAMPLERS), *(("person", p, CONDITIONS) for p in person)]:
            if value not in possible:
                raise ValueError(f"{name} must be one of {', '.join(possible)}, not {value}")
        self.seed, self.sampler, self.steps, self.guidance, self.precision = seed, sampler, steps, guidance, precision
        self.person = {name: value for name, value in person.items() if value is not None}

    def words(self) -> str:
        """Such as "dpm in 20 steps"."""
        how = self.sampler if self.sampler == "ddpm" else f"{self.sampler} in {self.steps} steps"
        return how + (f", guidance {self.guidance:g}" if self.guidance != 1 else "")


class BrainNoise:
    """Draws noise [n Z, C, h, w] for n brains, correlated along z; brain i depends on (seed, i) alone."""

    def __init__(self, model: LatentDiffusion, seed: int, brains: range):
        self.model, self.generators = model, [util.brain_generator(seed, i) for i in brains]

    def __call__(self) -> Tensor:
        Z, device = self.model.slices_per_brain, self.model.alpha.device
        shape, z = (Z, *self.model.latent_shape), torch.arange(Z, device=device)
        white = (torch.randn(shape, generator=generator).to(device) for generator in self.generators)
        return torch.cat([self.model.gaussian.correlate(noise, z, Z) for noise in white])


def denoiser(
    model: LatentDiffusion, people: Tensor, z: Tensor, sampling: Sampling, away: float = 1.0
) -> Denoise:
    """(x_t, t) -> (x_0, noise) of whole brains, x_t [n Z, C, h, w], for people [n, K] and z [n Z], NaN if unknown.

    away: as in LatentDiffusion.denoise.
    """
    people = people.repeat_interleave(model.slices_per_brain, 0)

    def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        with util.autocast(x.device, sampling.precision):
            return model.denoise(x, t, z, model.slices_per_brain, people, away)

    return denoise


@torch.no_grad()
def sample_latents(
    model: LatentDiffusion,
    sampling: Sampling,
    brains: range,
    people: list[dict[str, float]],
    given: tuple[Tensor, Tensor] | None = None,
) -> Iterator[Tensor]:
    """Latents [n Z, C, h, w] of n brains after each step from noise; the last are the samples.

    Args:
        people: what is known of each, by the names in CONDITIONS, as numbers.
        given: of a single brain, known latents [k, C, h, w] and their z int64 [k]; the other slices are drawn.
    """
    device = model.alpha.device
    z = torch.arange(model.slices_per_brain, device=device).repeat(len(brains))
    known = torch.stack([in_numbers(person, model.conditions) for person in people]).to(device)
    away = AWAY if model.calibration.measured else 1.0  # by itself it makes heads too rich in detail
    denoise = denoiser(model, known, z, sampling, away)
    if sampling.guidance != 1:
        nothing = denoiser(model, torch.full_like(known, torch.nan), torch.full(z.shape, torch.nan, device=device),
                           sampling, away)  # fmt: skip
        denoise = guide(denoise, nothing, sampling.guidance)
    if model.calibration.measured:
        denoise = model.calibrated(denoise, z)
    if given is not None:
        denoise = complete(denoise, model.gaussian, model.alpha, model.sigma, *given)
    draw = BrainNoise(model, sampling.seed, brains)
    steps = sampling.steps if sampling.sampler != "ddpm" else model.T
    path = SAMPLERS[sampling.sampler](denoise, draw(), model.alpha, model.sigma, steps, draw)
    names = f"brain {brains.start}" if len(brains) == 1 else f"brains {brains.start} to {brains.stop - 1}"
    yield from util.progress(path, names, steps, "step")


@torch.no_grad()
def decode_brain(
    first_stage: Autoencoder, latent: Tensor, seed: int = 0, brain: int = 0, shown: list[int] | None = None
) -> np.ndarray:
    """uint8 [Z, S, S] of latents [Z, C, h, w] in the order of z, or only of the slices shown, with texture if there
    is any: that of (seed, brain)."""
    z = torch.arange(len(latent)) if shown is None else torch.tensor(shown)
    generator = util.brain_generator(seed, brain, "texture")
    x = first_stage.draw(latent[z], z.to(latent.device), generator, len(latent))
    return to_slices(x).cpu().numpy()


def check_finite(latent: Tensor, brain: int) -> None:
    """Raises UserError for latents of a brain that cannot be decoded."""
    if not torch.isfinite(latent).all():
        raise UserError(f"the latents of brain {brain} are not finite, so it is not written; leave --guidance and "
                        "--precision out, or sample other weights")  # fmt: skip


def steps_kept(steps: int) -> range:
    """After which of so many steps draw_brains keeps the latents: at most 31, evenly spaced, the last is `steps`."""
    return range(steps, 0, -max(1, steps // 16))[::-1]


def draw_brains(
    model: LatentDiffusion, first_stage: Autoencoder, sampling: Sampling, brains: range = range(1)
) -> Iterator[tuple[np.ndarray, dict[str, float], list[Tensor]]]:
    """(slices uint8 [Z, S, S], person, way) of each new brain; the way is its latents after steps_kept.

    model and first_stage are those of load_second_stage. One brain at a time: memory stays small.
    Raises UserError for people whom the model never saw.
    """
    asked = person_of(sampling.person, model.description)
    for i in brains:
        person = draw_person(asked, model.description, sampling.seed, i)
        heard = as_heard(person, model.description, sampling.seed, i)
        way = list(sample_latents(model, sampling, range(i, i + 1), [heard]))
        check_finite(way[-1], i)
        kept = [way[step - 1] for step in steps_kept(len(way))]
        yield decode_brain(first_stage, way[-1], sampling.seed, i), person, kept


@torch.no_grad()
def from_noise(
    first_stage: Autoencoder, way: list[Tensor], z: int, seed: int, brain: int
) -> tuple[np.ndarray, np.ndarray]:
    """One slice of a brain on its way from noise: pictures uint8 [FRAMES, H, W] of the coded box, and their places.

    From each picture to the next as much changes. So a place, 0 .. len(way) - 1, may lie between two latents of the
    way; the picture is then of a latent interpolated between them.
    """
    latents = torch.stack([latent[z] for latent in way])

    def decode(latents: Tensor) -> np.ndarray:
        at, texture = torch.full((len(latents),), z), util.brain_generator(seed, brain, "texture")
        x = first_stage.draw(latents, at.to(latents.device), texture, len(way[0]))
        return to_uint8(first_stage.crop(x))[:, 0].cpu().numpy()

    change = np.abs(np.diff(decode(latents).astype(float), axis=0)).mean((1, 2))
    places = sheets.even_positions(change, FRAMES)
    before = torch.from_numpy(places).long()
    after, share = (before + 1).clamp(max=len(way) - 1), torch.from_numpy(places - before.numpy()).to(latents)
    return decode(latents[before].lerp(latents[after], share[:, None, None, None])), places


def load_sampling(args: argparse.Namespace, weights: Path) -> tuple[LatentDiffusion, Autoencoder, Sampling]:
    """(model, first stage, how to sample) that the flags mean."""
    model, first_stage = load_second_stage(weights, MODELS, util.pick_device(args.device))
    if args.guidance != 1 and not model.drop_z:
        raise UserError(f"--guidance {args.guidance:g}: {weights} always needs z; leave the flag out")
    sampling = Sampling(seed=args.seed, sampler=args.sampler, steps=args.sample_steps, guidance=args.guidance,
                        precision=args.precision, **{name: getattr(args, name) for name in CONDITIONS})  # fmt: skip
    person_of(sampling.person, model.description)  # refuses what the model never saw, before a folder is made
    if not model.calibration.measured and model.description.get("data", {}).get("cases", 0) >= CALIBRATION_LEAST:
        print(f"{weights} is not calibrated yet, as it is at the end of training; the command that trains goes on")
    return model, first_stage, sampling


def sample(args: argparse.Namespace, declared: Flags, weights: Path) -> None:
    """Writes args.brains new brains, and the GIF of the first."""
    model, first_stage, sampling = load_sampling(args, weights)
    scorer, about = find_scorer()
    scorer.to(model.alpha.device)
    made_by = describe_samples(declared, weights, args, model.description, scorer=about["digest"])
    out = args.out or samples_folder(args.name, made_by)
    samples = Samples(out, made_by)
    how = f"seed {args.seed}, {sampling.words()}, {first_stage.decoder_in_use} decoder"
    print(f"sampling {args.brains} brains of {weights} (trained for {model.description['step']} steps), {how}, on "
          f"{util.describe_device(model.alpha.device)}")  # fmt: skip
    for i in samples.missing(range(args.brains), model.slices_per_brain, first_stage.image_size):
        slices, person, way = next(draw_brains(model, first_stage, sampling, range(i, i + 1)))
        if i == 0:  # before the brain is recorded: after that it is not drawn again
            z, steps = len(slices) // 2, model.T if args.sampler == "ddpm" else args.sample_steps
            pictures, places = from_noise(first_stage, way, z, args.seed, i)
            at = np.interp(places, np.arange(len(way)), steps_kept(steps))
            frames = sheets.frames(pictures, f"slice z = {z} of brain 0, from noise; between steps interpolated",
                                   [f"after step {step:.1f} of {steps}" for step in at])  # fmt: skip
            sheets.save_gif(out / "process.gif", frames, seconds=4)
            print(f"from noise to brain, slice z = {z}: {out}/process.gif")
        masks = read_masks(scorer, slices)
        samples.add(i, slices, ", ".join([f"brain {i}", *words_for(person)]), how, in_letters(person), masks)
    write_card(out)
    write_index(out)


# ---------------------------------------------------------------------------------------------------------- completion


def given_slices(folder: Path, size: int, slices_per_brain: int) -> dict[int, dict[int, np.ndarray]]:
    """{case: {z: uint8 [size, size]}} of the slices in a folder.

    Raises UserError where there are none, and for whatever a brain of so many slices cannot be completed from.
    """
    if not folder.is_dir() or has_splits(folder):
        raise UserError(f"--complete {folder}: give a folder that itself holds slices, case_NNN_slice_Z.nii.png")
    given = {}
    for case, z, path in list_slices(folder, "train"):
        if z >= slices_per_brain:
            raise UserError(f"{path}: these weights know slices 0 to {slices_per_brain - 1}; move it elsewhere")
        pixels = read_slice(path)
        if pixels.shape != (size, size):
            raise UserError(f"{path} has {pixels.shape[1]}x{pixels.shape[0]} pixels, but these weights draw "
                            f"{size}x{size}; give slices of that size")  # fmt: skip
        if np.isin(pixels, MASK_VALUES).all():
            raise UserError(f"{path} holds only {', '.join(map(str, MASK_VALUES))}, as masks do; give the picture")
        given.setdefault(case, {})[z] = pixels
    for case, slices in given.items():
        if len(slices) == slices_per_brain:
            raise UserError(f"--complete {folder}: case {case} has all {slices_per_brain} slices; move them elsewhere")
    return given


@torch.no_grad()
def complete_brain(
    model: LatentDiffusion,
    first_stage: Autoencoder,
    encoder: Autoencoder,
    sampling: Sampling,
    given: dict[int, np.ndarray],
    brain: int = 0,
    person: dict[str, float] | None = None,
) -> np.ndarray:
    """uint8 [Z, S, S]: a brain with the given slices {z: uint8 [S, S]} and others that are drawn to fit them.

    Args:
        model, first_stage: of load_second_stage.
        encoder: of training.stages.find_encoder.
        brain: with the seed, it decides on the noise.
        person: what is known of the person, by the names in CONDITIONS, as numbers.
    """
    z, slices = torch.tensor(list(given)), np.stack(list(given.values()))
    x = to_float(torch.from_numpy(slices))[:, None].to(model.alpha.device)
    with util.autocast(x.device, sampling.precision):
        known = encoder.encode(x, z.to(x.device)).float(), z.to(x.device)
    *_, latent = sample_latents(model, sampling, range(brain, brain + 1), [person or {}], known)
    check_finite(latent, brain)
    completed = decode_brain(first_stage, latent, sampling.seed, brain)
    completed[z] = slices
    return completed


def complete_folder(args: argparse.Namespace, declared: Flags, weights: Path) -> None:
    """Writes the brains of which some slices are in the folder args.complete; of people as its table or flags say."""
    model, first_stage, sampling = load_sampling(args, weights)
    given = given_slices(args.complete, first_stage.image_size, model.slices_per_brain)
    asked, table = person_of(sampling.person, model.description), people_table(args.complete)
    people, (scorer, about) = read_people(table) if table else {}, find_scorer()
    scorer.to(model.alpha.device)
    encoder = find_encoder(first_stage)
    if encoder is None:
        raise UserError(f"{weights} has no encoder, and its first stage is not here; copy that to "
                        "model_ckpt/NAME/model.safetensors")  # fmt: skip
    pictures = (f"{case} {z}".encode() + given[case][z].tobytes() for case in given for z in given[case])
    digest = hashlib.blake2b(b"".join(pictures), digest_size=8).hexdigest()
    made_by = describe_samples(declared, weights, args, model.description, scorer=about["digest"], given=digest)
    samples = Samples(args.out or samples_folder(args.name, made_by), made_by)
    how = f"seed {args.seed}, {sampling.words()}, {first_stage.decoder_in_use} decoder"
    print(f"completing {len(given)} brains of {args.complete} by {weights}, {how}, on "
          f"{util.describe_device(model.alpha.device)}")  # fmt: skip
    for case in samples.missing(given, model.slices_per_brain, first_stage.image_size):
        slices = given[case]
        known = {name: people.get(case, {}).get(name, math.nan) for name in model.conditions} | asked
        person = {name: number for name, number in known.items() if not math.isnan(number)}
        brain = complete_brain(model, first_stage, encoder, sampling, slices, case, person)
        kept = " ".join(map(str, slices))
        name = ", ".join([f"case {case}", *words_for(person), f"given z = {kept}"])
        samples.add(case, brain, name, how, in_letters(person) | {"given": kept}, read_masks(scorer, brain))
    write_card(samples.out)
    write_index(samples.out)


# ------------------------------------------------------------------------------------------------------------ training


@torch.no_grad()
def validate(model: LatentDiffusion, latents: Tensor, z: Tensor, people: Tensor, run: Run) -> float:
    """Loss over held-out latents at fixed noise and steps spread over the whole process.

    The model sees whole brains, as in sampling, unless slices are missing.
    """
    torch.manual_seed(0)
    whole = torch.arange(model.slices_per_brain, device=z.device).repeat(len(z) // model.slices_per_brain)
    slices = model.slices_per_brain if torch.equal(z, whole) else 1
    brains = len(latents) // slices
    rounds = -(-32 // brains)  # few brains are seen at several steps each
    index = torch.arange(len(latents)).repeat(rounds)
    white = torch.randn(len(index), *latents.shape[1:])
    t = torch.linspace(0, model.T - 1, rounds * brains).long().repeat_interleave(slices)
    losses = []
    for n in torch.arange(len(index)).split(2 * model.slices_per_brain):
        noise = model.gaussian.correlate(white[n].to(run.device), z[index[n]], slices)
        batch = latents[index[n]], z[index[n]], t[n].to(run.device), noise
        with run.autocast():
            losses.append(model(*batch, slices, people[index[n]]))
    return float(torch.cat(losses).mean())


def check_slices(args: argparse.Namespace, train: Slices, held_out: Slices) -> None:
    """Raises UserError unless batches are made of whole windows, and brains are alike."""
    if args.slices > train.slices_per_brain:
        raise UserError(f"--slices {args.slices}: a brain has {train.slices_per_brain}; choose at most so many")
    if args.slices > 1 and held_out.slices_per_brain != train.slices_per_brain:
        raise UserError(f"--slices {args.slices}: brains have {train.slices_per_brain} slices in train, but "
                        f"{held_out.slices_per_brain} in validate; use --slices 1")  # fmt: skip
    if args.batch_size % args.slices:
        raise UserError(
            f"--batch-size {args.batch_size} is no multiple of --slices {args.slices}; it counts slices, so choose one"
        )


def known_conditions(folder: Path) -> list[str]:
    """What a model can learn of people with these data."""
    if people_table(folder):
        return list(CONDITIONS)
    print(f"no table of people with these data: nothing is learned of {', '.join(CONDITIONS)}")
    return []


def build(args: argparse.Namespace, first_stage: Autoencoder, data: Slices, conditions: list[str]) -> dict:
    """The keywords of the LatentDiffusion that these settings mean with these data."""
    whole = len(data.whole_cases())
    return {
        "latent_shape": first_stage.latent_shape,
        "widths": tuple(args.widths),
        "blocks": BLOCKS,
        "recipe": args.recipe,
        "slices": args.slices,
        "slices_per_brain": data.slices_per_brain,
        "modes": min(MODES, whole // 4) if whole * data.slices_per_brain == len(data) else 0,
        "conditions": conditions,
        "moved": args.moved_heads > 0,
    }


def measure_latents(model: LatentDiffusion, known: TrainingLatents) -> None:
    """Gives a model what is measured and not trained: the moments and modes of its training latents."""
    heads = known.latents[known.whole]
    if len(heads) > 1:
        model.gaussian.fit_correlation(heads)
        model.calibration.measure_power(heads - heads.mean(0))
    if len(model.gaussian.modes):
        model.gaussian.fit(heads, known.people[known.whole[:, 0]])
    else:
        mean, variance = moments_at_each_z(known.latents, known.z, known.Z)
        model.gaussian.mean.copy_(mean)
        model.gaussian.variance.copy_(variance)


def train(args: argparse.Namespace) -> None:
    """Trains, or resumes, the run args.name; exits when it is stopped on the way."""
    device = util.pick_device(args.device)
    first_stage = load_first_stage(args.first_stage, device)
    folder = find_data(args.data)
    data = {split: load_slices(folder, split, first_stage.image_size, device) for split in ("train", "validate")}
    allow_brains(first_stage, *data.values())
    check_slices(args, *data.values())
    conditions = known_conditions(folder)

    # every slice is encoded once
    known, held_out = (TrainingLatents(part, first_stage, conditions, args) for part in data.values())
    real = data["validate"].whole_brains()[:8]
    neighbours = {"real/adjacent_ssim": float(adjacent_ssim(real).mean())} if len(real) else {}

    torch.manual_seed(args.seed)
    model_kwargs = build(args, first_stage, data["train"], conditions)
    model = LatentDiffusion(**model_kwargs).to(device)
    model.channel_weight.copy_(first_stage.channel_weight())
    measure_latents(model, known)
    run = Run(args, model, data=data, steps=args.steps, built_on=first_stage.description["digest"],
              matrices=model.unet.matrices())  # fmt: skip
    description = {"model_kwargs": model_kwargs, **known.described}
    if run.done < run.total:
        known.add_moved(data["train"], first_stage, args)
        known.project(model)
    for step in run.steps():
        slices = 1 if step < ALONE * run.total else args.slices
        batch = known.batch(run.index(len(known.starts[slices]), args.batch_size // slices), slices)
        with run.autocast():
            loss = run.forward(**batch).mean()
        if run.update({"loss": loss}):
            if run.report_due:
                scores = {"validate/loss": validate(run.ema, held_out.latents, held_out.z, held_out.people, run)}
                *_, latent = sample_latents(run.ema, Sampling(seed=args.seed), range(1), [{}])
                slices = decode_brain(first_stage, latent)
                scores["sample/adjacent_ssim"] = float(adjacent_ssim(torch.from_numpy(slices)[None]).mean())
                title = f"sampled after {run.done} steps: seed {args.seed}, dpm in 20 steps"
                run.report(scores | neighbours, sample=sheets.brain_sheet(slices, title))
            save_second_stage(run.weights, run.ema, first_stage, description | run.described())
            run.save()
    model = run.finish()
    if calibrate(model, description | run.described(), run, len(known.whole)):
        save_second_stage(run.weights, model, first_stage, description | run.described())
    run.say_where()


@torch.no_grad()
def calibrate(model: LatentDiffusion, description: dict, run: Run, known: int) -> bool:
    """After training: measures model.calibration on brains drawn side by side, of people as samples are of.

    Each step of `dpm` goes on from what the calibrated guesses of the steps before have made. Guesses are kept in
    data/cache, in half precision, to which they are rounded: a calibration that was stopped goes on. The noise is not
    that of any brain that --sample draws. Returns whether anything was measured: not again, and not with few training
    brains.
    """
    before = load_weights(run.weights)
    if before[1]["step"] == run.done and before[0]["prior.calibration.weight"].any():
        return False
    if known < CALIBRATION_LEAST:
        print(f"samples are not calibrated: {known} whole training brains do not say what power heads have")
        return False
    seed, Z = util.mix_seed(run.args.seed, "calibration"), model.slices_per_brain
    brains = min(CALIBRATION_BRAINS, known // 4)
    z = torch.arange(Z, device=run.device).repeat(brains)
    people = (draw_person({}, description, seed, i) for i in range(brains))
    people = torch.stack([in_numbers(person, model.conditions) for person in people]).to(run.device)
    times = sampling_times(model.alpha, model.sigma, calibration.LEVELS)
    model.calibration.reset((model.sigma / model.alpha)[times].log())
    sampling = Sampling(seed=seed, precision=run.args.precision)
    one_by_one = [denoiser(model, person[None], z[:Z], sampling, AWAY) for person in people]
    dtype = util.autocast_dtype(run.device, run.args.precision)
    key = f"{digest_of(model.state_dict())}_{AWAY}_{seed}_{brains}_{dtype}"

    def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        def guess() -> dict[str, Tensor]:
            parts = [denoise_one(part, t)[0] for denoise_one, part in zip(one_by_one, x.split(Z), strict=True)]
            return {"x0": torch.cat(parts).half()}

        x0 = cached(f"calibration_{key}_{t}", guess)["x0"].to(x)
        alpha, sigma = model.alpha[t].float(), model.sigma[t].float()
        model.calibration.measure(times.index(t), alpha, model.minus_mean(x, alpha, z), model.minus_mean(x0, 1, z))
        return x0, (x - alpha * x0) / sigma

    noise = BrainNoise(model, seed, range(brains))()
    levels = sample_dpm(model.calibrated(denoise, z), noise, model.alpha, model.sigma, calibration.LEVELS)
    for _ in util.progress(levels, "calibrate", calibration.LEVELS, "level"):
        pass
    return True


def main() -> None:
    declared = flags()
    args, typed = declared.parse()
    args.name = args.name or LatentDiffusion.kind
    if args.sample_steps > 1000:
        raise UserError(f"--sample-steps {args.sample_steps} is more than the 1000 steps of the process; choose fewer")
    if args.complete and "brains" in typed:
        raise UserError("--brains: --complete draws one brain for each case; leave it out, and for others give --seed")
    args.sample |= args.complete is not None
    util.start_processes()
    released = RELEASED / "stable_diffusion.safetensors"
    weights = weights_to_sample(declared, args, typed, released) if args.sample else None
    if weights is None:
        train(open_run(declared, args, typed, preset_of_first_stage))
        weights = run_weights(args.name)
    if args.sample and util.first_process():
        (complete_folder if args.complete else sample)(args, declared, weights)


if __name__ == "__main__":
    util.command(main, LESS_MEMORY)
