"""A small network for scores of samples, trained on masks: it reads tissue, slice index and features of a slice.

One encoder, two heads: probabilities of CSF, grey and white matter at every pixel (their sum over a slice is the
tissue's area), and 64 features of the slice, from which its index z and the tissues' areas can be read. These features
stand where other projects use a network trained on photographs.

Pictures of any size are brought to 256 px first. A quarter of the training slices are blurred or were reduced to 128 or
64 px, so that blurred and small pictures are read too.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

import util
from dataset import Slices, load_slices, to_float
from heads.layout import MASK_VALUES
from module import Downsample, Upsample, norm
from pictures import sheets
from scores.metrics import DARK
from training import checkpoints
from training.run import Run
from training.settings import recorded_settings
from util import UserError

COMMAND = "python evaluate.py --train-scorer"
NAME, STEPS = "scorer", 2000  # of the run that trains one
RELEASED = checkpoints.RELEASED / "scorer.safetensors"
TISSUES = ("csf", "grey", "white")
SIZE = 256  # px and mm, the side of the pictures it reads: a pixel is 1 mm^2
SPECKS = 0.01  # of a drawn head's pixels may lie outside the box; else one brain of a set has masks and the next none
WEIGHTS = {"tissue": 1.0, "z": 0.1, "areas": 0.3}  # of the losses


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
        slices_per_brain: Z, how many slice indices there are.
        box: (top, left, height, width) of the 256 px picture that it reads; every head must lie inside.
    """

    def __init__(
        self,
        *,
        channels: tuple[int, ...] = (16, 32, 64),
        features: int = 64,
        slices_per_brain: int = 32,
        box: tuple[int, int, int, int] = (32, 16, 192, 224),
    ):
        super().__init__()
        self.slices_per_brain, self.box = slices_per_brain, tuple(box)
        widths = (*channels, features)
        self.stem = nn.Conv2d(4, widths[0], 3, padding=1)
        self.encode = nn.ModuleList(Block(C) for C in channels)
        self.down = nn.ModuleList(Downsample(a, b) for a, b in pairwise(widths))
        self.bottom = nn.Sequential(Block(features), Block(features), norm(features), nn.SiLU())
        self.up = nn.ModuleList(Upsample(b, a) for a, b in pairwise(widths))
        self.decode = nn.ModuleList(Block(C) for C in channels)
        self.tissue = nn.Sequential(norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], 16, 3, padding=1))
        height, width = (side // 2 ** (len(channels) + 2) for side in self.box[2:])
        self.summary = nn.Linear(features * height * width, features)  # a mean over positions would forget where it is
        self.whole = nn.Sequential(nn.SiLU(), nn.Linear(features, slices_per_brain + len(TISSUES)))

    def matrices(self) -> list[nn.Parameter]:
        """The weights of all layers but the first and the last."""
        inner = (self.encode, self.down, self.bottom, self.up, self.decode, self.summary)
        return [weight for part in inner for weight in part.parameters() if weight.ndim > 1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reads slices x [B, 1, S, S] in [-1, 1]; z is not told.

        Returns logits [B, 4, 256, 256] of none, CSF, grey and white matter, none outside the box; [B, Z + 3], logits of
        z, then areas of the tissues in tenths of the picture, both read from the features; features [B, 64].
        """
        top, left, height, width = self.box
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


def how_to_train() -> str:
    """The command that trains a scorer on one's own data, under another name if there is a run scorer already."""
    return COMMAND + (" --scorer NEW, and give --scorer NEW" if checkpoints.run_weights(NAME).is_file() else "")


def find_scorer(run: str | None = None) -> tuple[Scorer, dict]:
    """(scorer in evaluation mode, its description with "path" and "digest") of a run or file.

    By default the run scorer if it was trained here, else the released one. Raises UserError when the named one is not
    there or is something else.
    """
    own = checkpoints.run_weights(NAME)
    path = checkpoints.find_weights(run, f"{COMMAND} --scorer {run}") if run else own if own.is_file() else RELEASED
    weights, description = checkpoints.load_weights(path)
    if description.get("kind") != "scorer":
        raise UserError(f"{path} is no scorer but a {description.get('kind')}; train one with: {how_to_train()}")
    scorer = checkpoints.fill_model(Scorer(**description["model_kwargs"]), weights, path).eval().requires_grad_(False)
    return scorer, description | {"path": str(path), "digest": checkpoints.digest_of(weights)}


def expected_z(whole: Tensor) -> Tensor:
    """The mean [B], in slices, of the distribution over z in the Scorer's second output [B, Z + 3]."""
    share = whole[:, : -len(TISSUES)].float().softmax(1)
    return share @ torch.arange(share.shape[1], device=share.device, dtype=share.dtype)


@torch.no_grad()
def read_slices(scorer: Scorer, slices: Tensor, batch_size: int = 32) -> dict[str, Tensor]:
    """What the scorer reads in slices uint8 [N, S, S].

    Returns {"areas" [N, 3], mm^2 of CSF, grey and white matter: the sum of their probabilities over pixels of 1 mm^2,
    "z" [N], in slices, "features" [N, 64], float32, and "tissue" uint8 [N, S, S]: at each pixel 0 for none, 1 CSF, 2
    grey, 3 white matter, whichever is most probable}.
    """
    device, parts = next(scorer.parameters()).device, []
    for batch in slices.split(batch_size):
        logits, whole, features = scorer(to_float(batch.to(device))[:, None])
        tissue = F.interpolate(logits, batch.shape[1:], mode="nearest-exact").argmax(1).to(torch.uint8)
        areas = logits.softmax(1)[:, 1:].sum((2, 3))
        parts.append([part.cpu() for part in (areas, expected_z(whole), features, tissue)])
    return dict(zip(("areas", "z", "features", "tissue"), map(torch.cat, zip(*parts))))


def read_masks(scorer: Scorer, slices: np.ndarray) -> np.ndarray | None:
    """Masks uint8 [Z, S, S], with MASK_VALUES, of all slices uint8 [Z, S, S] of a head, as the scorer reads them.

    None, and a printed line that says so, where the scorer cannot read them: it knows another number of slices, or the
    head lies partly outside its box, by more than a few specks.
    """
    top, left, height, width = (side * slices.shape[1] // SIZE for side in scorer.box)
    head = slices.max(0) > DARK
    outside = head.copy()
    outside[top : top + height, left : left + width] = False
    if len(slices) != scorer.slices_per_brain or outside.sum() > SPECKS * head.sum():
        print(f"no masks: the scorer reads heads of {scorer.slices_per_brain} slices that lie in its box")
        return None
    return np.array(MASK_VALUES, np.uint8)[read_slices(scorer, torch.from_numpy(slices))["tissue"].numpy()]


def csf_area(scorer: Scorer, slices: Tensor) -> Tensor:
    """Area of cerebrospinal fluid, mm^2, float32 [N], of slices uint8 [N, S, S]: it grows with age."""
    return read_slices(scorer, slices)["areas"][:, 0]


# ------------------------------------------------------------------------------------------------------------ training


def train_scorer(
    folder: Path,
    device: str = "auto",
    *,
    name: str = NAME,
    steps: int = STEPS,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
    precision: str = "auto",
    model_kwargs: dict | None = None,
) -> dict:
    """Trains a scorer on the training split of a data folder, half an hour on one CPU core; the same call resumes.

    Args:
        device, precision: as the flags of training.
        name: of the run: model_ckpt/NAME/model.safetensors, log/NAME, and a picture in NAME_vis.
        steps, batch_size, learning_rate, seed: of the run, which records them.
        model_kwargs: of Scorer; what the data decide, slices and box, need not be given.
    Returns the description in the file of weights, with its "accuracy" on validate. Raises UserError without masks, and
    where NAME is something else or is trained by another process.
    """
    script, naming = COMMAND.split()[1], "--scorer"
    recorded_settings(script, name, naming)
    util.own(Path("model_ckpt") / name, f"another {naming}")
    data = {split: load_slices(folder, split, SIZE, masks=True) for split in ("train", "validate")}
    train = data["train"]
    settings = {"name": name, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    settings |= {"seed": seed, "precision": precision}
    args = argparse.Namespace(**settings, recorded=list(settings), script=script, naming=naming)
    args.device, args.compile, args.minutes = device, False, None  # of this start, not of the run
    fixed = {"slices_per_brain": train.slices_per_brain, "box": train.content_box()}
    model_kwargs = {"channels": (32, 64, 64), "features": 64} | fixed | (model_kwargs or {})
    torch.manual_seed(seed)
    scorer = Scorer(**model_kwargs)
    run = Run(args, scorer, data=data, steps=steps, decay=0.99, matrices=scorer.matrices())
    for _ in run.steps():
        x, shares, z = (part.to(run.device) for part in training_batch(train, run.index(len(train)), run.generator()))
        with run.autocast():
            logits, whole, _ = run.forward(x)
        if run.update(scorer_losses(logits, whole, shares, z), WEIGHTS):
            if run.done == steps:
                save_scorer(run, model_kwargs, data["validate"])
            run.save()
    run.finish()
    run.say_where()
    return checkpoints.load_weights(run.weights)[1]


def training_batch(data: Slices, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, 1, S, S], shares of none, CSF, grey, white [B, 4, 256, 256], z [B] of slices.

    Of eight batches one is blurred by a gaussian of up to 2 pixels and one reduced to 128 or 64 px; the rest are sharp.
    Heads are not turned: FAST's masks follow single pixels, which interpolation would mix.
    """
    x, z, _ = data.batch(index)
    shares = tissue_shares(data.masks[index])
    kind, strength = torch.rand(2, generator=generator).tolist()
    if kind < 1 / 8:
        x = gaussian_blur(x, 13, 0.1 + 1.9 * strength)
    elif kind < 1 / 4:
        x = F.avg_pool2d(x, 2 if strength < 0.5 else 4)
    return x, torch.cat([1 - shares.sum(1, keepdim=True), shares], 1), z


def tissue_shares(masks: Tensor) -> Tensor:
    """float32 [B, 3, S, S], 0 or 1, of masks uint8 [B, S, S]: CSF, grey, white."""
    return torch.stack([masks == value for value in MASK_VALUES[1:]], 1).float()


def scorer_losses(logits: Tensor, whole: Tensor, shares: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Losses of a Scorer's first two outputs against shares of tissue [B, 4, 256, 256] and z [B].

    Cross-entropies of tissue and z, and the mean error of the areas; the target of z is a gaussian with an sd of 1
    slice, so that a near miss costs less.
    """
    z_logits, areas = whole.float().tensor_split([-len(TISSUES)], 1)
    every_z = torch.arange(z_logits.shape[1], device=z.device)
    near = (-(every_z - z[:, None]).square() / 2.0).softmax(1)
    return {
        "tissue": F.cross_entropy(logits.float(), shares),
        "z": F.cross_entropy(z_logits, near),
        "areas": (areas - 10 * shares[:, 1:].mean((2, 3))).abs().mean(),
    }


def save_scorer(run: Run, model_kwargs: dict, held_out: Slices) -> None:
    """Writes the averaged weights in half precision, with their accuracy, and a picture, and prints the accuracy."""
    weights = {name: tensor.half() for name, tensor in run.ema.state_dict().items()}
    rounded = {name: half.float().cpu() for name, half in weights.items()}
    scorer = checkpoints.fill_model(Scorer(**model_kwargs), rounded, run.weights).eval()
    scores = {"validate": accuracy(scorer, held_out), "validate at 64 px": accuracy(scorer, held_out, reduce=4)}
    logged = {f"validate/{name}": value for name, value in scores["validate"].items()}
    run.report(logged, tissues=draw_tissues(scorer, held_out))
    data = {key: value for key, value in run.data["train"].items() if key != "folder"}
    description = {"kind": "scorer", "model_kwargs": model_kwargs, "step": run.done, "seed": run.args.seed}
    description |= {"data": data, "accuracy": scores, "commit": util.commit_of_code()}
    checkpoints.save_weights(run.weights, weights, description)
    for where, score in scores.items():
        dice = ", ".join(f"{tissue} {score[f'dice_{tissue}']:.3f}" for tissue in TISSUES)
        area = ", ".join(f"{tissue} {score[f'area_error_{tissue}']:.1%}" for tissue in TISSUES)
        print(f"{where}: Dice {dice}; error of area {area}; of z {score['z_error']:.2f} slices")


def overlaps(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """(common, sizes), pixels float32 [B, 3] of CSF, grey, white in slices: common to what is read and the mask; the
    mean of both areas. Dice of slices is sum(common) / sum(sizes).

    Args:
        logits: [B, 4, S, S], as of Scorer.
        masks: uint8 [B, S, S].
    """
    true, read = tissue_shares(masks), logits.argmax(1)
    found = torch.stack([read == n for n in (1, 2, 3)], 1).float()
    return (true * found).sum((2, 3)), (true.sum((2, 3)) + found.sum((2, 3))) / 2


@torch.no_grad()
def accuracy(scorer: Scorer, data: Slices, reduce: int = 1) -> dict[str, float]:
    """How well a scorer reads a split at 256 px with masks.

    Returns {"dice_csf", "dice_grey", "dice_white", over all pixels of the split together, "area_error_csf", ..: mean
    |read - true| over the mean true area, "z_error" in slices}.

    reduce: the pictures are first reduced by this factor; masks and areas stay those of 256 px.
    """
    overlap, sizes, area_error, z_error = torch.zeros(3), torch.zeros(3), torch.zeros(3), 0.0
    for index in util.progress(torch.arange(len(data)).split(32), f"accuracy at {SIZE // reduce} px", unit="batch"):
        x, z, _ = data.batch(index)
        logits, whole, _ = scorer(F.avg_pool2d(x, reduce))
        common, mean_sizes = overlaps(logits, data.masks[index])
        overlap, sizes = overlap + common.sum(0), sizes + mean_sizes.sum(0)
        true_areas = tissue_shares(data.masks[index]).sum((2, 3))
        area_error += (logits.softmax(1)[:, 1:].sum((2, 3)) - true_areas).abs().sum(0)
        z_error += float((expected_z(whole) - z).abs().sum())
    true_areas = torch.stack([(data.masks == value).sum() for value in MASK_VALUES[1:]])
    result = {f"dice_{name}": float(value) for name, value in zip(TISSUES, overlap / sizes)}
    result |= {f"area_error_{name}": float(value) for name, value in zip(TISSUES, area_error / true_areas)}
    return result | {"z_error": z_error / len(data)}


@torch.no_grad()
def draw_tissues(scorer: Scorer, data: Slices):
    """A sheet of slices of one brain: as they are, then with the true and with the read tissues in colour."""
    chosen = torch.arange(len(data))[data.case == data.case[0]][2::5]
    x, z, _ = data.batch(chosen)
    logits, whole, _ = scorer(x)
    colours = torch.tensor([[0, 0, 0], [60, 120, 255], [150, 150, 150], [255, 255, 255]], dtype=torch.uint8)
    labels = torch.searchsorted(torch.tensor(MASK_VALUES), data.masks[chosen].long())
    rows = [data.images[chosen][..., None].expand(-1, -1, -1, 3), colours[labels], colours[logits.argmax(1)]]
    captions = [f"z = {n}, read as {n_hat:.1f}" for n, n_hat in zip(z.tolist(), expected_z(whole).tolist())]
    return sheets.sheet(
        sheets.heads([row.numpy() for row in rows]),
        title=f"{data.split} case {int(data.case[0])}; CSF blue, grey matter grey, white matter white; anterior right",
        row_names=["slice", "mask", "read"],
        captions=captions + [""] * 2 * len(chosen),
    )
