"""Kills a script with SIGKILL at each of its writes, runs it again, and compares what is there with an undisturbed run.

    python kill_everywhere.py FOLDER SCRIPT FLAGS        # prints one line of JSON

A write is killed before its file is opened, when some bytes of it are written, and before it is renamed or removed.
Every run is a process of its own, forked from one that has imported the script: that takes a second instead of five.
"""

import importlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch._dynamo  # which optimisers import late, in five seconds

import util
from training import run

torch.set_num_threads(1)  # a forked process has no threads but its own
run.step_bytes = lambda *model: 1  # an estimate that takes longer than such a run
run.REPORTS = 1

FIRST_BYTES = 40  # of a file that gets written when a write is cut off
UNEQUAL = re.compile(rb'"(seconds|processor_seconds|images_per_second|started)": [^,}]*')  # from run to run


def events(folder: Path, act) -> None:
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


def run_once(module, flags: list[str], folder: Path, act) -> int:
    """Forks, and runs the script there in `folder`; returns its exit status, below 0 the number of a signal."""
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
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run, without what changes from start to start."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != util.LOCK)
    return {str(path.relative_to(folder)): UNEQUAL.sub(b"", path.read_bytes()) for path in files}


def fresh(folder: Path) -> Path:
    """A new, empty folder in place of the old one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def kill_at(number: int, half: bool):
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
    now = contents(folder)
    return " ".join(sorted(name for name in now.keys() | whole.keys() if now.get(name) != whole.get(name)))


def main() -> None:
    work, script, *flags = sys.argv[1:]
    work, module = Path(work).resolve(), importlib.import_module(Path(script).stem)
    folder, seen = fresh(work / "undisturbed" / "run"), work / "events.txt"

    def note(event: str, path: Path) -> None:
        with open(seen, "a") as file:
            file.write(f"{event} {path.relative_to(folder)}\n")

    if status := run_once(module, flags, folder, note):
        sys.exit(f"the undisturbed run ended with {status}: {(folder.parent / 'errors.txt').read_text()}")
    changes = seen.read_text().splitlines()
    kills = [(number, half) for number, change in enumerate(changes, 1)
             for half in ((False, True) if change.startswith("open") else (False,))]  # fmt: skip
    whole = contents(folder)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
        unlike = [pool.submit(kill_and_go_on, module.__name__, flags, work, whole, *kill) for kill in kills]
        found = {f"{changes[number - 1]}{' half' * half}": job.result()
                 for (number, half), job in zip(kills, unlike) if job.result()}  # fmt: skip
    print(json.dumps({"kills": len(kills), "found": found}))


if __name__ == "__main__":
    main()
