"""What the README promises: its commands parse, its files exist, and every flag that is declared is read."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TRAINERS = ("prestage_train", "stable_diffusion", "pixelCNN")


def commands() -> list[str]:
    """Every `python SCRIPT.py ...` of the README, in code blocks, tables and sentences."""
    found = re.findall(r"python (?:playground/)?\w+\.py[^`\n#|]*", README)
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_readme_exist_and_their_flags_parse(command, monkeypatch):
    """A reader can type every command: the script is there, imports, and knows the flags."""
    _, script, *arguments = shlex.split(command)
    source = (ROOT / script).read_text()
    declared = set(re.findall(r'"(--[\w-]+)"', source))
    if Path(script).stem in TRAINERS:
        module = importlib.import_module(Path(script).stem)
        module.flags().parse_args(arguments)  # exits with status 2 on an unknown flag or value
    else:
        assert {a for a in arguments if a.startswith("--")} <= declared


def test_files_that_the_readme_names_exist():
    """No dead link, no picture that is missing, no file of the table that is not there, none that is left out."""
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", README) if not link.startswith("http")]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
    table = README[README.index("## The files") :]
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts <= set(re.findall(r"`(\w+\.py)`", table))


@pytest.mark.parametrize("name", TRAINERS)
def test_every_declared_flag_is_read(name):
    """A flag that nothing reads is a lie; `args.flag` must stand somewhere in the script or in runs.py."""
    module = importlib.import_module(name)
    flags = vars(module.flags().parse_args([]))
    read = set()
    for file in (f"{name}.py", "runs.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
                read.add(node.attr)
    assert set(flags) <= read


@pytest.mark.parametrize("name", TRAINERS)
def test_every_preset_flag_is_declared(name):
    """The preset table sets no flag that the script does not have, and leaves none without a value."""
    import util

    module = importlib.import_module(name)
    declared = vars(module.flags().parse_args([]))
    for preset in util.PRESET_NAMES:
        settings = util.preset_settings(f"{name}.py", preset)
        assert set(settings) <= set(declared)
        optional = {"data", "name", "preset", "minutes", "out", "discriminator_learning_rate", "weak", "slice_noise"}
        optional |= {"conditions", "age", "sex", "cdr", "start_from", "decoder"}
        optional |= {"schedule", "prediction", "weighting", "times"}  # --recipe has them
        assert {flag for flag, value in {**declared, **settings}.items() if value is None} <= optional


def test_imports_go_one_way():
    """Models know nothing of training, scripts not of each other, and importing any file has no effect."""
    ours = {path.stem for path in ROOT.glob("*.py")}
    imports = {}
    for name in ours:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imports[name] = names & ours
        effects = [
            node for node in tree.body if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        ]
        assert not effects, f"importing {name}.py runs something"
    low = {"util", "runs", "sheets"}
    assert imports["util"] == imports["phantom"] == set()
    assert imports["runs"] | imports["sheets"] | imports["people"] <= {"util"}
    assert imports["dataset"] <= low | {"phantom", "people"}
    assert imports["logger"] <= low
    assert imports["module"] <= {"util"}
    assert imports["quantizer"] == set()
    assert imports["grain"] | imports["linear_denoiser"] | imports["calibration"] <= {"module"}
    assert imports["volume"] <= low | {"dataset"}
    assert imports["metrics"] <= {"util"}
    assert imports["realism"] <= {"util", "dataset", "metrics", "scorer"}
    assert imports["realism_page"] <= low | {"realism", "dataset", "metrics", "scorer"}
    assert imports["scorer"] <= low | {"dataset", "logger", "module"}
    parts = {"module", "quantizer", "grain", "linear_denoiser", "calibration", "people"}
    assert imports["model_discriminator"] | imports["model_diffusion"] | imports["autoencoder"] <= parts
    assert imports["model_VAE"] <= parts | {"autoencoder", "util", "runs"}  # which also reads its files
    for script in (*TRAINERS, "evaluate"):
        allowed = ours - set(TRAINERS) - {"evaluate"}
        allowed |= {"pixelCNN"} if script == "evaluate" else set()  # the codes' price needs the prior's class
        assert imports[script] <= allowed, f"{script}.py imports {imports[script] - allowed}"
