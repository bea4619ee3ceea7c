"""Laws of logger.py: the log on disk is right, survives crashes, and its curves are drawn without surprise."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import logger
import util
from logger import MOST, SCRIPTS, Curves, Logger, draw_curves, read_log, smooth


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it, and an empty working folder."""
    time = {"now": 1000.0}
    monkeypatch.setattr(logger.time, "monotonic", lambda: time["now"])
    monkeypatch.setattr(logger.time, "process_time", lambda: 2 * time["now"])  # two threads
    return time


def lines() -> list[dict]:
    return [json.loads(line) for line in Path("log/run/metrics.jsonl").read_text().splitlines()]


def test_lines_hold_the_means_of_their_steps(clock):
    log = Logger("run", {"script": "x"}, step=0, every=2)
    for step, value in enumerate([1.0, 3.0, 10.0, 20.0, 5.0], 1):
        clock["now"] += 2
        log.add(step, {"train/loss": torch.tensor(value, requires_grad=True), "rate": 2 * value}, images=8)
    log.flush(5)
    log.flush(5)
    assert lines() == [
        {"step": 2, "seconds": 4, "processor_seconds": 8, "images_per_second": 4, "train/loss": 2, "rate": 4},
        {"step": 4, "seconds": 8, "processor_seconds": 16, "images_per_second": 4, "train/loss": 15, "rate": 30},
        {"step": 5, "seconds": 10, "processor_seconds": 20, "images_per_second": 4, "train/loss": 5, "rate": 10},
    ]
    assert read_log(Path("log/run")) == lines()
    assert json.loads(Path("log/run/run.json").read_text()) == {"script": "x"}


def test_only_training_counts_as_time(clock, capsys):
    """Validation, pictures and checkpoints between flush and pause do not slow the logged speed."""
    log = Logger("run", {}, step=0, every=2)
    for step in (1, 2, 3):
        clock["now"] += 1
        log.add(step, {"loss": 0.0}, images=10)
    log.flush(3)  # in the middle of an interval
    clock["now"] += 100  # a validation
    log.report(3, {"validate/ssim": 0.5})
    clock["now"] += 100
    log.pause()
    clock["now"] += 1
    log.add(4, {"loss": 0.0}, images=10)
    log.flush(4)
    trained = [line for line in lines() if "images_per_second" in line]
    assert {line["images_per_second"] for line in trained} == {10}
    assert lines()[-1]["seconds"] == 4 and lines()[-1]["processor_seconds"] == 8
    assert "step 3" in capsys.readouterr().out


def test_a_checkpoint_between_two_lines_costs_no_time(clock):
    """What was trained before the pause of a checkpoint is counted, the checkpoint is not."""
    log = Logger("run", {}, step=0, every=4)
    for step in (1, 2, 3, 4):
        clock["now"] += 1
        log.add(step, {"loss": 0.0}, images=10)
        if step == 3:
            clock["now"] += 100
            log.pause()
    assert [(line["seconds"], line["images_per_second"]) for line in lines()] == [(4, 10)]


def test_resuming_drops_what_was_logged_after_the_checkpoint(clock):
    """Steps done twice would be drawn twice; the training time goes on from where the checkpoint was."""
    log = Logger("run", {}, step=0, every=1)
    for step in range(1, 6):
        clock["now"] += 1
        log.add(step, {"loss": float(step)}, images=1)
    log = Logger("run", {}, step=3, every=1)
    assert [line["step"] for line in lines()] == [1, 2, 3]
    clock["now"] += 1
    log.add(4, {"loss": 40.0}, images=1)
    assert [(line["step"], line["seconds"]) for line in lines()] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    Logger("run", {}, step=0, every=1)
    assert lines() == []


def test_a_run_that_stops_between_two_lines_goes_on_with_the_same_means(clock):
    """What was added since the last line is part of the checkpoint; a scalar may begin late."""
    for stops in ([], [1, 4]):
        log = Logger("run", {}, step=0, every=3)
        for step in range(1, 7):
            log.add(step, {"loss": torch.tensor(float(step))} | ({"late": 2.0 * step} if step > 4 else {}), images=step)
            if step in stops:
                state, log = log.state_dict(), Logger("run", {}, step=step, every=3)
                log.load_state_dict(json.loads(json.dumps(state)))
        assert [(line["step"], line["loss"], line.get("late")) for line in lines()] == [(3, 2, None), (6, 5, 11)]


def test_a_last_line_cut_by_a_crash_is_left_out_and_a_damaged_one_in_the_middle_named(clock):
    log = Logger("run", {}, step=0, every=1)
    for step in (1, 2, 3):
        log.add(step, {"loss": 0.125}, images=1)
    path = Path("log/run/metrics.jsonl")
    whole, last = path.read_text(), path.read_text().splitlines()[-1]
    for cut in range(1, len(last) + 1):
        path.write_text(whole[: -1 - cut])
        assert [line["step"] for line in read_log(Path("log/run"))] == [1, 2]
    path.write_text(whole[:-10])
    log = Logger("run", {}, step=3, every=1)
    log.add(4, {"loss": 0.25}, images=1)
    assert [line["step"] for line in lines()] == [1, 2, 4]
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(util.UserError, match="metrics.jsonl"):
        read_log(Path("log/run"))


def test_null_in_a_log_is_a_scalar_that_a_line_does_not_have(clock):
    """As other programs write it; words where a number belongs are refused."""
    Logger("run", {}, step=0, every=1)
    path = Path("log/run/metrics.jsonl")
    path.write_text(
        '{"step": 1, "seconds": 1.0, "loss": 0.9, "late": null}\n{"step": 2, "seconds": 2.0, "loss": 0.8}\n'
    )
    assert read_log(Path("log/run"))[0] == {"step": 1, "seconds": 1.0, "loss": 0.9}
    path.write_text('{"step": 1, "seconds": 1.0, "loss": "high"}\n')
    with pytest.raises(util.UserError, match="metrics.jsonl"):
        read_log(Path("log/run"))


def test_quiet_writes_nothing_at_all_and_pictures_are_kept_as_they_are(clock, capsys):
    pixels, log = np.arange(64, dtype=np.uint8).reshape(8, 8), Logger("run", {}, step=0, every=1, quiet=True)
    log.add(1, {"loss": 1.0}, images=1)
    log.flush(1)
    log.report(1, {"loss": 1.0})
    log.picture("noise", Image.fromarray(pixels))
    log.pause()
    assert list(Path().iterdir()) == [] and capsys.readouterr().out == ""
    path = Logger("run", {}, step=0, every=1).picture("noise", Image.fromarray(pixels))
    assert path == Path("run_vis/noise.png")
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), pixels)


def test_smoothing_has_no_start_up_bias():
    """A constant stays itself from the first value on; else m_t = sum_i w^(t-i) v_i / sum_i w^(t-i)."""
    assert np.allclose(smooth([3.0] * 5, 0.9), 3)
    assert np.allclose(smooth([1.0, 2.0, 4.0], 0.5), [1, (0.5 + 2) / 1.5, (0.25 + 1 + 4) / 1.75])
    assert smooth([1.0, 5.0], 0.0) == [1.0, 5.0]


def panels(figure) -> dict:
    """{first line of its title: axes} of all panels in which something is drawn."""
    return {axis.get_title(loc="left").splitlines()[0]: axis for axis in figure.axes if axis.lines}


def test_curves_show_scalars_of_all_runs_at_their_values():
    """What is not finite is left out, and so is a scalar with a single point."""
    a = [{"step": s, "seconds": 10.0 * s, "loss": float(s), "validate/ssim": 0.1} for s in (1, 2, 3)]
    b = [{"step": 1, "seconds": 5, "loss": math.nan, "once": 0.5}, {"step": 4, "seconds": 9, "loss": 7}]
    shown = panels(draw_curves([Curves("a", {}, a), Curves("b", {}, b)], x="seconds"))
    assert shown.keys() == {"loss", "validate: ssim"}
    assert [line.get_xydata().tolist() for line in shown["loss"].lines] == [[[10, 1], [20, 2], [30, 3]], [[9, 7]]]
    assert shown["loss"].get_xlabel() == "seconds of training"
    with pytest.raises(util.UserError, match="a has a single report"):
        draw_curves([Curves("a", {}, a[:1]), Curves("b", {}, b[:1])])


def phased(*counts: int) -> Curves:
    """A first stage with so many lines, a step each, in each of its two phases, and a report at the end of each."""
    log, step = [], 0
    for names, report, count in zip((["codebook", "reconstruction"], ["discriminator", "generator", "likeness"]),
                                    ("ssim", "spectrum"), counts, strict=True):  # fmt: skip
        for _ in range(count):
            step += 1
            clocks = {"step": step, "seconds": 2.0 * step}
            log.append(clocks | {f"train/{name}": 1 / step for name in names} | {"learning_rate": 1e-3})
        log.append(clocks | {f"validate/{report}": 0.5})
    return Curves("log/first", {"script": "prestage_train.py"}, log)


def test_phases_are_marked_where_their_losses_begin():
    """In every panel the names of just the phases that it shows, and a line where one begins inside."""
    run = phased(20, 10)
    for x, unit in (("step", 1), ("seconds", 2)):
        assert run.phases(x) == [("codec", 0), ("texture", 20 * unit)]
        shown = panels(draw_curves([run], x=x))
        said = {title: [text.get_text() for text in axis.texts] for title, axis in shown.items()}
        assert said["Learning rate"] == ["codec", "texture"]
        assert said["Reconstruction loss"] == ["codec"] and said["Blurred slices, real - drawn"] == ["texture"]
        marks = [line.get_xdata()[0] for line in shown["Learning rate"].lines if line.get_linestyle() == ":"]
        assert marks == [20 * unit]
    other = Curves("log/other", {}, [line for line in run.lines if "train/codebook" in line])
    assert not any(axis.texts for axis in panels(draw_curves([other])).values())  # one phase needs no name


def test_runs_of_a_script_share_a_block_and_few_panels_are_drawn_unless_all_are_asked_for():
    """Blocks come in the order of the stages, and all together have at most MOST panels; what matters most is first."""
    one, two = phased(20, 10), phased(15, 15)
    names = [f"train/x{n}" for n in range(20)]
    many = [{"step": s, "seconds": s} | dict.fromkeys(names, 1.0) | {"validate/bits": 1 / s} for s in (1, 2, 3)]
    runs = [Curves("log/z", {"script": "pixelCNN.py"}, many), one, two]
    figure = draw_curves(runs)
    assert len(figure.subfigs) == 2 and len(panels(figure)) <= MOST
    first, second = (list(panels(part)) for part in figure.subfigs)
    assert "Reconstruction loss" in first and second[0] == SCRIPTS["pixelCNN.py"][1][0].title
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert len(labels) == 3 and all("log/first" in label for label in labels[:2])
    assert len(panels(draw_curves(runs[:1], most=None))) == 21
    assert len(panels(draw_curves(runs[:1]))) == MOST


def test_a_block_says_what_was_run_and_a_damaged_record_is_in_nobodys_way(run_main, tmp_path):
    """Data and time come from run.json and the log, a folder only by its name; a dollar is no formula."""
    record = {"script": "pixelCNN.py", "data": {"train": {"folder": "/home/me/heads", "slices": 8544, "cases": 267}}}
    record["data"]["train"]["image_size"] = 256
    run = Curves("log/$a$", record, [{"step": s, "seconds": 720.0, "loss": 1.0} for s in (1, 12_000)])
    words = run.describe()
    assert all(word in words for word in ("log/$a$", "heads", "8,544", "267", "256 px", "12,000 steps", "12 min"))
    assert "/home" not in words
    text = "".join(json.dumps(line) + "\n" for line in run.lines).encode()
    damaged = [{"script": ["x"]}, {"data": 5}, {"data": {"train": {}}}, [1], {"script": "pixelCNN.py", "data": None}]
    for number, content in enumerate([*(json.dumps(thing).encode() for thing in damaged), b"{", b"\xff", None]):
        folder = tmp_path / f"log/$run{number}"
        util.write_file(folder / "metrics.jsonl", text)
        if content is not None:
            util.write_file(folder / "run.json", content)
    status, out, _ = run_main(logger, "log")
    assert status == 0 and "$run7: 12,000 steps" in out


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1, "sec'])
def test_a_log_without_a_line_is_one_line_and_status_2(run_main, tmp_path, content):
    if content is None:
        (tmp_path / "log").mkdir()
    else:
        util.write_file(tmp_path / "log/metrics.jsonl", content)
    for arguments in (["log"], []):  # log is also the default
        status, _, errors = run_main(logger, *arguments)
        assert status == 2 and len(errors.splitlines()) == 1 and "log" in errors


def test_two_runs_are_drawn_into_one_png(run_main, tmp_path):
    for name, level in (("a", 1.0), ("b", 9.0)):
        text = "".join(json.dumps({"step": s, "seconds": s, "loss": level / s}) + "\n" for s in range(1, 30))
        util.write_file(tmp_path / "log" / name / "metrics.jsonl", text.encode())
    status, out, _ = run_main(logger, "log/a", "log/b", "--smooth", 0.5, "--x", "seconds")
    assert status == 0 and "log/a: 29 steps" in out and "log/b: 29 steps" in out
    with Image.open(tmp_path / "log/a/curves.png") as picture:
        colours = {tuple(c) for c in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    drawn = [tuple(bytes.fromhex(logger.look_of(n)[0][1:])) for n in (0, 1)]
    assert set(drawn) <= colours  # a line of each run
    status, _, _ = run_main(logger, "log", "--out", "new/all.png")
    assert status == 0 and (tmp_path / "new/all.png").is_file()
    util.write_file(tmp_path / "log/c/metrics.jsonl", b"")
    status, out, _ = run_main(logger, "log")
    assert status == 0 and "log/c/metrics.jsonl is empty" in out  # a run that has just begun is in nobody's way
    status, _, errors = run_main(logger, "log", "--smooth", 1)
    assert status == 2 and len(errors.splitlines()) == 1
