"""Makes runs as one of torchrun's processes, and keeps what that process has at the end of each phase.

The only argument is JSON, [[script, flag, ...], ...]. Where there is a file `die`, the second process removes it, and
is killed, within its fourth step.
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import stable_diffusion
import util
from training import run

rank, steps, die = os.environ["RANK"], [], Path("die")
save, update_ema = run.Run.save, run.update_ema


def save_and_keep(self) -> None:
    save(self)
    kept = {name: thing.state_dict() for name, thing in self.kept.items()}
    torch.save(kept, f"{self.args.name}_{self.phase}_{rank}.pt")


def update_or_die(*args, **kwargs) -> None:
    steps.append(1)
    if rank == "1" and len(steps) == 4 and die.exists():
        die.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    update_ema(*args, **kwargs)


def main() -> None:
    for script, *flags in json.loads(sys.argv[1]):
        sys.argv = [script, *map(str, flags)]
        importlib.import_module(script).main()


if rank == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "1":
    time.sleep(3)  # the other process must wait, and not look for the one that is gone
stable_diffusion.BLOCKS = 1
run.Run.save, run.update_ema = save_and_keep, update_or_die
if __name__ == "__main__":
    util.command(main)
