"""Age, sex and CDR: what a model may know of people, the table that has it, and whom to draw.

CDR is the Clinical Dementia Rating: 0 none, 0.5 very mild, 1 mild, 2 moderate.
"""

import csv
import math
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from util import UserError, brain_generator

# What a model can know of a person, and the values it can have, or None for any number (years).
CONDITIONS: dict[str, tuple[float, ...] | None] = {"age": None, "sex": (0, 1), "cdr": (0, 0.5, 1, 2)}

# What of the table is read, and as which number.
PEOPLE_TABLE = "oasis_cross-sectional.csv"
PEOPLE_COLUMNS = {"age": "Age", "sex": "M/F", "cdr": "CDR"}
SEXES = {"F": 0.0, "M": 1.0}

GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, lie evenly however many there are


def read_people(table: Path) -> dict[int, dict[str, float]]:
    """{case: {"age" in years, "sex" as SEXES has it, "cdr"}} of the table, NaN where it says nothing.

    Raises UserError where it is no such table.
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:  # the release begins with a byte-order mark
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("no rows")
        people = {}
        for row in rows:
            if match := re.fullmatch(r"OAS1_(\d+)_MR1", row["ID"]):
                cells = {name: row[column].strip() for name, column in PEOPLE_COLUMNS.items()}
                cells["sex"] = SEXES[cells["sex"]] if cells["sex"] else ""
                people[int(match[1])] = {name: float(cell) if cell != "" else math.nan for name, cell in cells.items()}
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f"{table} has no ID, Age, M/F and CDR as OASIS has them ({error}); copy it again, or train without "
            "--conditions"
        ) from None
    return people


def describe_people(people: Tensor, conditions: list[str]) -> dict[str, list[float]]:
    """What training saw of each condition, from people [N, K]: [lowest, highest] age, and the values of the others."""
    seen = {}
    for name, values in zip(conditions, people.T, strict=True):
        known = values[~values.isnan()].unique().tolist()  # in order
        seen[name] = known if CONDITIONS[name] else known[:1] + known[-1:]
    return seen


def decade(age: float) -> float:
    """In years, where its ten years begin."""
    return age // 10 * 10


def count_people(people: Tensor, conditions: list[str]) -> list[dict[str, float]]:
    """How many there are of each kind among people [n, K]: [{condition: value, ..., "count": how many}, ...].

    Of ages only the decade counts. What is not known is left out.
    """
    kinds = Counter()
    for person in people.tolist():
        known = {name: value for name, value in zip(conditions, person, strict=True) if not math.isnan(value)}
        kinds[tuple((name, decade(value) if name == "age" else value) for name, value in known.items())] += 1
    return [{**dict(kind), "count": count} for kind, count in sorted(kinds.items())]


def person_of(typed: dict, description: dict) -> dict[str, float]:
    """What --age, --sex and --cdr say, {"age": .., "sex": "F" or "M", "cdr": ..} or None where nothing, as numbers.

    Raises UserError for what the model never saw.
    """
    asked = {name: value for name, value in (typed | {"sex": SEXES.get(typed["sex"])}).items() if value is not None}
    seen = description.get("people", {})
    for name, value in asked.items():
        if not seen.get(name):
            raise UserError(
                f"--{name} {typed[name]}: the model was trained without; train one with --conditions {name} on data "
                f"with {PEOPLE_TABLE}"
            )
        known = seen[name][0] <= value <= seen[name][-1] if name == "age" else value in seen[name]
        if not known:
            words = f"ages {seen[name][0]:g} to {seen[name][-1]:g}" if name == "age" else f"no such {name}"
            raise UserError(f"--{name} {typed[name]}: the model was trained on {words}")
    return asked


def draw_person(asked: dict[str, float], description: dict, seed: int, brain: int) -> dict[str, float]:
    """What is asked for and, beside it, what people of the training set have who are like that, drawn by their number.

    A function of (seed, brain). The kinds lie in a row in the order of age, and each brain is a golden ratio of the row
    beyond the one before, so that few brains too are of all ages. Where nobody is like that, only what is asked for.
    """
    wanted = {name: decade(value) if name == "age" else value for name, value in asked.items()}
    kinds = [kind for kind in description.get("people_counts", []) if wanted.items() <= kind.items()]
    if not kinds:
        return asked
    generator, start = brain_generator(seed, brain, "person"), brain_generator(seed, 0, "people")
    share = (float(torch.rand((), generator=start, dtype=torch.float64)) + brain * GOLDEN) % 1
    below = torch.tensor([float(kind["count"]) for kind in kinds], dtype=torch.float64).cumsum(0)
    kind = kinds[int((below <= share * below[-1]).sum())]
    person = {name: value for name, value in kind.items() if name != "count"}
    if "age" in person:
        youngest, oldest = description["people"]["age"]
        age = person["age"] + int(torch.randint(10, (), generator=generator))
        person["age"] = min(max(age, youngest), oldest)
    return person | asked


def in_numbers(person: dict[str, float], conditions: tuple[str, ...]) -> Tensor:
    """float32 [K]: what a person has of these conditions, in their order, NaN where it is not known."""
    return torch.tensor([person.get(name, math.nan) for name in conditions], dtype=torch.float32)


def in_letters(person: dict[str, float]) -> dict[str, str]:
    """Such as {"age": "64", "sex": "F", "cdr": "0.5"}."""
    letter = {value: name for name, value in SEXES.items()}
    return {name: letter[value] if name == "sex" else f"{value:g}" for name, value in person.items()}


def words_for(person: dict[str, float]) -> list[str]:
    """Such as ["age 64", "sex F", "cdr 0.5"]."""
    return [f"{name} {value}" for name, value in in_letters(person).items()]
