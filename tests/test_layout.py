"""The order of the house: which room may import which, that importing does nothing, that every script has --help."""

import ast
import importlib
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [  # a file may import files of its own room and of those above; a name with a slash is a folder
    ("util",),
    ("heads/",),
    ("pictures/",),
    ("module",),
    ("parts/",),
    ("model_VAE", "model_discriminator", "model_diffusion"),
    ("dataset",),
    ("logger",),
    ("training/",),
    ("scores/",),
    ("prestage_train", "pixelCNN", "stable_diffusion"),
    ("evaluate",),
    ("playground/",),
]
FILES = sorted(path.relative_to(ROOT) for folder in ("", "*/") for path in ROOT.glob(f"{folder}*.py")
               if path.parent.name != "tests")  # fmt: skip
SCRIPTS = [file for file in FILES if '__name__ == "__main__"' in (ROOT / file).read_text()]


def room_of(file: Path) -> int:
    name = f"{file.parent}/" if file.parent != Path() else file.stem
    return next(n for n, room in enumerate(ROOMS) if name in room)


def imports_of(file: Path) -> set[Path]:
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {path for name in names if (path := Path(name.replace(".", "/") + ".py")) in FILES}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_one_way(file):
    """Models know nothing of training, training nothing of scores, and nobody of the playground."""
    wrong = {other for other in imports_of(file) if room_of(other) > room_of(file)}
    assert not wrong, f"{file} imports {wrong}"


def test_no_imports_go_in_circles():
    order = list(TopologicalSorter({file: imports_of(file) for file in FILES}).static_order())  # raises CycleError
    assert len(order) == len(FILES) and len(imports_of(Path("evaluate.py"))) > 5


IMPORT_ALL = """
import json, os, random, sys
import numpy, torch
def state():
    return [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.initial_seed(),
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(),
            torch.random.get_rng_state().sum().item(), int(numpy.random.get_state()[1].sum()),
            random.getstate()[1][0], dict(os.environ)]
import matplotlib.pyplot, PIL, scipy, torchvision  # noqa: libraries may do as they like
before = state()
for name in sys.argv[1:]:
    __import__(name)
print(json.dumps([before, state(), os.listdir()]))
"""


def test_importing_all_files_changes_nothing(tmp_path):
    """No output, no file, no global switch, no random number drawn."""
    names = [".".join(file.with_suffix("").parts) for file in FILES]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{IMPORT_ALL}", *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    before, after, files = json.loads(done.stdout)  # nobody else printed
    assert before == after and files == []


@pytest.mark.parametrize("file", SCRIPTS, ids=str)
def test_every_script_has_help(file, monkeypatch, capsys, tmp_path):
    module = importlib.import_module(".".join(file.with_suffix("").parts))
    monkeypatch.setattr(sys, "argv", [file.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--help" in out and module.__doc__.splitlines()[0][:40] in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["stable_diffusion.py", "playground/age.py"])
def test_scripts_start_from_any_folder(run_script, script):
    done = run_script(script, "--help")
    assert done.returncode == 0 and "--help" in done.stdout, done.stderr


LATER = {"typing": {"Self", "Never", "assert_never", "override", "reveal_type"}, "enum": {"StrEnum"},
         "itertools": {"batched"}, "datetime": {"UTC"}, "asyncio": {"TaskGroup"}}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_imported_that_python_3_10_does_not_have(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not LATER.get(node.module, set()) & {name.name for name in node.names}
        elif isinstance(node, ast.Import):
            assert not {"tomllib"} & {name.name for name in node.names}
