"""What every script shares: flag types and errors, devices and processes, seeds, progress, mathematics without layers.

Randomness is a function of (seed, step) and the order of the data of (seed, epoch), so a resumed run repeats an
uninterrupted one without any generator state on disk. Several processes draw together, see draw_together.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

LOCK, OWNER = ".lock", ".owner"  # files in a folder that a process has made its own
MAKING = ".making"  # how names of files end that are not whole yet


class UserError(Exception):
    """Something the user can mend. The message says what, where and what to do, in one line."""


# ------------------------------------------------------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        sys.exit(_complain(f"{message} ({self.prog} --help lists the flags)"))


def plain_parser(description: str) -> argparse.ArgumentParser:
    """An argument parser whose errors are one line."""
    return _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


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


def command(main: Callable[[], None], less_memory: str = "close other programs") -> None:
    """Runs a script's main(). What a user can mend ends in one line and exit status 2; Ctrl-C in status 130.

    less_memory: what this script advises where memory is too small.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook has something else
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold anything
    try:
        main()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except (RuntimeError, MemoryError) as error:
        # on a CPU PyTorch raises a plain RuntimeError
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        sys.exit(_complain(f"out of memory; {less_memory}"))
    except BrokenPipeError:
        sys.exit(_complain("nothing reads this output any more; run the same command again without that pipe"))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run the same command again" if full else "check that path and its permissions"
        sys.exit(_complain(f"{error.strerror or error}: {error.filename or 'while writing'}; {advice}"))
    except KeyboardInterrupt:
        print("interrupted; give the same command again to go on", file=sys.stderr)
        sys.exit(130)
    finally:
        disown()
        if dist.is_initialized():  # else threads that wait for the other processes may abort this one at its exit
            dist.destroy_process_group()


def run_script(script: str, flags: list) -> None:
    """Runs another script of the project and shows its command line. Raises UserError when it fails."""
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, flags)]
    print("run:", *command[1:], flush=True)
    status = subprocess.run(command, check=False).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"{script} failed, see above; mend what it says and run this again")


def write_file(path: Path, content: bytes) -> None:
    """Writes all or nothing, see whole. Of torchrun's processes only the first writes."""
    if speaks():
        with whole(path) as making, open(making, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The name beside `path` under which a file is made, that becomes `path` in the end; after an error it is removed.

    A process that was killed may leave one behind; it goes when the file is made again. A file has one maker at a time:
    the process that owns the folder, or is alone in it.
    """
    making = path.with_name(f".{path.name}{MAKING}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield making
        os.replace(making, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where it is
            error.filename = str(path)
        making.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """As whole, but for a folder, which is this process's own meanwhile. Raises UserError if `path` is there."""
    if path.exists():
        raise UserError(f"{path} exists already; name a new folder")
    making = path.with_name(f".{path.name}{MAKING}")
    making.mkdir(parents=True, exist_ok=True)
    own(making)
    try:
        _empty(making)
        yield making
        disown(making)
        (making / LOCK).unlink(missing_ok=True)
        making.rename(path)
    except BaseException:
        _empty(making)
        disown(making)
        raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (LOCK, OWNER):
            path.unlink()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is alone in a folder that many write to, such as a cache."""
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / LOCK):
        yield


_owned: dict[Path, filelock.FileLock] = {}  # what this process has, until it ends


def own(folder: Path, other: str = "another name") -> None:
    """Makes a folder this process's own until it ends. Raises UserError, which names the owner, if another one has it.

    `other` says what the user can choose instead.

    The lock is the operating system's: it goes with its process, however that ends, so no stale one is left behind.
    Of torchrun's processes only the first owns.
    """
    folder = folder.resolve()
    if not speaks() or folder in _owned:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = filelock.FileLock(folder / LOCK), folder / OWNER
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        who = owner.read_text() if owner.is_file() else "another process"
        raise UserError(f"{folder} belongs to {who}, which still runs; wait for it, or choose {other}") from None
    _owned[folder] = lock
    owner.write_text(f"process {os.getpid()} on {platform.node()}")


def holds_anything(folder: Path) -> bool:
    """Whether there is anything in a folder but the signs of its owner, and what a killed process left half made."""
    return any(not (name in (LOCK, OWNER) or name[:1] == "." and name.endswith(MAKING)) for name in os.listdir(folder))


def disown(*folders: Path) -> None:
    """Gives back these folders, or all that this process owns."""
    for folder in [folder.resolve() for folder in folders] or list(_owned):
        if folder not in _owned:
            continue
        if nothing := not holds_anything(folder):
            _empty(folder)  # while it is ours
        (folder / OWNER).unlink(missing_ok=True)
        # the lock's file stays, since another process may be opening it; but not in a folder of nothing else
        _owned.pop(folder).release()
        if nothing:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _complain(message: str) -> int:
    """Prints an error as one line, whatever a name in it holds."""
    print("error:", "".join(c if c.isprintable() else repr(c)[1:-1] for c in message), file=sys.stderr)
    return 2


# ------------------------------------------------------------------------------------------- devices and processes


def start_processes() -> tuple[int, int]:
    """Joins torchrun's processes if it started us. Returns (rank, world size), which is (0, 1) otherwise.

    Raises UserError where only a part of torchrun's environment is there.
    """
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        try:
            store, rank, world = next(rendezvous("env://"))
            # the store outlives a restart by torchrun, and so would the addresses of processes that are gone
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        except (ValueError, RuntimeError) as error:
            words = " ".join(str(error).split())[:100]
            raise UserError(f"$RANK is set, but torchrun's other processes are not to be found ({words}); unset RANK, "
                            "or start with torchrun") from None  # fmt: skip
        if dist.get_rank():
            sys.stdout = io.StringIO()  # one process speaks
    return dist.get_rank(), dist.get_world_size()


def speaks() -> bool:
    """Whether this is the process that speaks and writes: the only one, or the first of torchrun's."""
    return not dist.is_initialized() or dist.get_rank() == 0


def first_process() -> bool:
    """As speaks; torchrun's processes wait for each other here."""
    if dist.is_initialized():
        dist.barrier()
    return speaks()


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
        # sums in one order, so that a resumed run ends exactly as an uninterrupted one
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    elif device.type != "cpu":
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:0")
    return device


def describe_device(device: torch.device) -> str:
    """A phrase for people: the GPU's name, or the number of CPU threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def autocast_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The dtype in which --precision lets networks multiply: float32, bfloat16 or float16.

    auto: bfloat16 where the processor has it in hardware, float16 on older GPUs (T4, 20-series), float32 on older CPUs.
    """
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        return names[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # processors with AMX have it too
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of --precision."""
    dtype = autocast_dtype(device, precision)
    reduced = dtype != torch.float32
    return torch.autocast(device.type, dtype if reduced else torch.bfloat16, enabled=reduced)


# -------------------------------------------------------------------------------------------------------------- seeds


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


def draw_together(random: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """random(x), such as torch.randn_like(x), where x [B, ...] belongs to this process's part of the batch.

    torchrun's processes have the same seed. Each draws for the joined batch of all, and keeps the rows of its own part:
    so their numbers are those of one process with the joined batch.
    """
    if not dist.is_initialized():
        return random(x)
    rank, world = dist.get_rank(), dist.get_world_size()
    return random(torch.cat([x] * world)).chunk(world)[rank]


def any_process(flag: bool) -> bool:
    """True when the flag is set in any of torchrun's processes."""
    if not dist.is_initialized():
        return bool(flag)
    total = torch.tensor(float(flag))
    dist.all_reduce(total)
    return bool(total > 0)


def mean_of_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over torchrun's processes."""
    if not dist.is_initialized():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def joined(part: Tensor) -> Tensor:
    """The joined batch [processes B, ...], of which each of torchrun's processes has a part [B, ...]."""
    if not dist.is_initialized():
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces every gradient by its mean over torchrun's processes, so that all take the same step."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message instead of hundreds
    means = mean_of_processes(flat).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


# ---------------------------------------------------------------------------------------------------------- progress

QUIET_SECONDS = 30  # without a terminal, at least a line so often


def progress(
    items: Iterable,
    title: str,
    total: int | None = None,
    unit: str = "it",
    start: int = 0,
    note: Callable[[], str] = str,
) -> Iterator:
    """Hands on the items and says how far it is: a bar on a terminal, else a line at least every half minute.

    Args:
        items: to iterate over; `total` of them, or len(items).
        start: how many were done before.
        note: is asked for a few words, such as the loss, whenever something is shown.
    """
    total = len(items) + start if total is None else total
    if not speaks():
        yield from items
        return
    if sys.stderr.isatty():
        with tqdm(desc=title, initial=start, total=total, unit=unit) as bar:
            shown = time.monotonic()
            for item in items:
                yield item
                if time.monotonic() - shown > 1:  # asking for the loss makes a GPU wait
                    shown = time.monotonic()
                    bar.set_postfix_str(note(), refresh=False)
                bar.update()
        return
    began = shown = time.monotonic()
    for done, item in enumerate(items, start + 1):
        yield item
        now = time.monotonic()
        if now - shown >= QUIET_SECONDS:
            shown, rate = now, (done - start) / (now - began)
            words = [f"{title}: {done} of {total} {unit}", note(), per_second(rate, unit)]
            words.append(f"{duration((total - done) / rate)} left")
            print(", ".join(filter(None, words)), flush=True)


def per_second(rate: float, unit: str) -> str:
    """Such as "3.2 step/s", or "4.1 s/step" where it is slow."""
    return f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit}"


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


# -------------------------------------------------------------------------------------------------------- provenance


def versions() -> dict[str, str]:
    """Versions of Python, PyTorch and NumPy, which decide about the last digits of results."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def commit_of_code() -> str:
    """The commit of these files, with -dirty where they were changed since."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        here = Path(__file__).parent
        commit = subprocess.run(describe, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return commit or "not a git checkout"


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
