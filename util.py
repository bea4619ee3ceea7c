"""What every script shares: flags and presets, devices and processes, seeds and steps, mathematics without layers.

Randomness is a function of (seed, step, rank) and the order of the data of (seed, epoch), so a resumed run repeats an
uninterrupted one without any generator state on disk.
"""

import argparse
import errno
import hashlib
import io
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. The message says what, where and what to do, in one line."""


# ----------------------------------------------------------------------------------------------- flags and presets

# One row per setting: demo (64 px, CPU minutes), small (256 px, CPU hours), base (256 px, one CUDA GPU).
PRESETS: dict[str, dict[str, tuple]] = {
    "prestage_train.py": {
        "image_size": (64, 256, 256),
        "steps": (600, 3800, 60_000),
        "batch_size": (32, 4, 32),
        "channels": (32, 128, 96),
        "channel_multipliers": ((1, 2), (1,), (1, 2)),
        "patch": (2, 8, 4),
        "blocks": (1, 3, 3),
        "codebook_size": (256, 1024, 1024),
        "learning_rate": (1e-3, 8e-4, 3e-4),
        "discriminator_channels": (32, 32, 64),
        "discriminator_start": (350, 2700, 40_000),
        "gan_start": (450, 2900, 45_000),
        "report_every": (200, 400, 1000),
    },
    "stable_diffusion.py": {
        "steps": (1000, 1600, 100_000),
        "batch_size": (64, 32, 128),
        "channels": (48, 64, 128),
        "channel_multipliers": ((1, 2), (1, 2, 3), (1, 2, 3)),
        "blocks": (1, 2, 2),
        "slices": (8, 1, 8),
        "moved_heads": (0, 0, 6),
        "learning_rate": (1e-3, 5e-4, 2e-4),
        "report_every": (500, 400, 5000),
    },
    "pixelCNN.py": {
        "steps": (600, 2400, 40_000),
        "batch_size": (32, 16, 64),
        "channels": (48, 64, 128),
        "layers": (6, 8, 12),
        "learning_rate": (1e-3, 8e-4, 3e-4),
        "report_every": (200, 400, 1000),
    },
}
PRESET_NAMES = ("demo", "small", "base")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        print(f"error: {message} ({self.prog} --help lists the flags)", file=sys.stderr)
        sys.exit(2)


def plain_parser(description: str) -> argparse.ArgumentParser:
    """An argument parser whose errors are one line."""
    return _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def training_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every training script has."""
    parser = plain_parser(description)
    add = parser.add_argument
    add(
        "--data",
        metavar="FOLDER",
        help="folder that holds keras_png_slices_*; default: $OASIS_DATA, "
        "else data/keras_png_slices_data, else the built-in phantom",
    )
    add("--name", help="name of the run: model_ckpt/NAME, log/NAME, NAME_vis; default: the model's name")
    add(
        "--preset",
        choices=PRESET_NAMES,
        help="sizes and lengths: demo 64 px for CPU minutes, small 256 px for CPU hours, base 256 px for a GPU; "
        "flags without a default below take theirs from here; default: for a first stage base on CUDA, else small, "
        "or demo on the phantom; for a second stage that of its first",
    )
    add("--steps", type=positive_int, help="optimiser steps of the whole run; raise it to train a finished run further")
    add("--minutes", type=positive_float, help="stop and save after this many minutes; default: no limit")
    add("--batch-size", type=positive_int, help="slices per step and process")
    add("--learning-rate", type=positive_float, help="Adam's, after warm-up")
    add("--report-every", type=positive_int, help="steps between reports, each with validation, pictures, checkpoint")
    add("--seed", type=seed, default=0, help="all randomness follows from it (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="bf16 is autocast: quantiser, losses and metrics stay float32; auto takes bf16 where the processor "
        "has it in hardware (default: %(default)s)",
    )
    add("--compile", action="store_true", help="torch.compile the networks: slow to start, then faster on a GPU")
    return parser


def add_decoder_flag(parser: argparse.ArgumentParser, default: str | None, usual: str) -> None:
    """--decoder, for every script that decodes with a first stage; `usual` says what the default means."""
    parser.add_argument(
        "--decoder",
        choices=("fidelity", "perceptual"),
        default=default,
        help="of the first stage: fidelity is nearest to the encoded slice, perceptual has its texture, if it was "
        f"trained (default: {usual})",
    )


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return value


def whole_number(text: str) -> int:
    """argparse type: an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 on")
    return int(text)


def seed(text: str) -> int:
    """argparse type: an integer that NumPy and PyTorch take as a seed."""
    if not text.isdecimal() or (value := int(text)) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no whole number between 0 and 2^63 - 1")
    return value


def number(text: str) -> float:
    """A finite number, for the argparse types below."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no number")
    return value


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    if (value := number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def fraction(text: str) -> float:
    """argparse type: a number in [0, 1]."""
    if not 0 <= (value := number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def preset_settings(script: str, preset: str) -> dict:
    """The preset's column for `script`, as {flag: value}."""
    column = PRESET_NAMES.index(preset)
    return {flag: values[column] for flag, values in PRESETS[script].items()}


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
    """Parses argv. Returns the settings with their plain defaults, and {flag: value} of what was typed."""
    plain, unset = vars(parser.parse_args([])), object()
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(plain, unset))))
    typed = {flag: value for flag, value in typed.items() if value is not unset}
    return argparse.Namespace(**{**plain, **typed}), typed


def command(main: Callable[[], None]) -> None:
    """Runs a script's main(). What a user can mend ends in one line and exit status 2; Ctrl-C in status 130."""
    try:
        main()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit(_complain("out of memory; choose a smaller --batch-size or --preset, or --device cpu"))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run the same command again" if full else "check that path and its permissions"
        sys.exit(_complain(f"{error.strerror or error}: {error.filename or 'while writing'}; {advice}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def run_script(script: str, flags: list) -> None:
    """Runs another script of the project and shows its command line. Raises UserError when it fails."""
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, flags)]
    print("run:", *command[1:], flush=True)
    status = subprocess.run(command, check=False).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"{script} failed, see above; change what it says, or remove the run it was to train")


def write_file(path: Path, content: bytes) -> None:
    """Writes all or nothing: to a temporary name beside `path`, flushed to disk, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


# ------------------------------------------------------------------------------------------- devices and processes


def start_processes() -> tuple[int, int]:
    """Joins torchrun's processes if it started us. Returns (rank, world size), which is (0, 1) otherwise."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if dist.get_rank():
            sys.stdout = io.StringIO()  # one process speaks
    return dist.get_rank(), dist.get_world_size()


def first_process() -> bool:
    """Whether this is the process that writes results; torchrun's processes wait for each other here."""
    if not dist.is_initialized():
        return True
    dist.barrier()
    return dist.get_rank() == 0


def pick_device(name: str) -> torch.device:
    """The device of this process for a --device flag. Raises UserError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device; use auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch sees no CUDA GPU; use --device cpu, or install a CUDA build")
        device = torch.device(
            "cuda", device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        )
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: there are {torch.cuda.device_count()} GPUs, counted from 0")
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 is asked for where 10 bits of mantissa would change codes
    elif device.type != "cpu":
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:0")
    return device


def describe_device(device: torch.device) -> str:
    """A phrase for people: the GPU's name, or the number of CPU threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of --precision. On a CPU, auto is bf16 only where AVX-512 or AMX multiply it."""
    if precision == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # processors with AMX have it too
        )
        precision = "bf16" if fast else "fp32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# -------------------------------------------------------------------------------------------------- seeds and steps


def mix_seed(*numbers: int | str) -> int:
    """One 63-bit seed from several numbers or words, such as (seed, step, rank); no two tuples collide in practice."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def brain_generator(seed: int, brain: int, *purpose: str) -> torch.Generator:
    """A generator on the CPU that is a function of (seed, brain), and of what it is for."""
    return torch.Generator().manual_seed(mix_seed(seed, brain, *purpose))


def batch_index(seed: int, step: int, batch_size: int, count: int, rank: int = 0, world: int = 1) -> Tensor:
    """int64 [batch_size]: which of `count` slices process `rank` sees in `step`; every epoch is one permutation."""
    position = step * batch_size * world + rank * batch_size + np.arange(batch_size)
    epoch = position // count
    shuffled = {e: np.random.default_rng((seed, e)).permutation(count) for e in np.unique(epoch)}
    return torch.tensor([shuffled[e][p % count] for e, p in zip(epoch, position)])


class TrainingSteps:
    """Iterates over start .. stop - 1 under a progress bar; ends early, after a whole step, on time limit or Ctrl-C.

    A second Ctrl-C interrupts at once. Under torchrun all processes end after the same step. Afterwards `interrupted`
    tells whether a signal ended it.
    """

    def __init__(self, start: int, stop: int, minutes: float | None, title: str):
        self.start, self.stop, self.minutes, self.title = start, stop, minutes, title
        self.interrupted = False

    def _note_signal(self, signum, frame) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        tqdm.write("stopping after this step and saving; Ctrl-C again stops at once")

    def __iter__(self) -> Iterator[int]:
        began = time.monotonic()
        previous = {s: signal.signal(s, self._note_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        silent = True if dist.is_initialized() and dist.get_rank() else None  # None: where there is no terminal
        steps = range(self.start, self.stop)
        bar = tqdm(steps, desc=self.title, initial=self.start, total=self.stop, unit="step", disable=silent)
        try:
            for step in bar:
                yield step
                late = self.minutes is not None and time.monotonic() - began > 60 * self.minutes
                if any_process(self.interrupted or late):
                    break
        finally:
            bar.close()
            for s, handler in previous.items():
                signal.signal(s, handler)


def stop_unfinished(step: int, steps: TrainingSteps) -> None:
    """Says how to continue, and exits: with status 130 after Ctrl-C, 0 after the time limit."""
    print(f"stopped after {step} of {steps.stop} steps; the same command continues")
    sys.exit(130 if steps.interrupted else 0)


def any_process(flag: bool) -> bool:
    """True when the flag is set in any of torchrun's processes."""
    if not dist.is_initialized():
        return flag
    total = torch.tensor(float(flag))
    dist.all_reduce(total)
    return bool(total > 0)


def mean_of_processes(value: Tensor | float) -> float:
    """The mean of a scalar over torchrun's processes."""
    if not dist.is_initialized():
        return float(value)
    total = torch.as_tensor(value).detach().cpu().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def learning_rate_factor(step: int, steps: int, warm_up: int = 100, final: float = 0.05) -> float:
    """Linear warm-up, then half a cosine from 1 to `final` at the last step."""
    ramp = min(1.0, (step + 1) / warm_up)
    return ramp * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def check_finite(losses: dict[str, Tensor], step: int) -> None:
    """Raises UserError naming the first term, of scalars on one device, that is NaN or infinite."""
    if torch.isfinite(torch.stack([value.detach().float() for value in losses.values()])).all():
        return
    for name, value in losses.items():
        if not torch.isfinite(value):
            raise UserError(
                f"{name} became {value.item()} at step {step}; the last checkpoint is good: "
                "run the same command with another --name and a lower --learning-rate, or --precision fp32"
            )


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float = 0.999) -> None:
    """ema <- d ema + (1 - d) model with d = min(decay, (1 + step) / (10 + step)); buffers are copied, not averaged.

    Frozen parameters stay as they are, to the last bit: averaging would turn -0 into 0, and change a digest.
    """
    decay = min(decay, (1 + step) / (10 + step))
    moving = [(kept, p.detach()) for kept, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_(*(list(part) for part in zip(*moving)), 1 - decay)
    for kept, current in zip(ema.buffers(), model.buffers()):
        kept.copy_(current)


# -------------------------------------------------------------------------------------------------------- mathematics


def sinusoidal_encoding(values: Tensor, dim: int, longest: float = 10_000.0) -> Tensor:
    """Sine and cosine features of positions or times (Vaswani et al. 2017, section 3.5).

    Args:
        values: [B], any real numbers.
        dim: number of features, even.
    Returns float32 [B, dim]: cos(v w_i) then sin(v w_i), with w_i falling geometrically from 1 to about 1 / longest.
    """
    if dim % 2:
        raise ValueError(f"dim must be even, not {dim}")
    frequency = torch.exp(torch.arange(dim // 2, device=values.device) * (-math.log(longest) / (dim // 2)))
    angle = values.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def window_matrix(size: int, like: Tensor) -> Tensor:
    """[size - 10, size]: row i holds the 11 weights of the gaussian window, sigma 1.5, from column i on."""
    position = torch.arange(-5, 6, dtype=like.dtype, device=like.device)
    window = torch.exp(-(position**2) / (2 * 1.5**2))
    matrix = torch.zeros(size - 10, size, dtype=like.dtype, device=like.device)
    for k, weight in enumerate(window / window.sum()):
        matrix.diagonal(k).fill_(weight)
    return matrix


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity at every valid position (Wang et al. 2004, eq. 13).

    Gaussian 11x11 window, sigma 1.5, K1 0.01, K2 0.03, population covariance.

    Args:
        x, y: floating [B, 1, H, W] in [0, 1], at least 11 pixels a side.
    Returns [B, 1, H - 10, W - 10]; position (i, j) is centred on pixel (i + 5, j + 5).
    """

    def blur(image):  # two products with banded matrices: on a CPU ten times faster than one-channel convolutions
        height, width = image.shape[-2:]
        return window_matrix(height, image) @ image @ window_matrix(width, image).T

    mean_x, mean_y, mean_xx, mean_yy, mean_xy = blur(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    var_x, var_y, cov = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    return (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
