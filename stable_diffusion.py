"""Second stage: latent diffusion. Learns the latents of a first stage, and decodes new brains.

    python stable_diffusion.py                       # trains on model_ckpt/vqvae; the same command resumes
    python stable_diffusion.py --sample --brains 4   # new brains; from the released weights if nothing was trained here

A brain is 32 slices, whose noise is correlated along z as their latents are. With --slices 1 the network sees them one
by one; with more, training shows windows of so many neighbouring slices, which hear of each other.

Training writes model_ckpt/NAME (the weights carry their first stage), log/NAME and NAME_vis; sampling writes, into
NAME_vis/samples or --out DIR, per brain a 4x8 sheet, a GIF through z, reslices, a NIfTI volume and 32 PNG slices
(volume.py), process.gif, the way from noise to brain, and samples.json, what they come from.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import util
from dataset import (
    SLICES_PER_CASE,
    Slices,
    find_data,
    load_slices,
    move,
    people_table,
    random_moves,
    to_uint8,
)
from heads.people import (
    CONDITIONS,
    PEOPLE_TABLE,
    SEXES,
    count_people,
    describe_people,
    draw_person,
    in_letters,
    in_numbers,
    person_of,
    words_for,
)
from logger import Logger
from model_diffusion import (
    MOVES,
    PREDICTIONS,
    RECIPES,
    SCHEDULES,
    SLICE_NOISE,
    TIMES,
    WEIGHTINGS,
    Denoise,
    LatentDiffusion,
    guide,
    noise_levels,
    sample_ddim,
    sample_ddpm,
    sample_dpm,
    sample_heun,
    sampling_times,
)
from model_VAE import load_first_stage, load_second_stage, save_second_stage
from parts import calibration
from parts.autoencoder import Autoencoder
from parts.gaussian_prior import CrossFitted, mean_at_each_z, slice_correlation
from pictures import sheets
from pictures.volume import Samples
from scores.metrics import adjacent_ssim
from training import checkpoints
from util import UserError

SCRIPT = Path(__file__).name
SAMPLERS = ("dpm", "ddim", "heun", "ddpm")
CALIBRATION_BRAINS = 64  # drawn at the end of training,
CALIBRATION_LEAST = 8  # if so many whole training brains say what power heads have
MODES = 24  # of the linear denoiser, or a quarter of the brains where these are few


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.training_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", default="vqvae", metavar="RUN", help="run name, folder or weights file (default: %(default)s)")
    add("--channels", type=util.positive_int, help="width of the UNet's first level")
    add(
        "--channel-multipliers",
        type=util.positive_int,
        nargs="+",
        metavar="M",
        help="width of each level over the first's",
    )
    add("--blocks", type=util.positive_int, help="residual blocks per level")
    add(
        "--recipe",
        choices=RECIPES,
        default="v",
        help="the next four flags as v (cosine, plain), min-snr (cosine, v), ddpm (linear, eps), flow (rectified flow) "
        "or edm have them; each can be given apart (default: %(default)s)",
    )
    add("--schedule", choices=SCHEDULES, help="of the noise; with -zero the last step is nothing but noise")
    add("--prediction", choices=PREDICTIONS, help="what the UNet predicts")
    add(
        "--weighting",
        choices=WEIGHTINGS,
        help="plain counts the squared error of the prediction once, min-snr that of x0 min(SNR, 5) times",
    )
    add("--times", choices=TIMES, help="distribution of the steps that training draws")
    add(
        "--drop-z",
        type=util.fraction,
        default=0.1,
        metavar="SHARE",
        help="how often training hides z, which --guidance needs (default: %(default)s)",
    )
    add(
        "--start-from",
        metavar="RUN",
        help="begin with the weights of this run or file, on the same first stage and of the same sizes, where one of "
        "--slices 1 may go on with more; default: random weights",
    )
    add(
        "--slices",
        type=util.positive_int,
        metavar="S",
        help=f"neighbouring slices of a brain that training shows together, up to {SLICES_PER_CASE}; 1 is a 2-D model",
    )
    add(
        "--moved-heads",
        type=util.whole_number,
        metavar="N",
        help="times that training sees every head turned, scaled and shifted a little, beside once as it is; the "
        "network is told how, and draws heads where they are. For long runs: few heads are soon learned by heart. All "
        "are encoded at every start",
    )
    add(
        "--slice-noise",
        choices=SLICE_NOISE,
        help="noise of a brain's slices: correlated along z as the training latents are, the same in all, or each its "
        "own; with --slices above 1 also in training (default: as in training, which has matched)",
    )
    add(
        "--conditions",
        choices=CONDITIONS,
        nargs="*",
        help=f"what the model learns of people, from {PEOPLE_TABLE} in the data folder or one up; default: all, if it "
        "is there; nothing after the flag: none",
    )
    add("--sample", action="store_true", help="draw new brains instead of training")
    add("--brains", type=util.positive_int, default=1, help="how many (default: %(default)s)")
    add(
        "--sampler",
        choices=SAMPLERS,
        default="dpm",
        help="dpm and ddim evaluate the network once a step, heun twice; ddpm takes all 1000 steps (default: "
        "%(default)s)",
    )
    add("--sample-steps", type=util.positive_int, default=20, help="of the sampler (default: %(default)s)")
    add("--eta", type=util.fraction, default=0.0, help="ddim's share of fresh noise, 0 is none (default: %(default)s)")
    add(
        "--guidance",
        type=util.number,
        default=1.0,
        metavar="W",
        help="above 1: away from the model without z, or from --weak; 2 evaluations a step (default: %(default)s, off)",
    )
    add("--weak", metavar="RUN", help="a smaller or less trained run on the same first stage, for --guidance")
    add("--age", type=util.positive_float, metavar="YEARS", help="of the people to sample; default: as in training")
    add("--sex", choices=SEXES, help="of the people to sample; default: as in training")
    add(
        "--cdr",
        type=float,
        choices=CONDITIONS["cdr"],
        help="Clinical Dementia Rating of the people to sample; default: as in training",
    )
    add(
        "--unknown-person",
        action="store_true",
        help="ask for nobody in particular: what none of these three says stays unknown, instead of being drawn among "
        "the people of the training set",
    )
    util.add_decoder_flag(parser, None, "perceptual where there is one")
    add("--out", type=Path, metavar="DIR", help="where samples go; default: NAME_vis/samples")
    return parser


# ------------------------------------------------------------------------------------------------------------ sampling


class BrainNoise:
    """Draws noise [32 n, C, h, w] for n brains, correlated between the slices of each as `how` says (see correlate).

    Brain i depends on (seed, i) alone, so it is the same picture in any batch.
    """

    def __init__(self, seed: int, brains: range, model: LatentDiffusion, how: str | None = None):
        self.generators = [util.brain_generator(seed, i) for i in brains]
        self.model, self.how = model, how

    def _of_brain(self, generator: torch.Generator) -> Tensor:
        white = torch.randn(SLICES_PER_CASE, *self.model.latent_shape, generator=generator)
        z = torch.arange(SLICES_PER_CASE, device=self.model.alpha.device)
        return self.model.correlate(white.to(z.device), z, SLICES_PER_CASE, self.how)

    def __call__(self) -> Tensor:
        return torch.cat([self._of_brain(generator) for generator in self.generators])


def walk(
    alpha: Tensor, sigma: Tensor, denoise: Denoise, draw: Callable[[], Tensor], args: argparse.Namespace
) -> tuple[Iterator[Tensor], int]:
    """(iterator over x, number of steps) of the sampler that args name, from a first draw of noise to x_0."""
    if args.sampler == "ddpm":
        return sample_ddpm(denoise, draw(), alpha, sigma, draw), len(alpha)
    if args.sample_steps > len(alpha):
        raise UserError(f"--sample-steps {args.sample_steps} is more than the {len(alpha)} steps of the process")
    if args.sampler == "ddim":
        return sample_ddim(denoise, draw(), alpha, sigma, draw, args.sample_steps, args.eta), args.sample_steps
    sampler = {"dpm": sample_dpm, "heun": sample_heun}[args.sampler]
    return sampler(denoise, draw(), alpha, sigma, args.sample_steps), args.sample_steps


@torch.no_grad()
def sample_latents(
    model: LatentDiffusion,
    brains: range,
    args: argparse.Namespace,
    device: torch.device,
    weak: LatentDiffusion | None = None,
    person: dict[str, float] | None = None,
) -> list[Tensor]:
    """Latents [32 n, C, h, w] of n brains, z 0..31 in each, on their way from noise; the last are the samples.

    `person` has what is known of the people, by the names in CONDITIONS. With args.guidance other than 1 the latents
    move away from what `weak` would make of them, or without one from what the model would that knows nothing, nor z.
    """
    z = torch.arange(SLICES_PER_CASE, device=device).repeat(len(brains))

    def denoiser(model: LatentDiffusion, z: Tensor, person: dict[str, float]) -> Denoise:
        people = in_numbers(person, model.conditions).to(device).expand(len(z), -1)

        def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            with util.autocast(device, args.precision):
                return model.denoise(x, t, z, SLICES_PER_CASE, people)

        return denoise

    denoise = denoiser(model, z, person or {})
    if args.guidance != 1:
        nothing = torch.full(z.shape, torch.nan, device=device)
        poor = denoiser(weak, z, person or {}) if weak else denoiser(model, nothing, {})
        denoise = guide(denoise, poor, args.guidance)
    if model.calibration.measured and args.slice_noise in (None, model.slice_noise):
        denoise = model.calibrated(denoise, z)
    draw = BrainNoise(args.seed, brains, model, args.slice_noise)
    alpha, sigma = min((m.sampling_levels() for m in (model, weak) if m), key=lambda levels: len(levels[0]))
    steps, total = walk(alpha, sigma, denoise, draw, args)
    every = max(1, total // 16)  # kept for the GIF
    path = []
    for n, x in enumerate(tqdm(steps, desc=f"brains {brains.start}..{brains.stop - 1}", total=total, disable=None)):
        if n % every == 0 or n == total - 1:
            path.append(x)
    return path


def load_weak(args: argparse.Namespace, model: LatentDiffusion, description: dict) -> LatentDiffusion | None:
    """The run of --weak, if there is one, to guide `model` away from. Raises UserError where the two do not fit."""
    if args.guidance == 1:
        if args.weak:
            raise UserError("--weak does nothing at --guidance 1; raise --guidance, for example to 1.5")
        return None
    if not args.weak:
        if not model.drop_z:
            raise UserError(
                f"--guidance {args.guidance:g}: run {args.name} was trained with --drop-z 0, so it always needs z; "
                "name a weaker run with --weak"
            )
        return None
    weak, _, other = load_second_stage(args.weak, LatentDiffusion, model.alpha.device)
    if other["first_stage"]["digest"] != description["first_stage"]["digest"]:
        raise UserError(f"--weak {args.weak} was trained on another first stage than run {args.name}")
    if (weak.schedule, weak.T) != (model.schedule, model.T):
        raise UserError(f"--weak {args.weak} has --schedule {weak.schedule}, but run {args.name} {model.schedule}")
    return weak


@torch.no_grad()
def decode_brain(first_stage: Autoencoder, latent: Tensor, seed: int = 0, brain: int = 0) -> np.ndarray:
    """uint8 [32, S, S] of latents [32, C, h, w] in the order of z, with the grain of (seed, brain) if it takes any."""
    z = torch.arange(SLICES_PER_CASE, device=latent.device)
    grain = first_stage.draw_grain(SLICES_PER_CASE, util.brain_generator(seed, brain, "grain"))
    return to_uint8(first_stage.decode(latent, z, grain))[:, 0].cpu().numpy()


def sample(args: argparse.Namespace, weights: Path) -> None:
    """Writes args.brains new brains, and the GIF of the first."""
    device = util.pick_device(args.device)
    model, first_stage, description = load_second_stage(weights, LatentDiffusion, device, args.decoder)
    if args.slice_noise == "matched" and (model.slice_correlation == 1).all():
        raise UserError(
            f"--slice-noise matched: {weights} was trained on too few whole cases to know it; choose another"
        )
    weak = load_weak(args, model, description)
    asked = person_of({"age": args.age, "sex": args.sex, "cdr": args.cdr}, description)
    how = args.sampler if args.sampler == "ddpm" else f"{args.sampler} in {args.sample_steps} steps"
    if args.guidance != 1:
        how += f", guidance {args.guidance:g}" + (f" from {args.weak}" if weak else "")
    noise = args.slice_noise or model.slice_noise
    how += f", {noise} noise"
    how += f", {first_stage.decoder_in_use} decoder"
    out = args.out or Path(f"{Path(args.name).stem}_vis") / "samples"
    samples = Samples(out, checkpoints.describe_samples(weights, args))
    print(
        f"sampling {args.brains} brains of {weights} (trained for {description['step']} steps), "
        f"seed {args.seed}, {how}, on {util.describe_device(device)}"
    )
    for i in range(args.brains):  # one at a time: memory stays small, and each depends on (seed, i) alone
        person = asked if args.unknown_person else draw_person(asked, description, args.seed, i)
        path = sample_latents(model, range(i, i + 1), args, device, weak, person)
        slices = decode_brain(first_stage, path[-1], args.seed, i)
        name = ", ".join([f"brain {i}", *words_for(person)])
        samples.add(i, slices, name, f"seed {args.seed}, {how}", in_letters(person))
        if i == 0:
            shown = [4, 12, 20, 28]
            frames = [np.hstack(decode_brain(first_stage, latent, args.seed, i)[shown]) for latent in path]
            sheets.save_gif(out / "process.gif", frames, seconds=4)
            print(f"from noise to brain, slices z = {shown}: {out}/process.gif")


# ------------------------------------------------------------------------------------------------------------ training


@torch.no_grad()
def encode_all(
    first_stage: Autoencoder, data: Slices, device: torch.device, precision: str, moves: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Latents float32 [N, C, h, w] and z int64 [N] of a whole split, kept on the device; moved by moves [N, 4]."""
    latents = []
    parts = torch.arange(len(data)).split(64)
    for index in tqdm(parts, desc=f"encode {data.split}", unit="batch", disable=None):
        x, z, _ = data.batch(index, device)
        if moves is not None:
            x = move(x, moves[index], mode="bicubic").clamp(-1, 1)
        with util.autocast(device, precision):
            latents.append(first_stage.encode(x, z))
    return torch.cat(latents), data.z.to(device)


def head_moves(data: Slices, copies: int, seed: int) -> list[Tensor]:
    """How far each of so many copies of a split is moved, float32 [N, 4] as in dataset.move, a head as a whole."""
    cases, case = data.case.unique(return_inverse=True)
    generators = (torch.Generator().manual_seed(util.mix_seed(seed, "moves", copy)) for copy in range(copies))
    return [random_moves(len(cases), generator)[case] for generator in generators]


@torch.no_grad()
def validate(
    model: LatentDiffusion,
    latents: Tensor,
    z: Tensor,
    device: torch.device,
    precision: str,
    people: Tensor | None = None,
) -> float:
    """Loss over held-out latents at fixed noise and steps spread over the whole process.

    A model that mixes slices sees whole brains, as in sampling.
    """
    torch.manual_seed(0)
    slices = SLICES_PER_CASE if model.slices > 1 else 1
    brains = len(latents) // slices
    rounds = -(-32 // brains)  # few brains are seen at several steps each
    index = torch.arange(len(latents)).repeat(rounds)
    white = torch.randn(len(index), *latents.shape[1:])
    t = torch.linspace(0, model.T - 1, rounds * brains).long().repeat_interleave(slices)
    losses = []
    for n in torch.arange(len(index)).split(2 * SLICES_PER_CASE):
        noise = model.correlate(white[n].to(device), z[index[n]], slices)
        batch = latents[index[n]], z[index[n]], t[n].to(device), noise
        with util.autocast(device, precision):
            losses.append(model(*batch, slices, None if people is None else people[index[n]]))
    return float(torch.cat(losses).mean())


def window_starts(data: Slices, slices: int) -> Tensor:
    """Positions int64 [n] where training windows of `slices` neighbouring slices begin, in data ordered by case and z.

    Windows begin evenly within a case and, as often as it takes, at its ends: else slices there were seen less often.
    Raises UserError when windows are asked for and a case lacks slices.
    """
    if slices == 1:
        return torch.arange(len(data))
    data.check_whole_cases(f"--slices {slices}")
    offset = torch.arange(1 - slices, SLICES_PER_CASE).clamp(0, SLICES_PER_CASE - slices)
    return (torch.arange(0, len(data), SLICES_PER_CASE)[:, None] + offset).flatten()


def around_windows(begin: Tensor, slices: int) -> tuple[Tensor, Tensor | None]:
    """(index, shown) of a batch of windows that begin at int64 [n]: their whole brains, and where in these they lie.

    Single slices come by themselves: shown is None.
    """
    if slices == 1:
        return begin, None
    place = (begin % SLICES_PER_CASE)[:, None]
    index = begin[:, None] - place + torch.arange(SLICES_PER_CASE)
    shown = SLICES_PER_CASE * torch.arange(len(begin))[:, None] + place + torch.arange(slices)
    return index.flatten(), shown.flatten()


def follow_recipe(args: argparse.Namespace) -> argparse.Namespace:
    """Settings with what --recipe implies where nothing was said. Raises UserError if they contradict."""
    recipe = dict(zip(("schedule", "prediction", "weighting", "times"), RECIPES[args.recipe], strict=True))
    args = argparse.Namespace(**{**vars(args), **{flag: getattr(args, flag) or recipe[flag] for flag in recipe}})
    if args.prediction == "eps" and noise_levels(args.schedule, 1000)[0][-1] == 0:
        raise UserError(
            f"--prediction eps says nothing about the latent where --schedule {args.schedule} ends, in pure noise; "
            "choose v, or cosine or linear"
        )
    return args


def choose_conditions(wanted: list[str] | None, folder: Path) -> list[str]:
    """What the model learns of people: what is wanted, else all that the data folder can tell."""
    table = people_table(folder)
    if wanted and not table:
        raise UserError(f"--conditions {' '.join(wanted)}: put {PEOPLE_TABLE} into {folder} or the folder above")
    if wanted is None and not table:
        print(f"no {PEOPLE_TABLE} with these data: nothing is learned of age, sex and CDR")
        return []
    return list(CONDITIONS) if wanted is None else wanted


def choose_slice_noise(wanted: str | None, whole_cases: int, folder: Path) -> str:
    """What is wanted, else matched where that can be measured, else shared."""
    if wanted == "matched" and whole_cases < 2:
        raise UserError(
            "--slice-noise matched measures how slices hang together on two whole training cases or more, and there "
            f"are {whole_cases}; python dataset.py {folder} lists what is missing, or choose shared or own"
        )
    if not wanted and whole_cases < 2:
        print("fewer than two whole training cases: the slices of a brain share their noise (--slice-noise shared)")
    return wanted or ("matched" if whole_cases > 1 else "shared")


def check_slices(args: argparse.Namespace) -> None:
    """Raises UserError unless batches are made of whole windows."""
    if args.slices > SLICES_PER_CASE:
        raise UserError(f"--slices {args.slices}: a brain has {SLICES_PER_CASE}")
    if args.batch_size % args.slices:
        raise UserError(
            f"--batch-size {args.batch_size} is no multiple of --slices {args.slices}; it counts slices, not windows"
        )


def network_settings(args: argparse.Namespace, first_stage: Autoencoder, whole_cases: int) -> dict:
    """The arguments of LatentDiffusion that these settings mean with so many whole training cases."""
    return {
        "latent_shape": first_stage.latent_shape,
        "channels": args.channels,
        "channel_multipliers": tuple(args.channel_multipliers),
        "blocks": args.blocks,
        "schedule": args.schedule,
        "prediction": args.prediction,
        "weighting": args.weighting,
        "times": args.times,
        "drop_z": args.drop_z,
        "slices": args.slices,
        "slice_noise": args.slice_noise,
        "slices_per_brain": SLICES_PER_CASE,
        "modes": min(MODES, whole_cases // 4) if args.slices > 1 and args.slice_noise == "matched" else 0,
        "conditions": args.conditions,
        "moved": args.moved_heads > 0,
    }


def measure_latents(
    model: LatentDiffusion, latents: Tensor, z: Tensor, people: Tensor, whole: Tensor
) -> CrossFitted | None:
    """Gives a model what is measured and not trained: mean, correlation along z, and modes of its training latents.

    Returns the linear denoisers that training hears in place of the model's, if that has modes. latents [N, C, h, w]
    are at z [N] and of people [N, conditions]; whole [n, 32] says where whole brains lie.
    """
    heads = latents[whole]
    if len(heads) > 1:
        model.slice_correlation.copy_(slice_correlation(heads))
        model.calibration.measure_power(heads - heads.mean(0))
    if not len(model.linear.modes):
        model.linear.mean.copy_(mean_at_each_z(latents, z, SLICES_PER_CASE))
        return None
    known = heads, people[whole[:, 0]], model.slice_correlation
    model.linear.fit(*known)
    return CrossFitted(model.linear, *known)


@torch.no_grad()
def calibrate(model: LatentDiffusion, description: dict, brains: int, args: argparse.Namespace) -> None:
    """Measures model.calibration on so many brains that are drawn side by side, of people as samples are of.

    Each step of `dpm` goes on from what the calibrated guesses of the steps before have made. The noise is not that of
    any brain that --sample draws.
    """
    device, seed = model.alpha.device, util.mix_seed(args.seed, "calibration")
    z = torch.arange(SLICES_PER_CASE, device=device)
    known = (draw_person({}, description, seed, i) for i in range(brains))
    people = [in_numbers(person, model.conditions).to(device).expand(len(z), -1) for person in known]
    alphas, sigmas = model.sampling_levels()
    times = sampling_times(alphas, sigmas, calibration.LEVELS)
    model.calibration.start((sigmas / alphas)[times].log())
    tqdm.write(f"calibrating: {brains} brains are drawn side by side")

    all_z = z.repeat(brains)

    def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        parts = zip(x.split(len(z)), people, strict=True)
        with util.autocast(device, args.precision):
            pairs = [model.denoise(part, t, z, len(z), person) for part, person in parts]
        x0, noise = (torch.cat(part) for part in zip(*pairs))
        alpha = alphas[t].float()
        model.calibration.measure(
            times.index(t), alpha, model.less_mean(x, alpha, all_z), model.less_mean(x0, 1, all_z)
        )
        return x0, noise

    noise = BrainNoise(seed, range(brains), model)()
    steps = sample_dpm(model.calibrated(denoise, all_z), noise, alphas, sigmas, calibration.LEVELS)
    for _ in tqdm(steps, desc="calibrate", unit="level", total=calibration.LEVELS, disable=None):
        pass


def start_from(run: str, model: LatentDiffusion, first_stage: Autoencoder) -> None:
    """Gives a new model the networks of `run`.

    Mixing of slices and what hears of moves, if `run` has none, stay as they start: without effect.

    Raises UserError where first stage or sizes differ.
    """
    prior, _, description = load_second_stage(run, LatentDiffusion, model.alpha.device)
    if description["first_stage"]["digest"] != first_stage.description["digest"]:
        raise UserError(f"--start-from {run}: it was trained on another first stage; name that with --first-stage")
    try:
        missing, unexpected = model.unet.load_state_dict(prior.unet.state_dict(), strict=False)
    except RuntimeError:
        missing, unexpected = [], ["weights of other shapes"]
    hears_of_moves = "embed_moves.weight"  # may be missing here or there: heads that are not moved do without
    missing, unexpected = (set(names) - {hears_of_moves} for names in (missing, unexpected))
    if unexpected or any(".mixing." not in name for name in missing):
        raise UserError(
            f"--start-from {run} is another network; give the same --channels, --channel-multipliers, --blocks, "
            "--conditions and --drop-z, of which 0 goes with 0 alone; --slices may go from 1 to more, not back"
        )


def train(args: argparse.Namespace, typed: dict) -> None:
    """Trains, or resumes, the run args.name; exits when it is stopped on the way."""
    rank, world = util.start_processes()
    device = util.pick_device(args.device)
    args = checkpoints.open_run(SCRIPT, args, typed, lambda new: load_first_stage(new.first_stage).description["preset"])
    args = follow_recipe(args)
    check_slices(args)
    first_stage = load_first_stage(args.first_stage, device)
    folder = find_data(args.data)
    print(
        f"run {args.name}: latent diffusion on {args.first_stage}, preset {args.preset}, {args.steps} steps of "
        f"{args.batch_size} latents on {util.describe_device(device)}"
    )
    args.conditions = choose_conditions(args.conditions, folder)

    # data: every slice is encoded once
    train_slices = load_slices(folder, "train", first_stage.image_size, device)
    held_out_slices = load_slices(folder, "validate", first_stage.image_size, device)
    latents, z_all = encode_all(first_stage, train_slices, device, args.precision)
    held_out, held_out_z = encode_all(first_stage, held_out_slices, device, args.precision)
    starts = window_starts(train_slices, args.slices)
    if args.slices > 1:
        held_out_slices.check_whole_cases(f"--slices {args.slices}")
    people, held_out_people = (data.people(args.conditions).to(device) for data in (train_slices, held_out_slices))
    first_slices = torch.from_numpy(np.unique(train_slices.case.numpy(), return_index=True)[1])
    whole = train_slices.whole_cases().to(device)
    args.slice_noise = choose_slice_noise(args.slice_noise, len(whole), folder)
    real = held_out_slices.whole_brains()[:8]
    real_neighbours = {"real/adjacent_ssim": float(adjacent_ssim(real).mean())} if len(real) else {}

    # network
    together = SLICES_PER_CASE if args.slices > 1 else 1  # the linear denoiser sees whole brains, the UNet windows
    torch.manual_seed(args.seed)
    model_kwargs = network_settings(args, first_stage, len(whole))
    model = LatentDiffusion(**model_kwargs).to(device, memory_format=torch.channels_last)
    checkpoint = Path("model_ckpt") / args.name / "last.pt"
    if args.start_from and not checkpoint.exists():
        start_from(args.start_from, model, first_stage)
    model.channel_weight.copy_(first_stage.channel_weight())
    cross_fitted = measure_latents(model, latents, z_all, people, whole)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), fused=True)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    start = 0
    if checkpoint.exists():
        state = checkpoints.load_checkpoint(checkpoint, SCRIPT)
        start = state["step"]
        checkpoints.check_same_first_stage(args.name, state["first_stage"], first_stage.description["digest"])
        checkpoints.fill_model(model, state["model"], checkpoint)
        checkpoints.fill_model(ema, state["ema"], checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        print(f"resumed at step {start}")
    forward = DistributedDataParallel(model) if world > 1 else model
    forward = torch.compile(forward) if args.compile else forward
    data = {"train": train_slices.describe(), "validate": held_out_slices.describe()}
    checkpoints.check_same_data(args.name, data)
    run = checkpoints.describe_run(
        SCRIPT,
        args,
        data,
        parameters=sum(p.numel() for p in model.parameters()),
        first_stage=first_stage.description,
        channel_weight=model.channel_weight.flatten().tolist(),
    )
    people_seen = {
        "people": describe_people(people, args.conditions),
        "people_counts": count_people(people[first_slices], args.conditions),
    }

    def save(step: int) -> None:
        checkpoints.save_checkpoint(
            checkpoint,
            {
                "script": SCRIPT,
                "step": step,
                "first_stage": first_stage.description["digest"],
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
        )
        description = {"model_kwargs": model_kwargs, "step": step, "preset": args.preset, "data": data["train"]}
        save_second_stage(checkpoint.with_name("model.safetensors"), ema, first_stage, description | people_seen)

    def finish(step: int) -> None:
        """Calibrates what training has made."""
        if len(whole) < CALIBRATION_LEAST or args.slice_noise == "shared":
            why = "slices share their noise" if args.slice_noise == "shared" else f"{len(whole)} whole training cases"
            tqdm.write(f"samples are not calibrated: {why}")
            return
        calibrate(ema, people_seen, CALIBRATION_BRAINS, args)
        save(step)

    if start >= args.steps:
        if rank == 0 and not ema.calibration.measured:  # it was stopped before
            finish(start)
        print(f"run {args.name} has its {start} steps; raise --steps to train it further, or --sample")
        return

    # and once more for every time that training moves it: copies of the split follow each other
    if args.moved_heads:
        print(f"encoding every head {args.moved_heads} times more, moved: {args.moved_heads * len(z_all)} slices")
    moves = head_moves(train_slices, args.moved_heads, args.seed)
    moved = (encode_all(first_stage, train_slices, device, args.precision, by)[0] for by in moves)
    latents = torch.cat([latents, *moved])
    moves = torch.cat([torch.zeros(len(z_all), MOVES), *moves]).to(device)
    starts = torch.cat([starts + copy * len(z_all) for copy in range(1 + args.moved_heads)])
    logger = Logger(args.name, run, step=start, every=max(1, args.report_every // 10), quiet=rank > 0)

    def report(step: int) -> None:
        quick = argparse.Namespace(**{**vars(args), "sampler": "dpm", "sample_steps": 20, "guidance": 1.0})
        slices = decode_brain(first_stage, sample_latents(ema, range(1), quick, device)[-1])
        scores = {"validate/loss": validate(ema, held_out, held_out_z, device, args.precision, held_out_people)}
        scores["sample/adjacent_ssim"] = float(adjacent_ssim(torch.from_numpy(slices)[None]).mean())
        logger.report(step, scores | real_neighbours)
        title = f"sampled after {step} steps: seed {args.seed}, dpm in 20 steps"
        tqdm.write(f"picture: {logger.picture(f'sample_{step:06d}', sheets.brain_sheet(slices, title))}")

    # training
    step = start
    steps = util.TrainingSteps(start, args.steps, args.minutes, args.name)
    for step in steps:
        torch.manual_seed(util.mix_seed(args.seed, step, rank))
        windows = util.batch_index(args.seed, step, args.batch_size // args.slices, len(starts), rank, world)
        index, shown = around_windows(starts[windows], args.slices)
        unmoved = index % len(z_all)
        rate = args.learning_rate * util.learning_rate_factor(step, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

        with util.autocast(device, args.precision):
            known = z_all[unmoved], None, None, together, people[unmoved], shown, moves[index]
            linear = cross_fitted and cross_fitted.of(unmoved[::together] // together)
            loss = forward(latents[index], *known, linear).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        util.check_finite({"loss": loss, "gradient": norm}, step)
        optimizer.step()
        util.update_ema(ema, model, step)

        logger.add(step + 1, {"train/loss": loss, "learning_rate": rate}, args.batch_size * world)
        reported = (step + 1) % args.report_every == 0 or step + 1 == args.steps
        if reported and rank == 0:
            logger.flush(step + 1)
            save(step + 1)
            if step + 1 == args.steps:
                finish(step + 1)
            report(step + 1)

    if not reported and rank == 0:
        logger.flush(step + 1)
        save(step + 1)
    print(f"weights: {checkpoint.with_name('model.safetensors')}   log: {logger.folder}   pictures: {logger.pictures}")
    finished = step + 1 == args.steps
    if not finished:
        util.stop_unfinished(step + 1, steps)


def main() -> None:
    args, typed = util.parse_flags(flags())
    args.name = args.name or "diffusion"
    if args.sample_steps > 1000:
        raise UserError(f"--sample-steps {args.sample_steps} is more than the 1000 steps of the process")
    util.start_processes()
    released = checkpoints.RELEASED / "stable_diffusion.safetensors"
    weights = checkpoints.weights_to_sample(SCRIPT, args, typed, released) if args.sample else None
    if weights is None:
        train(args, typed)
        weights = checkpoints.run_weights(args.name)
    if args.sample and util.first_process():
        sample(args, weights)


if __name__ == "__main__":
    util.command(main)
