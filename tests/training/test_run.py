"""Laws of training/run.py: steps, signals, limits, checkpoints and precision, on a model of two numbers."""

import math
import os
import signal
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import util
from logger import read_log
from training import run as training_run
from training.checkpoints import save_weights
from training.run import REPORTS, Run, learning_rate_factor, update_ema
from training.settings import Flags, open_run
from util import UserError

ONE_STEP = ("--minutes", "1e-9")  # a limit that is over when the first step is done


class Data:
    """Stands for Slices: the numbers x = -1 .. 1 and y = 2 x + 1."""

    x = torch.linspace(-1, 1, 24)[:, None]

    def describe(self) -> dict:
        return {"folder": "numbers", "digest": "abc"}


class Line(nn.Module):
    """Mean squared error of a x + b, with a buffer that the checkpoint holds and no optimiser moves."""

    def __init__(self):
        super().__init__()
        self.line, self.frozen = nn.Linear(1, 1), nn.Parameter(torch.tensor([-0.0]), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch._subclasses.fake_tensor.is_fake(x):
            self.seen += len(x)
        return (self.line(x) - (2 * x + 1) + 0.1 * torch.randn_like(x)).square().mean()


def parse(*typed: str):
    flags = Flags("toy.py", "a toy")
    flags.train("--steps", type=util.positive_int, default=10, changeable=True, help="steps")
    flags.train("--batch-size", type=util.positive_int, default=4, help="numbers a step")
    flags.train("--learning-rate", type=util.positive_float, default=0.1, help="Adam's")
    args, typed = flags.parse(["--name", "line", "--device", "cpu", "--precision", "fp32", *map(str, typed)])
    return open_run(flags, args, typed, lambda new: "demo")


def train(*typed, **options) -> Run:
    args, data = parse(*typed), Data()
    torch.manual_seed(args.seed)
    run = Run(args, Line(), data={"train": data}, steps=args.steps, **options)
    for _ in run.steps():
        with run.autocast():
            loss = run.forward(data.x[run.index(len(data.x))])
        if run.update({"loss": loss}, {"loss": 1.0}):
            if run.report_due:
                run.report({"validate/loss": float(loss.detach())})
            save_weights(run.weights, run.ema.state_dict(), {"kind": "line", "model_kwargs": {}} | run.described())
            run.save()
    run.finish()
    return run


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    monkeypatch.setattr(util, "commit_of_code", lambda: "abc")  # asking git takes longer than such a run


@pytest.fixture
def straight(tmp_path_factory, monkeypatch) -> Path:
    """The folder of a run of ten steps, with two reports and as many lines in the log, that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    monkeypatch.setattr(training_run, "REPORTS", 2)
    monkeypatch.setattr(training_run, "LINES", 1)
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        train()
    return folder


def test_learning_rate_factor_warms_up_and_falls_to_its_final_value():
    factors = [learning_rate_factor(step, 1000, warm_up=100, final=0.1) for step in range(1001)]
    assert math.isclose(factors[0], 0.01) and math.isclose(factors[49], 0.5, rel_tol=0.02)
    assert max(factors) <= 1 and factors.index(max(factors)) in (99, 100)
    assert factors[:100] == sorted(set(factors[:100])) and factors[100:] == sorted(set(factors[100:]), reverse=True)
    assert math.isclose(factors[500], 0.1 + 0.9 / 2) and math.isclose(factors[1000], 0.1)


def test_ema_warms_up_copies_buffers_and_leaves_alone_what_is_frozen():
    """d = min(decay, (1 + step) / (10 + step)), so that the start is forgotten; averaged counts would be nonsense."""
    model, ema = Line(), Line()
    with torch.no_grad():
        ema.line.weight.fill_(0.0)
        model.line.weight.fill_(1.0)
        model.seen.fill_(5.0)
    update_ema(ema, model, 0)
    assert torch.allclose(ema.line.weight, torch.tensor(0.9)) and ema.seen == 5
    assert torch.signbit(ema.frozen).all()  # -0 averaged with -0 would be 0
    update_ema(ema, model, 1)
    assert torch.allclose(ema.line.weight, torch.tensor(0.9 + 0.1 * 9 / 11))
    with torch.no_grad():
        ema.line.weight.fill_(0.0)
    update_ema(ema, model, 10**6, decay=0.99)
    assert torch.allclose(ema.line.weight, torch.tensor(0.01)) and torch.equal(model.line.weight, torch.ones(1, 1))


@pytest.mark.parametrize("steps", [1, 7, 10, 25, 31])
def test_there_are_ten_reports_at_even_distances_and_one_at_the_end(steps):
    reports = []
    run = Run(parse(), Line(), data={"train": Data()}, steps=steps)
    for _ in run.steps():
        due = run.update({"loss": run.model(Data().x)})
        assert due == run.report_due
        if due:
            reports.append(run.done)
    every = -(-steps // REPORTS)
    assert reports == sorted({*range(every, steps + 1, every), steps}) and len(reports) <= REPORTS


def test_update_asks_for_a_checkpoint_when_the_last_is_old(monkeypatch):
    """Between reports too; and a save makes it new."""
    run = Run(parse(), Line(), data={"train": Data()}, steps=1000)
    for step in run.steps():
        monkeypatch.setattr(training_run, "SAVE_MINUTES", 0 if step < 2 else 10)
        assert run.update({"loss": run.model(Data().x)}) == (step < 2) and not run.report_due
        run.save()
        assert run.saved > run.stepped and run.checkpoint.is_file()
        if step == 2:
            break


def test_every_optimiser_that_is_kept_has_the_rate_of_the_step():
    (other,) = training_run.new_optimizers(nn.Linear(1, 1), 5.0, (0.5, 0.9))
    run = Run(parse(), Line(), data={"train": Data()}, steps=4, keep={"other": other})
    for step in run.steps():
        rate = 0.1 * learning_rate_factor(step, 4)
        assert [o.param_groups[0]["lr"] for o in (*run.optimizers, other)] == [rate, rate]
        run.update({"loss": run.model(Data().x)})
    run.report({})
    assert read_log(Path("log/line"))[-1]["learning_rate"] == pytest.approx(rate, rel=1e-6)


def test_splits_of_the_same_slices_are_refused():
    with pytest.raises(UserError, match="train and validate are the same slices"):
        Run(parse(), Line(), data={"train": Data(), "validate": Data()}, steps=3)


def test_only_what_is_possible_is_advised(capsys):
    """A smaller batch and a lower rate, where the script has such flags and the run is new; --precision not in fp32."""
    for naming, words in (("--name", "another --name and a lower --learning-rate$"), ("--scorer", "another --scorer$")):
        run = Run(Namespace(**vars(parse()), naming=naming), Line(), data={"train": Data()}, steps=3)
        run.forward(Data().x)
        assert ("--batch-size" in capsys.readouterr().out) == (naming == "--name")
        with pytest.raises(UserError, match=words):
            run.descend({"loss": torch.tensor(math.nan)}, run.model(Data().x), run.model, *run.optimizers)
    run.save()
    run = Run(parse(), Line(), data={"train": Data()}, steps=3)
    run.forward(Data().x)
    assert "--batch-size" not in capsys.readouterr().out


def test_phases_go_on_counting():
    """In the log; seeds and rate begin anew, so that a phase does not depend on what came before."""
    drawn = {}
    for phase, before in (("first", 0), ("second", 3)):
        run = Run(parse(), Line(), data={"train": Data()}, steps=3, phase=phase, before=before)
        for _ in run.steps():
            drawn[before + run.step] = (torch.rand(()).item(), *run.index(24).tolist(), run.generator().initial_seed())
            if run.update({"loss": run.model(Data().x)}):
                run.save()
    assert len(set(drawn.values())) == 3 and all(drawn[step] == drawn[step + 3] for step in range(3))
    assert [line["step"] for line in read_log(Path("log/line"))] == [1, 2, 3, 4, 5, 6]
    Run(parse(), Line(), data={"train": Data()}, steps=3, phase="first")  # as the same command does
    assert [line["step"] for line in read_log(Path("log/line"))] == [1, 2, 3, 4, 5, 6]


def test_a_run_stopped_after_every_step_equals_an_uninterrupted_one(straight, differences, tmp_path, capsys):
    """With what the checkpoints know of lines of the log that were not yet full."""
    for step in range(1, 10):
        with pytest.raises(SystemExit) as stop:
            train(*ONE_STEP)
        assert stop.value.code == 0 and f"stopped after {step} steps" in capsys.readouterr().out
    train()
    assert differences(straight, "line", tmp_path, "line") == []


@pytest.mark.parametrize("step", [3, 10])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_after_a_whole_step(straight, differences, at_step, tmp_path, capsys, step, number):
    """The step is completed and saved, also where it was the last; and the old handlers come back."""
    at_step(step, lambda: os.kill(os.getpid(), number))
    before, outside = signal.default_int_handler, signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            train()
        assert stop.value.code == 128 + number and signal.getsignal(number) is before
    finally:
        signal.signal(number, outside)
    assert f"stopped after {step} steps; the same command continues" in capsys.readouterr().out
    assert train().done == 10
    assert differences(straight, "line", tmp_path, "line") == []


def test_a_closed_terminal_stops_nothing_under_nohup(at_step):
    """Which begins a process with SIGHUP ignored."""
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGHUP))
    outside = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train().done == 10
    finally:
        signal.signal(signal.SIGHUP, outside)


def test_a_second_ctrl_c_interrupts_at_once(at_step):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(2, twice)
    with pytest.raises(KeyboardInterrupt):
        train()


@pytest.mark.parametrize("step", [1, 8])
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(straight, differences, at_step, tmp_path, step):
    with at_step(step):
        train()
    assert Path("model_ckpt/line/last.pt").exists() == (step > 5)
    train()
    assert differences(straight, "line", tmp_path, "line") == []


def test_what_was_built_on_something_else_starts_anew(capsys):
    """And what is measured at the beginning is measured then, and only then."""
    begun = []
    for built_on, expected in (("a", 1), ("a", 1), ("b", 2)):
        run = train(built_on=built_on, begin=lambda: begun.append(1))
        assert len(begun) == expected and run.done == 10
    assert capsys.readouterr().out.count("the phase last starts anew") == 1


class Overflowing(Line):
    """A Line whose gradient is infinite whenever the scaled loss is beyond what half precision holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = super().forward(x)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * math.inf if gradient > 2**14 else gradient)
        return loss


def test_half_precision_leaves_out_steps_with_infinite_gradients():
    """The scale is halved until they are finite, and training goes on, also from a checkpoint."""
    run = Run(parse("--precision", "fp16"), Overflowing(), data={"train": Data()}, steps=8)
    assert run.scaler.is_enabled() and run.scaler.get_scale() == 2**16
    moved, before = [], run.model.line.weight.item()
    for _ in run.steps():
        run.update({"loss": run.model(Data().x)})
        moved.append(run.model.line.weight.item() != before)
        before = run.model.line.weight.item()
        if run.done == 4:
            run.save()
            break
    assert moved == [False, False, True, True] and run.scaler.get_scale() == 2**14
    assert torch.isfinite(run.ema.line.weight).all()
    again = Run(parse("--precision", "fp16"), Overflowing(), data={"train": Data()}, steps=8)
    assert again.done == 4 and again.scaler.get_scale() == 2**14


@pytest.mark.parametrize("first, then", [("fp16", "fp32"), ("fp32", "fp16")])
def test_a_run_may_go_on_at_a_device_with_another_precision(monkeypatch, first, then):
    """As --precision auto has it: half precision on an older GPU, float32 on a CPU."""
    precision, autocast_dtype = first, util.autocast_dtype
    monkeypatch.setattr(util, "autocast_dtype", lambda device, _: autocast_dtype(device, precision))
    with pytest.raises(SystemExit):
        train(*ONE_STEP, "--precision", "auto")
    precision = then
    assert train("--precision", "auto").done == 10


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(precision, monkeypatch):
    with pytest.raises(SystemExit):
        train(*ONE_STEP, "--precision", precision)
    before = {path: path.read_bytes() for path in Path("model_ckpt/line").glob("[!.]*")}
    monkeypatch.setattr(Line, "forward", lambda self, x: self.line(x).mean() * math.nan)
    with pytest.raises(UserError, match="loss became nan at step 1") as error:
        train("--precision", precision)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in Path("model_ckpt/line").glob("[!.]*")} == before and len(before) == 2


def test_a_gradient_that_is_not_finite_is_one_too(monkeypatch):
    """In float32; in half precision it is not."""
    monkeypatch.setattr(Line, "forward", lambda self, x: (x.sum() * self.line.weight * 0).sqrt().sum())
    with pytest.raises(UserError, match="gradient became (nan|inf) at step 0"):
        train()


class Exact(Line):
    """Without noise, so that the loss of a batch is the mean of its halves' losses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.line(x) - (2 * x + 1)).square().mean()


def note_steps(kind: type[nn.Module], *typed) -> list[torch.Tensor]:
    """Trains for four steps, and returns gradient and weight of each."""
    torch.manual_seed(0)
    run, noted = Run(parse(*typed), kind(), data={"train": Data()}, steps=4), []
    for _ in run.steps():
        run.update({"loss": run.model(Data().x[run.index(24)])})
        noted += [run.model.line.weight.grad.clone(), run.model.line.weight.detach().clone()]
    return noted


def in_one_of_two(rank: int, folder: str) -> None:
    """What each of torchrun's two processes does: trains twice; in the second run, one has infinite gradients."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.chdir(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    noted = {"exact": note_steps(Exact, "--batch-size", 2)}
    noted["halves"] = note_steps(Overflowing if rank else Exact, "--precision", "fp16", "--name", "halves")[1::2]
    noted["mean"] = util.mean_of_processes(torch.tensor([float(rank), 1.0])).tolist()
    noted["any"] = util.any_process(rank == 1)
    torch.save(noted, f"{folder}/noted{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_with_the_joined_batch(tmp_path):
    """Gradients and weights, to 1e-5; one log. An infinite gradient in one leaves the step out in both."""
    start = torch.multiprocessing.start_processes
    context = start(in_one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn", join=False)
    while not context.join(timeout=600):  # returns whenever one of them has ended
        pass
    first, second = (torch.load(tmp_path / f"noted{rank}.pt") for rank in range(2))
    for ours, other, one in zip(first["exact"], second["exact"], note_steps(Exact, "--name", "one"), strict=True):
        assert torch.equal(ours, other) and torch.allclose(ours, one, rtol=1e-5, atol=1e-6)
    assert first["mean"] == second["mean"] == [0.5, 1] and first["any"] and second["any"]
    assert len(read_log(Path("log/line"))) == 4
    a, b = first["halves"], second["halves"]
    assert all(torch.equal(*pair) and pair[0].isfinite().all() for pair in zip(a, b, strict=True))
    assert torch.equal(a[0], a[1]) and not torch.equal(a[1], a[2])  # two steps left out, two taken
