"""Age, sex and CDR of people: the table that has them, how often they occur, and whom samples are of.

CDR is the Clinical Dementia Rating: 0 none, 0.5 very mild, 1 mild, 2 moderate.
"""

import csv
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from util import UserError, brain_generator, write_file


class Condition(NamedTuple):
    """One thing that a model can know of a person, as a number.

    column: of PEOPLE_TABLE.
    help: in a few words, for the flag that asks for it.
    values: {how it is written: its number}, or None for any number.
    scale: a difference that matters. Networks embed number / scale, and people are counted in steps of it.
    blur: sd of what is added to the number before a network that draws hears it; see as_heard.
    """

    column: str
    help: str
    values: dict[str, float] | None = None
    scale: float = 1.0
    blur: float = 0.0

    def read(self, text: str) -> float:
        """The number of a text, NaN of an empty one. Raises ValueError for one that is neither known nor a number."""
        if not text:
            return math.nan
        return self.values[text] if self.values and text in self.values else float(text)

    def write(self, number: float) -> str:
        """The text of a number."""
        written = {value: text for text, value in (self.values or {}).items()}
        return written.get(number, f"{number:g}")

    def step(self, number: float) -> float:
        """The number itself where there are only a few, else the one at which its step of `scale` begins."""
        return number if self.values else number // self.scale * self.scale


# Another row, such as one for the column Hand, is all that the models and scripts need to learn more of people. Ages
# are embedded in decades: the sines of single years would tell every person of a small data set from all others.
CONDITIONS = {
    "age": Condition("Age", "age in years", scale=10, blur=7),
    "sex": Condition("M/F", "sex", {"F": 0.0, "M": 1.0}),
    "cdr": Condition("CDR", "Clinical Dementia Rating", {"0": 0.0, "0.5": 0.5, "1": 1.0, "2": 2.0}),
}

PEOPLE_TABLE = "oasis_cross-sectional.csv"
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, lie evenly however many there are


def read_people(table: Path) -> dict[int, dict[str, float]]:
    """{case: {name of a condition: number}} of the table, NaN where a cell is empty.

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
                cells = {name: row[condition.column].strip() for name, condition in CONDITIONS.items()}
                people[int(match[1])] = {name: CONDITIONS[name].read(cell) for name, cell in cells.items()}
    except (KeyError, ValueError, AttributeError, csv.Error) as error:
        columns = ", ".join(condition.column for condition in CONDITIONS.values())
        raise UserError(
            f"{table} has no columns ID, {columns} as OASIS has them ({error}); copy it again, or take it away to "
            "train without"
        ) from None
    return people


def write_people(table: Path, people: dict[int, dict[str, str]]) -> None:
    """Writes a table that read_people reads, of {case: {name of a condition: text}}. What is not known stays empty."""
    rows = [["ID", *(condition.column for condition in CONDITIONS.values())]]
    for case, person in sorted(people.items()):
        rows.append([f"OAS1_{case:04d}_MR1", *(person.get(name, "") for name in CONDITIONS)])
    write_file(table, "".join(",".join(row) + "\n" for row in rows).encode())


def describe_people(people: Tensor, conditions: list[str]) -> dict[str, list[float]]:
    """The numbers of each condition in training, from people [N, K]: [lowest, highest], or where they are few, all."""
    seen = {}
    for name, values in zip(conditions, people.T, strict=True):
        known = values[~values.isnan()].unique().tolist()  # in order
        seen[name] = known if CONDITIONS[name].values else known[:1] + known[-1:]
    return seen


def count_people(people: Tensor, conditions: list[str]) -> list[dict[str, float]]:
    """How many there are of each kind among people [n, K]: [{condition: number, ..., "count": how many}, ...].

    Of an age only the decade counts. Conditions that are not known are left out.
    """
    kinds = Counter()
    for person in people.tolist():
        known = [(name, value) for name, value in zip(conditions, person, strict=True) if not math.isnan(value)]
        kinds[tuple((name, CONDITIONS[name].step(value)) for name, value in known)] += 1
    return [{**dict(kind), "count": count} for kind, count in sorted(kinds.items())]


def person_of(typed: dict[str, str | float | None], description: dict) -> dict[str, float]:
    """The numbers of a person from flags, such as {"age": 64.0, "sex": "F", "cdr": None}; None is left out.

    Raises UserError for a person of a kind that the model never saw.
    """
    asked = {name: CONDITIONS[name].read(str(text)) for name, text in typed.items() if text is not None}
    for name, value in asked.items():
        flag, seen = f"--{name} {CONDITIONS[name].write(value)}", description.get("people", {}).get(name)
        if not seen:
            raise UserError(f"{flag}: the model was trained without; train another on data with {PEOPLE_TABLE}")
        few = CONDITIONS[name].values is not None
        if not (value in seen if few else seen[0] <= value <= seen[-1]):
            words = ", ".join(map(CONDITIONS[name].write, seen)) if few else f"{seen[0]:g} to {seen[-1]:g}"
            raise UserError(f"{flag}: the model was trained on {name} {words}; choose among these")
    return asked


def draw_person(asked: dict[str, float], description: dict, seed: int, brain: int) -> dict[str, float]:
    """A person with the numbers that are asked for; all others are those of a random person like that in training.

    The training people like that stand in a row, sorted by age. Brain 0 takes a place in it that follows from the seed,
    and every next brain goes on by 0.618 of the row, from its end back to its beginning: such places are spread evenly
    however few brains there are. The exact age, of which only the decade is stored, is a function of (seed, brain).
    Where nobody in training was like that, only the numbers asked for are known.
    """
    wanted = {name: CONDITIONS[name].step(value) for name, value in asked.items()}
    kinds = [kind for kind in description.get("people_counts", []) if wanted.items() <= kind.items()]
    if not kinds:
        return asked
    first = float(torch.rand((), generator=brain_generator(seed, 0, "people"), dtype=torch.float64))
    place = (first + brain * GOLDEN) % 1
    last = torch.tensor([float(kind["count"]) for kind in kinds], dtype=torch.float64).cumsum(0)  # of each in the row
    kind = kinds[int((last <= place * last[-1]).sum())]
    person = {name: value for name, value in kind.items() if name != "count"}
    generator = brain_generator(seed, brain, "person")
    for name, value in person.items():
        if not CONDITIONS[name].values:
            least, most = description["people"][name]
            further = int(torch.randint(max(1, int(CONDITIONS[name].scale)), (), generator=generator))
            person[name] = min(max(value + further, least), most)
    return person | asked


def as_heard(person: dict[str, float], description: dict, seed: int, brain: int) -> dict[str, float]:
    """What the network hears of a person whose brain it draws: numbers plus N(0, blur^2), within those of training.

    Of two people of one age, one has the brain of an older person and the other that of a younger. A network that has
    heard the exact ages of a few hundred people draws brains of one age too much alike; ages that are not exact give
    back what is missing (noise on conditions: Ho et al. 2022, "Cascaded diffusion models", section 4). What is added is
    a function of (seed, brain), so one brain at several ages stays one person.
    """
    generator, heard = brain_generator(seed, brain, "heard"), dict(person)
    for name, condition in CONDITIONS.items():
        if condition.blur and name in person:
            least, most = description["people"][name]
            number = person[name] + condition.blur * float(torch.randn((), generator=generator))
            heard[name] = min(max(number, least), most)
    return heard


def in_numbers(person: dict[str, float], conditions: tuple[str, ...]) -> Tensor:
    """float32 [K]: the numbers of a person for these conditions, in their order, NaN where one is not known."""
    return torch.tensor([person.get(name, math.nan) for name in conditions], dtype=torch.float32)


def in_letters(person: dict[str, float]) -> dict[str, str]:
    """Such as {"age": "64", "sex": "F", "cdr": "0.5"}."""
    return {name: CONDITIONS[name].write(value) for name, value in person.items()}


def words_for(person: dict[str, float]) -> list[str]:
    """Such as ["age 64", "sex F", "cdr 0.5"]."""
    return [f"{name} {value}" for name, value in in_letters(person).items()]
