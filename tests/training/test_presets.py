"""Preset base is sized by work, which playground/gpu_hours.py counts; the table of the README is its answer."""

import pytest
from test_readme import README

from playground import gpu_hours

HOURS = 4


@pytest.mark.parametrize("count_work", gpu_hours.TRAINERS.values(), ids=gpu_hours.TRAINERS)
def test_each_stage_of_preset_base_takes_at_most_four_hours_of_a_t4(count_work):
    """And at least one: a GPU that is lent for an afternoon should be used."""
    assert 1 < count_work().operations / (gpu_hours.CARDS["T4"] * gpu_hours.REACHED) / 3600 <= HOURS


@pytest.mark.slow
def test_the_table_of_the_readme_is_what_the_script_counts():
    assert gpu_hours.table() in README
