"""Which first stage learns fastest? Autoencoders trained by one loop on the same slices for the same number of seconds.

    python playground/equal_time.py --arm ours monai-vqvae --seconds 300   # these arms; without --arm all of them
    python playground/equal_time.py --draw                                 # table and plot of all that were run

Every arm has one code (K 1024) or one vector of 8 numbers per 8x8 pixels, the loss L1 + 0.5 (1 - SSIM), Adam with a
warm-up and a cosine over the seconds, and the same slices in the same order. `ours` is preset small of
prestage_train.py, `ours-*` change one thing, `classic` convolves at full resolution over the whole picture from random
weights, as the first VQ-VAEs do. The arms of MONAI and diffusers need pip install -r
playground/requirements-peers.txt. Seconds are those of training steps alone, without loading and validation: on a GPU
by the clock, on a CPU the processor time of each thread, which other work on the machine does not lengthen. The plot
shows validation SSIM against training seconds: further left and higher is better.
"""

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import prestage_train
import util
from dataset import Slices, find_data, has_masks, load_slices, to_uint8
from model_VAE import VAE, VQVAE
from pictures import sheets
from scores.metrics import mean_scores, slice_scores
from scores.page import markdown_table
from training.optimizer import new_optimizers
from training.run import learning_rate_factor

SIZE, WHOLE_PICTURE = 256, (0, 0, 256, 256)
KL_WEIGHT = 1e-3 / SIZE**2  # of one bit per picture
WATCHED = 32  # validation slices
MARKS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)  # shares of the seconds after which they are looked at


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--arm", nargs="+", choices=ARMS, default=list(ARMS), help="what to train, in this order (default: all)")
    add("--seconds", type=util.positive_float, default=300, help="of training steps (default: %(default)s)")
    add("--batch-size", type=util.positive_int, default=4, help="slices per step (default: %(default)s)")
    add("--learning-rate", type=util.positive_float, default=8e-4, help="of Adam (default: %(default)s)")
    add("--draw", action="store_true", help="print and draw all results in --out instead of training")
    add("--data", metavar="FOLDER", help="as in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="as in training (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/equal_time"), help="results (default: %(default)s)")
    return parser


# ------------------------------------------------------------------------------------------------------------ the arms


class Arm(NamedTuple):
    """An autoencoder that takes part.

    build: makes it, of the training slices.
    forward: (net, x, z) -> decoded x for training, and what is added to the loss.
    reconstruct: (net, x, z) -> decoded x.
    """

    build: Callable[[Slices], nn.Module]
    forward: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    reconstruct: Callable[[nn.Module, Tensor, Tensor], Tensor]


def kl_price(mean: Tensor, log_variance: Tensor) -> Tensor:
    """What a VAE of posterior N(mean, variance), [B, C, h, w] each, pays for its latent."""
    return KL_WEIGHT * VAE.kl_bits(mean, log_variance).mean()


def ours(kind: type = VQVAE, linear_path: bool = True, **changes) -> Arm:
    """A VQVAE or VAE of preset small with some keywords changed, or without linear path and k-means at its start."""

    def build(train: Slices) -> nn.Module:
        small = prestage_train.flags().presets["small"]
        kwargs = {name: small[name] for name in ("image_size", "patch", "widths", "blocks")}
        kwargs |= {"latent_channels": 8, "box": train.content_box()} | changes
        net = kind(**kwargs, **({"codebook_size": 1024} if kind is VQVAE and "levels" not in changes else {}))
        if linear_path:
            prestage_train.fit_to_data(net, train)
            return net
        for parameter in net.linear.parameters():
            parameter.data.zero_().requires_grad_(False)
        for half in (net.encoder, net.decoder):  # nothing else would break the symmetry
            half.out[2].reset_parameters()
        x, z, _ = train.batch(torch.linspace(0, len(train) - 1, 64).long())
        net.quantizer.fit(net.vectors(x, z).detach().movedim(1, -1).flatten(0, 2))
        return net

    def forward(net: nn.Module, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, losses = net(x, z)
        return x_hat, losses["codebook"] if "codebook" in losses else KL_WEIGHT * losses["kl"]

    return Arm(build, forward, lambda net, x, z: net.reconstruct(x, z))


def peer(module: str, name: str, **kwargs) -> Callable[[Slices], nn.Module]:
    """Builds a class of a library that is imported only then."""
    return lambda train: getattr(importlib.import_module(module), name)(**kwargs)


def monai_kl(net: nn.Module, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Arm.forward of monai.networks.nets.AutoencoderKL."""
    x_hat, mean, sigma = net(x)
    return x_hat, kl_price(mean, 2 * sigma.log())


def diffusers_vq(net: nn.Module, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Arm.forward of diffusers.VQModel."""
    quantised, loss, _ = net.quantize(net.encode(x).latents)
    return net.decoder(net.post_quant_conv(quantised)), loss


def diffusers_kl(net: nn.Module, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Arm.forward of diffusers.AutoencoderKL."""
    posterior = net.encode(x).latent_dist
    return net.decode(posterior.sample()).sample, kl_price(posterior.mean, posterior.logvar)


ONE_CHANNEL = {"in_channels": 1, "out_channels": 1}
MONAI = {**ONE_CHANNEL, "spatial_dims": 2}
DIFFUSERS = {**ONE_CHANNEL, "block_out_channels": (32, 64, 64, 128), "latent_channels": 8, "norm_num_groups": 16,
             "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
ARMS = {
    "ours": ours(),
    "ours-vae": ours(VAE),
    "ours-fsq": ours(levels=(8, 8, 4, 4), latent_channels=4),
    "ours-patch-4": ours(patch=4, widths=(64, 128), blocks=2),
    "ours-whole-picture": ours(box=WHOLE_PICTURE),
    "ours-random-start": ours(linear_path=False),
    "classic": ours(linear_path=False, box=WHOLE_PICTURE, patch=1, widths=(16, 32, 64, 128), blocks=1),
    "monai-vqvae": Arm(
        peer("monai.networks.nets", "VQVAE", **MONAI, channels=(32, 64, 128), num_res_layers=2,
             num_res_channels=(32, 64, 128), downsample_parameters=((2, 4, 1, 1),) * 3,
             upsample_parameters=((2, 4, 1, 1, 0),) * 3, num_embeddings=1024, embedding_dim=8),
        lambda net, x, z: net(x),
        lambda net, x, z: net(x)[0],
    ),
    "monai-kl": Arm(
        peer("monai.networks.nets", "AutoencoderKL", **MONAI, channels=(32, 64, 64, 128), num_res_blocks=1,
             latent_channels=8, norm_num_groups=16, attention_levels=(False,) * 4, with_encoder_nonlocal_attn=False,
             with_decoder_nonlocal_attn=False),
        monai_kl,
        lambda net, x, z: net.decode(net.encode(x)[0]),
    ),
    "diffusers-vq": Arm(
        peer("diffusers", "VQModel", **DIFFUSERS, num_vq_embeddings=1024),
        diffusers_vq,
        lambda net, x, z: diffusers_vq(net, x, z)[0],
    ),
    "diffusers-kl": Arm(
        peer("diffusers", "AutoencoderKL", **DIFFUSERS),
        diffusers_kl,
        lambda net, x, z: net.decode(net.encode(x).latent_dist.mode()).sample,
    ),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the one loop


@torch.no_grad()
def validate(arm: Arm, net: nn.Module, data: Slices, args: argparse.Namespace) -> dict[str, float]:
    """Mean scores of WATCHED slices spread over a split."""
    net.eval()
    scores = []
    for part in torch.linspace(0, len(data) - 1, WATCHED).round().long().split(16):
        x, z, _ = data.batch(part, args.device)
        with util.autocast(args.device, args.precision):
            fake = to_uint8(arm.reconstruct(net, x, z))[:, 0].cpu()
        scores.append(slice_scores(fake, data.images[part].cpu(), None if data.masks is None else data.masks[part]))
    net.train()
    return mean_scores(scores)


def clock(device: torch.device) -> float:
    """Seconds: of the wall on a GPU, of each thread's processor on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def train_arm(name: str, args: argparse.Namespace, train: Slices, held_out: Slices) -> None:
    """Trains one arm for args.seconds and writes what it reached at MARKS into OUT/NAME.json."""
    torch.manual_seed(0)
    arm, device = ARMS[name], args.device
    net = arm.build(train).to(device, memory_format=torch.channels_last)
    (optimizer,), parameters = new_optimizers(net, args.learning_rate), sum(p.numel() for p in net.parameters())
    print(f"{name}: {parameters:,} parameters, {args.seconds:.0f} s on {util.describe_device(device)}", flush=True)
    marks, points, seconds, step = [args.seconds * share for share in MARKS], [], 0.0, 0
    while marks:
        began = clock(device)
        index, generator = util.batch_index(0, step, args.batch_size, len(train)), torch.Generator().manual_seed(step)
        x, z, _ = train.batch(index, device, generator)
        factor = learning_rate_factor(int(1e4 * seconds / args.seconds), 10_000, warm_up=1) * min(1, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor
        with util.autocast(device, args.precision):
            x_hat, price = arm.forward(net, x, z)
        target = net.crop(x) if isinstance(net, VAE | VQVAE) else x
        loss = prestage_train.reconstruction_loss(x_hat.float(), target) + price
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        seconds, step = seconds + clock(device) - began, step + 1
        if seconds >= marks[0]:
            marks = [mark for mark in marks if mark > seconds]
            points.append({"seconds": seconds, "step": step, **validate(arm, net, held_out, args)})
            print("  ".join(f"{key} {value:.4g}" for key, value in points[-1].items()), flush=True)
    result = {"parameters": parameters, "seconds_per_step": seconds / step, "points": points}
    result |= {"batch_size": args.batch_size, "learning_rate": args.learning_rate}
    result["device"] = util.describe_device(device)
    util.write_file(args.out / f"{name}.json", json.dumps(result, indent=2).encode())


# ------------------------------------------------------------------------------------------------------------- results


def seconds_to(points: list[dict], ssim: float) -> float | None:
    """Training seconds at which SSIM was reached, interpolated between the points beside it; None if never."""
    before = None
    for point in points:
        if point["ssim"] >= ssim:
            if before is None:
                return point["seconds"]
            share = (ssim - before["ssim"]) / (point["ssim"] - before["ssim"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None


def draw(folder: Path) -> None:
    """Prints the table of all arms in `folder`, best first, and draws their curves."""
    arms = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not arms:
        raise util.UserError(f"no arm was run into {folder}; run one with --arm ours")
    rows, (figure, axis) = [], plt.subplots(figsize=(10, 5.5), layout="constrained")
    looks = {line: product(("full", "none"), zip(sheets.COLOURS, sheets.MARKERS)) for line in ("-", "--")}
    for name, arm in sorted(arms.items(), key=lambda item: -item[1]["points"][-1]["ssim"]):
        points, last, reached = arm["points"], arm["points"][-1], seconds_to(arm["points"], 0.9)
        rows.append([name, f"{arm['parameters'] / 1e6:.1f} M", f"{arm['seconds_per_step']:.2f}"])
        rows[-1] += [f"{last['seconds']:.0f}", f"{last['ssim']:.4f}", f"{last.get('brain_ssim', math.nan):.4f}"]
        rows[-1] += ["not reached" if reached is None else f"{reached:.0f}"]
        curve = [point["seconds"] for point in points], [point["ssim"] for point in points]
        line = "-" if name.startswith("ours") else "--"
        filled, (colour, marker) = next(looks[line])
        style = {"color": colour, "marker": marker, "fillstyle": filled, "markersize": 5}
        axis.plot(*curve, line, **style, label=f"{name} ({last['ssim']:.3f})")
    header = ["arm", "parameters", "s per step", "seconds", "SSIM", "brain SSIM", "seconds to SSIM .90"]
    print(markdown_table(header, rows))
    axis.axhline(0.9, color="grey", linewidth=0.8)
    axis.set(xlabel="training seconds", ylabel=f"validation SSIM, {WATCHED} slices; below .5 is cut", ylim=(0.5, 1))
    axis.set(title=f"one code or vector per 8x8 pixels, equal training time on {arm['device']}")
    figure.legend(loc="outside right upper", title="arm (SSIM at the end)", fontsize=9)
    axis.grid(alpha=0.3)
    sheets.save_picture(folder / "equal_time.png", figure)
    print(f"picture: {folder / 'equal_time.png'}")


def main() -> None:
    args = flags().parse_args()
    if args.draw:
        return draw(args.out)
    args.device, folder = util.pick_device(args.device), find_data(args.data)
    train = load_slices(folder, "train", SIZE)
    held_out = load_slices(folder, "validate", SIZE, masks=has_masks(folder, "validate"))
    for name in args.arm:
        train_arm(name, args, train, held_out)


if __name__ == "__main__":
    util.command(main)
