"""Laws of playground/how_many.py: who is learned from, that nothing is trained twice, and what the table says."""

import json
from pathlib import Path

import util
from dataset import load_slices
from playground import how_many


def test_subsets_are_the_first_people_and_what_was_measured_is_not_measured_again(heads_folder, run_main, monkeypatch):
    """A row for each number of people and each length, in order; the first stage is of the largest set."""
    commands = []
    monkeypatch.setattr(util, "run_script", lambda script, flags: commands.append([script, *map(str, flags)]))
    how_many.HERE.mkdir(parents=True)
    for people, steps, loss in ((2, 1, 0.5), (2, 9, 0.25), (4, 1, 0.625), (4, 9, 0.125)):
        known = {"loss": loss, "copies": loss / 10, "copied_brains": 0.0}
        (how_many.HERE / f"how_many-{people}-{steps}-0.json").write_text(json.dumps(known))
    status, out, errors = run_main(how_many, "--data", heads_folder, "--people", 4, 2, "--steps", 9, 1)
    assert status == 0, errors
    assert [command[0] for command in commands] == ["prestage_train.py"]
    folder = Path(commands[0][commands[0].index("--data") + 1])
    assert load_slices(folder, "train", 64).case.unique().tolist() == [1, 2, 3, 4]
    assert load_slices(how_many.subset(2, str(heads_folder)), "train", 64).case.unique().tolist() == [1, 2]
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith(("| 2 |", "| 4 |"))]
    assert [row[:4] for row in rows] == [
        ["2", "1", "0.5000", "5.0%"],
        ["2", "9", "0.2500", "2.5%"],
        ["4", "1", "0.6250", "6.2%"],
        ["4", "9", "0.1250", "1.2%"],
    ]
    assert (how_many.HERE / "how_many.png").is_file()
