"""Runs prestage_train.py as one of torchrun's processes, and keeps what that process has at the end of each phase.

Where there is a file `die`, the second process removes it, and is killed, within its fourth step.
"""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import prestage_train
import util
from training import run

rank, steps, die = os.environ["RANK"], [], Path("die")
save, update_ema = run.Run.save, run.update_ema


def save_and_keep(self) -> None:
    save(self)
    modules = {name: thing for name, thing in self.kept.items() if isinstance(thing, torch.nn.Module)}
    torch.save({name: module.state_dict() for name, module in modules.items()}, f"{self.phase}_{rank}.pt")


def update_or_die(*args, **kwargs) -> None:
    steps.append(1)
    if rank == "1" and len(steps) == 4 and die.exists():
        die.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    update_ema(*args, **kwargs)


prestage_train.DISCRIMINATOR_CHANNELS = 8
run.Run.save, run.update_ema = save_and_keep, update_or_die
if __name__ == "__main__":
    util.command(prestage_train.main)
