"""Laws of the log: the index and its pages agree, entries are complete, and their sentences are short."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_readme import parser_of

ROOT = Path(__file__).parents[2]
LOG = ROOT / "playground"
INDEX = (LOG / "EXPERIMENTS.md").read_text()
PAGES = {f"experiments/{page.name}": page.read_text() for page in sorted((LOG / "experiments").glob("*.md"))}
ROWS = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in INDEX.splitlines() if row.startswith("| 20")]


def anchor(title: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


ENTRIES = {
    f"{page}#{anchor(entry.splitlines()[0])}": entry
    for page, text in PAGES.items()
    for entry in re.split(r"^## ", text, flags=re.MULTILINE)[1:]
}


def sentences(text: str) -> list[str]:
    """Sentences outside tables and code blocks; a colon or semicolon ends none."""
    prose = re.sub(r"^ *\|.*|^    .*|`[^`]*`", " code ", text, flags=re.MULTILINE)
    prose = re.sub(r"\]\([^)]*\)|\*\*\w+\.\*\*", " ", prose)
    return re.split(r"(?<=[.!?])\s+(?=[^a-z.])|\n\s*\n|\n(?=[-#])", prose)


def test_every_entry_has_one_line_of_the_index_of_its_date_and_commit():
    links = [re.search(r"\]\(([^)]+)\)", row[1]).group(1) for row in ROWS]
    assert sorted(links) == sorted(ENTRIES)
    for link, row in zip(links, ROWS):
        assert len(row) == 5 and all(row) and ENTRIES[link].startswith(row[0]) and row[4] in ENTRIES[link]


@pytest.mark.parametrize("link", ENTRIES)
def test_an_entry_has_a_date_and_all_parts_in_their_order(link):
    assert re.match(r"20\d\d-\d\d-\d\d \w", ENTRIES[link])
    parts = re.findall(r"^\*\*(\w+)\.\*\*", ENTRIES[link], flags=re.MULTILINE)
    assert [part for part in parts if part != "Open"] == ["Question", "Change", "Cost", "Result", "Decision", "Record"]


@pytest.mark.parametrize("page", ["EXPERIMENTS.md", *PAGES])
def test_links_of_the_log_lead_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", (LOG / page).read_text()):
        name, _, heading = link.partition("#")
        target = ((LOG / page).parent / name) if name else LOG / page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.+)", target.read_text(), flags=re.MULTILINE) if heading else []
        assert not heading or heading in map(anchor, titles), link


@pytest.mark.parametrize("page", ["EXPERIMENTS.md", *PAGES])
def test_no_sentence_has_more_than_40_words(page):
    assert not [sentence for sentence in sentences((LOG / page).read_text()) if len(sentence.split()) > 40]


def test_commands_that_repeat_an_entry_parse():
    commands = {found for text in PAGES.values() for found in re.findall(r"`python ([^`]+\.py[^`]*)`", text)}
    assert commands
    for script, *arguments in map(shlex.split, commands):
        parser_of(importlib.import_module(script.removesuffix(".py").replace("/", "."))).parse_args(arguments)


def test_every_commit_of_the_log_is_in_the_history():
    def git(*arguments, **text):
        run = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False, **text)
        return run.stdout

    if not (ROOT / ".git").exists() or git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("no full history here")
    commits = set(re.findall(r"\b[0-9a-f]{7}\b", INDEX + "".join(PAGES.values())))
    found = git("cat-file", "--batch-check=%(objecttype)", input="\n".join(sorted(commits)))
    assert found.split() == ["commit"] * len(commits)
