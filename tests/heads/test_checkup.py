"""Laws of heads/checkup.py: nothing is found in sound folders, and every planted defect is."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from planted import part, plant, save

from dataset import people_table
from heads.checkup import check_folder
from heads.layout import write_slices


def problems_of(folder: Path) -> str:
    return "\n".join(check_folder(folder, people_table(folder))[1])


def test_the_check_up_finds_nothing_in_sound_folders(phantom_folder, noise_folder, tmp_path):
    """Nor in a folder of bare slices, as samples are written."""
    for folder in (phantom_folder, noise_folder):
        report, problems = check_folder(folder, None)
        assert problems == [] and len(report) >= 6
    assert sum("32.0 slices per brain" in line for line in report) == 3
    bare = Path(shutil.copytree(part(phantom_folder, "test"), tmp_path / "samples"))
    report, problems = check_folder(bare, None)
    assert problems == [] and "32 images of 1 brains" in "\n".join(report)
    (bare / "case_005_slice_3.nii.png").unlink()
    assert "case 5 slice 3" in problems_of(bare)


def test_the_check_up_expects_what_most_brains_have(tmp_path):
    """Where most have 20 slices, a brain of 19 lacks one and a brain of 21 has one too many, whatever its split."""
    rng = np.random.default_rng(0)
    for case, (split, slices) in enumerate([("train", 20), ("train", 21), ("validate", 20), ("test", 19)], 1):
        write_slices(part(tmp_path, split), case, rng.integers(0, 256, (slices, 16, 16), np.uint8))
    save(part(tmp_path, "validate") / "case_3_slice_4.nii.png", np.eye(16, dtype=np.uint8))
    report, problems = check_folder(tmp_path, None)
    assert report[0] == "most brains have 20 slices, z = 0..19"
    assert problems == [
        "train: double or out of 0..19 (1): case 2 slice 20",
        "validate: double or out of 0..19 (1): case 3 slice 4",
        "test: missing (1): case 4 slice 19",
    ]


DEFECTS = ["missing slice", "extra slice", "duplicate picture", "truncated PNG", "16 bits", "colour"]
DEFECTS += ["case in two splits", "masks as images", "images as masks", "wrong size", "black picture", "missing mask"]
DEFECTS += ["grey of 0 and 1", "JPEG's background", "other names", "empty masks", "damaged table"]
DEFECTS += ["no training images"]


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_check_up_finds_a_planted_defect(noise_folder, defect):
    finding = plant(noise_folder, defect)
    assert finding in problems_of(noise_folder)


def test_one_defect_hides_no_other(noise_folder):
    """A damaged file in the same split must not switch off the search for copies or for wrong masks."""
    findings = [plant(noise_folder, defect) for defect in ("16 bits", "duplicate picture")]
    findings += ["seg_001_slice_0.nii.png", "seg_001_slice_1.nii.png"]
    other_values, cut_off = (part(noise_folder, "train", "seg_") / name for name in findings[2:])
    save(other_values, np.full((64, 64), 7, np.uint8))
    cut_off.write_bytes(cut_off.read_bytes()[:100])
    problems = problems_of(noise_folder)
    assert [finding for finding in findings if finding not in problems] == []
