"""What every script shares: flags and presets, runs and checkpoints, seeds and steps, mathematics without layers.

Randomness is a function of (seed, step, rank) and the order of the data of (seed, epoch), so a resumed run repeats an
uninterrupted one without any generator state on disk.
"""

import argparse
import errno
import hashlib
import io
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
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

RELEASED = Path(__file__).parent / "pretrained"  # weights that come with the project

# What belongs to one start of a script and not to the run: neither recorded nor inherited by the next start.
OF_ONE_START = {
    "minutes",
    "device",
    "compile",
    "sample",
    "out",
    "brains",
    "sampler",
    "sample_steps",
    "eta",
    "guidance",
    "weak",
    "age",
    "sex",
    "cdr",
    "unknown_person",
    "temperature",
    "top_p",
    "decoder",
}
# What a run has and --sample may change.
FREE_IN_SAMPLING = {"seed", "precision", "slice_noise"}
# What may change from start to start without making the run another experiment.
FREE_ON_RESUME = OF_ONE_START | {"data", "steps", "report_every", "patience"}


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
    return 0 if text == "0" else positive_int(text)


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


# ------------------------------------------------------------------------------------------- files, runs, checkpoints


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


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes a training state of tensors, numbers, strings and containers of these."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path, script: str) -> dict:
    """Reads what `script` saved, never running code from the file. Raises UserError on anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train the run first, or name another") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} is no readable checkpoint ({type(error).__name__}); delete it or choose another --name"
        ) from None
    if not isinstance(state, dict) or state.get("script") != script:
        raise UserError(f"{path} is no checkpoint of {script}; delete it or choose another --name")
    return state


def stop_unfinished(step: int, steps: TrainingSteps) -> None:
    """Says how to continue, and exits: with status 130 after Ctrl-C, 0 after the time limit."""
    print(f"stopped after {step} of {steps.stop} steps; the same command continues")
    sys.exit(130 if steps.interrupted else 0)


def save_weights(path: Path, weights: dict[str, Tensor], description: dict) -> None:
    """Writes a safetensors file whose metadata holds `description` (JSON values: the model's kind, keywords, ...)."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    metadata = {"project": "stable-diffusion-on-oasis", "description": json.dumps(description)}
    write_file(path, safetensors.torch.save(weights, metadata))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Reads (weights, description) from a file of save_weights. Raises UserError when it is not one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).float() for name in file.offset_keys()}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train one first, or give the path of a .safetensors file") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is no readable safetensors file ({type(error).__name__}); is the copy whole?"
        ) from None
    if metadata.get("project") != "stable-diffusion-on-oasis" or "description" not in metadata:
        raise UserError(
            f"{path} was not written by this project; give a model.safetensors from model_ckpt/ or pretrained/"
        )
    return weights, json.loads(metadata["description"])


def find_weights(run: str | Path, train_with: str) -> Path:
    """The weights meant by a file, a run's folder or a run's name (model_ckpt/NAME/model.safetensors).

    Raises UserError, advising the command `train_with`, when there are none.
    """
    path = Path(run)
    if path.is_file():
        return path
    for weights in (path / "model.safetensors", run_weights(run)):
        if weights.is_file():
            return weights
    raise UserError(
        f"there are no weights at {run}: no such file, and no model_ckpt/{path.name}/model.safetensors; "
        f"train them with: {train_with}"
    )


def fill_model(model: nn.Module, weights: dict[str, Tensor], path: Path) -> nn.Module:
    """Loads weights into a model, every key and shape, or raises UserError."""
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{path} holds weights of another model; name the run that fits this script") from None
    return model


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def check_same_first_stage(name: str, trained_on: str, given: str) -> None:
    """Raises UserError when a second stage's checkpoint was made with another first stage than the one given."""
    if trained_on != given:
        raise UserError(
            f"run {name} was trained on another first stage than --first-stage names now; choose another --name"
        )


def digest_of(weights: dict[str, Tensor]) -> str:
    """16 hexadecimal digits that tell one set of weights from another."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def read_run(script: str, name: str, typed: dict) -> dict | None:
    """The recorded settings of run `name`, None if there is no such run.

    Raises UserError when log/NAME belongs to something else or a typed setting contradicts the run.
    """
    if Path(name).name != name:
        raise UserError(f"--name {name} is no plain name; it becomes part of model_ckpt/NAME, log/NAME and NAME_vis")
    log = Path("log") / name
    if not (log / "run.json").is_file():
        for folder in (log, Path("model_ckpt") / name):
            if folder.exists() and any(folder.iterdir()):
                raise UserError(
                    f"{folder} is not empty and no run of ours (log/{name}/run.json is missing); "
                    "choose another --name or remove the folder"
                )
        return None
    try:
        recorded = json.loads((log / "run.json").read_text())
        settings, owner = recorded["settings"], recorded["script"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{log}/run.json is no description of a run; choose another --name or remove {log}") from None
    if owner != script:
        raise UserError(f"{log} is a run of {owner}; choose another --name")
    for flag, value in typed.items():
        value = list(value) if isinstance(value, tuple) else value
        if flag not in FREE_ON_RESUME and flag in settings and settings[flag] != value:
            raise UserError(
                f"--{flag.replace('_', '-')} {value} contradicts the run in {log}, which has "
                f"{settings[flag]}; leave the flag out, or choose another --name"
            )
    return settings


def run_weights(name: str) -> Path:
    """Where run `name` keeps its weights."""
    return Path("model_ckpt") / name / "model.safetensors"


def weights_to_sample(script: str, args: argparse.Namespace, typed: dict, released: Path) -> Path | None:
    """What --sample draws from: the weights of run args.name, or the file that --name is.

    Where nothing of one's own was trained, neither this run nor its first stage, and no setting of training is typed,
    the `released` weights. None otherwise: training comes first. Says which. Raises UserError when a setting of
    training is typed that the trained run does not have.
    """
    settings = {flag: value for flag, value in typed.items() if flag not in OF_ONE_START | FREE_IN_SAMPLING}
    if Path(args.name).is_file():
        return Path(args.name)
    if run_weights(args.name).is_file():
        if (Path("log") / args.name / "run.json").is_file():  # weights alone are enough to sample
            read_run(script, args.name, settings)
        return run_weights(args.name)
    if not settings and not run_weights(args.first_stage).is_file() and released.is_file():
        print(f"nothing was trained here yet: sampling the released weights, pretrained/{released.name}")
        return released
    print(f"there is no trained run {args.name} yet: training it first, then sampling")
    return None


def open_run(
    script: str, args: argparse.Namespace, typed: dict, preset: Callable[[argparse.Namespace], str]
) -> argparse.Namespace:
    """Completes the settings of a training run: those typed, else the existing run's, else the preset's, else plain.

    Args:
        script: file name of the training script, which owns the run.
        args, typed: from parse_flags; args.name is set.
        preset: gives the default of --preset for a new run.
    Raises UserError as read_run.
    """
    settings = read_run(script, args.name, typed)
    if settings is None:
        args.preset = args.preset or preset(args)
        return argparse.Namespace(**{**vars(args), **preset_settings(script, args.preset), **typed})
    settings = {flag: value for flag, value in settings.items() if flag in vars(args).keys() - OF_ONE_START}
    return argparse.Namespace(**{**vars(args), **settings, **typed})


def check_same_data(name: str, data: dict[str, dict]) -> None:
    """Raises UserError when run NAME was started on other slices than `data`, {split: Slices.describe()}."""
    path = Path("log") / name / "run.json"
    recorded = json.loads(path.read_text())["data"] if path.is_file() else data
    for split in data:
        if recorded[split]["digest"] != data[split]["digest"]:
            raise UserError(
                f"run {name} was trained on other {split} slices, those of {recorded[split]['folder']}; "
                "give them with --data, or choose another --name"
            )


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


def describe_samples(weights: Path, args: argparse.Namespace) -> dict:
    """What decides how sampled brain i looks: the digests of the weights, and the settings of sampling."""
    of_the_start = {"minutes", "device", "compile", "sample", "out", "brains"}
    names = (OF_ONE_START | FREE_IN_SAMPLING) - of_the_start
    settings = {name: value for name, value in sorted(vars(args).items()) if name in names}
    if settings.get("weak"):
        settings["weak"] = file_digest(find_weights(settings["weak"], "--weak"))
    return {"weights": file_digest(weights), "settings": settings}


def file_digest(path: Path) -> str:
    """A digest, 16 hexadecimal digits, of the bytes of a file."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def describe_run(script: str, args: argparse.Namespace, data: dict, **more) -> dict:
    """What run.json records: settings, data digest, versions, commit and machine."""
    return {
        "script": script,
        "settings": {flag: value for flag, value in vars(args).items() if flag not in OF_ONE_START},
        "data": data,
        **more,
        "commit": commit_of_code(),
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": describe_device(pick_device(args.device)),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


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


# ----------------------------------------------------------------------------------------------------------- pictures


def sheet(
    rows: list[np.ndarray],
    *,
    title: str,
    row_names: list[str] | None = None,
    captions: list[str] | None = None,
    zoom: int = 1,
) -> Image.Image:
    """Lays pictures out in rows, pixel for pixel, with a title and, if given, a name per row and a caption per picture.

    Args:
        rows: each uint8 [columns, H, W] or [columns, H, W, 3].
        captions: one per picture, in reading order; drawn under the pictures.
        zoom: every pixel becomes zoom x zoom pixels.
    """
    font, gap = ImageFont.load_default(15), 4
    columns, (height, width) = max(len(row) for row in rows), (n * zoom for n in rows[0].shape[1:3])
    height = height + (18 if captions else 0)
    left = gap + (max(int(font.getlength(name)) for name in row_names) + 8 if row_names else 0)
    size = (max(left + columns * (width + gap), int(font.getlength(title)) + 2 * gap), 26 + len(rows) * (height + gap))
    mode = "RGB" if any(row.ndim == 4 for row in rows) else "L"
    page = Image.new(mode, size, "white")
    draw, words = ImageDraw.Draw(page), iter(captions or [])
    draw.text((gap, 4), title, "black", font)
    for r, row in enumerate(rows):
        top = 26 + r * (height + gap)
        if row_names:
            draw.text((gap, top + height // 2 - 8), row_names[r], "black", font)
        for c, picture in enumerate(row):
            at = (left + c * (width + gap), top)
            picture = Image.fromarray(picture).convert(mode)
            page.paste(picture.resize((width, picture.height * zoom), Image.Resampling.NEAREST), at)
            if captions:
                draw.text((at[0], at[1] + height - 17), next(words), "black", ImageFont.load_default(12))
    return page


def brain_sheet(slices: np.ndarray, title: str) -> Image.Image:
    """The 32 slices of one brain, uint8 [32, S, S], as 4 rows of 8 in the order of z; anterior is right."""
    rows = list(slices.reshape(4, 8, *slices.shape[1:]))
    zoom = max(1, 128 // slices.shape[1])
    return sheet(rows, title=title, captions=[f"z = {z}" for z in range(32)], zoom=zoom)


def save_picture(path: Path, picture) -> None:
    """Writes a PIL image or a matplotlib figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, "PNG")
    else:
        picture.savefig(buffer, format="png", dpi=110)
    write_file(path, buffer.getvalue())


def save_gif(path: Path, frames: list[np.ndarray], seconds: float) -> None:
    """Writes frames, uint8 [H, W] each, as a GIF that loops for ever and rests for 2 s on its last frame."""
    duration = [1000 * seconds / len(frames)] * (len(frames) - 1) + [2000]
    buffer = io.BytesIO()
    imageio.imwrite(buffer, np.stack(frames), extension=".gif", duration=duration, loop=0)
    write_file(path, buffer.getvalue())
