"""What several test files need: small data, tiny models, two ways to start a script, and what a run left behind."""

import importlib
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
from heads.phantom import phantom_case
from logger import read_log
from training import checkpoints
from training import run as training_run

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    """Tests are of the CPU, where results are exact, but for those of the mark gpu, which run by themselves."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    config.addinivalue_line("markers", "slow: needs more than 15 seconds; pytest -m 'not slow' leaves it out")
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; pytest -m gpu runs these alone")


@pytest.fixture(autouse=True)
def reproducible(monkeypatch, tmp_path):
    """Every test starts from one seed in a folder of its own, and the caller's own data folder plays no part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OASIS_DATA", raising=False)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory) -> Path:
    """Three heads to train on, one to validate, one to test; 256 px, with masks. Read only."""
    folder = tmp_path_factory.mktemp("data") / "phantom"
    dataset.write_phantom(folder, {"train": 3, "validate": 1, "test": 1})
    return folder


@pytest.fixture
def validate(phantom_folder) -> dataset.Slices:
    """Eight slices of the phantom at 64 px, with masks, as if they were two of each of four brains."""
    data = dataset.load_slices(phantom_folder, "validate", 64, masks=True)
    data.images, data.masks, data.z, data.case = data.images[::4], data.masks[::4], data.z[::4], torch.arange(8) // 2
    return data


def write_heads(folder: Path) -> None:
    """Four heads to train on and one to validate, of 20 slices of 64 px, with masks."""
    for case, split in enumerate(["train"] * 4 + ["validate"], 1):
        images, masks = phantom_case(0, case, 20)
        images = images.reshape(20, 64, 4, 64, 4).mean((2, 4)).round().astype(np.uint8)
        dataset.write_slices(folder / f"keras_png_slices_{split}", case, images)
        dataset.write_slices(folder / f"keras_png_slices_seg_{split}", case, masks[:, ::4, ::4], "seg")
    (folder / "PHANTOM.txt").write_text("phantom")


@pytest.fixture(scope="session")
def heads_folder(tmp_path_factory) -> Path:
    """The folder of write_heads. Read only."""
    folder = tmp_path_factory.mktemp("data") / "heads"
    write_heads(folder)
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
def tiny_sizes() -> dict:
    """Keywords of a small VAE; a VQVAE needs codebook_size as well. Blocks of 4x4 pixels, a latent of 4x12x14."""
    return {"image_size": 64, "box": (8, 4, 48, 56), "patch": 2, "widths": (8, 16), "blocks": 1, "latent_channels": 4}


@pytest.fixture
def awaken():
    """awaken(module): the module with small noise on every parameter, so that no layer stays silent at zero."""

    def move(module, scale: float = 0.05):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
        return module

    return move


@pytest.fixture
def run_script(tmp_path):
    """run_script("dataset.py", "--cases", 3): the CompletedProcess of a process of its own, working in tmp_path."""

    def run(script: str, *flags, cwd=tmp_path, launcher=(), threads=2, timeout=600) -> subprocess.CompletedProcess:
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
    """run_main(prestage_train, "--steps", 3): (status, stdout, stderr) of the script in this process; bugs raise."""
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
def refused(run_main):
    """refused(pixelCNN, "--steps", 0, names=["--steps"]): the script ends with one line that has these words."""

    def check(module, *flags, names: list[str]) -> None:
        status, _, errors = run_main(module, *flags)
        assert status == 2 and len(errors.splitlines()) == 1 and all(name in errors for name in names), errors

    return check


@pytest.fixture(scope="session")
def run_in():
    """run_in(folder, module, "--steps", 3): the script in this process and that folder; for fixtures of wide scope."""

    def run(folder: Path, module, *flags) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("MPLBACKEND", "agg")
            patch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, flags)])
            module.main()

    return run


FIRST_STAGE = ["--preset", "demo", "--precision", "fp32", "--widths", 8, 16, "--patch", 4, "--latent-channels", 4]
FIRST_STAGE += ["--codebook-size", 16, "--batch-size", 4, "--steps", 3, "--learning-rate", 0.03, "--gan-weight", 0.5]


@pytest.fixture(scope="session")
def first_stages(heads_folder, tmp_path_factory, run_in):
    """first_stages("--model", "vqvae2"): the weights of a first stage of one step, its texture of two. Read only."""
    import prestage_train

    made = {}

    def build(*flags: str) -> Path:
        if flags not in made:
            folder = tmp_path_factory.mktemp("first")
            run_in(folder, prestage_train, "--data", heads_folder, "--name", "codes", *FIRST_STAGE, *flags)
            made[flags] = folder / "model_ckpt/codes/model.safetensors"
        return made[flags]

    return build


@pytest.fixture(scope="session")
def first_stage(first_stages) -> Path:
    """The weights file of a VQ-VAE of heads_folder: latents of 4x6x7, 16 codes, texture. Read only."""
    return first_stages()


SECOND_STAGE = ["--preset", "demo", "--precision", "fp32", "--steps", 4, "--batch-size", 4]
SIZES = {"pixelCNN": ["--channels", 8, "--layers", 2], "stable_diffusion": ["--widths", 8, 16, "--slices", 2]}


@pytest.fixture(scope="session")
def tiny_flags(heads_folder, first_stage) -> dict[str, list]:
    """{script: the flags of its tiniest run}, for processes of their own."""
    second = ["--data", heads_folder, "--first-stage", first_stage, *SECOND_STAGE, "--steps", 2]
    return {
        "prestage_train.py": ["--data", heads_folder, *FIRST_STAGE],
        "stable_diffusion.py": [*second, "--widths", 8, "--slices", 2],
        "pixelCNN.py": [*second, *SIZES["pixelCNN"]],
    }


@pytest.fixture(scope="module")
def script(request):
    """The script that a file of tests is named after."""
    return importlib.import_module(request.module.__name__.removeprefix("test_"))


@pytest.fixture(scope="module")
def tiny_run(script, heads_folder, first_stage):
    """The flags of a run of a second stage, with two reports, a shallow network, and calibration by few brains."""
    import stable_diffusion

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "REPORTS", 2)
        patch.setattr(stable_diffusion, "BLOCKS", 1)
        patch.setattr(stable_diffusion, "CALIBRATION_LEAST", 2)
        yield ["--data", heads_folder, "--first-stage", first_stage, *SECOND_STAGE, *SIZES[script.__name__]]


@pytest.fixture(scope="module")
def straight(script, tiny_run, tmp_path_factory, run_in) -> Path:
    """The folder of such a run that nothing interrupted. Read only."""
    folder = tmp_path_factory.mktemp("second")
    run_in(folder, script, *tiny_run)
    return folder


@pytest.fixture
def trained(straight, tmp_path) -> Path:
    """The working folder, with a copy of that run."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def train(script, tiny_run, run_main):
    """train("--steps", 3): such a run with other flags; checks the exit status, and returns what was printed."""

    def run(*flags, status: int = 0) -> str:
        ended, out, errors = run_main(script, *tiny_run, *flags)
        assert ended == status, errors
        return out

    return run


class Killed(BaseException):
    """Ends a run as kill -9 does: nothing that it would still have written is written."""


@pytest.fixture
def at_step(monkeypatch):
    """at_step(7, action): calls action() within the seventh step from now on. with at_step(7): kills the run there."""

    def arrange(number: int, action=None):
        calls, update_ema = [], training_run.update_ema

        def counting(*args, **kwargs):
            calls.append(1)
            if len(calls) == number and action is None:
                raise Killed
            if len(calls) == number:
                action()
            return update_ema(*args, **kwargs)

        monkeypatch.setattr(training_run, "update_ema", counting)
        return pytest.raises(Killed)

    return arrange


def unlike(a, b, place: str) -> list[str]:
    """Where two nested containers of tensors and values differ, to the last bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in unlike(a[key], b[key], f"{place} {key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b)) for found in unlike(*pair, f"{place} {i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    return [] if a == b else [f"{place}: {a} and {b}"]


@pytest.fixture
def differences():
    """differences(folder, "a", other, "b"): where two runs' files differ, to the last bit, but for seconds in logs."""

    def state(folder: Path, name: str) -> dict:
        files = folder / "model_ckpt" / name
        found = {path.name: torch.load(path, weights_only=True) for path in files.glob("*.pt")}
        found["weights"], found["description"] = checkpoints.load_weights(files / "model.safetensors")
        found["log"] = [
            {key: value for key, value in line.items() if "second" not in key}
            for line in read_log(folder / "log" / name)
        ]
        return found

    def compare(folder: Path, name: str, other_folder: Path, other: str) -> list[str]:
        return unlike(state(folder, name), state(other_folder, other), "")

    return compare
