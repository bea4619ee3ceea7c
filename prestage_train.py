"""First stage: trains a VAE, a VQ-VAE or a VQ-VAE-2 on slices, then its texture against a z-conditioned PatchGAN.

    python prestage_train.py --model vqvae                        # or vae, vqvae2; the same command resumes
    python prestage_train.py --start-from vqvae --name textured   # new texture for a finished first stage

Two phases. The codec (encoder, codes, decoder) is trained to be faithful. Then it is frozen, and a texture learns
against a discriminator to draw what the faithful picture leaves out. Writes model_ckpt/NAME/model.safetensors (averaged
weights, for use) and a checkpoint for each phase, log/NAME (python logger.py log/NAME draws it) and NAME_vis/ (real |
reconstructed | difference, draws from the prior).
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import util
from dataset import Slices, find_data, has_masks, is_phantom, load_slices, locate_data, to_uint8
from model_discriminator import PatchDiscriminator, gradient_penalty, relativistic_loss, smooth
from model_VAE import MODELS, VAE, VQVAE
from parts.autoencoder import Autoencoder
from pictures import sheets
from scores.metrics import COUNTABLE, code_usage, decibel, mean_scores, radial_spectrum, slice_scores
from training.checkpoints import digest_of, save_weights
from training.optimizer import new_optimizers
from training.run import Run
from training.settings import LESS_MEMORY, Flags, open_run
from training.stages import load_first_stage
from util import UserError

SCRIPT = Path(__file__).name
TEXTURE = 7 / 12  # of the steps; the codec has the rest
KL_CYCLES, KL_RAMP = 4, 0.5  # of cyclical annealing: how many, and the share of each in which the weight rises
GAN_WEIGHT = 1.0  # with --start-from, where the preset would train no perceptual decoder
LIKENESS, BLUR = 20.0, 2.0  # weight of the difference from the real slice, after a blur of so many pixels
BETAS, SHARE = (0.0, 0.99), 0.5  # of Adam; of batch size and learning rate: the critic moves too
# The penalty's weight falls from the first to the second: a free critic is too sure at first, a bound one too weak in
# the end. It is computed every so many steps, and counts so many times then (Karras et al. 2020, "StyleGAN2").
PENALTY, EVERY = (0.03, 0.0012), 4
WATCHED_SLICES = 128  # of validation, at every report
STATISTICS_SLICES = 512  # give the scale of the latents, to about a per cent


def flags() -> Flags:
    """This script's command line."""
    flags = Flags(SCRIPT, __doc__)
    train, positive = flags.train, util.positive_int
    train("--model", choices=sorted(MODELS), default="vqvae", of_first_stage=True, help="which first stage")
    train("--start-from", metavar="RUN", help="run or file of a first stage; all steps go into a new texture for it")
    train("--steps", type=positive, changeable=True, help="of all phases together")
    train("--batch-size", type=positive, help="slices per step and process")
    train("--learning-rate", type=util.positive_float, help="Adam's, after warm-up")
    train("--image-size", type=positive, of_first_stage=True, help="pixels a side, by area")
    train("--widths", type=positive, nargs="+", metavar="W", of_first_stage=True,
          help="channels of each level; from level to level the resolution halves")  # fmt: skip
    train("--blocks", type=positive, of_first_stage=True, help="residual blocks a level")
    train("--patch", type=positive, of_first_stage=True,
          help="pixels a side folded into channels; a latent stands for patch 2^(levels - 1) a side")  # fmt: skip
    train("--latent-channels", type=positive, default=8, of_first_stage=True, help="numbers per latent vector or code")
    train("--codebook-size", type=positive, of_first_stage=True, help="codes of a VQ-VAE")
    train("--levels", type=positive, nargs="+", metavar="L", of_first_stage=True,
          help="of each number of a code, such as 8 5 5 5: finite scalar quantisation, no codebook")  # fmt: skip
    train("--kl-weight", type=util.positive_float, default=1e-3, of_first_stage=True,
          help="of a VAE's KL in bits per pixel")  # fmt: skip
    train("--kl-schedule", choices=("cyclical", "monotonic", "constant"), default="cyclical", of_first_stage=True,
          help="of that weight")  # fmt: skip
    train("--gan-weight", type=util.fraction, help="of the discriminator's gradient over the "
          "reconstruction's; 0 trains no texture")  # fmt: skip
    return flags


# --------------------------------------------------------------------------------------------------- losses, schedules


def reconstruction_loss(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean |x_hat - x| + 0.5 (1 - SSIM) of [B, 1, H, W], x in [-1, 1].

    Values below -1 are clamped when a picture is written, so an error there counts only a tenth.
    """
    clamped = x_hat.clamp(min=-1)
    x_hat = clamped + 0.1 * (x_hat - clamped)
    ssim = util.ssim_map((x_hat + 1) / 2, (x + 1) / 2).mean()
    return (x_hat - x).abs().mean() + 0.5 * (1 - ssim)


def kl_factor(schedule: str, step: int, steps: int, cycles: int = KL_CYCLES, ramp: float = KL_RAMP) -> float:
    """The KL weight's factor in [0, 1] at a step.

    cyclical: in each of the cycles 0 to 1 over the share `ramp`, then 1 (Fu et al. 2019, eq. 6); monotonic: one cycle;
    constant: 1.
    """
    if schedule == "constant" or ramp == 0:
        return 1.0
    position = (step * (cycles if schedule == "cyclical" else 1) / steps) % 1.0
    return min(1.0, position / ramp)


def penalty_weight(step: int, steps: int) -> float:
    """Of the gradient penalty, falling by one factor from step to step."""
    first, last = PENALTY
    return first * (last / first) ** (step / steps)


# ---------------------------------------------------------------------------------------------- validation and pictures


def watched_slices(data: Slices) -> Tensor:
    """int64 [n]: positions of the slices that reports look at, spread over a split."""
    return torch.linspace(0, len(data) - 1, min(WATCHED_SLICES, len(data))).round().long()


@torch.no_grad()
def validate(model: Autoencoder, data: Slices, run: Run) -> dict[str, float]:
    """Mean scores over slices spread over a split, named as they are logged."""
    scores, codes = [], []
    for part in watched_slices(data).split(32):
        x, z, _ = data.batch(part, run.device)
        with run.autocast():
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
def validate_texture(model: Autoencoder, data: Slices, run: Run) -> dict[str, float]:
    """Of drawn slices spread over a split: mean SSIM with the real ones, and the rms difference of spectra, dB."""
    ssim, spectra = [], []
    for part in watched_slices(data).split(32):
        x, z, _ = data.batch(part, run.device)
        noise = torch.Generator().manual_seed(0)
        with run.autocast():
            drawn = to_uint8(model.draw(model.encode(x, z), z, noise))[:, 0].cpu()
        real = data.images[part].cpu()
        ssim.append(slice_scores(drawn, real, None)["ssim"])
        spectra.append(torch.stack([radial_spectrum(pictures) for pictures in (drawn, real)], 1))
    found, known = torch.cat(spectra).mean(0)
    off = decibel(found, known).square().mean().sqrt()
    return {"validate/ssim": float(torch.cat(ssim).mean()), "validate/spectrum": float(off)}


@torch.no_grad()
def draw_reconstructions(model: Autoencoder, data: Slices, step: int):
    """Sheet real | reconstructed | 5 x difference of six slices of one validation brain."""
    index = torch.linspace(0, min(data.slices_per_brain, len(data)) - 1, 6).round().long()
    x, z, case = data.batch(index, model.latent_mean.device)
    noise = torch.Generator().manual_seed(0)
    fake = model.draw(model.encode(x, z), z, noise) if model.texture is not None else model.reconstruct(x, z)
    real, fake = (to_uint8(pictures)[:, 0].cpu().int() for pictures in (x, fake))
    difference = (128 + 5 * (fake - real)).clamp(0, 255)
    return sheets.sheet(
        sheets.heads([part.to(torch.uint8).numpy() for part in (real, fake, difference)]),
        title=f"{data.split} slices after {step} steps; difference x5, grey is none",
        captions=[f"case {c}, z = {i}" for c, i in zip(case.tolist(), z.tolist())] + [""] * 12,
        row_names=["real", "reconstructed", "difference x5"],
        zoom=max(1, 256 // x.shape[-1]),
    )


@torch.no_grad()
def draw_prior(model: Autoencoder, data: Slices, seed: int, step: int):
    """Sheet of one latent from the untrained prior decoded at every z: a second stage has to be better."""
    device, slices = model.latent_mean.device, data.slices_per_brain
    latent = model.prior_latent(1, torch.Generator().manual_seed(seed)).expand(slices, -1, -1, -1)
    pictures = to_uint8(model.decode(latent.to(device), torch.arange(slices, device=device)))[:, 0].cpu().numpy()
    prior = "N(0, 1)" if isinstance(model, VAE) else "the code distribution"
    return sheets.brain_sheet(pictures, f"decoded draw from {prior} after {step} steps: no second stage yet")


# ------------------------------------------------------------------------------------------------------------ building


def default_preset(args: argparse.Namespace) -> str:
    """demo on the phantom, else base on a GPU, else small."""
    if is_phantom(locate_data(args.data)[0]):
        return "demo"
    return "base" if util.pick_device(args.device).type == "cuda" else "small"


def phase_steps(args: argparse.Namespace) -> dict[str, int]:
    """The steps of each phase; at least one, unless it is left out."""
    if args.gan_weight == 0:
        return {"codec": args.steps, "texture": 0}
    texture = args.steps if args.start_from else max(1, round(TEXTURE * args.steps))
    return {"codec": 0 if args.start_from else max(1, args.steps - texture), "texture": texture}


def build(args: argparse.Namespace, box: tuple[int, int, int, int]) -> tuple[Autoencoder, dict]:
    """The untrained codec and the keywords that rebuild it; `box` is the part of the pictures to be coded."""
    kwargs = {
        "image_size": args.image_size,
        "box": box,
        "patch": args.patch,
        "widths": tuple(args.widths),
        "blocks": args.blocks,
        "latent_channels": args.latent_channels,
    }
    if args.model != "vae" and args.levels:
        kwargs |= {"latent_channels": len(args.levels), "levels": tuple(args.levels)}
    elif args.model != "vae":
        kwargs |= {"codebook_size": args.codebook_size}
    if min(box[2:]) < 11:
        raise UserError(f"--image-size {args.image_size}: SSIM needs 11 pixels a side; choose a larger one")
    try:
        return MODELS[args.model](**kwargs), kwargs
    except ValueError as error:
        raise UserError(f"{error}; change --patch, --widths, --latent-channels, --levels or --image-size") from None


def fit_to_data(model: Autoencoder, data: Slices) -> None:
    """Sets linear path and codes from 256 slices spread over the training set."""
    x, z, _ = data.batch(torch.linspace(0, len(data) - 1, min(256, len(data))).round().long())
    try:
        model.fit(x, z)
    except ValueError as error:
        raise UserError(f"{error}, from {len(x)} slices; choose a smaller --codebook-size, or other --data") from None


@torch.no_grad()
def measure_latents(model: Autoencoder, data: Slices, run: Run) -> None:
    """Sets the scale of the latents, so that a second stage learns numbers of mean 0 and sd 1."""
    index = torch.linspace(0, len(data) - 1, min(STATISTICS_SLICES, len(data))).round().long()
    with run.autocast():
        model.set_latent_statistics(data.batch(part, run.device)[:2] for part in index.split(64))


def with_texture(codec: Autoencoder) -> Autoencoder:
    """A first stage with all of a codec, and an untrained texture."""
    kwargs = codec.description["model_kwargs"] | {"perceptual": True}
    model = MODELS[codec.kind](**kwargs)
    model.description = {"kind": codec.kind, "model_kwargs": kwargs}
    if "digest" in codec.description:
        model.description["started_from"] = {name: codec.description[name] for name in ("digest", "step")}
    kept = {name: t for name, t in codec.state_dict().items() if not name.startswith("texture.")}
    model.load_state_dict(kept, strict=False)
    return model


def save_first_stage(run: Run, model: Autoencoder, description: dict) -> None:
    """model.safetensors, for use, then the checkpoint."""
    save_weights(run.weights, model.state_dict(), description | run.described())
    run.save()


# ------------------------------------------------------------------------------------------------------------ training


def train_codec(args: argparse.Namespace, data: dict[str, Slices]) -> Autoencoder:
    """Phase one: encoder, codes and decoder, to be faithful."""
    train, held_out = data["train"], data["validate"]
    torch.manual_seed(args.seed)
    model, model_kwargs = build(args, train.content_box())
    description = {"kind": args.model, "model_kwargs": model_kwargs}
    run = Run(args, model, data=data, steps=phase_steps(args)["codec"], phase="codec",
              begin=lambda: fit_to_data(model, train))  # fmt: skip
    for step in run.steps():
        x, z, _ = train.batch(run.index(len(train)), run.device, run.moves())
        with run.autocast():
            x_hat, losses = run.forward(x, z)
        losses["reconstruction"] = reconstruction_loss(x_hat, model.crop(x))
        # the loss is in bits per image, the weight per pixel: it means the same at every size
        weight = args.kl_weight / args.image_size**2 * kl_factor(args.kl_schedule, step, run.total)
        if run.update(losses, {"kl": weight} if "kl" in losses else {}):
            measure_latents(run.ema, train, run)
            if run.report_due:
                pictures = {
                    "reconstruction": draw_reconstructions(run.ema, held_out, run.done),
                    "prior": draw_prior(run.ema, train, args.seed, run.done),
                }
                run.report(validate(run.ema, held_out, run), **pictures)
            save_first_stage(run, run.ema, description)
    codec = run.finish()
    codec.description = description
    if args.gan_weight == 0:
        run.say_where()
    return codec


def latents_of(codec: Autoencoder, x: Tensor, z: Tensor, first: int = 0) -> Tensor:
    """Normalised latents of x; of every other slice those of its codes, where there are codes.

    Second stages over codes and over latents both decode with the texture. `first` is the number of the first slice
    among all that training sees: batches of one take turns too, in every process.
    """
    latent = codec.encode(x, z)
    if isinstance(codec, VAE):
        return latent
    odd = torch.arange(first, first + len(x), device=x.device).view(-1, 1, 1, 1) % 2 == 1
    return torch.where(odd, latent, codec.dequantise(codec.encode_indices(x, z)))


def train_texture(args: argparse.Namespace, codec: Autoencoder, data: dict[str, Slices]) -> None:
    """Phase two: the texture against a PatchGAN; the codec stays as it is."""
    train, held_out = data["train"], data["validate"]
    steps, device = phase_steps(args), util.pick_device(args.device)
    torch.manual_seed(args.seed)
    critic = PatchDiscriminator().to(device, memory_format=torch.channels_last)
    model = with_texture(codec).to(device)
    model.use_decoder("perceptual")
    codec = codec.to(device).eval().requires_grad_(False)
    (critic_optimizer,) = new_optimizers(critic, SHARE * args.learning_rate, BETAS)
    trained = copy.deepcopy(model.texture)  # the model has its average
    run = Run(args, trained, data=data, steps=steps["texture"], phase="texture", before=steps["codec"],
              built_on=digest_of(codec.state_dict()), betas=BETAS, share=SHARE,
              keep={"critic": critic, "critic_optimizer": critic_optimizer})  # fmt: skip
    for step in run.steps():
        x, z, _ = train.batch(run.index(len(train)), run.device)  # unmoved: interpolation takes the texture away
        real = codec.crop(x)
        with run.autocast(), torch.no_grad():
            first = (step * run.world + run.rank) * len(x)
            faithful, features = codec.faithful(latents_of(codec, x, z, first), z)
        with run.autocast():
            drawn = run.forward(faithful, features, util.draw_together(torch.randn_like, real), z)

        # the critic: real slices are better than drawn ones; both in one batch
        seen = torch.cat([critic.planes(part, faithful) for part in (real, drawn.detach().clamp(-1, 1))])
        punished = step % EVERY == 0
        with run.autocast():
            logits = critic(seen.requires_grad_(punished), torch.cat([z, z]))
        real_logits, drawn_logits = logits.chunk(2)
        total = loss = relativistic_loss(real_logits, drawn_logits)
        if punished:
            total = loss + penalty_weight(step, run.total) * EVERY * gradient_penalty(logits, seen)
        run.descend({"discriminator": loss}, total, critic, critic_optimizer)

        # the texture: drawn slices are better than real ones, and like the real one after a blur
        critic.requires_grad_(False)
        planes = critic.planes(drawn.clamp(-1, 1), faithful)  # in float32, as above: finest detail would be rounded
        with run.autocast():
            drawn_logits = critic(planes, z)
        critic.requires_grad_(True)
        losses = {
            "generator": relativistic_loss(drawn_logits, real_logits.detach()),
            "likeness": (smooth(drawn, BLUR) - smooth(real, BLUR)).abs().mean(),
            "below_black": F.relu(-1 - drawn).mean(),
        }
        weights = {"generator": args.gan_weight, "likeness": LIKENESS}
        if run.update(losses, weights, {"discriminator": loss}):
            model.texture.load_state_dict(run.ema.state_dict())
            if run.report_due:
                picture = draw_reconstructions(model, held_out, run.before + run.done)
                run.report(validate_texture(model, held_out, run), reconstruction=picture)
            save_first_stage(run, model, model.description)
    run.finish()
    run.say_where()


def main() -> None:
    declared = flags()
    args, typed = declared.parse()
    util.start_processes()
    if args.start_from and not args.name:
        raise UserError(f"--start-from {args.start_from} makes a first stage of its own: give it a --name")
    args.name = args.name or args.model
    args = open_run(declared, args, typed, default_preset)
    if args.start_from and args.gan_weight == 0:
        if "gan_weight" in typed:
            raise UserError(f"--start-from {args.start_from} trains a texture: it needs --gan-weight above 0")
        args.gan_weight = GAN_WEIGHT
    codec = load_first_stage(args.start_from) if args.start_from else None
    for flag in typed.keys() & declared.of_first_stage if codec else ():
        raise UserError(f"--{flag.replace('_', '-')} comes with --start-from {args.start_from}; leave it out")
    folder, size = find_data(args.data), codec.image_size if codec else args.image_size
    data = {"train": load_slices(folder, "train", size, util.pick_device(args.device)),
            "validate": load_slices(folder, "validate", size, masks=has_masks(folder, "validate"))}  # fmt: skip
    codec = codec or train_codec(args, data)
    if args.gan_weight > 0:
        train_texture(args, codec, data)


if __name__ == "__main__":
    util.command(main, LESS_MEMORY)
