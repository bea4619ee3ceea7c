"""Laws of people.py: the table, and whom samples are of."""

import math

import pytest
import torch

import heads.people
from heads.people import CONDITIONS, PEOPLE_TABLE, Condition, as_heard, count_people, describe_people, draw_person
from util import UserError


@pytest.mark.parametrize("text", ["ID,Age\nOAS1_0001_MR1,3", "ID,M/F,Age,CDR\nOAS1_0001_MR1,X,3,", "a;b\n1;2", "\x00"])
def test_a_table_of_another_kind_is_one_line(people_folder, text):
    (people_folder / PEOPLE_TABLE).write_text(text)
    with pytest.raises(UserError, match=f"{PEOPLE_TABLE}.*ID, Age, M/F, CDR.*train without") as error:
        heads.people.read_people(people_folder / PEOPLE_TABLE)
    assert "\n" not in str(error.value)


def known(people: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """The people without the numbers that are NaN."""
    return {case: {name: n for name, n in person.items() if not math.isnan(n)} for case, person in people.items()}


def test_a_table_that_is_written_reads_as_what_was_written(people_folder):
    """What is not known stays unknown, and whatever else is said of a person is left out."""
    people = known(heads.people.read_people(people_folder / PEOPLE_TABLE))
    texts = {case: heads.people.in_letters(person) | {"given": "0, 4"} for case, person in people.items()}
    heads.people.write_people(people_folder / "again.csv", {**texts, 0: {}})
    again = heads.people.read_people(people_folder / "again.csv")
    assert list(again) == [0, 1, 2, 3] and known(again) == {0: {}, **people}


def test_a_further_condition_is_one_row_of_one_table(people_folder, monkeypatch):
    """It is read, asked for, drawn and written like the others."""
    monkeypatch.setitem(CONDITIONS, "hand", Condition("Hand", "hand", {"R": 0.0, "L": 1.0}))
    table = heads.people.read_people(people_folder / PEOPLE_TABLE)
    assert table[1] == {"age": 74, "sex": 0, "cdr": 0.5, "hand": 0} and set(table) == {1, 2, 3}
    people = torch.tensor([list(table[case].values()) for case in (1, 2, 3)])
    names = list(CONDITIONS)
    description = {"people": describe_people(people, names), "people_counts": count_people(people, names)}
    assert description["people"] == {"age": [20, 74], "sex": [0, 1], "cdr": [0, 0.5], "hand": [0]}
    asked = heads.people.person_of({"age": None, "hand": "R"}, description)
    person = draw_person(asked, description, 0, 0)
    assert asked == {"hand": 0} and heads.people.in_letters(person)["hand"] == "R"
    assert heads.people.in_numbers(person, ("hand",)).tolist() == [0]


COUNTS = [{"age": 20.0, "sex": 0.0, "count": 6}, {"age": 70.0, "sex": 1.0, "cdr": 0.5, "count": 2}]
SEEN = {"people_counts": COUNTS, "people": {"age": [22.0, 75.0], "sex": [0.0, 1.0], "cdr": [0.5]}}


def test_people_are_counted_by_kind_and_decade():
    """What is not known is left out, so that drawing among kinds draws what is unknown as often as in training."""
    people = torch.tensor([[24, 0, torch.nan]] * 4 + [[29, 0, torch.nan]] * 2 + [[71, 1, 0.5], [79, 1, 0.5]])
    assert count_people(people, ["age", "sex", "cdr"]) == COUNTS
    assert describe_people(people, ["age", "sex", "cdr"]) == {"age": [24, 79], "sex": [0, 1], "cdr": [0.5]}
    assert count_people(torch.zeros(3, 0), []) == [{"count": 3}]


def test_a_network_hears_an_age_that_is_not_exact():
    """By the same years at every age; the person stays as asked for, and what is no age is heard as it is."""

    def heard(age: float, brains: int = 400) -> torch.Tensor:
        seen = {"people": {"age": [0, 100]}}
        people = [as_heard({"age": age, "sex": 1.0}, seen, 0, brain) for brain in range(brains)]
        assert all(person["sex"] == 1 for person in people)
        return torch.tensor([person["age"] for person in people])

    assert heard(50).mean() == pytest.approx(50, abs=1) and heard(50).std() == pytest.approx(7, rel=0.1)
    torch.testing.assert_close(heard(60, 20), heard(50, 20) + 10)
    asked = {"age": 74.0}
    near_the_end = [as_heard(asked, SEEN, 0, brain)["age"] for brain in range(50)]
    assert asked == {"age": 74.0} and max(near_the_end) == 75 and min(near_the_end) < 70
    assert as_heard({"sex": 0.0}, SEEN, 0, 0) == {"sex": 0.0} and as_heard({}, {}, 0, 0) == {}


def test_people_are_drawn_as_often_as_they_are_in_training():
    """What is asked for stays, the rest is that of people who are like that; all of it follows from seed and brain."""

    def drawn(**asked):
        return [draw_person(asked, SEEN, 0, brain) for brain in range(400)]

    people = drawn()
    young = [person for person in people if person["sex"] == 0]
    assert len(young) in (299, 300, 301) and all("cdr" not in person and "count" not in person for person in young)
    assert {person["age"] for person in young} == set(range(22, 30))
    assert {person["age"] for person in people if person["sex"] == 1} == set(range(70, 76))
    assert sum(person["sex"] == 0 for person in people[:8]) in (5, 6, 7)  # few are spread evenly too
    assert people == drawn()
    assert all(person["age"] == 72 and person["cdr"] == 0.5 for person in drawn(age=72))
    assert drawn(age=72, sex=0)[0] == {"age": 72, "sex": 0}  # there is nobody like that
    assert draw_person({}, {}, 0, 0) == {}  # a model without people
    assert heads.people.words_for({"age": 72.0, "sex": 1, "cdr": 0.5}) == ["age 72", "sex M", "cdr 0.5"]
    assert heads.people.in_numbers({"sex": 1.0}, ("age", "sex")).isnan().tolist() == [True, False]


def test_people_whom_the_model_never_saw_are_refused():
    assert heads.people.person_of({"age": 22.0, "sex": "M", "cdr": "0.5"}, SEEN) == {"age": 22, "sex": 1, "cdr": 0.5}
    for typed, words in (({"age": 80.0}, "--age 80: .*age 22 to 75; choose among"), ({"cdr": "2"}, "--cdr 2.*cdr 0.5")):
        with pytest.raises(UserError, match=words):
            heads.people.person_of(typed, SEEN)
    with pytest.raises(UserError, match="--sex F.*without"):
        heads.people.person_of({"sex": "F"}, {})
