"""Laws of util.py: flags, seeds, steps, and the mathematics."""

import argparse
import errno
import math
import os
import signal

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn

import prestage_train
import util
from util import UserError

# -------------------------------------------------------------------------------------------------------- mathematics


def pictures(*shape: int) -> torch.Tensor:
    """Smooth random pictures in [0, 1] with black areas, as brains have them."""
    return (torch.nn.functional.avg_pool2d(torch.randn(*shape, dtype=torch.float64), 5, 1, 2) * 2).clamp(0, 1)


def test_ssim_map_equals_scikit_image():
    """At every valid position of every picture of a batch, also where both are black, to 1e-10."""
    x, y = pictures(3, 1, 40, 52), pictures(3, 1, 40, 52)
    x[2, :, :20], y[2, :, :20] = 0, 0
    for a, b, ours in zip(x, y, util.ssim_map(x, y)):
        _, theirs = structural_similarity(
            a[0].numpy(),
            b[0].numpy(),
            full=True,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
        )
        np.testing.assert_allclose(ours[0].numpy(), theirs[5:-5, 5:-5], atol=1e-10)


def test_ssim_map_is_symmetric_and_one_on_equal_pictures():
    x, y = pictures(2, 1, 24, 24), pictures(2, 1, 24, 24)
    assert torch.allclose(util.ssim_map(x, y), util.ssim_map(y, x), atol=1e-12)
    assert torch.allclose(util.ssim_map(x, x), torch.ones(()).double(), atol=1e-9)
    assert util.ssim_map(x, y).mean() < 0.9


def test_sinusoidal_encoding_by_hand_and_by_its_law():
    """cos then sin of v w_i; the scalar product of two encodings depends on their distance only."""
    code = util.sinusoidal_encoding(torch.tensor([0.0, 3.0, 10.0, 13.0]), 8, longest=100.0)
    w = [1.0, 100**-0.25, 100**-0.5, 100**-0.75]
    by_hand = [math.cos(3 * v) for v in w] + [math.sin(3 * v) for v in w]
    assert code.dtype == torch.float32 and torch.allclose(code[1], torch.tensor(by_hand), atol=1e-6)
    assert torch.isclose(code[0] @ code[1], code[2] @ code[3], atol=1e-5)
    with pytest.raises(ValueError, match="dim"):
        util.sinusoidal_encoding(torch.zeros(1), 7)


# -------------------------------------------------------------------------------------------------- seeds and steps


def test_batch_index_visits_every_slice_once_per_epoch():
    """Also where an epoch ends inside a batch; and the next epoch has another order."""
    order = torch.cat([util.batch_index(5, step, 4, 10) for step in range(5)])
    assert order.dtype == torch.int64
    first, second = order[:10].tolist(), order[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != list(range(10))


def test_batch_index_holds_whole_epochs_when_the_batch_is_larger_than_the_data():
    assert torch.bincount(util.batch_index(0, 3, 21, 7)).tolist() == [3] * 7


def test_ranks_partition_the_batch_of_one_process():
    for step in range(4):
        parts = [util.batch_index(1, step, 3, 50, rank, world=2) for rank in range(2)]
        assert torch.equal(torch.cat(parts), util.batch_index(1, step, 6, 50))


def test_batch_index_is_a_pure_function_of_seed_and_step():
    before = util.batch_index(1, 7, 8, 100)
    torch.rand(3), np.random.rand(3), util.batch_index(1, 2, 8, 100)
    assert torch.equal(before, util.batch_index(1, 7, 8, 100))
    assert not torch.equal(before, util.batch_index(2, 7, 8, 100))


def test_mix_seed_separates_tuples_and_is_the_same_in_every_process():
    """Sums would confuse (1, 2) with (2, 1); hash() differs from process to process."""
    seeds = {util.mix_seed(seed, step, rank) for seed in range(5) for step in range(100) for rank in range(4)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds)
    assert len({util.mix_seed(1, 23), util.mix_seed(12, 3), util.mix_seed(123), util.mix_seed(23, 1)}) == 4
    assert util.mix_seed(0, 1, 2) == 5458876493991123480  # another value would change every run that is to be resumed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_TrainingSteps_ends_after_a_whole_step_on_a_signal(number):
    """The step in which the signal arrives is completed, none follows, and the old handlers come back."""
    before, done = signal.getsignal(number), []
    for step in util.TrainingSteps(3, 100, None, "test"):
        if step == 5:
            os.kill(os.getpid(), number)
        done.append(step)
    assert done == [3, 4, 5] and signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt):
        for step in util.TrainingSteps(0, 100, None, "test"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            done.append(step)
    assert done == []


def test_TrainingSteps_keeps_its_limits():
    assert list(util.TrainingSteps(2, 5, None, "test")) == [2, 3, 4]
    assert list(util.TrainingSteps(2, 5, 1e-9, "test")) == [2]  # the first step is done whatever the limit
    assert list(util.TrainingSteps(2, 5, 60.0, "test")) == [2, 3, 4]


def test_learning_rate_factor_warms_up_and_falls_to_its_final_value():
    factors = [util.learning_rate_factor(step, 1000, warm_up=100, final=0.1) for step in range(1001)]
    assert math.isclose(factors[0], 0.01) and math.isclose(factors[49], 0.5, rel_tol=0.02)
    assert max(factors) <= 1 and factors.index(max(factors)) in (99, 100)
    assert factors[:100] == sorted(set(factors[:100])) and factors[100:] == sorted(set(factors[100:]), reverse=True)
    assert math.isclose(factors[500], 0.1 + 0.9 / 2) and math.isclose(factors[1000], 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_finite_names_the_term_and_the_step(bad):
    util.check_finite({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, 7)
    with pytest.raises(UserError, match="kl .* step 7") as error:
        util.check_finite({"reconstruction": torch.tensor(1.0), "kl": torch.tensor(bad)}, 7)
    assert "reconstruction" not in str(error.value)


def test_ema_warms_up_and_copies_buffers():
    """d = min(decay, (1 + step) / (10 + step)), so that the start is forgotten; averaged counts would be nonsense."""
    model, ema = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        ema.weight.fill_(0.0)
        model.weight.fill_(1.0)
        model.running_mean.fill_(5.0)
    util.update_ema(ema, model, 0)
    assert torch.allclose(ema.weight, torch.tensor(0.9)) and torch.equal(ema.running_mean, model.running_mean)
    util.update_ema(ema, model, 1)
    assert torch.allclose(ema.weight, torch.tensor(0.9 + 0.1 * 9 / 11))
    with torch.no_grad():
        ema.weight.fill_(0.0)
    util.update_ema(ema, model, 10**6, decay=0.99)
    assert torch.allclose(ema.weight, torch.tensor(0.01)) and torch.equal(model.weight, torch.ones(3))


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_write_file_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch, failing):
    path = tmp_path / "new folder" / "weights"
    util.write_file(path, b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError):
        util.write_file(path, b"new and longer")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["weights"]


def test_write_file_flushes_before_it_renames(tmp_path, monkeypatch):
    """The other way round a power cut leaves an empty file under the good name."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    util.write_file(tmp_path / "file", b"12345")
    assert calls == [5, "rename"] and (tmp_path / "file").read_bytes() == b"12345"


# ----------------------------------------------------------------------------------------------- flags and presets


def test_parse_flags_tells_typed_from_default():
    """A flag typed with its default's value is typed."""
    args, typed = util.parse_flags(prestage_train.flags(), ["--seed", "0", "--channel-multipliers", "1", "2"])
    assert typed == {"seed": 0, "channel_multipliers": [1, 2]}
    assert (args.seed, args.model, args.steps, args.compile) == (0, "vqvae", None, False)


@pytest.mark.parametrize("preset", util.PRESET_NAMES)
def test_a_default_lives_in_one_place(preset):
    """What a preset sets is a flag of the script, and has no plain default beside it."""
    plain = vars(prestage_train.flags().parse_args([]))
    settings = util.preset_settings("prestage_train.py", preset)
    assert settings and all(plain.get(flag, "no such flag") is None for flag in settings)
    undecided = {flag for flag, value in plain.items() if value is None} - settings.keys()
    assert undecided == {"data", "name", "preset", "minutes", "discriminator_learning_rate", "start_from"}


@pytest.mark.parametrize("typed", [("--batch-size", "0"), ("--image-size", "100"), ("--no-such-flag",)])
def test_a_flag_out_of_range_is_one_line_and_status_2(run_script, typed):
    done = run_script("prestage_train.py", *typed)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and typed[0] in done.stderr


@pytest.mark.parametrize(
    "flag, value",
    [("--steps", "-3"), ("--steps", "many"), ("--minutes", "inf"), ("--minutes", "nan"), ("--learning-rate", "0")]
    + [("--kl-ramp", "1.5"), ("--gan-weight", "nan"), ("--preset", "huge"), ("--model", "gan"), ("--seed", "1.5")]
    + [("--seed", "-1"), ("--seed", str(2**63)), ("--minutes", "ten"), ("--kl-ramp", ""), ("--gan-weight", "-0.1")],
)
def test_every_kind_of_flag_has_a_range(run_main, flag, value):
    status, _, errors = run_main(prestage_train, flag, value)
    assert status == 2 and len(errors.splitlines()) == 1 and flag in errors


def test_a_number_from_0_on_says_so():
    """Zero is one of them, and what is refused is told where they begin."""
    assert (util.whole_number("0"), util.whole_number("6")) == (0, 6)
    for text in ("-1", "x", "1.5", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="from 0 on"):
            util.whole_number(text)


@pytest.mark.parametrize("device", ["banana", "cuda", "cuda:7", "mps", "meta"])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert util.pick_device("auto") == util.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=f"--device {device.split(':')[0]}"):
        util.pick_device(device)


def test_precision_is_what_the_flag_says():
    a = torch.randn(4, 4)
    with util.autocast(torch.device("cpu"), "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with util.autocast(torch.device("cpu"), "fp32"):
        assert (a @ a).dtype == torch.float32


def ends(error: BaseException) -> int | str | None:
    """Exit status of a script that ends in `error`."""

    def main():
        raise error

    with pytest.raises(SystemExit) as exit_:
        util.command(main)
    return exit_.value.code


def test_command_turns_what_a_user_can_mend_into_one_line(capsys):
    assert ends(UserError("no data; get some")) == 2
    assert capsys.readouterr().err == "error: no data; get some\n"
    assert ends(OSError(errno.ENOSPC, "No space left on device", "last.pt")) == 2
    line = capsys.readouterr().err
    assert "last.pt" in line and len(line.splitlines()) == 1
    assert ends(KeyboardInterrupt()) == 130


def test_command_hides_no_bug():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        util.command(main)
