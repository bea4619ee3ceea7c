"""What the README promises: its commands parse, its files exist, its code runs, and every declared flag is read."""

import ast
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from test_layout import SCRIPTS

from heads.people import CONDITIONS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "report.md", "pretrained/README.md", "playground/EXPERIMENTS.md", "CHANGELOG.md")


def commands() -> list[str]:
    """Every `python SCRIPT.py ...` of README and report, in code blocks, tables and sentences."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES[:2])
    return sorted({found.strip() for found in re.findall(r"python (?:playground/)?\w+\.py[^`\n#|]*", text)})


def parser_of(module):
    """The parser of a script's flags(), None where its main() declares them."""
    flags = module.flags() if hasattr(module, "flags") else None
    return getattr(flags, "parser", flags)


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_pages_exist_and_their_flags_parse(command):
    _, script, *arguments = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if parser := parser_of(module):
        parser.parse_args(arguments)  # ends with status 2 where it does not know one
    else:
        declared = set(re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text()))
        assert {argument for argument in arguments if argument.startswith("--")} <= declared


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_to_exist(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [link for link in links if not link.startswith("http") and not (folder / link).exists()]
    assert not missing


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_places_that_a_page_links_to_exist(page):
    at = ROOT / page
    links = [link for link in re.findall(r"\]\(([^)\s]*)#([^)\s]+)\)", at.read_text()) if "://" not in link[0]]
    missing = [link for link in links if link[1] not in anchors(at.parent / link[0] if link[0] else at)]
    assert not missing


@pytest.mark.parametrize("page", PAGES[:2])
def test_no_sentence_of_a_page_is_longer_than_40_words(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for mark, word in ((r"`[^`]*`", "C"), (r"\$\$.*?\$\$", ""), (r"\$[^$]*\$", "M"), (r"\]\([^)]*\)", "]")):
        text = re.sub(mark, word, text)
    lines = [line for line in text.partition("## References")[0].splitlines() if not line.startswith(("|", ">"))]
    sentences = [found for line in lines for found in re.split(r"(?<=[.!?:])[*)]*\s+(?=[A-Z*(\[0-9])", line)]
    assert [sentence for sentence in sentences if len(sentence.split()) > 40] == []


def test_the_table_of_files_is_complete():
    table = README[README.index("## The files") :]
    named = set(re.findall(r"`(\w+(?:/|\.py))`", table[: table.index("\n## ", 5)]))
    rooms = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")}
    assert {path.name for path in ROOT.glob("*.py")} | rooms | {"figures/", "pretrained/"} == named


@pytest.mark.slow
def test_the_python_code_of_the_readme_runs(tmp_path, monkeypatch):
    """As it stands, with released weights; only with fewer brains, in fewer steps."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    assert "Sampling(age" in code and "range(2)" in code
    code = code.replace("Sampling(age", "Sampling(steps=1, age").replace("range(2)", "range(1)")
    (tmp_path / "code.py").write_text(code)
    monkeypatch.chdir(ROOT)
    known = {"x": torch.rand(2, 1, 256, 256) * 2 - 1, "z": torch.tensor([10, 11])}
    known = runpy.run_path(str(tmp_path / "code.py"), known)
    assert known["latent"].shape == (2, 8, 24, 28) and known["idx"].shape == (2, 24, 28)
    assert known["x_hat"].shape == (2, 1, 256, 256) and known["slices"].shape == (32, 256, 256)
    assert known["person"]["age"] == 75 and known["person"]["sex"] == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_declared_flag_is_read(script):
    """A flag that nothing reads is a lie; `args.flag` must stand somewhere in the script or in training/."""
    parser = parser_of(importlib.import_module(".".join(script.with_suffix("").parts)))
    if parser is None:
        pytest.skip("its main() declares the flags")
    read = set()
    for file in (ROOT / script, *(ROOT / "training").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args", "run.args"):
                read.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(args, name"):
                read |= CONDITIONS.keys()
    assert {action.dest for action in parser._actions} - {"help"} <= read
