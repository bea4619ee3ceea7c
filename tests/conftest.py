"""What several test files need: a tiny phantom, tiny models, and two ways to start a script."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
import util
from heads.people import PEOPLE_TABLE

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs more than 15 seconds; pytest -m 'not slow' leaves it out")


@pytest.fixture(autouse=True)
def reproducible(monkeypatch):
    """Every test starts from one seed, and the caller's own data folder plays no part."""
    monkeypatch.delenv("OASIS_DATA", raising=False)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory) -> Path:
    """Three heads to train on, one to validate, one to test; 256 px, with masks. Read only."""
    folder = tmp_path_factory.mktemp("data") / "phantom"
    dataset.write_phantom(folder, {"train": 3, "validate": 1, "test": 1})
    return folder


@pytest.fixture(scope="session")
def _pristine_noise_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "noise"
    rng = np.random.default_rng(0)
    for case, split in enumerate(dataset.SPLITS, 1):
        images = rng.integers(0, 256, (32, 64, 64), dtype=np.uint8)
        masks = rng.choice(np.array(dataset.MASK_VALUES, np.uint8), (32, 64, 64))
        dataset.write_slices(folder / f"keras_png_slices_{split}", case, images)
        dataset.write_slices(folder / f"keras_png_slices_seg_{split}", case, masks, "seg")
    return folder


@pytest.fixture
def noise_folder(_pristine_noise_folder, tmp_path) -> Path:
    """A copy, to be damaged, of a folder like OASIS: cases 1, 2, 3 in the three splits, 64 px noise, with masks."""
    return Path(shutil.copytree(_pristine_noise_folder, tmp_path / "noise"))


@pytest.fixture
def people_folder(noise_folder) -> Path:
    """noise_folder with a table of people as OASIS has it: a woman of 74 with CDR 0.5, a man of 20 without CDR."""
    rows = ["ID,M/F,Hand,Age,Educ,eTIV,nWBV,ASF,Delay,MMSE,CDR,SES"]
    rows += ["OAS1_0001_MR1,F,R,74,2,1344,0.74,1.3,N/A,29,0.5,3", "OAS1_0002_MR1,M,R,20,,1800,0.84,1.0,N/A,,,"]
    rows += ["OAS1_0003_MR1,F,R,55,4,1147,0.81,1.5,N/A,29,0,1"]
    rows += ["OAS1_0002_MR2,M,R,21,,1800,0.84,1.0,26,,,"]  # a second visit, of which there are no slices
    (noise_folder / PEOPLE_TABLE).write_text("\ufeff" + "\n".join(rows) + "\n", encoding="utf-8")
    return noise_folder


@pytest.fixture
def run_script(tmp_path):
    """run_script("dataset.py", "--cases", 3): the CompletedProcess of a process of its own, working in tmp_path."""

    def run(script: str, *flags, cwd=tmp_path, launcher=(), threads=2, timeout=120) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name != "OASIS_DATA"}
        environment |= {"OMP_NUM_THREADS": str(threads), "MPLBACKEND": "agg"}
        return subprocess.run(
            [sys.executable, *launcher, str(ROOT / script), *map(str, flags)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    return run


@pytest.fixture
def run_main(tmp_path, monkeypatch, capsys):
    """run_main(prestage_train, "--steps", 3): the script in this process, working in tmp_path; saves the imports.

    Returns (exit status, stdout, stderr). What util.command would show as a traceback fails the test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(module, *flags) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, flags)])
        capsys.readouterr()
        status = 0
        try:
            util.command(module.main)
        except SystemExit as error:
            status = error.code or 0
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def tiny_sizes() -> dict:
    """Keywords of a small VAE; a VQVAE needs codebook_size as well. Blocks of 4x4 pixels, a latent of 4x12x14."""
    return {
        "image_size": 64,
        "box": (8, 4, 48, 56),
        "patch": 2,
        "channels": 8,
        "channel_multipliers": (1, 2),
        "blocks": 1,
        "latent_channels": 4,
    }


@pytest.fixture
def awaken():
    """awaken(module): the module with small noise on every parameter, so that no layer stays silent at zero."""

    def move(module, scale: float = 0.05):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
        return module

    return move
