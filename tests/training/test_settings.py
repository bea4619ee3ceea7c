"""Laws of training/settings.py: what is typed, recorded, preset or plain, and what sampling draws from."""

import argparse
import importlib
import json
import shutil
from pathlib import Path

import pytest

import prestage_train
import stable_diffusion
import util
from training import settings
from training.presets import MEANINGS
from training.settings import Flags, describe_run, describe_samples, open_run, weights_to_sample
from util import UserError

TRAINERS = ("prestage_train", "stable_diffusion", "pixelCNN")


def start(*typed: str, preset: str = "demo", flags: Flags | None = None) -> argparse.Namespace:
    """The settings of a start of "run"."""
    flags = flags or prestage_train.flags()
    args, typed = flags.parse(["--name", "run", "--device", "cpu", *map(str, typed)])
    return open_run(flags, args, typed, lambda new: preset)


def record(args: argparse.Namespace) -> None:
    """Writes run.json as a run does, and stands for its first checkpoint, before which settings may change."""
    util.write_file(Path("model_ckpt/run/last.pt"), b"")
    util.write_file(Path("log/run/run.json"), json.dumps(describe_run(args, {})).encode())


def recorded() -> dict:
    return json.loads(Path("log/run/run.json").read_text())["settings"]


def toy() -> Flags:
    """The flags of a second stage with one setting of training and one of sampling of its own."""
    flags = Flags("toy.py", "a toy")
    flags.presets = {"demo": {"steps": 6}, "small": {"steps": 60}, "base": {"steps": 600}}
    flags.train("--first-stage", default="vqvae", help="run")
    flags.train("--steps", type=util.positive_int, changeable=True, help="steps")
    flags.add_sampling("NAME_vis/samples")
    flags.sample("--colour", default="grey", help="of the brains")
    return flags


@pytest.mark.parametrize("name", TRAINERS)
def test_a_default_lives_in_one_place(name):
    """Presets decide the same flags, all declared, and these have no plain default beside; all else has one."""
    flags = importlib.import_module(name).flags()
    plain, decided = vars(flags.parser.parse_args([])), set(flags.presets["demo"])
    assert flags.presets.keys() == MEANINGS.keys()
    assert all(set(values) == decided for values in flags.presets.values())
    assert all(plain[flag] is None for flag in decided)
    undecided = {flag for flag, value in plain.items() if value is None} - decided
    of_sampling = {"out", "complete", "age", "sex", "cdr"}
    assert undecided <= {"data", "name", "preset", "minutes", "start_from", "levels"} | of_sampling


@pytest.mark.parametrize(
    "flag, value",
    [("--steps", "-3"), ("--steps", "many"), ("--minutes", "inf"), ("--minutes", "nan"), ("--learning-rate", "0")]
    + [("--gan-weight", "1.5"), ("--gan-weight", "nan"), ("--preset", "huge"), ("--model", "gan"), ("--seed", "1.5")]
    + [("--seed", "-1"), ("--seed", str(2**63)), ("--minutes", "ten"), ("--gan-weight", ""), ("--no-such-flag", "1")],
)
def test_every_kind_of_flag_has_a_range(refused, flag, value):
    refused(prestage_train, flag, value, names=[flag])


def test_typed_beats_recorded_beats_preset_beats_plain():
    args, typed = prestage_train.flags().parse(["--seed", "0", "--widths", "8", "16"])
    assert typed == {"seed": 0, "widths": [8, 16]}  # also where it is the default
    assert (args.seed, args.model, args.steps, args.compile) == (0, "vqvae", None, False)
    demo = prestage_train.flags().presets["demo"]
    new = start("--blocks", 2, "--kl-schedule", "constant")
    assert (new.blocks, new.kl_schedule, new.preset, new.latent_channels) == (2, "constant", "demo", 8)
    assert (new.batch_size, new.steps) == (demo["batch_size"], demo["steps"])
    record(new)
    again = start("--steps", 9, preset="base")
    assert (again.blocks, again.kl_schedule, again.preset, again.steps) == (2, "constant", "demo", 9)
    record(again)
    assert start().steps == 9  # and is then the run's
    kept = recorded()
    del kept["patch"]  # as of a run from before there was this flag
    Path("log/run/run.json").write_text(json.dumps({"script": "prestage_train.py", "settings": kept}))
    assert start().patch == demo["patch"]
    args = start("--name", "other", "--preset", "base", "--image-size", 128)
    assert vars(args) | prestage_train.flags().presets["base"] | {"image_size": 128, "preset": "base"} == vars(args)


@pytest.mark.parametrize(
    "flag, value",
    [("--blocks", "3"), ("--widths", "2"), ("--seed", "1"), ("--model", "vae"), ("--precision", "bf16")]
    + [("--kl-weight", "0.5"), ("--preset", "small")],
)
def test_a_contradiction_is_refused_in_one_line(flag, value):
    record(start("--blocks", 2, "--widths", 8, 16))
    start("--blocks", 2, "--widths", 8, 16, "--seed", 0)  # the same values again are none
    with pytest.raises(UserError) as error:
        start(flag, value)
    assert flag in str(error.value) and value in str(error.value) and "\n" not in str(error.value)


def test_a_run_that_has_saved_nothing_may_be_started_with_other_settings():
    """As after "out of memory; choose a smaller --batch-size"."""
    record(start("--batch-size", 64))
    with pytest.raises(UserError, match="contradicts"):
        start("--batch-size", 8)
    Path("model_ckpt/run/last.pt").unlink()
    assert start("--batch-size", 8).batch_size == 8


def test_a_run_of_something_else_is_refused():
    """Of another script or version, a log that describes nothing, and folders that somebody else filled."""
    record(start())
    description = json.loads(Path("log/run/run.json").read_text())
    for text, words in (
        (json.dumps(description | {"script": "pixelCNN.py"}), "pixelCNN.py"),
        (json.dumps(description | {"settings": recorded() | {"channel_multipliers": [1]}}), "--channel-multipliers"),
        *((json.dumps(description | {"settings": recorded() | {flag: value}}), "no flag takes")
          for flag, value in (("kl_schedule", 0), ("steps", "many"), ("widths", [8, -1]), ("seed", {}))),
        *((text, "run.json") for text in ("", "[]", "{}", '{"script": "prestage_train.py"}', "not JSON")),
    ):  # fmt: skip
        Path("log/run/run.json").write_text(text)
        with pytest.raises(UserError, match=words):
            start()
    Path("log/run/run.json").write_text(json.dumps(description))
    Path("log/run").rename("log/copy")
    with pytest.raises(UserError, match="log/copy is the log of run run; give it back that name"):
        start("--name", "copy")
    Path("log/copy").rename("log/run")
    Path("log/run/run.json").rename("log/run/notes.txt")
    with pytest.raises(UserError, match="log/run"):
        start()
    util.write_file(Path("model_ckpt/fresh/thesis.txt"), b"precious")
    with pytest.raises(UserError, match="model_ckpt/fresh"):
        start("--name", "fresh")
    for name in ("../elsewhere", "a/b", "/tmp", "..", ".", ""):  # --name is no path: it becomes part of three
        with pytest.raises(UserError, match="--name"):
            start("--name", name)


def draws_from(*typed: str) -> Path | None:
    """Where a toy draws its samples from, if "released.safetensors" is released."""
    flags = toy()
    args, typed = flags.parse(["--sample", *map(str, typed)])
    args.name = args.name or "toy"
    util.write_file(Path("pretrained/released.safetensors"), b"")
    return weights_to_sample(flags, args, typed, Path("pretrained/released.safetensors"))


def test_where_nothing_was_trained_the_released_weights_are_sampled(capsys):
    """Whatever is typed of sampling, also by a flag that is new; a setting of training asks for training."""
    released = Path("pretrained/released.safetensors")
    for typed in ([], ["--colour", "blue"], ["--brains", 3, "--out", "here", "--seed", 5, "--device", "cpu"]):
        assert draws_from(*typed) == released
        assert "pretrained/released.safetensors" in capsys.readouterr().out
    assert draws_from("--steps", 9) is None and "training it first" in capsys.readouterr().out
    util.write_file(Path("model_ckpt/vqvae/model.safetensors"), b"")
    assert draws_from() is None  # there is a first stage of one's own


def test_a_trained_run_is_sampled_and_a_file_too():
    util.write_file(Path("model_ckpt/toy/model.safetensors"), b"")
    assert draws_from() == Path("model_ckpt/toy/model.safetensors")
    assert draws_from("--name", "pretrained/released.safetensors") == Path("pretrained/released.safetensors")
    for name in ("pretrained/other.safetensors", "other.safetensors", "pretrained/released"):
        with pytest.raises(UserError, match=f"--name {name}: there is no such file"):
            draws_from("--name", name)
    settings = {"script": "toy.py", "settings": {"preset": "demo", "steps": 6, "first_stage": "vqvae", "seed": 0}}
    util.write_file(Path("log/toy/run.json"), json.dumps(settings).encode())
    assert draws_from("--seed", 7, "--colour", "blue", "--steps", 9) == Path("model_ckpt/toy/model.safetensors")
    with pytest.raises(UserError, match="--first-stage other contradicts"):
        draws_from("--first-stage", "other")


def test_flags_of_one_start_and_of_sampling_are_neither_recorded_nor_inherited():
    """Those of sampling decide how brains look."""
    flags = prestage_train.flags()
    assert flags.one_start == {"minutes", "device", "compile"}
    record(start("--minutes", 5, "--compile"))
    assert recorded().keys() == vars(flags.parser.parse_args([])).keys() - flags.one_start
    again = start()
    assert again.minutes is None and not again.compile
    shutil.rmtree("log"), shutil.rmtree("model_ckpt")
    flags = toy()
    args = start("--colour", "blue", "--brains", 2, flags=flags)
    record(args)
    assert recorded().keys().isdisjoint({"colour", "sample", "brains", "out", "device", "minutes"})
    assert recorded()["steps"] == 6 and start(flags=flags).colour == "grey"
    util.write_file(Path("weights"), b"w")
    described = describe_samples(flags, Path("weights"), args, {"data": {"folder": "/home/me", "cases": 3}}, scorer="s")
    assert described["settings"] == {"colour": "blue", "precision": "auto", "seed": 0}
    assert described["data"] == {"cases": 3} and described["scorer"] == "s"
    other = describe_samples(flags, Path("weights"), start(flags=flags), {"data": {"cases": 3}}, scorer="s")
    assert {name for name in described if described[name] != other[name]} == {"settings"}


def test_all_that_decides_how_a_brain_looks_is_in_the_record_of_samples():
    """Every flag of sampling does, but for those that say whether, which, how many and where."""
    flags = stable_diffusion.flags()
    others = {"sample", "complete", "brains", "out"}
    group = {action.dest for action in flags.groups["sampling"]._group_actions}
    assert others < group and flags.sampling == group - others | {"seed", "precision"}
    assert settings.file_digest(Path(stable_diffusion.__file__)) != settings.file_digest(Path(prestage_train.__file__))
