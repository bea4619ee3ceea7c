"""Laws of util.py: flags, devices, seeds, files, progress, and the mathematics."""

import errno
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

import util
from util import UserError


def pictures(*shape: int) -> torch.Tensor:
    """Smooth random pictures in [0, 1] with black areas, as brains have them."""
    return (torch.nn.functional.avg_pool2d(torch.randn(*shape, dtype=torch.float64), 5, 1, 2) * 2).clamp(0, 1)


def test_ssim_map_equals_scikit_image():
    x, y = pictures(3, 1, 40, 52), pictures(3, 1, 40, 52)
    x[2, :, :20], y[2, :, :20] = 0, 0
    for a, b, ours in zip(x, y, util.ssim_map(x, y)):
        how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
        _, theirs = structural_similarity(a[0].numpy(), b[0].numpy(), full=True, **how)
        np.testing.assert_allclose(ours[0].numpy(), theirs[5:-5, 5:-5], atol=1e-10)


def test_sinusoidal_encoding_by_hand_and_by_its_law():
    """cos then sin of v w_i; the scalar product of two encodings depends on their distance only."""
    code = util.sinusoidal_encoding(torch.tensor([0.0, 3.0, 10.0, 13.0]), 8, longest=100.0)
    w = [1.0, 100**-0.25, 100**-0.5, 100**-0.75]
    by_hand = [math.cos(3 * v) for v in w] + [math.sin(3 * v) for v in w]
    assert code.dtype == torch.float32 and torch.allclose(code[1], torch.tensor(by_hand), atol=1e-6)
    assert torch.isclose(code[0] @ code[1], code[2] @ code[3], atol=1e-5)
    with pytest.raises(ValueError, match="dim"):
        util.sinusoidal_encoding(torch.zeros(1), 7)


def test_batch_index_visits_every_slice_once_per_epoch():
    """Also where an epoch ends inside a batch; and the next epoch has another order."""
    order = torch.cat([util.batch_index(5, step, 4, 10) for step in range(5)])
    assert order.dtype == torch.int64
    first, second = order[:10].tolist(), order[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != list(range(10))
    assert torch.bincount(util.batch_index(0, 3, 21, 7)).tolist() == [3] * 7  # a batch larger than the data
    parts = [util.batch_index(5, 1, 2, 10, rank, world=2) for rank in range(2)]  # ranks share the batch of one process
    assert torch.equal(torch.cat(parts), order[4:8])
    torch.rand(3), np.random.rand(3)  # it is a pure function of seed and step
    assert torch.equal(torch.cat([util.batch_index(5, step, 4, 10) for step in range(5)]), order)
    assert not torch.equal(util.batch_index(6, 0, 4, 10), order[:4])


def test_mix_seed_separates_tuples_and_is_the_same_in_every_process():
    """Sums would confuse (1, 2) with (2, 1); hash() differs from process to process."""
    seeds = {util.mix_seed(seed, step, rank) for seed in range(5) for step in range(100) for rank in range(4)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds)
    assert len({util.mix_seed(1, 23), util.mix_seed(12, 3), util.mix_seed(123), util.mix_seed(23, 1)}) == 4
    assert util.mix_seed(0, 1, 2) == 5458876493991123480  # another value would change every run that is to be resumed


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_write_file_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch, failing):
    path = tmp_path / "new folder" / "weights"
    util.write_file(path, b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError) as error:
        util.write_file(path, b"new and longer")
    assert error.value.filename == str(path)  # the system itself does not say which file finds no room
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["weights"]


def test_write_file_flushes_before_it_renames(tmp_path, monkeypatch):
    """The other way round a power cut leaves an empty file under the good name."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    util.write_file(tmp_path / "file", b"12345")
    assert calls == [5, "rename"] and (tmp_path / "file").read_bytes() == b"12345"


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    """What a killed process left half made is made anew; what was there already stays as it is."""
    path, making = tmp_path / "new", tmp_path / f".new{util.MAKING}"
    (making / "old").mkdir(parents=True)
    (making / "old" / "half").touch()
    with pytest.raises(ZeroDivisionError), util.new_folder(path) as folder:
        (folder / "file").touch()
        print(1 / 0)
    assert list(tmp_path.iterdir()) == []
    with util.new_folder(path) as folder:
        assert folder == making and not path.exists()
        (folder / "file").touch()
    assert [*tmp_path.iterdir()] == [path] and [file.name for file in path.iterdir()] == ["file"]
    with pytest.raises(util.UserError, match="new exists already"), util.new_folder(path):
        pass
    assert [*tmp_path.iterdir()] == [path] and (path / "file").exists()


def test_a_new_folder_has_one_maker(tmp_path):
    """The second is told who the first is."""
    script = "import time, util; from pathlib import Path; m = util.new_folder(Path('new')); m.__enter__(); "
    command = [sys.executable, "-c", script + "print('mine', flush=True); time.sleep(60)"]
    environment = os.environ | {"PYTHONPATH": str(Path(util.__file__).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as first:
        assert first.stdout.readline() == "mine\n"
        with pytest.raises(util.UserError, match=f"belongs to process {first.pid}"), util.new_folder(tmp_path / "new"):
            pass
        first.kill()
    with util.new_folder(tmp_path / "new") as folder:
        (folder / "file").touch()
    assert (tmp_path / "new" / "file").exists()


@pytest.mark.parametrize("device", ["banana", "cuda", "cuda:7", "mps", "meta"])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert util.pick_device("auto") == util.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=f"--device {device.split(':')[0]}"):
        util.pick_device(device)


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.half), ("fp32", torch.float)])
def test_precision_is_what_the_flag_says(precision, dtype):
    cpu, a = torch.device("cpu"), torch.randn(4, 4)
    with util.autocast(cpu, precision):
        assert (a @ a).dtype == dtype
    assert util.autocast_dtype(cpu, "auto") in (torch.float32, torch.bfloat16)  # what the processor has in hardware


def lines_of(progress, capsys) -> list[str]:
    capsys.readouterr()
    assert list(progress) == ["a", "b", "c"]
    return capsys.readouterr().out.splitlines()


def test_without_a_terminal_progress_prints_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(util, "QUIET_SECONDS", 0)
    notes = iter(["loss 3", "", "loss 1"])
    lines = lines_of(util.progress("abc", "run", total=5, unit="step", start=2, note=lambda: next(notes)), capsys)
    speed = r"[\d.]+ (step/s|s/step), \d+ s left"
    patterns = [rf"run: {done}, {speed}" for done in ("3 of 5 step, loss 3", "4 of 5 step", "5 of 5 step, loss 1")]
    assert len(lines) == 3 and all(map(re.fullmatch, patterns, lines)), lines
    assert lines_of(util.progress("abc", "run"), capsys)[-1].startswith("run: 3 of 3 it, ")
    monkeypatch.setattr(util, "QUIET_SECONDS", 3600)
    assert lines_of(util.progress("abc", "run"), capsys) == []


def test_on_a_terminal_progress_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    assert lines_of(util.progress("abc", "run", unit="step"), capsys) == []
    assert "run: 100%" in screen.getvalue() and "3/3" in screen.getvalue()


def test_speeds_and_durations_are_readable():
    assert [util.per_second(rate, "step") for rate in (20, 1, 0.25)] == ["20.0 step/s", "1.0 step/s", "4.0 s/step"]
    words = [util.duration(seconds) for seconds in (0.4, 40, 89, 720, 12_000)]
    assert words == ["0 s", "40 s", "89 s", "12 min", "3 h 20 min"]


def ends(error: BaseException) -> int | str | None:

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
    assert ends(BrokenPipeError(errno.EPIPE, "Broken pipe")) == 2 and "pipe" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a bug is not hidden
        util.command(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="inconsistent"):
        util.command(lambda: torch.ones(2) @ torch.ones(3), "buy more")


def test_too_little_memory_is_one_line_with_advice_of_the_script(capsys):
    """Also on a CPU, where PyTorch raises a RuntimeError like any other."""
    for ask in (lambda: torch.empty(2**55), lambda: np.empty(2**55)):
        with pytest.raises(SystemExit):
            util.command(ask, "choose less")
        assert capsys.readouterr().err == "error: out of memory; choose less\n"


def test_an_error_of_a_flag_is_one_line(capsys):
    parser = util.plain_parser("")
    parser.add_argument("--steps", type=util.positive_int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps", "1\n2"])
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("known", [{"RANK": "0"}, {"RANK": "x"}, {"RANK": ""}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_half_of_torchruns_environment_is_one_line(monkeypatch, known):
    """Left over in a shell, or set by a cluster."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(util.UserError, match="RANK is set.*unset RANK, or start with torchrun") as refusal:
        util.start_processes()
    assert "\n" not in str(refusal.value)


def test_a_folder_belongs_to_one_process_as_long_as_that_runs(tmp_path):
    """The second is told whose it is; when the first is killed, nothing is left in the way."""
    folder, wait = tmp_path / "run", "import sys, time, util; from pathlib import Path; util.own(Path(sys.argv[1])); "
    command = [sys.executable, "-c", wait + "print('mine', flush=True); time.sleep(60)", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(util.__file__).parent) as first:
        assert first.stdout.readline() == "mine\n"
        with pytest.raises(util.UserError, match=f"belongs to process {first.pid} on .*wait for it, .*another --out"):
            util.own(folder, "another --out")
        first.kill()
    util.own(folder)
    util.own(folder)  # it is ours already
    assert (folder / util.OWNER).read_text().startswith(f"process {os.getpid()} ")
    (folder / "result").touch()
    assert util.holds_anything(folder)
    util.disown()
    assert {file.name for file in folder.iterdir()} == {"result", util.LOCK}
