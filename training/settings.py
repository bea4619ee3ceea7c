"""The settings of a run: its flags, the record in log/NAME/run.json, and what a later start may change.

A run NAME is model_ckpt/NAME (weights, checkpoints), log/NAME (run.json and scalars) and NAME_vis (pictures). The same
command resumes it, so its settings come from run.json, and a typed one that differs is refused.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import util
from training.checkpoints import file_digest, is_path, run_weights
from training.presets import MEANINGS, PRESETS
from util import UserError

# what a trainer advises where memory is too small
LESS_MEMORY = "close other programs, take --device cpu, or another --name with a smaller --batch-size or --preset"


class Flags:
    """The command line of a trainer, and what each flag means for its run.

    Args:
        script: file name of the trainer, which owns its runs.
        description: its docstring, for --help.
    """

    def __init__(self, script: str, description: str):
        self.script = script
        self.parser = util.plain_parser(description)
        self.groups = {name: self.parser.add_argument_group(name) for name in ("training", "sampling")}
        self.presets = PRESETS.get(script, {})  # {preset: {flag: value}}
        self.one_start: set[str] = set()  # not of the run: neither recorded nor inherited
        self.changeable: set[str] = set()  # recorded, but another value makes no other run
        self.sampling: set[str] = set()  # decides how a sampled brain looks
        self.of_first_stage: set[str] = set()  # comes with a finished first stage
        self._add_common()

    def train(
        self,
        name: str,
        *,
        help: str,
        one_start: bool = False,
        changeable: bool = False,
        samples: bool = False,
        of_first_stage: bool = False,
        **options,
    ) -> None:
        """Declares a flag of training. Its default is what the preset says, or else the plain one of the options.

        Args:
            one_start: it belongs to one start of the script and not to the run, such as --device.
            changeable: a later start may change it, such as --steps.
            samples: sampling takes it too, such as --seed.
            of_first_stage: a finished first stage has it already.
            options: of argparse.
        """
        flag = name.lstrip("-").replace("-", "_")
        marks = {"one_start": one_start, "changeable": changeable, "of_first_stage": of_first_stage}
        for mark, is_so in (marks | {"sampling": samples}).items():
            if is_so:
                getattr(self, mark).add(flag)
        self._add("training", name, help, options)

    def sample(self, name: str, *, help: str, decides: bool = True, **options) -> None:
        """Declares a flag of sampling; `decides` says whether a brain of a given number looks otherwise with it."""
        flag = name.lstrip("-").replace("-", "_")
        self.one_start.add(flag)
        if decides:
            self.sampling.add(flag)
        self._add("sampling", name, help, options)

    def _add(self, group: str, name: str, help: str, options: dict) -> None:
        """Adds the flag; its help ends with its value in each preset, or with its plain default."""
        flag, default = name.lstrip("-").replace("-", "_"), options.get("default")
        chosen = {preset: values[flag] for preset, values in self.presets.items() if flag in values}
        if chosen:
            help += f" ({', '.join(f'{preset} {_words(value)}' for preset, value in chosen.items())})"
        elif default is not None and options.get("action") != "store_true":
            help += f" ({_words(default)})"
        self.groups[group].add_argument(name, help=help.replace("%", "%%"), **options)

    def _add_common(self) -> None:
        """The flags that all trainers have, but for --steps and others that differ."""
        self.train("--data", metavar="FOLDER", changeable=True, help="holds keras_png_slices_*; else $OASIS_DATA, "
                   "data/keras_png_slices_data, the built-in phantom")  # fmt: skip
        self.train("--name", help="of the run: model_ckpt/NAME, log/NAME, NAME_vis; default: the model's")
        meanings = "; ".join(f"{name}: {meaning}" for name, meaning in MEANINGS.items())
        self.train("--preset", choices=tuple(MEANINGS), help=f"the values in brackets below. {meanings}")
        self.train("--minutes", type=util.positive_float, one_start=True, help="stop and save after so many")
        self.train("--seed", type=util.seed, default=0, samples=True, help="all randomness follows from it")
        self.train("--device", default="auto", one_start=True, help="auto, cpu, cuda or cuda:N")
        self.train("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", samples=True,
                   help="of multiplications; auto takes what the processor has in hardware")  # fmt: skip
        self.train("--compile", action="store_true", one_start=True, help="torch.compile: a slow start, then faster")

    def add_sampling(self, results: str) -> None:
        """The flags that all second stages have; `results` says where samples go by default."""
        self.sample("--sample", action="store_true", decides=False, help="draw new brains instead of training")
        self.sample("--brains", type=util.positive_int, default=1, decides=False, help="how many")
        self.sample("--out", type=Path, metavar="DIR", decides=False, help=f"where they go; default: {results}")

    def check(self, settings: dict) -> None:
        """Raises ValueError for a value of the settings that the command line would not take."""
        for flag in self.parser._actions:
            value = settings.get(flag.dest)
            if value is None or flag.nargs == 0:
                continue
            for part in value if isinstance(value, list | tuple) else [value]:
                try:
                    taken = part if flag.type is None else flag.type(str(part))
                except (argparse.ArgumentTypeError, TypeError) as error:
                    raise ValueError(str(error)) from None
                if flag.choices is not None and taken not in flag.choices:
                    raise ValueError(f"{flag.dest}: {taken}")

    def parse(self, argv: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
        """(settings with plain defaults, {flag: value} of what was typed); --minutes count from here."""
        plain, unset = vars(self.parser.parse_args([])), object()
        typed = vars(self.parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(plain, unset))))
        typed = {flag: value for flag, value in typed.items() if value is not unset}
        return argparse.Namespace(**{**plain, **typed, "script": self.script, "began": time.monotonic()}), typed


# --------------------------------------------------------------------------------------------------- opening a run


def has_saved(name: str) -> bool:
    """Whether run `name` has written a checkpoint or weights."""
    folder = Path("model_ckpt") / name
    return any((*folder.glob("*.pt"), *folder.glob("*.safetensors")))


def recorded_settings(script: str, name: str, naming: str = "--name") -> dict | None:
    """The settings that `script` recorded of its run `name`, None if there is no such run.

    Raises UserError where log/NAME or model_ckpt/NAME belong to something else. `naming` is the script's flag for NAME.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{naming} {name} is no name for model_ckpt/NAME, log/NAME and NAME_vis; choose a plain one")
    log = Path("log") / name
    if not (log / "run.json").is_file():
        for folder in (log, Path("model_ckpt") / name):
            if folder.exists() and util.holds_anything(folder):
                raise UserError(
                    f"{folder} is not empty and no run of ours (log/{name}/run.json is missing); "
                    f"choose another {naming}, or move that folder elsewhere"
                )
        return None
    try:
        recorded = json.loads((log / "run.json").read_text())
        settings, owner = dict(recorded["settings"]), recorded["script"]
        if script in PRESETS and not isinstance(settings["preset"], str | None):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{log}/run.json is no description of a run; restore it, or choose another {naming}") from None
    if owner != script:
        raise UserError(f"{log} is a run of {owner}; choose another {naming}")
    if (original := settings.get("name", name)) != name:
        raise UserError(f"{log} is the log of run {original}; give it back that name, or choose another {naming}")
    return settings


def read_run(flags: Flags, name: str, typed: dict) -> dict | None:
    """The recorded settings of run `name`, None if there is no such run or it has saved nothing yet.

    Raises UserError as recorded_settings, and where a typed setting contradicts the run.
    """
    settings, log = recorded_settings(flags.script, name), Path("log") / name
    if settings is None or not has_saved(name):
        return None  # it failed before its first checkpoint, perhaps because of its settings
    try:
        flags.check(settings)
    except ValueError:
        what = f"{log}/run.json has a value that no flag takes"
        raise UserError(f"{what}; restore it, or choose another --name") from None
    for flag, value in typed.items():
        value = list(value) if isinstance(value, tuple) else value
        if flag not in flags.one_start | flags.changeable and flag in settings and settings[flag] != value:
            raise UserError(
                f"--{flag.replace('_', '-')} {_words(value)} contradicts the run in {log}, which has "
                f"{'none' if settings[flag] is None else _words(settings[flag])}; "
                "leave the flag out, or choose another --name"
            )
    return settings


def open_run(
    flags: Flags, args: argparse.Namespace, typed: dict, default_preset: Callable[[argparse.Namespace], str]
) -> argparse.Namespace:
    """The settings of a training run, printed: those typed, else the existing run's, else the preset's, else plain.

    Args:
        args, typed: from Flags.parse; args.name is set.
        default_preset: gives the default of --preset for a new run.
    Raises UserError as read_run, and where another process trains the run.
    """
    recorded = read_run(flags, args.name, typed)
    util.own(Path("model_ckpt") / args.name, "another --name")
    if recorded is None:
        recorded = {"preset": args.preset or default_preset(args)}
    elif unknown := recorded.keys() - vars(args).keys():
        flag = min(unknown).replace("_", "-")
        raise UserError(f"run {args.name} is of another version, which had --{flag}; choose another --name")
    settings = flags.presets.get(recorded["preset"], {}) | recorded
    settings = {flag: value for flag, value in settings.items() if flag in vars(args).keys() - flags.one_start}
    args = argparse.Namespace(**vars(args) | settings | typed)
    args.recorded = sorted(vars(args).keys() - flags.one_start - {"script", "began", "recorded"})
    shown = (f"{flag.replace('_', '-')} {_words(vars(args)[flag])}" for flag in args.recorded if flag != "name")
    print(f"run {args.name}: {', '.join(shown)}")
    return args


def _words(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def describe_run(args: argparse.Namespace, data: dict, **more) -> dict:
    """What run.json records: settings, data digest, versions, commit and machine."""
    return {
        "script": args.script,
        "settings": {flag: vars(args)[flag] for flag in args.recorded},
        "data": data,
        **more,
        "commit": util.commit_of_code(),
        "versions": util.versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": util.describe_device(util.pick_device(args.device)),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def check_same_data(name: str, data: dict[str, dict], naming: str = "--name") -> None:
    """Raises UserError when run NAME was started on other slices than `data`, {split: Slices.describe()}.

    `naming` is the script's flag for the name of a run.
    """
    path = Path("log") / name / "run.json"
    if not (path.is_file() and has_saved(name)):
        return
    try:
        recorded = json.loads(path.read_text())["data"]
        other = [split for split in data if recorded[split]["digest"] != data[split]["digest"]]
        folder = recorded[other[0]]["folder"] if other else ""
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path} does not say which slices the run has; choose another {naming}") from None
    if other:
        known = f"run {name} was trained on other {other[0]} slices, those of {folder}; give them with --data"
        if folder == data[other[0]]["folder"]:
            known = f"the {other[0]} slices in {folder} have changed since run {name} began; restore them"
        raise UserError(f"{known}, or choose another {naming}")


# ----------------------------------------------------------------------------------------------- sampling from a run


def weights_to_sample(flags: Flags, args: argparse.Namespace, typed: dict, released: Path) -> Path | None:
    """What --sample draws from: the weights of run args.name, or the file that --name is.

    Where nothing of one's own was trained, neither this run nor its first stage, and no setting of training is typed,
    the `released` weights. None otherwise: training comes first. Says which. Raises UserError when a setting of
    training is typed that the trained run does not have.
    """
    settings = {flag: value for flag, value in typed.items() if flag not in flags.one_start | flags.sampling}
    if Path(args.name).is_file():
        return Path(args.name)
    if is_path(args.name):
        raise UserError(f"--name {args.name}: there is no such file here; mend the path, or give the name of a run")
    if run_weights(args.name).is_file():
        if (Path("log") / args.name / "run.json").is_file():  # weights alone are enough to sample
            read_run(flags, args.name, settings)
        return run_weights(args.name)
    if not settings and not run_weights(args.first_stage).is_file() and released.is_file():
        print(f"nothing was trained here yet: sampling the released weights, pretrained/{released.name}")
        return released
    print(f"there is no trained run {args.name} yet: training it first, then sampling")
    return None


def describe_samples(flags: Flags, weights: Path, args: argparse.Namespace, description: dict, **more: str) -> dict:
    """What decides how sampled brain i looks: script, digest of the weights, settings of sampling, and whatever more.

    description: of the weights; it says on which data they were trained. Where these lay on a disk is left out.
    """
    settings = {name: vars(args)[name] for name in sorted(flags.sampling)}
    data = {name: value for name, value in description.get("data", {}).items() if name != "folder"}
    return {"script": flags.script, "weights": file_digest(weights), "settings": settings, "data": data, **more}
