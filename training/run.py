"""What the trainers' loops call: one phase of a training run, with all that is the same whatever is trained.

    run = Run(args, model, data={"train": train, "validate": held_out}, steps=args.steps)
    for step in run.steps():                          # seeded; ends early on Ctrl-C or the time limit
        with run.autocast():
            losses = run.forward(*batch(run.index(len(train))))
        if run.update(losses):                        # backward, clip, check, optimiser, averaged weights, log
            if run.report_due:
                run.report(scores, sample=picture)
            run.save()
    model = run.finish()

The same command resumes, and ends as if it had never stopped: randomness is a function of (seed, step), and the
checkpoint holds all that changes.
"""

import argparse
import contextlib
import copy
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import util
from dataset import Slices, random_moves
from logger import Logger
from training.checkpoints import fill_model, load_checkpoint, save_checkpoint
from training.memory import in_words, step_bytes
from training.optimizer import new_optimizers
from training.settings import check_same_data, describe_run, has_saved
from util import UserError

REPORTS = 10  # of a phase, each with validation, pictures and a checkpoint
LINES = 10  # of the log from report to report
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAVE_MINUTES = 10  # after so many a checkpoint is written between reports too


def learning_rate_factor(step: int, steps: int, warm_up: int = 100, final: float = 0.05) -> float:
    """Linear warm-up, then half a cosine from 1 to `final` at the last step."""
    ramp = min(1.0, (step + 1) / warm_up)
    return ramp * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def check_finite(losses: dict[str, Tensor], step: int, advice: str) -> None:
    """Raises UserError naming the first term, of scalars on one device, that is NaN or infinite."""
    if torch.isfinite(torch.stack([value.detach().float() for value in losses.values()])).all():
        return
    for name, value in losses.items():
        if not torch.isfinite(value):
            raise UserError(f"{name} became {value.item()} at step {step}; run the same command with {advice}")


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


class Run:
    """One phase of a training run.

    Args:
        args: the settings, from settings.open_run.
        model: is trained; it goes to the device, and `ema` is its average. What may not change has requires_grad False.
        data: {split: Slices}; a run never goes on with other slices.
        steps: of this phase.
        phase: names the checkpoint, model_ckpt/NAME/PHASE.pt.
        before: steps of the phases before, so that the log goes on.
        built_on: digest of what the phase starts from; with another one it starts anew.
        begin: is called where there is no checkpoint, to set what is measured and not trained.
        keep: what else the checkpoint holds: {name: something with state_dict and load_state_dict}.
        decay: of the average.
        matrices: weights of the model that Muon trains, and not Adam.
        betas: Adam's.
        share: of the settings' batch size and learning rate, for this phase.
    Raises UserError where data or checkpoint belong to another run.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        *,
        data: dict[str, Slices],
        steps: int,
        phase: str = "last",
        before: int = 0,
        built_on: str = "",
        begin: Callable[[], None] | None = None,
        keep: dict | None = None,
        decay: float = 0.999,
        matrices: list[nn.Parameter] = (),
        betas: tuple[float, float] = (0.9, 0.99),
        share: float = 1.0,
    ):
        self.args, self.total, self.phase, self.before = args, steps, phase, before
        self.batch_size, self.learning_rate = max(1, round(share * args.batch_size)), share * args.learning_rate
        self.rank, self.world = util.start_processes()
        self.device = util.pick_device(args.device)
        self.built_on, self.decay, self.done, self.step = built_on, decay, 0, 0
        self.naming = getattr(args, "naming", "--name")  # the script's flag for the name of a run
        self.checkpoint = Path("model_ckpt") / args.name / f"{phase}.pt"
        self.weights = self.checkpoint.with_name("model.safetensors")
        self.data = {split: slices.describe() for split, slices in data.items()}
        for a, b in itertools.combinations(data, 2):
            if self.data[a]["digest"] == self.data[b]["digest"]:
                folder = self.data[a]["folder"]
                raise UserError(f"{a} and {b} are the same slices; python dataset.py {folder} lists what they share")
        check_same_data(args.name, self.data, self.naming)
        state = load_checkpoint(self.checkpoint, args.script) if self.checkpoint.exists() else None
        if state and state.get("built_on") != built_on:
            print(f"{self.checkpoint} was made from other weights: the phase {phase} starts anew")
            state = None
        if state is None and begin:
            begin()

        # channels_last: convolutions run twice as fast in half precision, on GPU and CPU
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizers = new_optimizers(model, self.learning_rate, betas, matrices)
        halves = util.autocast_dtype(self.device, args.precision) == torch.float16  # whose small gradients would be 0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=halves)
        self._network = torch.compile(model) if args.compile else model

        report_every = max(1, -(-steps // REPORTS))
        self.report_every, self.report_due = report_every, False
        parameters = sum(p.numel() for p in model.parameters())
        record = describe_run(args, self.data, parameters=parameters)
        self.kept = {"model": self.model, "ema": self.ema, "scaler": self.scaler}
        self.kept |= {type(optimizer).__name__.lower(): optimizer for optimizer in self.optimizers}
        self.kept |= keep or {}
        if state:
            self._restore(state)
        # a finished phase leaves the lines of later ones where they are
        known = before + self.done if self.done < steps else math.inf
        self.logger = Logger(args.name, record, step=known, every=max(1, report_every // LINES), quiet=self.rank > 0)
        if state:
            with self._own_version():
                self.logger.load_state_dict(state["log"])
        self.interrupted = 0  # the number of the signal that this process got
        self.stopping = False  # all processes, after this step
        self.saved = self.stepped = time.monotonic()
        self.spent = {"steps": 0.0, "reports and checkpoints": 0.0}  # seconds
        self.shown = None  # the loss of the last step
        self.peak = None  # bytes of a step

    def _restore(self, state: dict) -> None:
        with self._own_version():
            for name, thing in self.kept.items():
                if isinstance(thing, nn.Module):
                    fill_model(thing, state[name], self.checkpoint)
                elif state[name]:  # a scaler that was not in use has none
                    thing.load_state_dict(state[name])
            self.done = int(state["step"])
            if self.done < 0:
                raise ValueError(self.done)
        if self.done > self.total:
            asked = f"{self.checkpoint} has done {self.done} steps, and {self.total} are asked for"
            raise UserError(f"{asked}; ask for more --steps, or choose another {self.naming}")
        done = self.before + self.done
        print(f"all {done} steps are done" if self.done == self.total else f"resumed at step {done}")

    @contextlib.contextmanager
    def _own_version(self) -> Iterator[None]:
        """Whatever goes wrong with a checkpoint that holds something else than ours is a UserError."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError):
            of = "of another version of this project"
            raise UserError(f"{self.checkpoint} is {of}; choose another {self.naming}") from None

    # ---- the loop

    def steps(self) -> Iterator[int]:
        """The steps that are still to be done, counted from 0 in this phase, each with seeds and learning rate set.

        Ctrl-C, SIGTERM, a closed terminal and --minutes end it after a whole step; a second Ctrl-C ends it at once.
        """
        # nohup has a closed terminal ignored, and so it stays
        heard = [s for s in STOPPING if s.name != "SIGHUP" or signal.getsignal(s) != signal.SIG_IGN]
        previous = {s: signal.signal(s, self._note_signal) for s in heard}
        title = self.args.name if self.phase == "last" else f"{self.args.name}, {self.phase}"
        try:
            left = range(self.done, self.total)
            for step in util.progress(left, title, self.total, "step", start=self.done, note=self._loss_in_words):
                self.step = step
                torch.manual_seed(util.mix_seed(self.args.seed, step, 0))  # see util.draw_together
                self.rate = self.learning_rate * learning_rate_factor(step, self.total)
                for optimizer in self.kept.values():
                    for group in getattr(optimizer, "param_groups", []):
                        group["lr"] = self.rate
                began = time.monotonic()
                yield step
                self.spent["steps"] += self.stepped - began
                self.spent["reports and checkpoints"] += time.monotonic() - self.stepped
                if self.stopping:
                    break
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def _note_signal(self, signum, frame) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = signum
        tqdm.write("stopping after this step and saving; Ctrl-C again stops at once")

    def _loss_in_words(self) -> str:
        return "" if self.shown is None else f"loss {float(self.shown):.4g}"

    def index(self, count: int, batch_size: int | None = None) -> Tensor:
        """int64 [batch_size]: which of `count` examples this process sees in this step; an epoch is a permutation."""
        batch_size = batch_size or self.batch_size
        return util.batch_index(self.args.seed, self.step, batch_size, count, self.rank, self.world)

    def generator(self) -> torch.Generator:
        """A generator on the CPU for this step and process, such as for augmentation."""
        seed = util.mix_seed(self.args.seed, self.step, self.rank, 1)
        return torch.Generator().manual_seed(seed)

    def moves(self) -> Tensor:
        """float32 [batch_size, 4]: how the slices of `index` are moved; the same for any number of processes."""
        B, seed = self.batch_size, util.mix_seed(self.args.seed, self.step, 0, 1)
        moves = random_moves(B * self.world, torch.Generator().manual_seed(seed))
        return moves[self.rank * B :][:B]

    def autocast(self) -> torch.autocast:
        """The context in which networks run; losses belong outside."""
        return util.autocast(self.device, self.args.precision)

    def forward(self, *args, **kwargs):
        """The model's forward pass, compiled if that is wanted. The first one says how much memory a step takes."""
        if self.peak is None:
            self.peak = step_bytes(self.model, args, kwargs, self.autocast)
            words = f"memory: about {in_words(self.peak)} of {in_words(util.device_memory(self.device))} for a step"
            free = self.naming == "--name" and not has_saved(self.args.name)  # to choose the batch
            print(f"{words}; --batch-size lowers it" if free else words, flush=True)
        try:
            return self._network(*args, **kwargs)
        except Exception as error:
            if self.args.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                words = " ".join(str(error).split())[:100]
                raise UserError(f"--compile does not work here ({words}); leave the flag out") from None
            raise

    def descend(self, losses: dict[str, Tensor], total: Tensor, network: nn.Module, *optimizers) -> None:
        """One step of optimisers down the gradient of `total`, made of `losses`; clipped to norm 1, all finite."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.scaler.scale(total).backward()
        moving = [p for p in network.parameters() if p.requires_grad]
        util.average_gradients(moving)  # before unscale_, so that all processes see an infinite gradient of one
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(moving, 1.0)
        # with a scaler an infinite gradient is nothing bad: the step is left out, and the scale halved
        advice = f"another {self.naming}"
        if self.naming == "--name":
            reduced = util.autocast_dtype(self.device, self.args.precision) != torch.float32
            advice += f" and a lower --learning-rate{', or --precision fp32' if reduced else ''}"
        losses = losses if self.scaler.is_enabled() else losses | {"gradient": norm}
        check_finite(losses, self.before + self.step, advice)
        for optimizer in optimizers:
            self.scaler.step(optimizer)

    def update(
        self,
        losses: dict[str, Tensor],
        weights: dict[str, float] | None = None,
        others: dict[str, Tensor] | None = None,
    ) -> bool:
        """Trains the model on the weighted sum of the losses (weight 1 unless given), averages it, writes the log.

        `others` are losses of other networks, for the log.
        Returns whether to save now: a report is due, the run is to stop, or the last checkpoint is old.
        """
        weights = weights or {}
        total = sum(weights.get(name, 1.0) * loss for name, loss in losses.items())
        self.descend(losses, total, self.model, *self.optimizers)
        self.scaler.update()
        update_ema(self.ema, self.model, self.step, self.decay)
        self.done, self.shown = self.step + 1, total.detach()
        scalars = {f"train/{name}": loss for name, loss in (losses | (others or {})).items()}
        scalars |= {f"weight/{name}": weight for name, weight in weights.items()} | {"learning_rate": self.rate}
        self.logger.add(self.before + self.done, scalars, self.batch_size * self.world)

        now, minutes = time.monotonic(), self.args.minutes
        self.stepped = now
        late = minutes is not None and now - self.args.began > 60 * minutes
        self.stopping = util.any_process(self.interrupted or late)
        self.report_due = self.done == self.total or self.done % self.report_every == 0
        if self.report_due:
            self.logger.flush(self.before + self.done)  # before a validation, which is no training time
        return self.report_due or self.stopping or now - self.saved > 60 * SAVE_MINUTES

    # ---- results

    def report(self, scores: dict[str, float], **pictures: Image.Image) -> None:
        """Writes scores into the log, and pictures as NAME_vis/{name}_{step}.png."""
        step = self.before + self.done
        if scores:
            self.logger.report(step, scores)
        for name, picture in pictures.items():
            tqdm.write(f"picture: {self.logger.picture(f'{name}_{step:06d}', picture)}")

    def save(self) -> None:
        """Writes the checkpoint. Weights for use come first: a finished run then always has them."""
        state = {name: thing.state_dict() for name, thing in self.kept.items()}
        state |= {"script": self.args.script, "built_on": self.built_on, "step": self.done}
        save_checkpoint(self.checkpoint, state | {"log": self.logger.state_dict()})
        self.logger.pause()
        self.saved = time.monotonic()

    def described(self) -> dict:
        """What every file of weights says of its training."""
        return {"step": self.before + self.done, "preset": self.args.preset, "data": self.data["train"]}

    def finish(self) -> nn.Module:
        """The averaged model. Exits where the run was stopped: 128 + the number of a signal, 0 at the time limit."""
        interrupted = util.any_process(self.interrupted)  # perhaps in the last step, or in its report
        signum = self.interrupted or signal.SIGINT
        if interrupted or (self.stopping and self.done < self.total):
            print(f"stopped after {self.before + self.done} steps; the same command continues")
            sys.exit(128 + signum if interrupted else 0)
        return self.ema

    def say_where(self) -> None:
        """Prints where the time went and where the results are."""
        if any(self.spent.values()):
            print("time:", ", ".join(f"{what} {util.duration(seconds)}" for what, seconds in self.spent.items()))
        print(f"weights: {self.weights}   log: {self.logger.folder}   pictures: {self.logger.pictures}")
