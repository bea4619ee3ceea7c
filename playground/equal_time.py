"""Which first stage learns fastest? Autoencoders trained by one loop on the same slices for the same number of seconds.

    python playground/equal_time.py --arm ours monai-vqvae --seconds 300   # these arms; without --arm all of them
    python playground/equal_time.py --draw                                 # table and plot of all that were run

Every arm has one code (K 1024) or one vector of 8 numbers per 8x8 pixels, the loss L1 + 0.5 (1 - SSIM), Adam with a
warm-up and a cosine over the seconds, and the same slices in the same order. `ours` is what prestage_train.py takes on
a CPU, `ours-*` change one thing, `classic` convolves at full resolution over the whole picture from random weights, as
the first VQ-VAEs do. MONAI and diffusers are needed for their arms only: pip install -r
playground/requirements-peers.txt. Seconds are those of training steps alone, without loading and validation: on a GPU
by the clock, on a CPU the processor time of each thread, which other work on the machine does not lengthen. The plot
shows validation SSIM against training seconds: further left and higher is better.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util
from dataset import Slices, find_data, has_masks, load_slices, to_uint8
from model_VAE import VAE, VQVAE
from pictures import sheets
from prestage_train import reconstruction_loss, start_from_data
from scores.metrics import mean_scores, slice_scores
from util import PRESET_NAMES, PRESETS

SIZES = {
    name: values[PRESET_NAMES.index("small")]
    for name, values in PRESETS["prestage_train.py"].items()
    if name in ("patch", "channels", "channel_multipliers", "blocks")
}
WHOLE_PICTURE = (0, 0, 256, 256)
WATCHED = 32  # validation slices


class Ours(nn.Module):
    """VQVAE or VAE of this project. Calling it gives the reconstructed picture and what to add to its loss."""

    def __init__(self, train: Slices, kind: type = VQVAE, box=None, linear_path=True, attention=True, **sizes):
        super().__init__()
        kwargs = {"codebook_size": 1024} if kind is VQVAE else {}
        box = box or train.content_box()
        self.net = kind(**{"image_size": 256, "box": box, "latent_channels": 8, **kwargs, **SIZES, **sizes})
        if linear_path:
            start_from_data(self.net, train)
        else:
            for parameter in self.net.linear.parameters():
                parameter.data.zero_().requires_grad_(False)
            for half in (self.net.encoder, self.net.decoder):  # nothing else would break the symmetry
                half.out[2].reset_parameters()
            x, z, _ = train.batch(torch.arange(0, len(train), len(train) // 64)[:64])
            self.net.quantizer.start(self.net.vectors(x, z).detach().movedim(1, -1).flatten(0, 2))
        if not attention:
            self.net.encoder.attention = self.net.decoder.attention = nn.Identity()

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, losses = self.net(x, z)
        return x_hat, losses["codebook"] if "codebook" in losses else 1e-3 / 256**2 * losses["kl"]

    def reconstruct(self, x: Tensor, z: Tensor) -> Tensor:
        return self.net.reconstruct(x, z)


class MonaiVQVAE(nn.Module):
    """monai.networks.nets.VQVAE: three strided levels, K 1024, codes of 8."""

    def __init__(self, train: Slices):
        super().__init__()
        from monai.networks.nets import VQVAE as Peer

        self.net = Peer(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            channels=(32, 64, 128),
            num_res_layers=2,
            num_res_channels=(32, 64, 128),
            downsample_parameters=((2, 4, 1, 1),) * 3,
            upsample_parameters=((2, 4, 1, 1, 0),) * 3,
            num_embeddings=1024,
            embedding_dim=8,
        )

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x)

    def reconstruct(self, x: Tensor, z: Tensor) -> Tensor:
        return self.net(x)[0]


class MonaiKL(nn.Module):
    """monai.networks.nets.AutoencoderKL: four levels, 8 latent channels."""

    def __init__(self, train: Slices):
        super().__init__()
        from monai.networks.nets import AutoencoderKL as Peer

        self.net = Peer(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            channels=(32, 64, 64, 128),
            num_res_blocks=1,
            latent_channels=8,
            norm_num_groups=16,
            attention_levels=(False, False, False, False),
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, mean, sigma = self.net(x)
        bits = (mean**2 + sigma**2 - 1 - 2 * sigma.log()).sum((1, 2, 3)).mean() / 2 / 0.6931
        return x_hat, 1e-3 / 256**2 * bits

    def reconstruct(self, x: Tensor, z: Tensor) -> Tensor:
        return self.net.decode(self.net.encode(x)[0])


class DiffusersVQ(nn.Module):
    """diffusers VQModel: four levels, K 1024, codes of 8."""

    def __init__(self, train: Slices):
        super().__init__()
        from diffusers import VQModel as Peer

        self.net = Peer(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 64, 64, 128),
            latent_channels=8,
            num_vq_embeddings=1024,
            norm_num_groups=16,
        )

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        quantised, loss, _ = self.net.quantize(self.net.encode(x).latents)
        return self.net.decoder(self.net.post_quant_conv(quantised)), loss

    def reconstruct(self, x: Tensor, z: Tensor) -> Tensor:
        return self(x, z)[0]


class DiffusersKL(nn.Module):
    """diffusers AutoencoderKL: four levels, 8 latent channels."""

    def __init__(self, train: Slices):
        super().__init__()
        from diffusers import AutoencoderKL as Peer

        self.net = Peer(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 64, 64, 128),
            latent_channels=8,
            norm_num_groups=16,
        )

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.net.encode(x).latent_dist
        return self.net.decode(posterior.sample()).sample, 1e-3 / 256**2 / 0.6931 * posterior.kl().mean()

    def reconstruct(self, x: Tensor, z: Tensor) -> Tensor:
        return self.net.decode(self.net.encode(x).latent_dist.mode()).sample


PATCH_4 = {"patch": 4, "channels": 64, "channel_multipliers": (1, 2), "blocks": 2}
CLASSIC = {"patch": 1, "channels": 16, "channel_multipliers": (1, 2, 4, 8), "blocks": 1}

# name: (class, keywords, batch size)
ARMS = {
    "ours": (Ours, {}, 4),
    "ours-vae": (Ours, {"kind": VAE}, 4),
    "ours-batch-16": (Ours, {}, 16),
    "ours-patch-4": (Ours, PATCH_4, 4),
    "ours-no-attention": (Ours, {"attention": False}, 4),
    "ours-sphere": (Ours, {"quantizer_options": {"sphere": True}}, 4),
    "ours-rotation": (Ours, {"quantizer_options": {"rotation": True}}, 4),
    "ours-fsq": (Ours, {"quantizer": "fsq", "levels": (8, 8, 4, 4), "latent_channels": 4, "codebook_size": None}, 4),
    "ours-whole-picture": (Ours, {"box": WHOLE_PICTURE}, 4),
    "ours-random-start": (Ours, {"linear_path": False}, 4),
    "classic": (Ours, {**CLASSIC, "box": WHOLE_PICTURE, "linear_path": False}, 4),
    "monai-vqvae": (MonaiVQVAE, {}, 4),
    "monai-kl": (MonaiKL, {}, 4),
    "diffusers-vq": (DiffusersVQ, {}, 4),
    "diffusers-kl": (DiffusersKL, {}, 4),
}


@torch.no_grad()
def validate(model: nn.Module, data: Slices, index: Tensor, device: torch.device, precision: str) -> dict[str, float]:
    """Mean scores of the slices `index`."""
    model.eval()
    scores = []
    for part in index.split(16):
        x, z, _ = data.batch(part, device)
        with util.autocast(device, precision):
            fake = to_uint8(model.reconstruct(x, z).float().clamp(-1, 1))[:, 0].cpu()
        masks = data.masks[part] if data.masks is not None else None
        scores.append(slice_scores(fake, data.images[part].cpu(), masks))
    model.train()
    return mean_scores(scores)


def train_arm(arm: str, args: argparse.Namespace, train: Slices, held_out: Slices, device: torch.device) -> None:
    """Trains one arm for args.seconds and writes what it reached at 8 times into OUT/ARM.json."""
    watched = torch.linspace(0, len(held_out) - 1, WATCHED).round().long()
    build, kwargs, batch_size = ARMS[arm]
    batch_size = args.batch_size or batch_size
    torch.manual_seed(0)
    model = build(train, **kwargs).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        (p for p in model.parameters() if p.requires_grad), lr=args.learning_rate, betas=(0.9, 0.99), fused=True
    )
    marks = [args.seconds * share for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{arm}: {parameters:,} parameters, {args.seconds:.0f} s on {util.describe_device(device)}", flush=True)
    points, seconds, step = [], 0.0, 0

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()

    bar = tqdm(total=args.seconds, unit="s", disable=None)
    while marks:
        began = clock()
        x, z, _ = train.batch(
            util.batch_index(0, step, batch_size, len(train)), device, torch.Generator().manual_seed(step)
        )
        rate = util.learning_rate_factor(int(1e4 * seconds / args.seconds), 10_000, warm_up=1) * min(1, (step + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        with util.autocast(device, args.precision):
            x_hat, price = model(x, z)
        target = model.net.crop(x) if build is Ours else x
        loss = reconstruction_loss(x_hat.float(), target) + price
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds, step = seconds + clock() - began, step + 1
        bar.update(min(seconds, args.seconds) - bar.n)
        if seconds >= marks[0]:
            while marks and seconds >= marks[0]:
                marks.pop(0)
            scores = validate(model, held_out, watched, device, args.precision)
            points.append({"seconds": seconds, "step": step, **scores})
            line = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
            print(f"{arm}  {seconds:.0f} s  step {step}  {line}", flush=True)
    result = {
        "arm": arm,
        "parameters": parameters,
        "batch_size": batch_size,
        "learning_rate": args.learning_rate,
        "device": util.describe_device(device),
        "seconds_per_step": seconds / step,
        "points": points,
    }
    name = arm + (f"-{args.tag}" if args.tag else "")
    util.write_file(args.out / f"{name}.json", json.dumps(result, indent=2).encode())
    print(f"result: {args.out / f'{name}.json'}")


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
    import matplotlib.pyplot as plt

    arms = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not arms:
        raise util.UserError(f"no arm was run into {folder}; run one with --arm ours")
    arms = dict(sorted(arms.items(), key=lambda item: -item[1]["points"][-1]["ssim"]))
    print("| arm | parameters | s per step | seconds | SSIM | brain SSIM | seconds to SSIM .90 |")
    print("|---|---|---|---|---|---|---|")
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for name, arm in arms.items():
        points, last, reached = arm["points"], arm["points"][-1], seconds_to(arm["points"], 0.9)
        reached = "not reached" if reached is None else f"{reached:.0f}"
        print(
            f"| {name} | {arm['parameters'] / 1e6:.1f} M | {arm['seconds_per_step']:.2f} | {last['seconds']:.0f} "
            f"| {last['ssim']:.4f} | {last.get('brain_ssim', math.nan):.4f} | {reached} |"
        )
        style = "-" if name.startswith("ours") else "--"
        curve = [point["seconds"] for point in points], [point["ssim"] for point in points]
        axis.plot(*curve, style, marker=".", label=f"{name} ({last['ssim']:.3f})")
    axis.axhline(0.9, color="grey", linewidth=0.8)
    axis.set(
        xlabel="training seconds",
        ylabel=f"validation SSIM, {WATCHED} slices",
        title=f"one code or vector per 8x8 pixels, equal training time on {arm['device']}",
        ylim=(0.5, 1),
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    sheets.save_picture(folder / "equal_time.png", figure)
    print(f"picture: {folder / 'equal_time.png'}")


def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--arm", nargs="+", choices=ARMS, default=list(ARMS), help="what to train, in this order (default: all)")
    add("--seconds", type=util.positive_float, default=300, help="of training steps (default: %(default)s)")
    add("--batch-size", type=util.positive_int, help="default: 4, and 16 for the arm that says so")
    add("--learning-rate", type=util.positive_float, default=8e-4, help="of Adam (default: %(default)s)")
    add("--tag", help="added to the name of the result, when an arm is run with other settings")
    add("--draw", action="store_true", help="print and draw all results in --out instead of training")
    add("--data", metavar="FOLDER", help="as in training")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="as in training (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/equal_time"), help="results (default: %(default)s)")
    args = parser.parse_args()
    if args.draw:
        return draw(args.out)
    device, folder = util.pick_device(args.device), find_data(args.data)
    train = load_slices(folder, "train", 256)
    held_out = load_slices(folder, "validate", 256, masks=has_masks(folder, "validate"))
    for arm in args.arm:
        train_arm(arm, args, train, held_out, device)


if __name__ == "__main__":
    util.command(main)
