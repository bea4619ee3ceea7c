"""Second stage for codes: a gated PixelCNN learns the grids of a VQ-VAE, code after code, and draws new brains.

    python pixelCNN.py                       # trains on model_ckpt/vqvae; the same command resumes
    python pixelCNN.py --sample --brains 4   # new brains; from the released weights if nothing was trained here

The codes of a VQ-VAE-2 (--first-stage) get two networks, p(top) p(bottom | top); those of finite scalar quantisation
are predicted digit by digit.

Training stops when the validation likelihood no longer improves, and keeps the best weights. It writes model_ckpt/NAME
(the weights carry their first stage), log/NAME and NAME_vis; sampling writes, into NAME_vis/samples or --out DIR, per
brain a 4x8 sheet, a GIF through z, reslices, a NIfTI volume and PNG slices (pictures/volume.py), process.gif, a
slice that appears code by code, samples.json, what they come from, README.md, a card that says so in words, and
index.html, a page that shows them in three planes. The folder is a data folder, as that of stable_diffusion.py.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import util
from dataset import Slices, find_data, load_slices, to_slices
from model_VAE import VQVAE, VQVAE2
from module import Embedding, Upsample
from parts.quantizer import digits_of
from pictures import sheets
from pictures.volume import Samples, samples_folder, write_index
from scores.card import write_card
from scores.scorer import find_scorer, read_masks
from training.checkpoints import RELEASED, run_weights
from training.run import Run
from training.settings import LESS_MEMORY, Flags, describe_samples, open_run, weights_to_sample
from training.stages import allow_brains, load_first_stage, load_second_stage, preset_of_first_stage, save_second_stage
from util import UserError

SCRIPT = Path(__file__).name
WATCHED_SLICES = 256  # of validation, at every report
FRAMES, NO_CODE = 24, 64  # of process.gif, and the grey where no code is drawn yet


# ----------------------------------------------------------------------------------------------------------- the model


def gate(features: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) of [B, 2 C, ...] split in two (van den Oord et al. 2016b, eq. 2)."""
    a, b = features.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()


def at_one_position(convolution: nn.Conv2d, window: Tensor) -> Tensor:
    """[B, C] of windows [B, inputs, ...] as large as the kernel: a matrix product, in a third of the time."""
    return F.linear(window.flatten(1), convolution.weight.flatten(1), convolution.bias)


class GatedLayer(nn.Module):
    """One layer of both stacks: the vertical sees the rows above, the horizontal the codes to the left and it.

    Causality lies in the padding, not in masked weights: the inputs of the first layer are shifted by one row and one
    column, so from there on a position may see itself. The embedding [B, h, w, E], or [B, 1, 1, E] if it is the same
    everywhere, enters the gates of both.
    """

    def __init__(self, channels: int, kernel: int, embedding_dim: int, dropout: float):
        super().__init__()
        self.reach = kernel // 2
        self.vertical = nn.Conv2d(channels, 2 * channels, (self.reach + 1, kernel))
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, self.reach + 1))
        self.down = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.out_v, self.out_h = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.embed_v, self.embed_h = (nn.Linear(embedding_dim, 2 * channels) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def vertical_gates(self, window: Tensor, embedding: Tensor) -> Tensor:
        """[B, 2 C, rows - reach, w] of vertical features [B, C, rows, w]: each row sees itself and `reach` above."""
        window = F.pad(window, (self.reach, self.reach, 0, 0))
        return self.vertical(window) + self.embed_v(embedding).movedim(-1, 1)

    def from_above(self, v_gates: Tensor, embedding: Tensor) -> Tensor:
        """What the horizontal gates get besides their own window, [B, 2 C, rows, w]."""
        return self.down(v_gates) + self.embed_h(embedding).movedim(-1, 1)

    def forward(self, v: Tensor, h: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        v_gates = self.vertical_gates(F.pad(v, (0, 0, self.reach, 0)), embedding)
        h_gates = self.horizontal(F.pad(h, (self.reach, 0, 0, 0))) + self.from_above(v_gates, embedding)
        kept_v, kept_h = (util.draw_together(self.dropout, gate(gates)) for gates in (v_gates, h_gates))
        return v + self.out_v(kept_v), h + self.out_h(kept_h)

    def next_column(self, window: Tensor, from_above: Tensor) -> Tensor:
        """The horizontal features [B, C] of one position, as forward in evaluation mode.

        window: [B, C, reach + 1], what came in there and to the left; from_above: [B, 2 C].
        """
        h_gates = at_one_position(self.horizontal, window) + from_above
        return window[..., -1] + at_one_position(self.out_h, gate(h_gates))


class CodeEmbedding(nn.Embedding):
    """Codes to vectors: the sum of a learned vector for each digit, of which digit i has levels[i]."""

    def __init__(self, levels: tuple[int, ...], channels: int):
        super().__init__(sum(levels), channels)
        self.levels = levels
        with torch.no_grad():
            self.weight.mul_(len(levels) ** -0.5)  # the sum starts with unit variance

    def of_digit(self, i: int, digit: Tensor) -> Tensor:
        """[B, channels, ...] of int64 [B, ...], values of digit i."""
        return super().forward(digit + sum(self.levels[:i])).movedim(-1, 1)

    def forward(self, idx: Tensor) -> Tensor:
        """[B, channels, ...] of int64 codes [B, ...]."""
        return sum(self.of_digit(i, digit) for i, digit in enumerate(digits_of(idx, self.levels)))


def draw(logits: Tensor, noise: Tensor, temperature: float, top_p: float) -> Tensor:
    """int64 [B], drawn by Gumbel noise from softmax(logits / temperature), cut down to its nucleus; both [B, L].

    argmax(logits + noise) is an exact draw (Gumbel 1954). The nucleus is the fewest likeliest values that have
    probability top_p together (Holtzman et al. 2020); 1 is all values, 0 the likeliest alone.
    """
    logits = logits / temperature
    if top_p < 1:
        p, order = logits.softmax(1).sort(1, descending=True)
        outside = p.cumsum(1) - p >= top_p  # the likelier ones are enough
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return (logits + noise).argmax(1)


class PixelCNN(nn.Module):
    """p(idx | z) = prod_i p(idx_i | idx_<i, z) in reading order (van den Oord et al. 2016b).

    Two stacks instead of one, which would have a blind spot above to the right. z enters every gate, and so may the
    codes `top` of a grid of half the size, all of them at every position. A code of several digits is predicted digit
    by digit: p(d_1 | context) p(d_2 | d_1, context) and so on, so that K may be huge.

    Args:
        codebook_size: K.
        grid: (h, w) of the codes.
        channels, layers, kernel, dropout: of the stacks; kernel is odd.
        levels: how many values each digit of a code has, as in finite scalar quantisation; None: one digit of K.
        sees_top: whether there are codes `top`, int64 [B, h / 2, w / 2], with the same K and levels.
        slices_per_brain: Z, how many slices sampling draws.
    """

    kind, script = "pixelcnn", "pixelCNN.py"

    def __init__(
        self,
        *,
        codebook_size: int,
        grid: tuple[int, int],
        channels: int,
        layers: int,
        kernel: int = 5,
        dropout: float = 0.3,
        levels: tuple[int, ...] | None = None,
        sees_top: bool = False,
        slices_per_brain: int = 32,
    ):
        super().__init__()
        self.slices_per_brain = slices_per_brain
        self.codebook_size, self.grid, self.levels = codebook_size, tuple(grid), tuple(levels or [codebook_size])
        if math.prod(self.levels) != codebook_size:
            raise ValueError(f"the product of levels {self.levels} is not codebook_size {codebook_size}")
        self.embed_idx = CodeEmbedding(self.levels, channels)
        self.position = nn.Parameter(torch.zeros(1, channels, *grid))
        self.embed_z = Embedding(2 * channels)
        self.layers = nn.ModuleList(GatedLayer(channels, kernel, 2 * channels, dropout) for _ in range(layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, 4 * channels, 1), nn.ReLU(),
                                  nn.Conv2d(4 * channels, sum(self.levels), 1))  # fmt: skip
        self.embed_digits = CodeEmbedding(self.levels[:-1], channels) if len(self.levels) > 1 else None
        self.embed_top = None
        if sees_top:
            self.embed_top = nn.Sequential(CodeEmbedding(self.levels, channels), Upsample(channels, channels),
                                           nn.SiLU(), nn.Conv2d(channels, 2 * channels, 3, padding=1))  # fmt: skip

    @property
    def grids(self) -> tuple[tuple[int, int]]:
        """The only grid, for those who ask in the plural."""
        return (self.grid,)

    def embedding(self, z: Tensor, top: Tensor | None) -> Tensor:
        """What enters every gate: [B, 1, 1, E] of z alone, [B, h, w, E] of z and the codes top."""
        embedding = self.embed_z(z)[:, None, None]
        if self.embed_top is not None:
            embedding = embedding + self.embed_top(top).movedim(1, -1)
        return F.silu(embedding)

    def digit_logits(self, i: int, features: Tensor) -> Tensor:
        """Logits [B, L_i(, h, w)] of digit i, given features [B, C(, h, w)] that know the digits before it."""
        for layer in self.head:
            at_once = features.ndim == 2 and isinstance(layer, nn.Conv2d)
            features = at_one_position(layer, features) if at_once else layer(features)
        return features.split(self.levels, dim=1)[i]

    def logits(self, idx: Tensor, z: Tensor, top: Tensor | None = None) -> list[Tensor]:
        """For each digit [B, L_i, h, w], given int64 idx [B, h, w], z [B] and, if the network sees it, top.

        Those of digit i at (r, c) depend only on codes before (r, c) and on the digits before i.
        """
        codes, embedding = self.embed_idx(idx), self.embedding(z, top)
        v = F.pad(codes, (0, 0, 1, -1)) + self.position  # row r holds row r - 1
        h = F.pad(codes, (1, -1, 0, 0)) + self.position  # column c holds column c - 1
        for layer in self.layers:
            v, h = layer(v, h, embedding)
        logits = [self.digit_logits(0, h)]
        for i, digit in enumerate(digits_of(idx, self.levels)[:-1]):
            h = h + self.embed_digits.of_digit(i, digit)
            logits.append(self.digit_logits(i + 1, h))
        return logits

    def bits(self, idx: Tensor, z: Tensor, top: Tensor | None = None) -> Tensor:
        """-log2 p(idx | z) of each grid, float32 [B]: what an arithmetic coder with this model would pay."""
        digits = zip(self.logits(idx, z, top), digits_of(idx, self.levels), strict=True)
        nats = sum(F.cross_entropy(logits.float(), digit, reduction="none").sum((1, 2)) for logits, digit in digits)
        return nats / math.log(2)

    def forward(self, idx: Tensor, z: Tensor) -> dict[str, Tensor]:
        """{"bits": [B]}, what training minimises."""
        return {"bits": self.bits(idx, z)}

    def gumbel_noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Standard Gumbel noise [L_1 + ... + L_n, h, w] for one draw: a number for each value of each digit."""
        uniform = torch.rand(sum(self.levels), *self.grid, generator=generator).clamp(1e-20, 1 - 1e-7)
        return -torch.log(-torch.log(uniform))

    def draw_code(self, features: Tensor, noise: Tensor, temperature: float, top_p: float) -> Tensor:
        """int64 [B]: a code drawn digit by digit, given features [B, C] and noise [B, L_1 + ... + L_n]."""
        idx, place = 0, 1
        for i, part in enumerate(noise.split(self.levels, dim=1)):
            digit = draw(self.digit_logits(i, features), part, temperature, top_p)
            idx, place = idx + place * digit, place * self.levels[i]
            if i + 1 < len(self.levels):
                features = features + self.embed_digits.of_digit(i, digit)
        return idx

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top: Tensor | None = None,
        progress: str | None = None,
    ) -> Tensor:
        """Codes int64 [B, h, w], each computed once: a layer keeps what it saw, rows in one stack, columns in another.

        The same codes as sample_naive, in 1 / (h w) of its work.

        Args:
            z: int64 [B].
            noise: Gumbel noise [B, L_1 + ... + L_n, h, w].
            temperature, top_p: as in draw, at every digit.
            top: the codes of the grid of half the size, if this network sees them.
            progress: title of a progress bar, if one is wanted.
        """
        B, (height, width) = len(z), self.grid
        embedding = self.embedding(z, top).expand(-1, height, -1, -1)
        idx = torch.zeros(B, height, width, dtype=torch.int64, device=z.device)
        reach, channels = self.layers[0].reach, self.position.shape[1]
        above = [noise.new_zeros(B, channels, reach + 1, width) for _ in self.layers]
        row_above = above[0][:, :, -1:]
        for r in util.progress(range(height), progress, unit="row") if progress else range(height):
            # the vertical stack, one new row in every layer
            v, from_above = row_above + self.position[:, :, r : r + 1], []
            for n, layer in enumerate(self.layers):
                above[n] = torch.cat([above[n][:, :, 1:], v], dim=2)
                v_gates = layer.vertical_gates(above[n], embedding[:, r : r + 1])
                from_above.append(layer.from_above(v_gates, embedding[:, r : r + 1])[:, :, 0].unbind(-1))
                v = v + layer.out_v(gate(v_gates))
            # the horizontal stack, one new column in every layer
            left = [noise.new_zeros(B, channels, reach + 1) for _ in self.layers]
            codes = [noise.new_zeros(B, channels)]
            for c in range(width):
                h = codes[-1] + self.position[:, :, r, c]
                for n, layer in enumerate(self.layers):
                    left[n] = torch.cat([left[n][..., 1:], h[..., None]], dim=2)
                    h = layer.next_column(left[n], from_above[n][c])
                idx[:, r, c] = self.draw_code(h, noise[:, :, r, c], temperature, top_p)
                codes.append(self.embed_idx(idx[:, r, c]))
            row_above = torch.stack(codes[1:], dim=-1)[:, :, None]
        return idx

    @torch.no_grad()
    def sample_naive(
        self, z: Tensor, noise: Tensor, temperature: float = 1.0, top_p: float = 1.0, top: Tensor | None = None
    ) -> Tensor:
        """The definition: the whole network once for every digit of every code. Arguments and result as `sample`."""
        idx = torch.zeros(len(z), *self.grid, dtype=torch.int64, device=z.device)
        for r in range(self.grid[0]):
            for c in range(self.grid[1]):
                for i, part in enumerate(noise[:, :, r, c].split(self.levels, dim=1)):
                    digit = draw(self.logits(idx, z, top)[i][:, :, r, c], part, temperature, top_p)
                    idx[:, r, c] += digit * math.prod(self.levels[:i])
        return idx


class PixelCNN2(nn.Module):
    """p(top, bottom | z) = p(top | z) p(bottom | top, z): a PixelCNN for each grid of a VQVAE2 (Razavi et al. 2019).

    They share no weight, so training on the sum of their bits is training each. Codes and noise are (top, bottom).

    Args:
        grids: (h, w) of top and bottom.
        sizes: keywords of both.
    """

    kind, script = "pixelcnn2", "pixelCNN.py"

    def __init__(self, *, grids: tuple[tuple[int, int], tuple[int, int]], **sizes):
        super().__init__()
        self.top = PixelCNN(grid=grids[0], **sizes)
        self.bottom = PixelCNN(grid=grids[1], sees_top=True, **sizes)
        self.grids, self.slices_per_brain = (self.top.grid, self.bottom.grid), self.top.slices_per_brain

    def forward(self, idx: tuple[Tensor, Tensor], z: Tensor) -> dict[str, Tensor]:
        """{"top_bits": [B], "bottom_bits": [B]}, whose sum training minimises."""
        return {"top_bits": self.top.bits(idx[0], z), "bottom_bits": self.bottom.bits(idx[1], z, idx[0])}

    def bits(self, idx: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
        """-log2 p(top, bottom | z) of each image, float32 [B]."""
        return sum(self(idx, z).values())

    def gumbel_noise(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """PixelCNN.gumbel_noise for top and bottom."""
        return self.top.gumbel_noise(generator), self.bottom.gumbel_noise(generator)

    def sample(
        self,
        z: Tensor,
        noise: tuple[Tensor, Tensor],
        temperature: float = 1.0,
        top_p: float = 1.0,
        progress: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Codes (top, bottom), drawn in this order as PixelCNN.sample does."""
        top = self.top.sample(z, noise[0], temperature, top_p, progress=progress)
        return top, self.bottom.sample(z, noise[1], temperature, top_p, top, progress)


PRIORS = {prior.kind: prior for prior in (PixelCNN, PixelCNN2)}


# -------------------------------------------------------------------------------------------- codes of one or two grids

Codes = Tensor | tuple[Tensor, Tensor]  # idx int64 [B, h, w] of a VQVAE, (top, bottom) of a VQVAE2


def grids_of(codes: Codes) -> tuple[Tensor, ...]:
    """(idx,) or (top, bottom)."""
    return (codes,) if isinstance(codes, Tensor) else codes


def each_grid(function: Callable[..., Tensor], *codes: Codes) -> Codes:
    """function(*codes) of the only grid, or of both, top and bottom."""
    if isinstance(codes[0], Tensor):
        return function(*codes)
    return tuple(function(*grid) for grid in zip(*codes, strict=True))


def pick(codes: Codes, index: Tensor) -> Codes:
    """The codes of some slices, int64 index [n]."""
    return each_grid(lambda grid: grid[index], codes)


# ------------------------------------------------------------------------------------------------------------ sampling


def brain_noise(model: PixelCNN | PixelCNN2, seed: int, brain: int) -> Codes:
    """Gumbel noise [Z, L_1 + ... + L_n, h, w] of brain number `brain`, the same for its Z slices.

    Neighbouring slices have nearly the same logits, so with common noise they mostly choose the same codes.
    """
    noise = model.gumbel_noise(util.brain_generator(seed, brain))
    return each_grid(lambda grid: grid.expand(model.slices_per_brain, -1, -1, -1), noise)


@torch.no_grad()
def sample_brain(
    model: PixelCNN | PixelCNN2, seed: int = 0, brain: int = 0, temperature: float = 1.0, top_p: float = 1.0
) -> Codes:
    """Codes of all slices of one new brain; a function of (seed, brain)."""
    z = torch.arange(model.slices_per_brain, device=next(model.parameters()).device)
    noise = each_grid(lambda grid: grid.to(z.device), brain_noise(model, seed, brain))
    return model.sample(z, noise, temperature, top_p, progress=f"brain {brain}")


@torch.no_grad()
def decode_brain(first_stage: VQVAE | VQVAE2, idx: Codes, seed: int = 0, brain: int = 0) -> np.ndarray:
    """uint8 [Z, S, S] of the codes of a brain in the order of z, with texture if there is any."""
    Z, device = len(grids_of(idx)[0]), grids_of(idx)[0].device
    latent, generator = first_stage.dequantise(idx), util.brain_generator(seed, brain, "texture")
    x = first_stage.draw(latent, torch.arange(Z, device=device), generator)
    return to_slices(x).cpu().numpy()


def filling(picture: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A decoded picture uint8 [H, W] that appears code by code: uint8 [FRAMES, H, W], and how many codes are in each.

    Every code of the grid (h, w) uncovers its block of H / h by W / w pixels. From each picture to the next as much
    changes.
    """
    h, w = grid
    order = np.arange(h * w).reshape(grid).repeat(len(picture) // h, 0).repeat(picture.shape[1] // w, 1)
    change = np.bincount(order.flatten(), np.abs(picture.astype(float) - NO_CODE).flatten())
    drawn = sheets.even_positions(change, FRAMES).round().astype(int)
    return np.where(order < drawn[:, None, None], picture, np.uint8(NO_CODE)), drawn


def sample(args: argparse.Namespace, declared: Flags, weights: Path) -> None:
    """Writes args.brains new brains, and the GIF of the first."""
    device = util.pick_device(args.device)
    model, first_stage = load_second_stage(weights, PRIORS, device)
    scorer, about = find_scorer()
    scorer.to(device)
    how = f"temperature {args.temperature}" + (f", top-p {args.top_p}" if args.top_p < 1 else "")
    how += f", {first_stage.decoder_in_use} decoder"
    made_by = describe_samples(declared, weights, args, model.description, scorer=about["digest"])
    out = args.out or samples_folder(args.name, made_by)
    samples = Samples(out, made_by)
    print(
        f"sampling {args.brains} brains of {weights} (trained for {model.description['step']} steps), "
        f"seed {args.seed}, {how}, on {util.describe_device(device)}"
    )
    for i in samples.missing(range(args.brains), model.slices_per_brain, first_stage.image_size):
        idx = sample_brain(model, args.seed, i, args.temperature, args.top_p)
        slices = decode_brain(first_stage, idx, args.seed, i)
        if i == 0:  # before the brain is recorded: after that it is not drawn again
            z, (*_, (h, w)) = len(slices) // 2, (grid.shape[1:] for grid in grids_of(idx))
            pictures, drawn = filling(first_stage.crop(slices[z]), (h, w))
            frames = sheets.frames(pictures, f"slice z = {z} of brain 0, code by code; grey: no code yet",
                                   [f"{n} of {h * w} codes" for n in drawn])  # fmt: skip
            sheets.save_gif(out / "process.gif", frames, seconds=4)
            print(f"codes filling the grid, slice z = {z}: {out}/process.gif")
        words = f"seed {args.seed}, PixelCNN, {how}, one noise for all z"
        samples.add(i, slices, f"brain {i}", words, masks=read_masks(scorer, slices))
    write_card(out)
    write_index(out)


# ------------------------------------------------------------------------------------------------------------ training


def flags() -> Flags:
    """This script's command line."""
    flags = Flags(SCRIPT, __doc__)
    train, sample, positive = flags.train, flags.sample, util.positive_int
    train("--first-stage", default="vqvae", metavar="RUN", help="run name, folder or weights file")
    train("--steps", type=positive, changeable=True, help="optimiser steps at most")
    train("--batch-size", type=positive, help="slices per step and process")
    train("--learning-rate", type=util.positive_float, help="Adam's, after warm-up")
    train("--channels", type=positive, help="width of both stacks")
    train("--layers", type=positive, help="gated layers")
    train("--dropout", type=util.fraction, default=0.3, help="on the gates; few brains are soon learned by heart")
    train("--patience", type=positive, default=4, changeable=True, help="stop after so many reports, of which there "
          "are ten, without a better validation likelihood")  # fmt: skip
    flags.add_sampling("NAME_vis/samples")
    sample("--temperature", type=util.positive_float, default=1.0, help="below 1 the likely codes win")
    sample("--top-p", type=util.fraction, default=1.0, metavar="P", help="draw only among the likeliest codes that "
           "have probability P together")  # fmt: skip
    return flags


class Patience:
    """Early stopping: how many reports in a row have not improved on the best."""

    def __init__(self, limit: int):
        self.limit, self.best, self.stale = limit, math.inf, 0

    def improves(self, bits: float) -> bool:
        """Takes the bits of one more report, and says whether they are the best."""
        self.best, self.stale = (bits, 0) if bits < self.best else (self.best, self.stale + 1)
        return self.stale == 0

    @property
    def exhausted(self) -> bool:
        """Whether to stop."""
        return self.stale >= self.limit

    def state_dict(self) -> dict:
        """What load_state_dict takes."""
        return {"best": self.best, "stale": self.stale}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from there."""
        self.best, self.stale = state["best"], state["stale"]


@torch.no_grad()
def encode_all(first_stage: VQVAE | VQVAE2, data: Slices) -> tuple[Codes, Tensor]:
    """Codes and z int64 [N] of a whole split, kept on the device."""
    codes, device = [], first_stage.latent_mean.device
    for index in util.progress(torch.arange(len(data)).split(64), f"encode {data.split}", unit="batch"):
        x, z, _ = data.batch(index, device)
        codes.append(first_stage.encode_indices(x, z))
    return each_grid(lambda *parts: torch.cat(parts), *codes), data.z.to(device)


@torch.no_grad()
def validate(model: PixelCNN | PixelCNN2, codes: Codes, z: Tensor, run: Run) -> dict[str, float]:
    """{"bits": per image over the given codes}, and of a VQ-VAE-2 also {"top_bits", "bottom_bits"}."""
    with run.autocast():
        parts = [model(pick(codes, index), z[index]) for index in torch.arange(len(z), device=z.device).split(32)]
    bits = {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}
    return bits | {"bits": sum(bits.values())}


def build(args: argparse.Namespace, first_stage: VQVAE | VQVAE2, data: Slices) -> tuple[nn.Module, dict]:
    """The untrained prior and the keywords that rebuild it."""
    kwargs = {
        "codebook_size": first_stage.codebook_size,
        "levels": getattr(first_stage.quantizer, "levels", None),
        "channels": args.channels,
        "layers": args.layers,
        "dropout": args.dropout,
        "slices_per_brain": data.slices_per_brain,
    }
    if isinstance(first_stage, VQVAE2):
        kwargs |= {"grids": first_stage.grids}
        return PixelCNN2(**kwargs), kwargs
    kwargs |= {"grid": first_stage.latent_shape[1:]}
    return PixelCNN(**kwargs), kwargs


def train(args: argparse.Namespace) -> None:
    """Trains, or resumes, the run args.name; exits when it is stopped on the way."""
    device = util.pick_device(args.device)
    first_stage = load_first_stage(args.first_stage, device)
    if not isinstance(first_stage, VQVAE | VQVAE2):
        raise UserError(f"--first-stage {args.first_stage} is a {first_stage.kind} and has no codes; train one with "
                        "python prestage_train.py --model vqvae, or use stable_diffusion.py")  # fmt: skip
    folder = find_data(args.data)
    data = {split: load_slices(folder, split, first_stage.image_size, device) for split in ("train", "validate")}
    allow_brains(first_stage, *data.values())

    # every slice is encoded once
    codes, z = encode_all(first_stage, data["train"])
    held_out, held_out_z = encode_all(first_stage, data["validate"])
    watched = torch.linspace(0, len(held_out_z) - 1, min(WATCHED_SLICES, len(held_out_z))).round().long().to(device)
    held_out, held_out_z = pick(held_out, watched), held_out_z[watched]

    torch.manual_seed(args.seed)
    model, model_kwargs = build(args, first_stage, data["train"])
    nats_per_code = math.log(2) / sum(math.prod(grid) for grid in model.grids)  # of one bit per image
    patience = Patience(args.patience)
    run = Run(args, model, data=data, steps=args.steps, built_on=first_stage.description["digest"],
              keep={"patience": patience})  # fmt: skip
    for _ in () if patience.exhausted else run.steps():
        index = run.index(len(z)).to(device)
        with run.autocast():
            bits = run.forward(pick(codes, index), z[index])
        loss = sum(bits.values()).mean() * nats_per_code  # of the order of 1 at every size
        improved = False
        if run.update({"loss": loss}):
            if run.report_due:
                scores = validate(run.ema, held_out, held_out_z, run)
                if scores["bits"] > first_stage.fixed_bits:
                    print(f"worse than guessing, which takes {first_stage.fixed_bits:.0f} bits per image: if that "
                          "stays so, choose another --name and a lower --learning-rate")  # fmt: skip
                # torchrun's processes all stop together
                improved = patience.improves(float(util.mean_of_processes(torch.tensor(scores["bits"]))))
                slices = decode_brain(first_stage, sample_brain(run.ema, args.seed))
                title = f"sampled after {run.done} steps: seed {args.seed}, one noise for all z"
                scores = {f"validate/{name}": value for name, value in scores.items()}
                run.report(scores | {"validate/best_bits": patience.best}, sample=sheets.brain_sheet(slices, title))
            if improved or not run.weights.exists():  # the weights for use are the best
                description = {"model_kwargs": model_kwargs, **run.described()}
                save_second_stage(run.weights, run.ema, first_stage, description)
            run.save()
            if patience.exhausted:
                print(f"the validation likelihood has not improved for {patience.stale} reports: stopping")
                break
    run.finish()
    if math.isfinite(patience.best):
        print(f"best on validate: {patience.best:.0f} bits per image; {first_stage.fixed_bits:.0f} at fixed length")
    run.say_where()


def main() -> None:
    declared = flags()
    args, typed = declared.parse()
    args.name = args.name or PixelCNN.kind
    util.start_processes()
    weights = weights_to_sample(declared, args, typed, RELEASED / "pixelcnn.safetensors") if args.sample else None
    if weights is None:
        train(open_run(declared, args, typed, preset_of_first_stage))
        weights = run_weights(args.name)
    if args.sample and util.first_process():
        sample(args, declared, weights)


if __name__ == "__main__":
    util.command(main, LESS_MEMORY)
