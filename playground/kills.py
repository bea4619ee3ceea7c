"""Does a run that is killed, and started again, end as if nothing had happened?

    python playground/kills.py FOLDER prestage_train.py FLAGS                  # kills at each of its writes
    python playground/kills.py --random 100 FOLDER prestage_train.py FLAGS     # kills at random moments

Kills are SIGKILL, as of kill -9 or a lost machine. At a write they come before its file is opened, when some bytes of
it are there, and before it is renamed or removed. Afterwards the same command runs to its end, and all files are
compared with those of an undisturbed run: weights, averages, optimisers, log, pictures, and that nothing temporary is
left. Every run is a process of its own, forked from one that has imported the script: that takes a second instead of
five. FOLDER is made anew; the last line is JSON. It needs an operating system that forks.
"""

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util
from training import run
from util import UserError

FIRST_BYTES = 40  # of a file that gets written when a write is cut off
UNEQUAL = re.compile(rb'"(seconds|processor_seconds|images_per_second|started|commit)": [^,}]*')  # from start to start


def events(folder: Path, act: Callable) -> None:
    """Has act(name, path) called just before every change in `folder` from now on, and in processes forked later."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(path, str | Path) and flags & (os.O_WRONLY | os.O_RDWR)
        elif event in ("os.rename", "os.remove", "os.rmdir"):
            path, writes = arguments[0], True
        else:
            return
        path = Path(path).absolute() if writes else None
        if path and folder in path.parents and path.name not in (util.LOCK, util.OWNER):
            act(event.removeprefix("os."), path)

    sys.addaudithook(hook)


def run_once(module, flags: list[str], folder: Path, act: Callable, seconds: float | None = None) -> int:
    """Forks, and runs the script there in `folder`; returns its exit status, below 0 the number of a signal.

    After so many seconds it is killed.
    """
    child = os.fork()
    if not child:
        os.chdir(folder)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        errors = os.open(folder.parent / "errors.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 2)
        sys.argv = [Path(module.__file__).name, *flags]
        status = 1
        try:
            events(folder, act)
            util.command(module.main)
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        except Exception:  # noqa: BLE001  a bug, and shown
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    alarm = threading.Timer(seconds, os.kill, (child, signal.SIGKILL)) if seconds is not None else None
    if alarm:
        alarm.start()
    _, status = os.waitpid(child, 0)
    if alarm:
        alarm.cancel()
    return os.waitstatus_to_exitcode(status)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run, without what changes from start to start."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != util.LOCK)
    return {str(path.relative_to(folder)): UNEQUAL.sub(b"", path.read_bytes()) for path in files}


def fresh(folder: Path) -> Path:
    """A new, empty folder in place of the old one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def kill_at(number: int, half: bool) -> Callable:
    """A function for `events` that ends its process at the change of that number, or when it is half done."""
    seen = [0]

    def act(event: str, path: Path) -> None:
        seen[0] += 1
        if seen[0] == number and half:
            size = path.stat().st_size if path.exists() else 0
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + FIRST_BYTES,) * 2)
        elif seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def kill_and_go_on(name: str, flags: list[str], work: Path, whole: dict[str, bytes], number: int, half: bool) -> str:
    """Kills a new run at a change, goes on, and says in what the result differs from `whole`: "" is nothing."""
    folder, module = fresh(work / str(os.getpid()) / "run"), importlib.import_module(name)
    if run_once(module, flags, folder, kill_at(number, half)) >= 0:
        return "was not killed"
    if status := run_once(module, flags, folder, lambda *_: None):
        return f"status {status}: {(folder.parent / 'errors.txt').read_text().strip()[-300:]}"
    return compare(folder, whole)


def compare(folder: Path, whole: dict[str, bytes]) -> str:
    """The names of files that differ."""
    now = contents(folder)
    return " ".join(sorted(name for name in now.keys() | whole.keys() if now.get(name) != whole.get(name)))


def kill_at_random(module, flags: list[str], work: Path, whole: dict[str, bytes], kills: int, seconds: float) -> dict:
    """Kills runs after random times within `seconds`, each on and on until it ends: {its number: what is unlike}."""
    dice, done, found = random.Random(0), 0, {}
    for number in itertools.count(1):
        folder = fresh(work / "random" / "run")
        while done < kills and run_once(module, flags, folder, lambda *_: None, seconds * dice.random()) < 0:
            done += 1
        status = run_once(module, flags, folder, lambda *_: None)  # to its end, or once more when it has ended
        if unlike := f"status {status}" if status else compare(folder, whole):
            found[f"run {number}"] = unlike
        if done == kills:
            return found


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    parser.add_argument("--random", type=util.positive_int, metavar="N", help="so many kills at random moments")
    parser.add_argument("folder", type=Path, help="where runs are made; it is emptied")
    parser.add_argument("script", choices=("prestage_train.py", "stable_diffusion.py", "pixelCNN.py"), help="a trainer")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="its flags; the run should take seconds")
    return parser


def main() -> None:
    args = flags().parse_args()
    import torch._dynamo  # which optimisers import late, in five seconds

    torch.set_num_threads(1)  # a forked process has no threads but its own
    run.step_bytes, run.REPORTS = lambda *model: 1, 1  # an estimate and reports that take longer than such a run
    work, module = args.folder.resolve(), importlib.import_module(Path(args.script).stem)
    folder, seen = fresh(work / "undisturbed" / "run"), work / "events.txt"
    seen.unlink(missing_ok=True)

    def note(event: str, path: Path) -> None:
        with open(seen, "a") as file:
            file.write(f"{event} {path.relative_to(folder)}\n")

    began = time.monotonic()
    if status := run_once(module, args.flags, folder, note):
        raise UserError(f"the undisturbed run ended with {status}: {(folder.parent / 'errors.txt').read_text()}")
    seconds, whole = time.monotonic() - began, contents(folder)
    if args.random:
        found, count = kill_at_random(module, args.flags, work, whole, args.random, seconds), args.random
    else:
        changes = seen.read_text().splitlines()
        kills = [(number, half) for number, change in enumerate(changes, 1)
                 for half in ((False, True) if change.startswith("open") else (False,))]  # fmt: skip
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
            unlike = [pool.submit(kill_and_go_on, module.__name__, args.flags, work, whole, *kill) for kill in kills]
            found = {f"{changes[number - 1]}{' half' * half}": job.result()
                     for (number, half), job in zip(kills, unlike) if job.result()}  # fmt: skip
        count = len(kills)
    print(json.dumps({"kills": count, "files": len(whole), "found": found}))


if __name__ == "__main__":
    util.command(main)
