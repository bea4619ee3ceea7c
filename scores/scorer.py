"""The small network behind the scores of samples: tissue, slice index and features of a slice, learned from the masks.

    python scorer.py                      # trains in about ten minutes on one CPU core, on the training split alone

One encoder, two heads: probabilities of CSF, grey and white matter at every pixel (their sum over a slice is the
tissue's area), and 64 numbers from which the slice index z and the tissues' areas can be read; they stand for the slice
where other projects take a network trained on photographs. Writes model_ckpt/scorer/model.safetensors, with its
accuracy on validate inside, log/scorer and a picture in scorer_vis. It is short, so it does not resume: the same
command trains anew.

Pictures of any size are brought to 256 px first. So that blurred and small pictures are read as well as sharp ones,
half of the training slices are blurred or were reduced to 128 or 64 px.
"""

import argparse
import copy
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

import util
from dataset import (
    CONTENT_BOX,
    MASK_VALUES,
    SLICES_PER_CASE,
    Slices,
    find_data,
    load_slices,
    move,
    random_moves,
    to_float,
)
from logger import Logger
from module import Downsample, Upsample, norm
from pictures import sheets
from training import checkpoints

SCRIPT = Path(__file__).name
OWN, RELEASED = Path("model_ckpt/scorer/model.safetensors"), Path(__file__).parents[1] / "pretrained/scorer.safetensors"
TISSUES = ("csf", "grey", "white")
SIZE = 256  # px and mm, the side of the pictures it reads: a pixel is 1 mm^2
Z_WEIGHT, AREA_WEIGHT = 0.1, 0.3  # of the losses of the features beside the cross-entropy per pixel


class Block(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with SiLU as act (He et al. 2016, pre-activation)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = norm(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Scorer(nn.Module):
    """U-Net (Ronneberger et al. 2015) on blocks of 2x2 pixels; the features are read at its bottom.

    Args:
        channels: of its levels, from 1 / 2 of the pictures' resolution on down.
        features: of a slice, channels of the bottom.
    """

    def __init__(self, *, channels: tuple[int, ...] = (16, 32, 64), features: int = 64):
        super().__init__()
        widths = (*channels, features)
        self.stem = nn.Conv2d(4, widths[0], 3, padding=1)
        self.encode = nn.ModuleList(Block(C) for C in channels)
        self.down = nn.ModuleList(Downsample(a, b) for a, b in pairwise(widths))
        self.bottom = nn.Sequential(Block(features), Block(features), norm(features), nn.SiLU())
        self.up = nn.ModuleList(Upsample(b, a) for a, b in pairwise(widths))
        self.decode = nn.ModuleList(Block(C) for C in channels)
        self.tissue = nn.Sequential(norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 16, 3, padding=1))
        *_, height, width = (side // 2 ** (len(channels) + 2) for side in CONTENT_BOX)  # a mean over all positions
        self.summary = nn.Linear(features * height * width, features)  # would not say where anything is
        self.whole = nn.Sequential(nn.SiLU(), nn.Linear(features, SLICES_PER_CASE + len(TISSUES)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is in slices x [B, 1, S, S] in [-1, 1], z unknown.

        Returns logits [B, 4, 256, 256] of none, CSF, grey and white matter, where outside the box that holds every
        head it is none; [B, 35], logits of z and then areas of the tissues, in tenths of the picture, both read from
        the features; features [B, 64].
        """
        top, left, height, width = CONTENT_BOX
        if x.shape[-1] != SIZE:
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
        x = x[..., top : top + height, left : left + width] + 1  # black is zero, as the padding of convolutions is
        h, levels = self.stem(F.pixel_unshuffle(x, 2)), []
        for encode, down in zip(self.encode, self.down):
            levels.append(encode(h))
            h = down(levels[-1])
        h = self.bottom(h)
        features = self.summary(F.avg_pool2d(h, 2).flatten(1))
        for up, decode, level in reversed(list(zip(self.up, self.decode, levels))):
            h = decode(up(h, level.shape[-2:]) + level)
        inside = F.pixel_shuffle(self.tissue(h), 2)
        logits = inside.new_zeros(len(x), 4, SIZE, SIZE)
        logits[:, 0] = 20
        logits[..., top : top + height, left : left + width] = inside
        return logits, self.whole(features), features


# ------------------------------------------------------------------------------------------------------------- reading


def expected_z(whole: Tensor) -> Tensor:
    """The mean [B], in slices, of the distribution over z in the Scorer's second answer [B, 35]."""
    share = whole[:, :SLICES_PER_CASE].float().softmax(1)
    return share @ torch.arange(SLICES_PER_CASE, device=share.device, dtype=share.dtype)


def find_scorer(run: str | None = None) -> tuple[Scorer, dict]:
    """(scorer in evaluation mode, its description with "path") of a run or file; by default the run scorer, if it was
    trained here, else the released one. Raises UserError when the named one is not there or is something else."""
    path = checkpoints.find_weights(run, f"python {SCRIPT}") if run else OWN if OWN.is_file() else RELEASED
    weights, description = checkpoints.load_weights(path)
    if description.get("kind") != "scorer":
        raise util.UserError(f"{path} is no scorer but a {description.get('kind')}; train one with: python {SCRIPT}")
    scorer = checkpoints.fill_model(Scorer(**description["model_kwargs"]), weights, path).eval().requires_grad_(False)
    return scorer, description | {"path": str(path), "digest": checkpoints.digest_of(weights)}


@torch.no_grad()
def read_slices(scorer: Scorer, slices: Tensor, batch_size: int = 32) -> dict[str, Tensor]:
    """What the scorer sees in slices uint8 [N, S, S].

    Returns {"areas" [N, 3], mm^2 of CSF, grey and white matter: the sum of their probabilities over pixels of 1 mm^2,
    "z" [N], in slices, "features" [N, 64]}, float32.
    """
    device, parts = next(scorer.parameters()).device, []
    for batch in slices.split(batch_size):
        logits, whole, features = scorer(to_float(batch.to(device))[:, None])
        parts.append((logits.softmax(1)[:, 1:].sum((2, 3)).cpu(), expected_z(whole).cpu(), features.cpu()))
    return dict(zip(("areas", "z", "features"), map(torch.cat, zip(*parts))))


def csf_area(scorer: Scorer, slices: Tensor) -> Tensor:
    """Area of cerebrospinal fluid, mm^2, float32 [N], of slices uint8 [N, S, S]: it grows with age."""
    return read_slices(scorer, slices)["areas"][:, 0]


# ------------------------------------------------------------------------------------------------------------ training


def tissue_shares(masks: Tensor) -> Tensor:
    """float32 [B, 3, S, S], 0 or 1, of masks uint8 [B, S, S]: CSF, grey, white."""
    return torch.stack([masks == value for value in MASK_VALUES[1:]], 1).float()


def training_batch(data: Slices, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, 1, 256, 256], shares of none, CSF, grey, white [B, 4, 256, 256], z [B] of slices turned, scaled, shifted.

    Half of the batches are sharp, a quarter blurred by a gaussian of up to 2 pixels, a quarter reduced to 128 or 64 px.
    """
    x, z, _ = data.batch(index)
    moved = move(torch.cat([x, 2 * tissue_shares(data.masks[index]) - 1], 1), random_moves(len(x), generator))
    x, shares = moved[:, :1], (moved[:, 1:] + 1) / 2
    kind, strength = torch.rand(2, generator=generator).tolist()
    if kind < 0.25:
        x = gaussian_blur(x, 13, 0.1 + 1.9 * strength)
    elif kind < 0.5:
        x = F.avg_pool2d(x, 2 if strength < 0.5 else 4)
    return x, torch.cat([1 - shares.sum(1, keepdim=True), shares], 1), z


@torch.no_grad()
def accuracy(scorer: Scorer, data: Slices, reduce: int = 1) -> dict[str, float]:
    """On a split with masks: {"dice_csf", "dice_grey", "dice_white", over all pixels of the split together,
    "area_error_csf", ..: mean |read - true| over the mean true area, "z_error" in slices}.

    reduce: the pictures are first reduced by this factor, masks and areas stay those of 256 px.
    """
    overlap, sizes, area_error, z_error = torch.zeros(3), torch.zeros(3), torch.zeros(3), 0.0
    for index in torch.arange(len(data)).split(32):
        x, z, _ = data.batch(index)
        logits, whole, _ = scorer(F.avg_pool2d(x, reduce))
        true = tissue_shares(data.masks[index])
        found = torch.stack([logits.argmax(1) == n for n in (1, 2, 3)], 1).float()
        overlap += (true * found).sum((0, 2, 3))
        sizes += torch.stack([true.sum((0, 2, 3)), found.sum((0, 2, 3))]).mean(0)
        area_error += (logits.softmax(1)[:, 1:].sum((2, 3)) - true.sum((2, 3))).abs().sum(0)
        z_error += float((expected_z(whole) - z).abs().sum())
    true_areas = torch.stack([(data.masks == value).sum() for value in MASK_VALUES[1:]])
    result = {f"dice_{name}": float(value) for name, value in zip(TISSUES, overlap / sizes)}
    result |= {f"area_error_{name}": float(value) for name, value in zip(TISSUES, area_error / true_areas)}
    return result | {"z_error": z_error / len(data)}


@torch.no_grad()
def draw(scorer: Scorer, data: Slices):
    """A sheet of slices of one case: as they are, with the true and with the read tissues in colour."""
    shown = torch.arange(len(data))[data.case == data.case[0]][2::5]
    x, z, _ = data.batch(shown)
    logits, whole, _ = scorer(x)
    colours = torch.tensor([[0, 0, 0], [60, 120, 255], [150, 150, 150], [255, 255, 255]], dtype=torch.uint8)
    labels = torch.searchsorted(torch.tensor(MASK_VALUES), data.masks[shown].long())
    rows = [data.images[shown][..., None].expand(-1, -1, -1, 3), colours[labels], colours[logits.argmax(1)]]
    captions = [f"z = {n}, read as {n_hat:.1f}" for n, n_hat in zip(z.tolist(), expected_z(whole).tolist())]
    return sheets.sheet(
        [row.numpy() for row in rows],
        title=f"{data.split} case {int(data.case[0])}; CSF blue, grey matter grey, white matter white; anterior right",
        row_names=["slice", "mask", "read"],
        captions=captions + [""] * 2 * len(shown),
    )


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="as in training; needs the masks")
    add("--steps", type=util.positive_int, default=600, help="optimiser steps (default: %(default)s)")
    add("--batch-size", type=util.positive_int, default=16, help="slices per step (default: %(default)s)")
    add("--learning-rate", type=util.positive_float, default=3e-3, help="Adam's, after warm-up (default: %(default)s)")
    add("--seed", type=util.seed, default=0, help="all randomness follows from it (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of training (default: %(default)s)")
    return parser


def main() -> None:
    args = flags().parse_args()
    device = util.pick_device(args.device)
    folder = find_data(args.data)
    data, held_out = (load_slices(folder, split, SIZE, masks=True) for split in ("train", "validate"))
    torch.manual_seed(args.seed)
    model_kwargs = {"channels": (16, 32, 64), "features": 64}
    model = Scorer(**model_kwargs).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    described = {"train": data.describe(), "validate": held_out.describe()}
    parameters = sum(p.numel() for p in model.parameters())
    args.name = "scorer"
    run = checkpoints.describe_run(SCRIPT, args, described, parameters=parameters)
    logger = Logger(args.name, run, step=0, every=20)
    print(f"scorer: {parameters:,} weights, {args.steps} steps of {args.batch_size} on {util.describe_device(device)}")

    for step in tqdm(range(args.steps), desc="scorer", unit="step", disable=None):
        index = util.batch_index(args.seed, step, args.batch_size, len(data))
        generator = torch.Generator().manual_seed(util.mix_seed(args.seed, step))
        x, shares, z = (part.to(device) for part in training_batch(data, index, generator))
        rate = args.learning_rate * util.learning_rate_factor(step, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

        with util.autocast(device, args.precision):
            logits, whole, _ = model(x)
        near = (-(torch.arange(SLICES_PER_CASE, device=device) - z[:, None]).square() / 2.0).softmax(1)  # sd of 1 slice
        z_logits, areas = whole.float().split((SLICES_PER_CASE, len(TISSUES)), 1)
        losses = {
            "tissue": F.cross_entropy(logits.float(), shares),
            "z": F.cross_entropy(z_logits, near),
            "areas": (areas - 10 * shares[:, 1:].mean((2, 3))).abs().mean(),
        }
        optimizer.zero_grad()
        (losses["tissue"] + Z_WEIGHT * losses["z"] + AREA_WEIGHT * losses["areas"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        util.check_finite(losses, step)
        optimizer.step()
        util.update_ema(ema, model, step, decay=0.99)
        logger.add(step + 1, {f"train/{name}": value for name, value in losses.items()}, args.batch_size)

    weights = {name: tensor.half() for name, tensor in ema.state_dict().items()}
    ema = checkpoints.fill_model(Scorer(**model_kwargs), {name: half.float().cpu() for name, half in weights.items()}, OWN)
    scores = {"validate": accuracy(ema.eval(), held_out), "validate at 64 px": accuracy(ema, held_out, reduce=4)}
    logger.report(args.steps, {f"validate/{name}": value for name, value in scores["validate"].items()})
    description = {"kind": "scorer", "model_kwargs": model_kwargs, "step": args.steps, "seed": args.seed}
    without_folder = {key: value for key, value in described["train"].items() if key != "folder"}
    checkpoints.save_weights(OWN, weights, description | {"data": without_folder, "accuracy": scores, "commit": run["commit"]})
    for name, score in scores.items():
        dice = ", ".join(f"{tissue} {score[f'dice_{tissue}']:.3f}" for tissue in TISSUES)
        area = ", ".join(f"{tissue} {score[f'area_error_{tissue}']:.1%}" for tissue in TISSUES)
        print(f"{name}: Dice {dice}; error of area {area}; of z {score['z_error']:.2f} slices")
    print(f"weights: {OWN}   log: {logger.folder}   picture: {logger.picture('tissues', draw(ema, held_out))}")


if __name__ == "__main__":
    util.command(main)
