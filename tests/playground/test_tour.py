"""The notebook runs from top to bottom in a fresh folder, without Jupyter, and shows what it promises."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "playground/tour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]

RUN_CELLS = """
import json, sys
known = {}
for n, code in enumerate(json.load(sys.stdin)):
    exec(compile(code, f"cell {n}", "exec"), known)
shapes = {name: list(known[name].shape) for name in ("x", "x_hat", "idx", "slices", "brain")}
print(json.dumps([shapes, known["codec"].fixed_bits, known["ssim"], known["person"]]))
"""


def test_the_notebook_is_small_plain_and_saved_without_results():
    assert NOTEBOOK.stat().st_size < 300_000 and all(ast.parse(code) for code in CODE)  # no magic commands
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    titles = [n for n, cell in enumerate(CELLS) if cell["cell_type"] == "markdown"]
    assert titles[0] == 0 and all("".join(CELLS[n]["source"]).strip() for n in titles)


@pytest.mark.slow
def test_all_cells_run_and_show_their_pictures(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "OASIS_DATA"}
    environment |= {"QUICK": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", RUN_CELLS], input=json.dumps(CODE), cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=False, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tour"]
    shapes, bits, ssim, person = json.loads(done.stdout.splitlines()[-1])
    assert shapes["x"] == shapes["x_hat"] == [6, 1, 64, 64] and shapes["slices"] == [32, 64, 64]
    assert shapes["brain"] == [32, 256, 256] and (person["age"], person["sex"]) == (75, 0)
    assert 0 < ssim < 1 and bits == 8 * np.prod(shapes["idx"][1:])  # 256 codes
    shown = set(re.findall(r'^show\("(\w+)"', "\n".join(CODE), re.MULTILINE))
    assert {"head", "reconstruction", "way", "new_head", "new_brain", "cuts"} <= shown
    for name in shown:
        picture = np.asarray(Image.open(tmp_path / f"tour/{name}.png").convert("L"))
        assert picture.shape[1] > 500 and picture.std() > 20, name
