"""First stage: trains a VAE or a VQ-VAE on slices, sharpened by a z-conditioned PatchGAN.

    python prestage_train.py --model vqvae        # or vae; the same command resumes

Every step first improves the autoencoder, then the discriminator. Writes model_ckpt/NAME/model.safetensors (averaged
weights, for use), model_ckpt/NAME/last.pt (everything, for resuming), log/NAME (python logger.py log/NAME draws it) and
NAME_vis/ (real | reconstructed | difference, and draws from the prior).
"""

import copy
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import util
from dataset import Slices, find_data, has_masks, is_phantom, load_slices, locate_data, to_uint8
from evaluate import code_usage, mean_scores, slice_scores
from logger import Logger
from model_discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
)
from model_VAE import MODELS, VAE, VQVAE
from util import UserError

SCRIPT = Path(__file__).name


# --------------------------------------------------------------------------------------------------- losses, schedules


def reconstruction_loss(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean |x_hat - x| + 0.5 (1 - SSIM) of [B, 1, H, W], x in [-1, 1].

    What leaves [-1, 1] counts a tenth: it is clamped in the end, and black is best kept by aiming a little below it.
    """
    clamped = x_hat.clamp(-1, 1)
    x_hat = clamped + 0.1 * (x_hat - clamped)
    ssim = util.ssim_map((x_hat + 1) / 2, (x + 1) / 2).mean()
    return (x_hat - x).abs().mean() + 0.5 * (1 - ssim)


def cyclical_weight(step: int, steps: int, cycles: int, ramp: float) -> float:
    """Cyclical annealing (Fu et al. 2019, eq. 6): in each of `cycles`, 0 to 1 over the first `ramp`, then 1."""
    position = (step * cycles / steps) % 1.0
    return min(1.0, position / ramp) if ramp > 0 else 1.0


def ramp_weight(step: int, start: int, length: int) -> float:
    """0 before `start`, then linearly to 1 over `length` steps."""
    return min(1.0, max(0.0, (step - start) / length))


# ---------------------------------------------------------------------------------------------- validation and pictures


@torch.no_grad()
def validate(model: VAE | VQVAE, data: Slices, index: Tensor, device: torch.device, precision: str) -> dict[str, float]:
    """Mean scores over the slices `index`, named as they are logged."""
    scores, codes = [], []
    for part in index.split(32):
        x, z, _ = data.batch(part, device)
        with util.autocast(device, precision):
            if isinstance(model, VQVAE):
                codes.append(model.encode_indices(x, z).cpu())
                x_hat = model.decode_indices(codes[-1].to(device), z)
            else:
                x_hat = model.decode(model.encode(x, z), z)
        masks = data.masks[part] if data.masks is not None else None
        scores.append(slice_scores(to_uint8(x_hat)[:, 0].cpu(), data.images[part].cpu(), masks))
    result = mean_scores(scores)
    if codes:
        result |= code_usage(torch.cat(codes).numpy(), model.codebook_size)
    return {f"validate/{name}": value for name, value in result.items()}


@torch.no_grad()
def draw_reconstructions(model: VAE | VQVAE, data: Slices, device: torch.device, step: int):
    """Sheet real | reconstructed | 5 x difference of six slices of one validation case."""
    index = torch.linspace(0, min(31, len(data) - 1), 6).round().long()
    x, z, case = data.batch(index, device)
    real, fake = to_uint8(x)[:, 0].cpu().int(), to_uint8(model.decode(model.encode(x, z), z))[:, 0].cpu().int()
    difference = (128 + 5 * (fake - real)).clamp(0, 255)
    rows = [part.to(torch.uint8).numpy() for part in (real, fake, difference)]
    captions = [f"case {c}, z = {i}" for c, i in zip(case.tolist(), z.tolist())] + [""] * 12
    return util.sheet(
        rows,
        title=f"{data.split} slices after {step} steps; difference x5, grey is none",
        captions=captions,
        row_names=["real", "reconstructed", "difference x5"],
        zoom=256 // x.shape[-1],
    )


@torch.no_grad()
def draw_prior(model: VAE | VQVAE, device: torch.device, seed: int, step: int):
    """4x8 sheet: a latent from the untrained prior decoded at every z. What a second stage has to improve on."""
    latent = model.prior_latent(1, torch.Generator().manual_seed(seed)).expand(32, -1, -1, -1)
    slices = to_uint8(model.decode(latent.to(device), torch.arange(32, device=device)))[:, 0].cpu().numpy()
    prior = "N(0, 1)" if isinstance(model, VAE) else "the code distribution"
    return util.brain_sheet(slices, f"decoded draw from {prior} after {step} steps: no second stage yet")


# ------------------------------------------------------------------------------------------------------------ training


def flags():
    """This script's command line."""
    parser = util.training_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), default="vqvae", help="default: %(default)s")
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
    add("--codebook-size", type=util.positive_int, help="codes of a VQ-VAE")
    add(
        "--codebook", choices=("ema", "loss"), default="ema", help="how codes follow the encoder (default: %(default)s)"
    )
    add(
        "--kl-weight",
        type=util.positive_float,
        default=1e-3,
        help="of the KL in bits per pixel, VAE (default: %(default)s)",
    )
    add("--kl-cycles", type=util.positive_int, default=4, help="annealing cycles over the run (default: %(default)s)")
    add(
        "--kl-ramp",
        type=util.fraction,
        default=0.5,
        help="share of a cycle in which the weight rises (default: %(default)s)",
    )
    add("--discriminator-start", type=util.positive_int, help="step at which the discriminator begins to learn")
    add(
        "--gan-start",
        type=util.positive_int,
        help="step at which the autoencoder begins to see it, ramped over as many steps as lie between the two starts",
    )
    add(
        "--gan-weight",
        type=util.fraction,
        default=0.1,
        help="of the adversarial loss, after balancing its gradient with "
        "the reconstruction's; 0 trains without discriminator (default: %(default)s)",
    )
    add(
        "--feature-weight",
        type=util.fraction,
        default=0.1,
        help="of discriminator feature matching (default: %(default)s)",
    )
    return parser


def build(args, box: tuple[int, int, int, int]) -> tuple[torch.nn.Module, dict]:
    """The untrained autoencoder and the keywords that rebuild it."""
    kwargs = {
        "image_size": args.image_size,
        "box": box,
        "patch": args.patch,
        "channels": args.channels,
        "channel_multipliers": tuple(args.channel_multipliers),
        "blocks": args.blocks,
        "latent_channels": args.latent_channels,
    }
    if args.model == "vqvae":
        kwargs |= {"codebook_size": args.codebook_size, "ema_codebook": args.codebook == "ema"}
    try:
        return MODELS[args.model](**kwargs), kwargs
    except ValueError as error:
        raise UserError(f"{error}; change --patch, --channel-multipliers, --latent-channels or --image-size") from None


def default_preset(args) -> str:
    """base on a GPU, else small, or demo on the phantom."""
    on_gpu = util.pick_device(args.device).type == "cuda"
    return "base" if on_gpu else "demo" if is_phantom(locate_data(args.data)[0]) else "small"


@torch.no_grad()
def start_from_data(model: VAE | VQVAE, data: Slices) -> None:
    """Sets the linear path to the KLT, and the codebook to k-means, of 256 slices spread over the training set."""
    x, z, _ = data.batch(torch.linspace(0, len(data) - 1, min(256, len(data))).round().long())
    model.start_linear_path(x, whiten=isinstance(model, VAE))
    if isinstance(model, VQVAE):
        vectors = torch.cat([model.vectors(*part) for part in zip(x.split(32), z.split(32), strict=True)])
        if vectors[:, 0].numel() < model.codebook_size:
            raise UserError(
                f"--codebook-size {model.codebook_size} is more than {len(x)} slices have vectors; choose less"
            )
        model.quantizer.start(vectors.movedim(1, -1).flatten(0, 2))


def main() -> None:
    args, typed = util.parse_flags(flags())
    rank, world = util.start_processes()
    args.name = args.name or args.model
    args = util.open_run(SCRIPT, args, typed, default_preset)
    folder = find_data(args.data)
    if args.gan_start < args.discriminator_start:
        raise UserError(
            f"--gan-start {args.gan_start} lies before --discriminator-start {args.discriminator_start}; "
            "the discriminator needs a start of its own"
        )
    device = util.pick_device(args.device)
    print(
        f"run {args.name}: {args.model}, preset {args.preset}, {args.steps} steps of {args.batch_size} slices at "
        f"{args.image_size} px on {util.describe_device(device)}"
    )

    # data
    train = load_slices(folder, "train", args.image_size, device)
    held_out = load_slices(folder, "validate", args.image_size, masks=has_masks(folder, "validate"))
    watched = torch.linspace(0, len(held_out) - 1, min(256, len(held_out))).round().long()

    # networks
    torch.manual_seed(args.seed)
    model, model_kwargs = build(args, train.content_box())
    discriminator = PatchDiscriminator(channels=args.channels)
    adam = {"lr": args.learning_rate, "fused": True}
    checkpoint = Path("model_ckpt") / args.name / "last.pt"
    start, balance = 0, 1.0
    if checkpoint.exists():
        state = util.load_checkpoint(checkpoint, SCRIPT)
        start, balance = state["step"], state["balance"]
        util.fill_model(model, state["model"], checkpoint)
        util.fill_model(discriminator, state["discriminator"], checkpoint)
    else:
        start_from_data(model, train)
    model = model.to(device, memory_format=torch.channels_last)  # twice as fast in bf16, on GPU and CPU
    discriminator = discriminator.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), **adam)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), betas=(0.5, 0.9), **adam)
    if start:
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        print(f"resumed at step {start}")
    if start >= args.steps:
        print(f"run {args.name} has its {start} steps; raise --steps to train it further")
        return
    forward, judge = model, discriminator
    if world > 1:
        forward, judge = (DistributedDataParallel(network) for network in (model, discriminator))
    if args.compile:
        torch._functorch.config.donated_buffer = False  # adaptive_weight walks the graph before backward does
        forward, judge = torch.compile(forward), torch.compile(judge)
    data = {"train": train.describe(), "validate": held_out.describe()}
    util.check_same_data(args.name, data)
    run = util.describe_run(SCRIPT, args, data, parameters=sum(p.numel() for p in model.parameters()))
    logger = Logger(args.name, run, step=start, every=max(1, args.report_every // 10), quiet=rank > 0)

    def report(step: int) -> None:
        logger.report(step, validate(ema, held_out, watched, device, args.precision))
        path = logger.picture(f"reconstruction_{step:06d}", draw_reconstructions(ema, held_out, device, step))
        logger.picture(f"prior_{step:06d}", draw_prior(ema, device, args.seed, step))
        tqdm.write(f"pictures: {path}")

    def save(step: int, whole: bool) -> None:
        """last.pt for resuming, then model.safetensors, its latent scale from 512 training slices or all of them."""
        util.save_checkpoint(
            checkpoint,
            {
                "script": SCRIPT,
                "step": step,
                "balance": balance,
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "discriminator": discriminator.state_dict(),
                "optimizer": optimizer.state_dict(),
                "discriminator_optimizer": discriminator_optimizer.state_dict(),
            },
        )
        index = torch.arange(len(train)) if whole else torch.linspace(0, len(train) - 1, 512).round().long()
        with util.autocast(device, args.precision):
            ema.set_latent_statistics(train.batch(part, device)[:2] for part in index.split(64))
        util.save_weights(
            checkpoint.with_name("model.safetensors"),
            ema.state_dict(),
            {
                "kind": args.model,
                "model_kwargs": model_kwargs,
                "step": step,
                "preset": args.preset,
                "data": data["train"],
            },
        )
        logger.pause()

    # training
    step = start
    steps = util.TrainingSteps(start, args.steps, args.minutes, args.name)
    for step in steps:
        torch.manual_seed(util.mix_seed(args.seed, step, rank))
        augment = torch.Generator().manual_seed(util.mix_seed(args.seed, step, rank, 1))
        index = util.batch_index(args.seed, step, args.batch_size, len(train), rank, world)
        x, z, _ = train.batch(index, device, augment)
        target = model.crop(x)
        rate = args.learning_rate * util.learning_rate_factor(step, args.steps)
        for group in optimizer.param_groups + discriminator_optimizer.param_groups:
            group["lr"] = rate
        gan = args.gan_weight > 0 and step >= args.discriminator_start
        gan_weight = args.gan_weight * ramp_weight(step, args.gan_start, args.gan_start - args.discriminator_start + 1)

        # the autoencoder: reconstruction, the price of the latent, and what the discriminator says
        with util.autocast(device, args.precision):
            x_hat, losses = forward(x, z)
        losses["reconstruction"] = reconstruction_loss(x_hat, target)
        weights = {"reconstruction": 1.0, "codebook": 1.0}
        if "kl" in losses:
            kl_weight = args.kl_weight * cyclical_weight(step, args.steps, args.kl_cycles, args.kl_ramp)
            weights["kl"] = kl_weight / args.image_size**2  # the loss is in bits per image, the weight per pixel
        if gan_weight > 0:
            discriminator.eval().requires_grad_(False)  # frozen, also its power iterations
            with util.autocast(device, args.precision):
                fake_logits, fake_features = discriminator(x_hat.clamp(-1, 1), z)
                _, real_features = discriminator(target, z)
            losses["generator"] = generator_loss(fake_logits)
            losses["feature_matching"] = feature_matching_loss(real_features, fake_features)
            pull = adaptive_weight(losses["reconstruction"], losses["generator"], model.decoder.last_layer)
            balance = 0.99 * balance + 0.01 * util.mean_of_processes(pull)
            weights |= {
                "generator": gan_weight * balance,
                "feature_matching": gan_weight * args.feature_weight / args.gan_weight,
            }
            discriminator.train().requires_grad_(True)
        total = sum(weights[name] * loss for name, loss in losses.items())
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        util.check_finite(losses | {"gradient": norm}, step)
        optimizer.step()
        util.update_ema(ema, model, step)

        # the discriminator, on real and reconstructed slices in one batch
        if gan:
            with util.autocast(device, args.precision):
                real_logits, fake_logits = judge(torch.cat([target, x_hat.detach().clamp(-1, 1)]), torch.cat([z, z]))[
                    0
                ].chunk(2)
            losses["discriminator"] = discriminator_loss(real_logits, fake_logits)
            discriminator_optimizer.zero_grad()
            losses["discriminator"].backward()
            norm = torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
            util.check_finite({"discriminator": losses["discriminator"], "discriminator gradient": norm}, step)
            discriminator_optimizer.step()

        scalars = {f"train/{name}": loss for name, loss in losses.items()} | {"learning_rate": rate}
        scalars |= {
            f"weight/{name}": weight for name, weight in weights.items() if name not in ("reconstruction", "codebook")
        }
        logger.add(step + 1, scalars, args.batch_size * world)
        finished = step + 1 == args.steps
        reported = (step + 1) % args.report_every == 0 or finished
        if reported and rank == 0:
            logger.flush(step + 1)
            save(step + 1, whole=finished)
            report(step + 1)

    if not reported and rank == 0:
        logger.flush(step + 1)
        save(step + 1, whole=False)
    print(f"weights: {checkpoint.with_name('model.safetensors')}   log: {logger.folder}   pictures: {logger.pictures}")
    if not finished:
        util.stop_unfinished(step + 1, steps)


if __name__ == "__main__":
    util.command(main)
