"""The data card of a folder of samples: README.md, with front matter as Hugging Face reads it. Its words: card.md."""

import json
import math
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from statistics import median
from string import Template

import util
from heads.layout import RELEASE, has_splits, read_slice, slices_of_splits
from heads.people import CONDITIONS, PEOPLE_TABLE, read_people
from pictures.volume import RECORD, read_record
from scores.metrics import with_interval
from scores.page import markdown_table, sample_rows, sample_table
from scores.samples import SAMPLE_SCORES
from util import UserError

WORDS = Path(__file__).parent / "card.md"


def write_card(folder: Path) -> None:
    """Writes README.md of a folder of samples out of what is in it, and says so. Other folders are left as they are.

    Scores and copies are in it where evaluate.py has written samples_SPLIT.json. Raises UserError where a file does not
    hold what it should.
    """
    record = read_record(folder)
    if not record["brains"] or not has_splits(folder):
        return
    try:
        files = {split: folder / f"samples_{split}.json" for split in ("validate", "test")}
        found = {split: json.loads(file.read_text()) for split, file in files.items() if file.is_file()}
        text = card(folder, record, found)
    except (LookupError, TypeError, ValueError, AttributeError):
        words = f"{folder}: {RECORD} or a samples_*.json is not as it was written"
        raise UserError(f"{words}; delete the latter, or draw into another folder") from None
    util.write_file(folder / "README.md", text.encode())
    print(f"what they are, for those you share them with: {folder}/README.md")


def card(folder: Path, record: dict, reports: dict[str, dict]) -> str:
    """The text, of read_record and of the reports of scores.page.write_page by split."""
    made_by, brains, splits, rows = record["made_by"], record["brains"], [], []
    for split, files in slices_of_splits(folder).items():
        if files:
            case, seg = (RELEASE.folders[kind].format(split=split) for kind in ("case", "seg"))
            counts = len({number for number, _, _ in files}), len(files), len([*(folder / seg).glob("seg_*.png")])
            splits.append(f"  - split: {split}\n    path: {case}/*.png")
            rows.append([split, *map(str, counts)])
            height, width = read_slice(files[0][2]).shape
    what, origin = f"--sample --brains {1 + max(map(int, brains))}", "Nobody's heads: a model drew every slice of them."
    if given := "given" in made_by:
        origin = f"Of each brain some slices were given, and a model drew the others; `{RECORD}` says which were given."
        what = "--complete GIVEN"
    typed = [f"--{flag.replace('_', '-')} {value}" for flag, value in made_by["settings"].items() if value is not None]
    learned = made_by["data"].get("digest", "unknown")
    found = [scores(report, split, learned) for split, report in reports.items()]
    return Template(WORDS.read_text()).substitute(
        n=len(brains),
        origin=origin,
        splits="\n".join(splits),
        files=markdown_table(["split", "brains", "slices", "masks"], rows),
        size=f"{width} x {height}",
        scorer=made_by["scorer"],
        people=people(folder, made_by["settings"], given, len(brains)),
        command=" ".join([f"python {made_by['script']} {what} --name WEIGHTS", *typed, "--out FOLDER"]),
        weights=made_by["weights"],
        cases=made_by["data"].get("cases", "unknown"),
        data=learned,
        seed=made_by["settings"]["seed"],
        commit=record["commit"],
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        scores="\n\n".join(found) or "Nobody scored them or looked for copies: `python evaluate.py --samples FOLDER`.",
    )


def people(folder: Path, asked: dict, given: bool, n: int) -> str:
    """Who was asked for, and who was drawn."""
    if not (folder / PEOPLE_TABLE).is_file():
        return "The model was told of no people: age, sex and CDR of these brains are not known."
    persons, rows = read_people(folder / PEOPLE_TABLE).values(), []
    for name, condition in CONDITIONS.items():
        known = sorted(person[name] for person in persons if not math.isnan(person[name]))
        cells = [f"{condition.write(value)}: {count}" for value, count in Counter(known).items()]
        if known and not condition.values:
            cells = [f"{known[0]:g} to {known[-1]:g}, median {median(known):g}"]
        cells += [f"not known: {n - len(known)}"] * (n > len(known))
        rows.append([condition.help, "-" if asked.get(name) is None else str(asked[name]), ", ".join(cells)])
    rest = "were drawn as often as they were in training; the IDs have the form of OASIS, but name nobody"
    years = CONDITIONS["age"].blur
    noise = "" if given else f" The network heard ages with noise of {years:g} years (sd), as brains of one age differ."
    return (
        markdown_table(["", "asked for", f"of {n} people"], rows) + f"\n\n`{PEOPLE_TABLE}` has them one by one. Where "
        f"nothing was asked for, people {'are those of the given slices, as far as known' if given else rest}.{noise}"
    )


def scores(report: dict, split: str, learned: str) -> str:
    """What evaluate.py found, from its report: scores beside held-out people of a split, and how near training is.

    learned: the digest of the slices that the weights learned from.
    """
    result, near, searched = report["result"], report["nearest"], report["samples"]["brains"]
    rows = [row for group in sample_rows(result).values() for row in group]
    copies = [
        [SAMPLE_SCORES[name].title, *(with_interval(result[part], name, ".2%") for part in ("samples", "real"))]
        for name in ("copies", "copied_brains")
    ]
    pairs = [
        [f"{pair['case']}, z = {pair['z']}", f"{pair['training_case']}, z = {pair['training_z']}",
         *("-" if value is None else f"{value:.3f}" for value in (pair["distance"], pair["relative_distance"], person))]
        for pair, person in zip_longest(near, report["nearest_real"][: len(near)])
    ]  # fmt: skip
    same = "the very ones that the weights learned from"
    if report["data"]["train"]["digest"] != learned:
        same = "not exactly those that the weights learned from, so copies of others may be among them"
    near_one = round(result["samples"]["copied_brains"] * searched)
    inside = sum(row[-1] == "inside" for row in rows)
    return f"""## Scores beside people of {split}

{result["brains"]} brains stand beside as many held-out people. Of {len(rows)} scores, {inside} are inside the range \
of real people. [The page of scores](samples_{split}.md) says how to read them.

{sample_table(report)}

## Copies, beside people of {split}

{searched} brains were compared with {result["training_brains"]} training brains, as held-out people were. These \
training brains are {same}. {near_one} of the new brains are nearer to one of them than any held-out person is.

{markdown_table(["share", "new brains", "held-out people"], copies)}

Below are the slices nearest to training, of as many brains as possible. *Relative* is the distance over the mean \
distance to the next five training brains: near 1 for a new brain, 0 for a copy. Of the slices of held-out people, 1 % \
are below {result["samples"]["copies_limit"]:.3f}, and the last column has the nearest.

{markdown_table(["new brain", "training brain", "distance", "relative", "relative, people"], pairs)}

`samples_{split}_nearest.png` shows them beside real slices. Share it only where the terms of these allow it."""
