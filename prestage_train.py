"""First stage: trains a VAE, a VQ-VAE or a VQ-VAE-2 on slices, then sharpens its decoder with a z-conditioned PatchGAN.

    python prestage_train.py --model vqvae                        # or vae, vqvae2; the same command resumes
    python prestage_train.py --start-from vqvae --name sharper    # a new perceptual decoder for a finished first stage

Until --gan-start the autoencoder is trained to be faithful. Then encoder, codes and this fidelity decoder are frozen,
and a copy of the decoder, the perceptual one, goes on against the discriminator: both decode the same latents. It also
learns how strong the grain is that it leaves out, frequency by frequency, and can draw it over its pictures. Writes
model_ckpt/NAME/model.safetensors (averaged weights, for use), model_ckpt/NAME/last.pt (everything, for resuming),
log/NAME (python logger.py log/NAME draws it) and NAME_vis/ (real | reconstructed | difference, draws from the prior).
"""

import argparse
import copy
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import util
from dataset import Slices, find_data, has_masks, is_phantom, load_slices, locate_data, to_uint8
from logger import Logger
from model_discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    lecam_penalty,
)
from model_VAE import MODELS, VAE, VQVAE, load_first_stage
from parts.autoencoder import Autoencoder
from pictures import sheets
from scores.metrics import COUNTABLE, code_usage, mean_scores, slice_scores
from training import checkpoints
from util import UserError

SCRIPT = Path(__file__).name
WATCHED_SLICES = 128  # of validation, at every report
STATISTICS_SLICES = 2048  # give the scale of the latents: its error is then far below a per cent
# Flags of the autoencoder and of its fidelity phase, which a run with --start-from has behind it.
COMES_WITH_BASE = {"model", "image_size", "patch", "channels", "channel_multipliers", "blocks", "latent_channels"}
COMES_WITH_BASE |= {"quantizer", "codebook_size", "levels", "codebook", "code_space", "code_gradient"}
COMES_WITH_BASE |= {"kl_weight", "kl_schedule", "kl_cycles", "kl_ramp", "discriminator_start", "gan_start"}
GUARDED = 8  # times in the perceptual phase, besides reports, that the guard looks


# --------------------------------------------------------------------------------------------------- losses, schedules


def reconstruction_loss(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean |x_hat - x| + 0.5 (1 - SSIM) of [B, 1, H, W], x in [-1, 1].

    What is below -1 counts a tenth: it is clamped in the end, and black is best kept by aiming a little below it.
    """
    clamped = x_hat.clamp(min=-1)
    x_hat = clamped + 0.1 * (x_hat - clamped)
    ssim = util.ssim_map((x_hat + 1) / 2, (x + 1) / 2).mean()
    return (x_hat - x).abs().mean() + 0.5 * (1 - ssim)


def cyclical_weight(step: int, steps: int, cycles: int, ramp: float) -> float:
    """Cyclical annealing (Fu et al. 2019, eq. 6): in each of `cycles`, 0 to 1 over the first `ramp`, then 1."""
    position = (step * cycles / steps) % 1.0
    return min(1.0, position / ramp) if ramp > 0 else 1.0


def kl_factor(schedule: str, step: int, steps: int, cycles: int, ramp: float) -> float:
    """The KL weight's factor in [0, 1]: "cyclical", "monotonic" (one cycle, then 1 for good) or "constant"."""
    if schedule == "constant":
        return 1.0
    return cyclical_weight(step, steps, cycles if schedule == "cyclical" else 1, ramp)


def ramp_weight(step: int, start: int, length: int) -> float:
    """0 before `start`, then linearly to 1 over `length` steps."""
    return min(1.0, max(0.0, (step - start) / length))


# ---------------------------------------------------------------------------------------------- validation and pictures


@torch.no_grad()
def validate(model: Autoencoder, data: Slices, index: Tensor, device: torch.device, precision: str) -> dict[str, float]:
    """Mean scores over the slices `index`, named as they are logged."""
    scores, codes = [], []
    for part in index.split(32):
        x, z, _ = data.batch(part, device)
        with util.autocast(device, precision):
            if isinstance(model, VQVAE):
                codes.append(model.encode_indices(x, z))
                x_hat = model.decode_indices(codes[-1], z)
            else:
                x_hat = model.reconstruct(x, z)
        masks = data.masks[part] if data.masks is not None else None
        scores.append(slice_scores(to_uint8(x_hat)[:, 0].cpu(), data.images[part].cpu(), masks))
    result = mean_scores(scores)
    if codes and model.codebook_size <= COUNTABLE:
        result |= code_usage(torch.cat(codes).cpu().numpy(), model.codebook_size)
    return {f"validate/{name}": value for name, value in result.items()}


@torch.no_grad()
def draw_reconstructions(model: Autoencoder, data: Slices, device: torch.device, step: int):
    """Sheet real | reconstructed | 5 x difference of six slices of one validation case."""
    index = torch.linspace(0, min(31, len(data) - 1), 6).round().long()
    x, z, case = data.batch(index, device)
    real, fake = to_uint8(x)[:, 0].cpu().int(), to_uint8(model.reconstruct(x, z))[:, 0].cpu().int()
    difference = (128 + 5 * (fake - real)).clamp(0, 255)
    rows = [part.to(torch.uint8).numpy() for part in (real, fake, difference)]
    captions = [f"case {c}, z = {i}" for c, i in zip(case.tolist(), z.tolist())] + [""] * 12
    return sheets.sheet(
        rows,
        title=f"{data.split} slices after {step} steps; difference x5, grey is none",
        captions=captions,
        row_names=["real", "reconstructed", "difference x5"],
        zoom=256 // x.shape[-1],
    )


@torch.no_grad()
def draw_prior(model: Autoencoder, device: torch.device, seed: int, step: int):
    """4x8 sheet: a latent from the untrained prior decoded at every z. What a second stage has to improve on."""
    latent = model.prior_latent(1, torch.Generator().manual_seed(seed)).expand(32, -1, -1, -1)
    slices = to_uint8(model.decode(latent.to(device), torch.arange(32, device=device)))[:, 0].cpu().numpy()
    prior = "N(0, 1)" if isinstance(model, VAE) else "the code distribution"
    return sheets.brain_sheet(slices, f"decoded draw from {prior} after {step} steps: no second stage yet")


# ------------------------------------------------------------------------------------------------------------ training


def flags():
    """This script's command line."""
    parser = util.training_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), default="vqvae", help="default: %(default)s")
    add(
        "--start-from",
        metavar="RUN",
        help="run or file of a first stage, whose encoder, codes and fidelity decoder are kept as they are: all steps "
        "train a perceptual decoder for it; its sizes come with it",
    )
    add("--image-size", type=int, choices=(64, 128, 256), help="pixels a side, by area resampling")
    add("--channels", type=util.positive_int, help="width of the first level")
    add(
        "--channel-multipliers",
        type=util.positive_int,
        nargs="+",
        metavar="M",
        help="width of each level over the first's",
    )
    add("--blocks", type=util.positive_int, help="residual blocks per level")
    add(
        "--patch",
        type=util.positive_int,
        help="pixels a side folded into channels by the stem; a code or latent "
        "vector then stands for patch 2^(levels - 1) pixels a side",
    )
    add(
        "--latent-channels",
        type=util.positive_int,
        default=8,
        help="numbers per latent vector or code (default: %(default)s)",
    )
    add(
        "--quantizer",
        choices=("vq", "fsq"),
        default="vq",
        help="of a VQ-VAE: learned codes, or every number rounded to a few levels (default: %(default)s)",
    )
    add("--codebook-size", type=util.positive_int, help="codes of vq")
    add(
        "--levels",
        type=util.positive_int,
        nargs="+",
        default=(8, 5, 5, 5),
        metavar="L",
        help="levels of fsq, one per number of a code; their product counts the codes, and --latent-channels follows "
        "from them (default: 8 5 5 5)",
    )
    add(
        "--code-space",
        choices=("plane", "sphere"),
        default="plane",
        help="sphere divides vectors and codes of vq by their length (default: %(default)s)",
    )
    add(
        "--code-gradient",
        choices=("straight", "rotation"),
        default="straight",
        help="how the gradient of a vq code "
        "reaches the encoder: straight through, or by the rotation trick (default: %(default)s)",
    )
    add(
        "--codebook", choices=("ema", "loss"), default="ema", help="how codes follow the encoder (default: %(default)s)"
    )
    add(
        "--kl-weight",
        type=util.positive_float,
        default=1e-3,
        help="of the KL in bits per pixel, VAE (default: %(default)s)",
    )
    add(
        "--kl-schedule",
        choices=("cyclical", "monotonic", "constant"),
        default="cyclical",
        help="of the KL weight (default: %(default)s)",
    )
    add("--kl-cycles", type=util.positive_int, default=4, help="cycles of the fidelity phase (default: %(default)s)")
    add(
        "--kl-ramp",
        type=util.fraction,
        default=0.5,
        help="share of a cycle in which the weight rises (default: %(default)s)",
    )
    add("--discriminator-channels", type=util.positive_int, help="width of its first layer")
    add("--discriminator-start", type=util.positive_int, help="step at which the discriminator begins to learn")
    add(
        "--gan-start",
        type=util.positive_int,
        help="step at which the autoencoder is frozen and the perceptual "
        "decoder begins; the discriminator's say in it ramps up over the first half of its steps",
    )
    add(
        "--gan-weight",
        type=util.fraction,
        default=0.5,
        help="of the adversarial loss, after balancing its "
        "gradient with the reconstruction's; 0 trains no perceptual decoder (default: %(default)s)",
    )
    add(
        "--no-grain",
        action="store_true",
        help="the perceptual decoder learns no grain, the texture that it can draw over its pictures",
    )
    add(
        "--feature-weight",
        type=util.fraction,
        default=0.1,
        help="of discriminator feature matching (default: %(default)s)",
    )
    add("--lecam-weight", type=util.fraction, default=0.05, help="of LeCam regularisation (default: %(default)s)")
    add("--discriminator-learning-rate", type=util.positive_float, help="default: that of the autoencoder")
    add(
        "--guard",
        type=util.fraction,
        default=0.01,
        help="validation SSIM that the perceptual decoder, without noise, may lose against the fidelity decoder; "
        "beyond it, the last good one returns and the adversarial weight is halved "
        "(default: %(default)s)",
    )
    return parser


def build_on(base: Autoencoder, args) -> tuple[torch.nn.Module, dict]:
    """A first stage with everything from `base` but the perceptual decoder, and the keywords that rebuild it."""
    kwargs = base.description["model_kwargs"] | {"perceptual": True, "grain": not args.no_grain}
    model = MODELS[base.kind](**kwargs)
    kept = {name: tensor for name, tensor in base.state_dict().items() if not name.startswith("perceptual.")}
    model.load_state_dict(kept, strict=False)
    return model, kwargs


def follow_base(args, typed: dict, base: Autoencoder):
    """Settings with what comes with `base`, None where it has no such thing, and no steps of a fidelity decoder."""
    for name in typed.keys() & COMES_WITH_BASE:
        raise UserError(f"--{name.replace('_', '-')} comes with --start-from {args.start_from}; leave it out")
    if args.gan_weight == 0:
        raise UserError("--start-from trains a perceptual decoder, which needs a --gan-weight above 0")
    known = base.description["model_kwargs"] | {"model": base.kind, "discriminator_start": 0, "gan_start": 0}
    return argparse.Namespace(**vars(args) | {name: known.get(name) for name in COMES_WITH_BASE})


def build(args, box: tuple[int, int, int, int]) -> tuple[torch.nn.Module, dict]:
    """The untrained autoencoder and the keywords that rebuild it."""
    fsq = args.model != "vae" and args.quantizer == "fsq"
    kwargs = {
        "image_size": args.image_size,
        "box": box,
        "patch": args.patch,
        "channels": args.channels,
        "channel_multipliers": tuple(args.channel_multipliers),
        "blocks": args.blocks,
        "latent_channels": len(args.levels) if fsq else args.latent_channels,
        "perceptual": args.gan_weight > 0,
        "grain": not args.no_grain,
    }
    if fsq:
        kwargs |= {"quantizer": "fsq", "levels": tuple(args.levels)}
    elif args.model != "vae":
        options = {
            "ema": args.codebook == "ema",
            "sphere": args.code_space == "sphere",
            "rotation": args.code_gradient == "rotation",
        }
        kwargs |= {"codebook_size": args.codebook_size, "quantizer_options": options}
    try:
        return MODELS[args.model](**kwargs), kwargs
    except ValueError as error:
        flags = "--patch, --channel-multipliers, --latent-channels, --levels or --image-size"
        raise UserError(f"{error}; change {flags}") from None


def default_preset(args) -> str:
    """base on a GPU, else small, or demo on the phantom."""
    on_gpu = util.pick_device(args.device).type == "cuda"
    return "base" if on_gpu else "demo" if is_phantom(locate_data(args.data)[0]) else "small"


def start_from_data(model: Autoencoder, data: Slices) -> None:
    """Sets linear path and codes from 256 slices spread over the training set."""
    x, z, _ = data.batch(torch.linspace(0, len(data) - 1, min(256, len(data))).round().long())
    try:
        model.start(x, z)
    except ValueError as error:
        raise UserError(f"--codebook-size is too large for {len(x)} slices: {error}; choose less") from None


def new_optimizer(network: torch.nn.Module, rate: float, betas: tuple[float, float]) -> torch.optim.Adam:
    """Adam over what may change of a network."""
    return torch.optim.Adam((p for p in network.parameters() if p.requires_grad), lr=rate, betas=betas, fused=True)


def set_rate(optimizer: torch.optim.Adam, rate: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def main() -> None:
    args, typed = util.parse_flags(flags())
    rank, world = util.start_processes()
    if args.start_from and not args.name:
        raise UserError(f"--start-from {args.start_from} makes a first stage of its own: give it a --name")
    args.name = args.name or args.model
    args = checkpoints.open_run(SCRIPT, args, typed, default_preset)
    base = load_first_stage(args.start_from) if args.start_from else None
    args = follow_base(args, typed, base) if base else args
    folder = find_data(args.data)
    if args.gan_weight > 0 and args.gan_start < args.discriminator_start:
        raise UserError(
            f"--gan-start {args.gan_start} lies before --discriminator-start {args.discriminator_start}; "
            "the discriminator needs a start of its own"
        )
    device = util.pick_device(args.device)
    faithful = min(args.gan_start, args.steps) if args.gan_weight > 0 else args.steps  # steps of the fidelity decoder
    watching = args.steps // 10 if base else 0  # perceptual steps before a discriminator that starts with them is heard
    print(
        f"run {args.name}: {args.model}, preset {args.preset}, {args.steps} steps of {args.batch_size} slices at "
        f"{args.image_size} px on {util.describe_device(device)}; the perceptual decoder has the last "
        f"{args.steps - faithful}"
    )

    # data
    train = load_slices(folder, "train", args.image_size, device)
    held_out = load_slices(folder, "validate", args.image_size, masks=has_masks(folder, "validate"))
    watched = torch.linspace(0, len(held_out) - 1, min(WATCHED_SLICES, len(held_out))).round().long()

    # networks
    torch.manual_seed(args.seed)
    model, model_kwargs = build_on(base, args) if base else build(args, train.content_box())
    discriminator = PatchDiscriminator(channels=args.discriminator_channels)
    checkpoint = Path("model_ckpt") / args.name / "last.pt"
    state = checkpoints.load_checkpoint(checkpoint, SCRIPT) if checkpoint.exists() else None
    start = state["step"] if state else 0
    # averages of the adaptive weight and of the discriminator's mean logits; what the guard knows
    gan = state["gan"] if state else {"balance": None, "anchors": torch.zeros(2), "scale": 1.0, "fidelity": None}
    if state:
        checkpoints.fill_model(model, state["model"], checkpoint)
        checkpoints.fill_model(discriminator, state["discriminator"], checkpoint)
    elif not base:
        start_from_data(model, train)
    model.use_decoder("perceptual" if start > faithful else "fidelity")
    model = model.to(device, memory_format=torch.channels_last)  # twice as fast in bf16, on GPU and CPU
    discriminator = discriminator.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval()
    optimizer = new_optimizer(model, args.learning_rate, (0.9, 0.99))
    discriminator_rate = args.discriminator_learning_rate or args.learning_rate
    discriminator_optimizer = new_optimizer(discriminator, discriminator_rate, (0.5, 0.9))
    if state:
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        print(f"resumed at step {start}")
    good = copy.deepcopy(ema.perceptual)  # the last perceptual decoder that the guard let pass
    if state and state.get("good"):
        good.load_state_dict(state["good"])
    model.train(start <= faithful)  # a frozen codebook does not follow the encoder
    if start >= args.steps:
        print(f"run {args.name} has its {start} steps; raise --steps to train it further")
        return

    def wrapped(network: torch.nn.Module) -> torch.nn.Module:
        """The network as training calls it."""
        network = DistributedDataParallel(network) if world > 1 else network
        return torch.compile(network) if args.compile else network

    if args.compile:
        torch._functorch.config.donated_buffer = False  # adaptive_weight walks the graph before backward does
    forward, judge = wrapped(model), wrapped(discriminator)
    data = {"train": train.describe(), "validate": held_out.describe()}
    checkpoints.check_same_data(args.name, data)
    run = checkpoints.describe_run(SCRIPT, args, data, parameters=sum(p.numel() for p in model.parameters()))
    logger = Logger(args.name, run, step=start, every=max(1, args.report_every // 10), quiet=rank > 0)

    def report(step: int, scores: dict[str, float]) -> None:
        logger.report(step, scores)
        path = logger.picture(f"reconstruction_{step:06d}", draw_reconstructions(ema, held_out, device, step))
        if step <= faithful:
            logger.picture(f"prior_{step:06d}", draw_prior(ema, device, args.seed, step))
        tqdm.write(f"pictures: {path}")

    def save(step: int) -> None:
        """last.pt for resuming, then model.safetensors, whose perceptual decoder is one that the guard let pass."""
        if step <= faithful:  # afterwards the latents stay as they are, and last.pt has their scale
            index = torch.linspace(0, len(train) - 1, min(STATISTICS_SLICES, len(train))).round().long()
            with util.autocast(device, args.precision):
                ema.set_latent_statistics(train.batch(part, device)[:2] for part in index.split(64))
            if good is not None:
                good.load_state_dict(ema.decoder.state_dict(), strict=False)
        checkpoints.save_checkpoint(
            checkpoint,
            {
                "script": SCRIPT,
                "step": step,
                "gan": gan,
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "good": good.state_dict() if good is not None else None,
                "discriminator": discriminator.state_dict(),
                "optimizer": optimizer.state_dict(),
                "discriminator_optimizer": discriminator_optimizer.state_dict(),
            },
        )
        weights = ema.state_dict()
        if good is not None:
            weights |= {f"perceptual.{name}": tensor for name, tensor in good.state_dict().items()}
        checkpoints.save_weights(
            checkpoint.with_name("model.safetensors"),
            weights,
            {
                "kind": args.model,
                "model_kwargs": model_kwargs,
                "step": step,
                "perceptual_steps": max(0, step - faithful),
                "preset": args.preset,
                "data": data["train"],
            }
            | ({"started_from": base.description} if base else {}),
        )
        logger.pause()

    # training
    step, guard_every = start, max(1, (args.steps - faithful) // GUARDED)
    steps = util.TrainingSteps(start, args.steps, args.minutes, args.name)
    for step in steps:
        if step == faithful:
            model.load_state_dict(ema.state_dict())
            for network in (model, ema):
                network.start_perceptual()
            forward, optimizer = wrapped(model.eval()), new_optimizer(model, args.learning_rate, (0.9, 0.99))
            gan["balance"] = None
            gan["fidelity"] = util.mean_of_processes(
                validate(ema, held_out, watched, device, args.precision)["validate/ssim"]
            )
            good = copy.deepcopy(ema.perceptual)
            logger.pause()
            tqdm.write(f"step {step}: fidelity decoder done, validation SSIM {gan['fidelity']:.4f}; perceptual begins")
        perceptual = step >= faithful

        torch.manual_seed(util.mix_seed(args.seed, step, rank))
        augment = torch.Generator().manual_seed(util.mix_seed(args.seed, step, rank, 1))
        index = util.batch_index(args.seed, step, args.batch_size, len(train), rank, world)
        x, z, _ = train.batch(index, device, augment)
        still = train.batch(index, device)[0] if model.draws else None
        target = model.crop(x)
        begin, end = (faithful, args.steps) if perceptual else (0, faithful)
        factor = util.learning_rate_factor(step - begin, end - begin)
        set_rate(optimizer, args.learning_rate * factor)
        set_rate(discriminator_optimizer, discriminator_rate * (factor if perceptual else 1))

        # the autoencoder: reconstruction, the price of the latent, and what the discriminator says
        with util.autocast(device, args.precision):
            x_hat, losses = forward(x, z, still)
        losses["reconstruction"] = reconstruction_loss(x_hat, target)
        weights = {"reconstruction": 1.0, "codebook": 1.0, "grain": 1.0}
        if "kl" in losses and not perceptual:
            kl_weight = args.kl_weight * kl_factor(args.kl_schedule, step, faithful, args.kl_cycles, args.kl_ramp)
            weights["kl"] = kl_weight / args.image_size**2  # the loss is in bits per image, the weight per pixel
        if perceptual:
            # the latent is frozen, and costs nothing more
            losses = {name: losses[name] for name in ("reconstruction", "grain") if name in losses}
            discriminator.eval().requires_grad_(False)  # frozen, also its power iterations
            with util.autocast(device, args.precision):
                fake_logits, fake_features = discriminator(x_hat.clamp(-1, 1), z)
                _, real_features = discriminator(target, z)
            discriminator.train().requires_grad_(True)
            losses["generator"] = generator_loss(fake_logits)
            losses["feature_matching"] = feature_matching_loss(real_features, fake_features)
            pull = adaptive_weight(losses["reconstruction"], losses["generator"], model.perceptual.last_layer)
            pull = util.mean_of_processes(pull)
            gan["balance"] = pull if gan["balance"] is None else 0.98 * gan["balance"] + 0.02 * pull
            ramp = gan["scale"] * ramp_weight(step, faithful + watching, (args.steps - faithful) // 2 + 1)
            weights["generator"] = args.gan_weight * gan["balance"] * ramp
            weights["feature_matching"] = args.feature_weight * ramp
        total = sum(weights[name] * loss for name, loss in losses.items())
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        util.check_finite(losses | {"gradient": norm}, step)
        optimizer.step()
        util.update_ema(ema, model, step - begin)

        # the discriminator, on real and reconstructed slices in one batch
        if args.gan_weight > 0 and step >= args.discriminator_start:
            both, both_z = torch.cat([target, x_hat.detach().clamp(-1, 1)]), torch.cat([z, z])
            with util.autocast(device, args.precision):
                real_logits, fake_logits = judge(both, both_z)[0].chunk(2)
            losses["discriminator"] = discriminator_loss(real_logits, fake_logits)
            losses["lecam"] = lecam_penalty(real_logits, fake_logits, gan["anchors"].to(device))
            discriminator_optimizer.zero_grad()
            (losses["discriminator"] + args.lecam_weight * losses["lecam"]).backward()
            norm = torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
            util.check_finite({"discriminator": losses["discriminator"], "discriminator gradient": norm}, step)
            discriminator_optimizer.step()
            means = [util.mean_of_processes(logits.detach().mean()) for logits in (real_logits, fake_logits)]
            gan["anchors"] = gan["anchors"].lerp(torch.tensor(means), 0.01)

        scalars = {f"train/{name}": loss for name, loss in losses.items()}
        scalars |= {f"weight/{name}": weight for name, weight in weights.items() if name in ("kl", "generator")}
        logger.add(step + 1, scalars | {"learning_rate": args.learning_rate * factor}, args.batch_size * world)
        finished = step + 1 == args.steps
        reported = (step + 1) % args.report_every == 0 or finished or step + 1 == faithful
        guarded = perceptual and (reported or (step + 1 - faithful) % guard_every == 0)
        if not reported and not guarded:
            continue
        if rank == 0:
            logger.flush(step + 1)
        if guarded or rank == 0:
            scores = validate(ema, held_out, watched, device, args.precision)
        if guarded:
            lost = gan["fidelity"] - util.mean_of_processes(scores["validate/ssim"])
            if lost > args.guard:
                gan["scale"] /= 2
                for network in (model, ema):
                    network.perceptual.load_state_dict(good.state_dict())
                optimizer = new_optimizer(model, args.learning_rate, (0.9, 0.99))
                scores = validate(ema, held_out, watched, device, args.precision)
                tqdm.write(
                    f"step {step + 1}: the perceptual decoder lost {lost:.4f} SSIM; the last good one is back, "
                    f"the adversarial weight is {gan['scale']:g} of what it was"
                )
            else:
                good.load_state_dict(ema.perceptual.state_dict())
        logger.pause()
        if reported and rank == 0:
            save(step + 1)
            report(step + 1, scores | ({"weight/guard": gan["scale"]} if perceptual else {}))

    if not reported and rank == 0:
        logger.flush(step + 1)
        save(step + 1)
    print(f"weights: {checkpoint.with_name('model.safetensors')}   log: {logger.folder}   pictures: {logger.pictures}")
    if not finished:
        util.stop_unfinished(step + 1, steps)


if __name__ == "__main__":
    util.command(main)
