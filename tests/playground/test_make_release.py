"""The recipe of the release: its commands are commands of ours, and figures that are off are found."""

import importlib
import shlex
from pathlib import Path

import pytest

import evaluate
from playground import make_release, release
from playground.make_release import FULL, MAY_DIFFER, PICTURES, SMALL, comparison


@pytest.mark.parametrize("part", [*FULL, *SMALL], ids=lambda part: part.name)
def test_its_commands_are_ours(part):
    """Each trains a run of the part's name, and releases it."""
    script, *rest = shlex.split(part.train)
    if script == "evaluate.py":
        assert evaluate.flags().parse_args(rest).scorer == part.name
    else:
        args, _ = importlib.import_module(Path(script).stem).flags().parse(rest)
        assert args.name == part.name and args.seed == 0
    release.flags().parse_args([part.name, f"{part.name}.safetensors", *shlex.split(part.release)])


def test_the_full_recipe_makes_what_is_released_in_sixteen_hours():
    there = {path.stem for path in (make_release.ROOT / "pretrained").glob("*.safetensors")}
    assert {part.name for part in FULL} == there and sum(part.minutes for part in FULL) <= 16 * 60
    for script, flags in PICTURES.items():
        importlib.import_module(f"playground.{script}").flags().parse_args(shlex.split(flags))


def test_what_is_too_far_from_the_release_is_said():
    released = {"a, SSIM": 0.9, "b, brain SSIM": 0.8, "c, bits": 100.0}
    assert comparison(released, released)[1]
    for name, limit in (("a, SSIM", "SSIM"), ("b, brain SSIM", "brain SSIM"), ("c, bits", "bits")):
        for share, fine in ((0.9, True), (1.1, False)):
            here = released | {name: released[name] + share * MAY_DIFFER[limit]}
            rows, near = comparison(here, released)
            assert near is fine and [row[0] for row in rows[1:] if row[-1]] == [name] * (not fine)
    assert not comparison({"new, loss": 1.0}, released)[1]
