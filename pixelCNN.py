"""Second stage for codes: a gated PixelCNN learns the grids of a VQ-VAE, code after code, and draws new brains.

    python pixelCNN.py                       # trains on model_ckpt/vqvae; the same command resumes
    python pixelCNN.py --sample --brains 4   # new brains; trains first if nothing was trained yet

Training stops when the validation likelihood no longer improves, and keeps the best weights. It writes model_ckpt/NAME
(the weights carry their first stage), log/NAME and NAME_vis; sampling writes, into NAME_vis/samples or --out DIR, a 4x8
sheet and 32 PNG slices per brain and process.gif, the grid filling row by row.
"""

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import util
from dataset import SLICES_PER_CASE, Slices, find_data, load_slices, to_uint8, write_slices
from logger import Logger
from model_VAE import VQVAE, load_first_stage, load_second_stage, save_second_stage
from module import Embedding
from util import UserError

SCRIPT = Path(__file__).name


# ----------------------------------------------------------------------------------------------------------- the model


def gate(features: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) of [B, 2 C, ...] split in two (van den Oord et al. 2016b, eq. 2)."""
    a, b = features.chunk(2, dim=1)
    return a.tanh() * b.sigmoid()


class GatedLayer(nn.Module):
    """One layer of both stacks: the vertical sees the rows above, the horizontal the codes to the left and it.

    Causality lies in the padding, not in masked weights: the inputs of the first layer are shifted by one row and one
    column, so from there on a position may see itself.
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
        return self.vertical(window) + self.embed_v(embedding)[:, :, None, None]

    def horizontal_gates(self, window: Tensor, vertical: Tensor, embedding: Tensor) -> Tensor:
        """[B, 2 C, rows, columns - reach]: each column sees itself, `reach` to the left, and the vertical gates."""
        return self.horizontal(window) + self.down(vertical) + self.embed_h(embedding)[:, :, None, None]

    def forward(self, v: Tensor, h: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        v_gates = self.vertical_gates(F.pad(v, (0, 0, self.reach, 0)), embedding)
        h_gates = self.horizontal_gates(F.pad(h, (self.reach, 0, 0, 0)), v_gates, embedding)
        return v + self.out_v(self.dropout(gate(v_gates))), h + self.out_h(self.dropout(gate(h_gates)))


class PixelCNN(nn.Module):
    """p(idx | z) = prod_i p(idx_i | idx_<i, z) in reading order (van den Oord et al. 2016b).

    Two stacks instead of one, which would have a blind spot above to the right. z enters every gate.

    Args:
        codebook_size: K.
        grid: (h, w) of the codes.
        channels, layers, kernel, dropout: of the stacks; kernel is odd.
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
    ):
        super().__init__()
        self.codebook_size, self.grid = codebook_size, tuple(grid)
        self.embed_idx = nn.Embedding(codebook_size, channels)
        self.position = nn.Parameter(torch.zeros(1, channels, *grid))
        self.embed_z = Embedding(2 * channels)
        self.layers = nn.ModuleList(GatedLayer(channels, kernel, 2 * channels, dropout) for _ in range(layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, 4 * channels, 1), nn.ReLU(),
                                  nn.Conv2d(4 * channels, codebook_size, 1))  # fmt: skip

    def forward(self, idx: Tensor, z: Tensor) -> Tensor:
        """Logits [B, K, h, w] of int64 idx [B, h, w] and z [B]; those at (r, c) depend only on codes before it."""
        codes = self.embed_idx(idx).movedim(-1, 1)
        v = F.pad(codes, (0, 0, 1, -1)) + self.position  # row r holds row r - 1
        h = F.pad(codes, (1, -1, 0, 0)) + self.position  # column c holds column c - 1
        embedding = F.silu(self.embed_z(z))
        for layer in self.layers:
            v, h = layer(v, h, embedding)
        return self.head(h)

    def bits(self, idx: Tensor, z: Tensor) -> Tensor:
        """-log2 p(idx | z) of each grid, float32 [B]: what an arithmetic coder with this model would pay."""
        return F.cross_entropy(self(idx, z).float(), idx, reduction="none").sum((1, 2)) / math.log(2)

    @torch.no_grad()
    def sample(self, z: Tensor, noise: Tensor, temperature: float = 1.0, progress: str | None = None) -> Tensor:
        """Codes int64 [B, h, w], each computed once: a layer keeps what it saw, rows in one stack, columns in another.

        The same codes as sample_naive, in 1 / (h w) of its work.

        Args:
            z: int64 [B].
            noise: Gumbel noise [B, K, h, w]; argmax(logits / temperature + noise) is an exact draw (Gumbel 1954).
            progress: title of a progress bar, if one is wanted.
        """
        B, (height, width) = len(z), self.grid
        embedding = F.silu(self.embed_z(z))
        idx = torch.zeros(B, height, width, dtype=torch.int64, device=z.device)
        reach, channels = self.layers[0].reach, self.position.shape[1]
        above = [z.new_zeros(B, channels, reach + 1, width, dtype=noise.dtype) for _ in self.layers]
        row_above = above[0][:, :, -1:]
        for r in tqdm(range(height), desc=progress, unit="row", disable=None if progress else True):
            # the vertical stack, one new row in every layer
            v, v_gates = row_above + self.position[:, :, r : r + 1], []
            for n, layer in enumerate(self.layers):
                above[n] = torch.cat([above[n][:, :, 1:], v], dim=2)
                v_gates.append(layer.vertical_gates(above[n], embedding))
                v = v + layer.out_v(gate(v_gates[n]))
            # the horizontal stack, one new column in every layer
            left = [z.new_zeros(B, channels, 1, reach + 1, dtype=noise.dtype) for _ in self.layers]
            code = z.new_zeros(B, channels, 1, 1, dtype=noise.dtype)
            codes = []
            for c in range(width):
                h = code + self.position[:, :, r : r + 1, c : c + 1]
                for n, layer in enumerate(self.layers):
                    left[n] = torch.cat([left[n][..., 1:], h], dim=3)
                    h = h + layer.out_h(gate(layer.horizontal_gates(left[n], v_gates[n][..., c : c + 1], embedding)))
                idx[:, r, c] = (self.head(h)[..., 0, 0] / temperature + noise[:, :, r, c]).argmax(1)
                code = self.embed_idx(idx[:, r, c])[:, :, None, None]
                codes.append(code)
            row_above = torch.cat(codes, dim=3)
        return idx

    @torch.no_grad()
    def sample_naive(self, z: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """The definition: the whole network once for every code. Arguments and result as `sample`."""
        idx = torch.zeros(len(z), *self.grid, dtype=torch.int64, device=z.device)
        for r in range(self.grid[0]):
            for c in range(self.grid[1]):
                idx[:, r, c] = (self(idx, z)[:, :, r, c] / temperature + noise[:, :, r, c]).argmax(1)
        return idx


# ------------------------------------------------------------------------------------------------------------ sampling


def gumbel_noise(seed: int, brain: int, codebook_size: int, grid: tuple[int, int]) -> Tensor:
    """Gumbel noise [32, K, h, w] of brain number `brain`, the same for its 32 slices.

    Neighbouring slices have nearly the same logits, so with common noise they mostly choose the same codes.
    """
    generator = torch.Generator().manual_seed(util.mix_seed(seed, brain))
    uniform = torch.rand(codebook_size, *grid, generator=generator).clamp(1e-20, 1 - 1e-7)
    return -torch.log(-torch.log(uniform)).expand(SLICES_PER_CASE, -1, -1, -1)


@torch.no_grad()
def sample_brain(model: PixelCNN, seed: int, brain: int, temperature: float, device: torch.device) -> Tensor:
    """Codes int64 [32, h, w] of one new brain; a function of (seed, brain)."""
    noise = gumbel_noise(seed, brain, model.codebook_size, model.grid).to(device)
    return model.sample(torch.arange(SLICES_PER_CASE, device=device), noise, temperature, f"brain {brain}")


@torch.no_grad()
def decode_codes(first_stage: VQVAE, idx: Tensor, z: Tensor | None = None) -> np.ndarray:
    """uint8 [B, S, S] of codes [B, h, w] at z, which runs 0 .. B - 1 unless given."""
    z = torch.arange(len(idx), device=idx.device) if z is None else z
    return to_uint8(first_stage.decode_indices(idx, z))[:, 0].cpu().numpy()


def filling_frames(first_stage: VQVAE, idx: Tensor, shown: list[int]) -> list[np.ndarray]:
    """Pictures uint8 [S, 4 S] of some slices after each row of codes; what is missing has the corner's code: black."""
    frames = []
    for r in range(idx.shape[1] + 1):
        partial = idx[:, :1, :1].expand_as(idx).clone()
        partial[:, :r] = idx[:, :r]
        z = torch.tensor(shown, device=idx.device)
        frames.append(np.hstack(decode_codes(first_stage, partial[shown], z)))
    return frames


def sample(args: argparse.Namespace) -> None:
    """Writes sheets, slices and the GIF of args.brains new brains."""
    device = util.pick_device(args.device)
    model, first_stage, description = load_second_stage(args.name, PixelCNN, device)
    out = args.out or Path(f"{args.name}_vis") / "samples"
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"sampling {args.brains} brains of run {args.name} (trained for {description['step']} steps), "
        f"seed {args.seed}, temperature {args.temperature}, on {util.describe_device(device)}"
    )
    for i in range(args.brains):
        idx = sample_brain(model, args.seed, i, args.temperature, device)
        slices = decode_codes(first_stage, idx)
        write_slices(out, i, slices)
        title = f"sampled brain {i}: seed {args.seed}, PixelCNN, temperature {args.temperature}, one noise for all z"
        util.save_picture(out / f"brain_{i:03d}.png", util.brain_sheet(slices, title))
        print(f"brain {i}: {out}/brain_{i:03d}.png and {out}/case_{i:03d}_slice_*.nii.png", flush=True)
        if i == 0:
            shown = [4, 12, 20, 28]
            util.save_gif(out / "process.gif", filling_frames(first_stage, idx, shown), seconds=4)
            print(f"codes filling row by row, slices z = {shown}: {out}/process.gif")


# ------------------------------------------------------------------------------------------------------------ training


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.training_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", default="vqvae", metavar="RUN", help="run name, folder or weights file (default: %(default)s)")
    add("--channels", type=util.positive_int, help="width of the stacks")
    add("--layers", type=util.positive_int, help="gated layers")
    add(
        "--dropout",
        type=util.fraction,
        default=0.3,
        help="on the gates; few brains overfit soon (default: %(default)s)",
    )
    add("--patience", type=util.positive_int, default=8, help="stop after so many reports without a better validation "
        "likelihood (default: %(default)s)")  # fmt: skip
    add("--sample", action="store_true", help="draw new brains instead of training")
    add("--brains", type=util.positive_int, default=1, help="how many (default: %(default)s)")
    add(
        "--temperature",
        type=util.positive_float,
        default=1.0,
        help="below 1 the likely codes win (default: %(default)s)",
    )
    add("--out", type=Path, metavar="DIR", help="where samples go; default: NAME_vis/samples")
    return parser


@torch.no_grad()
def encode_all(first_stage: VQVAE, data: Slices, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes int64 [N, h, w] and z int64 [N] of a whole split, kept on the device."""
    codes = []
    for index in tqdm(torch.arange(len(data)).split(64), desc=f"encode {data.split}", unit="batch", disable=None):
        x, z, _ = data.batch(index, device)
        codes.append(first_stage.encode_indices(x, z))
    return torch.cat(codes), data.z.to(device)


@torch.no_grad()
def validate(model: PixelCNN, codes: Tensor, z: Tensor, device: torch.device, precision: str) -> float:
    """Bits per image over the given grids."""
    with util.autocast(device, precision):
        return float(torch.cat([model.bits(a, b) for a, b in zip(codes.split(32), z.split(32), strict=True)]).mean())


def train(args: argparse.Namespace, typed: dict) -> None:
    """Trains, or resumes, the run args.name; exits when it is stopped on the way."""
    rank, world = util.start_processes()
    device = util.pick_device(args.device)
    args = util.open_run(SCRIPT, args, typed, lambda new: load_first_stage(new.first_stage).description["preset"])
    first_stage = load_first_stage(args.first_stage, device)
    if not isinstance(first_stage, VQVAE):
        raise UserError(f"--first-stage {args.first_stage} is a {first_stage.kind} and has no codes; train one with "
                        "python prestage_train.py --model vqvae, or use stable_diffusion.py")  # fmt: skip
    folder = find_data(args.data)
    print(
        f"run {args.name}: PixelCNN on the codes of {args.first_stage}, preset {args.preset}, at most {args.steps} "
        f"steps of {args.batch_size} grids on {util.describe_device(device)}"
    )

    # data: every slice is encoded once
    train_slices = load_slices(folder, "train", first_stage.image_size, device)
    held_out_slices = load_slices(folder, "validate", first_stage.image_size, device)
    codes, z_all = encode_all(first_stage, train_slices, device)
    held_out, held_out_z = encode_all(first_stage, held_out_slices, device)
    watched = torch.linspace(0, len(held_out) - 1, min(256, len(held_out))).round().long().to(device)

    # network
    torch.manual_seed(args.seed)
    model_kwargs = {
        "codebook_size": first_stage.codebook_size,
        "grid": first_stage.latent_shape[1:],
        "channels": args.channels,
        "layers": args.layers,
        "dropout": args.dropout,
    }
    model = PixelCNN(**model_kwargs).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), fused=True)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    checkpoint = Path("model_ckpt") / args.name / "last.pt"
    start, best, stale = 0, math.inf, 0
    if checkpoint.exists():
        state = util.load_checkpoint(checkpoint, SCRIPT)
        start, best, stale = state["step"], state["best"], state["stale"]
        util.check_same_first_stage(args.name, state["first_stage"], first_stage.description["digest"])
        util.fill_model(model, state["model"], checkpoint)
        util.fill_model(ema, state["ema"], checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        print(f"resumed at step {start}")
    forward = model
    if world > 1:  # nothing reads the vertical output of the last layer
        forward = DistributedDataParallel(model, find_unused_parameters=True)
    forward = torch.compile(forward) if args.compile else forward
    data = {"train": train_slices.describe(), "validate": held_out_slices.describe()}
    util.check_same_data(args.name, data)
    parameters = sum(p.numel() for p in model.parameters())
    run = util.describe_run(SCRIPT, args, data, parameters=parameters, first_stage=first_stage.description)
    if start >= args.steps or stale >= args.patience:
        print(f"run {args.name} is finished after {start} steps; raise --steps or --patience to go on, or --sample")
        return
    logger = Logger(args.name, run, step=start, every=max(1, args.report_every // 10), quiet=rank > 0)

    weights = checkpoint.with_name("model.safetensors")

    def save(step: int, improved: bool) -> None:
        """last.pt for resuming; model.safetensors, for use, when it improved, or when there is none yet."""
        state = {
            "script": SCRIPT,
            "step": step,
            "best": best,
            "stale": stale,
            "first_stage": first_stage.description["digest"],
        }
        state |= {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        util.save_checkpoint(checkpoint, state)
        if improved or not weights.exists():
            description = {"model_kwargs": model_kwargs, "step": step, "preset": args.preset, "data": data["train"]}
            save_second_stage(weights, ema, first_stage, description)

    def draw(step: int) -> None:
        slices = decode_codes(first_stage, sample_brain(ema, args.seed, 0, 1.0, device))
        title = f"sampled after {step} steps: seed {args.seed}, one noise for all z"
        tqdm.write(f"picture: {logger.picture(f'sample_{step:06d}', util.brain_sheet(slices, title))}")

    # training
    step = start
    steps = util.TrainingSteps(start, args.steps, args.minutes, args.name)
    for step in steps:
        torch.manual_seed(util.mix_seed(args.seed, step, rank))
        index = util.batch_index(args.seed, step, args.batch_size, len(codes), rank, world).to(device)
        rate = args.learning_rate * util.learning_rate_factor(step, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

        with util.autocast(device, args.precision):
            logits = forward(codes[index], z_all[index])
        loss = F.cross_entropy(logits.float(), codes[index])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        util.check_finite({"loss": loss, "gradient": norm}, step)
        optimizer.step()
        util.update_ema(ema, model, step)

        bits = loss.detach() * (codes[0].numel() / math.log(2))
        logger.add(step + 1, {"train/bits": bits, "learning_rate": rate}, args.batch_size * world)
        reported = (step + 1) % args.report_every == 0 or step + 1 == args.steps
        if reported:
            logger.flush(step + 1)
            bits = validate(ema, held_out[watched], held_out_z[watched], device, args.precision)
            best, stale = (bits, 0) if bits < best else (best, stale + 1)
            logger.report(step + 1, {"validate/bits": bits, "validate/best_bits": best})
            if rank == 0:
                save(step + 1, improved=stale == 0)
                draw(step + 1)
            logger.pause()
            if stale >= args.patience:
                print(f"the validation likelihood has not improved for {stale} reports: stopping")
                break

    if not reported and rank == 0:
        logger.flush(step + 1)
        save(step + 1, improved=False)
    print(f"weights: {weights}   log: {logger.folder}   pictures: {logger.pictures}")
    if math.isfinite(best):
        print(f"best on validate: {best:.0f} bits per image, against {first_stage.fixed_bits:.0f} at fixed length")
    finished = step + 1 == args.steps or stale >= args.patience
    if not finished:
        util.stop_unfinished(step + 1, steps)


def main() -> None:
    args, typed = util.parse_flags(flags())
    args.name = args.name or "pixelcnn"
    trained = (Path("model_ckpt") / args.name / "model.safetensors").is_file()
    if args.sample and not trained:
        print(f"there is no trained run {args.name} yet: training it first, then sampling")
    if args.sample and trained:
        util.check_sampling(SCRIPT, args.name, typed)
    else:
        train(args, typed)
    if args.sample and util.first_process():
        sample(args)


if __name__ == "__main__":
    util.command(main)
