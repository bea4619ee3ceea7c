"""Laws of all plots: on a page of GitHub every letter is large enough, and none is cut."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from heads.phantom import phantom_case
from pictures import sheets, volume
from playground import age, kl_schedule, recipes, spread
from scores import ledger, page
from scores.metrics import RINGS
from scores.samples import SAMPLE_SCORES

TITLE = "35 brains of diffusion_vis/samples beside as many real ones (validate)"


def draw_age():
    head, ages = phantom_case(0, 1)[0], np.linspace(20.0, 90, 12)
    one_head = {years: (head, 5000.0) for years in age.AGES}
    return age.draw(one_head, ages, {"real": 50 * ages, "sampled": 60 * ages}, TITLE)


def draw_recipes():
    errors = {recipe: [1.0 + n for n in range(len(recipes.NOISE))] for recipe in recipes.RECIPES}
    scores = {
        recipe: {part: dict.fromkeys(recipes.DISTANCES, 1.0) for part in ("samples", "real")} for recipe in errors
    }
    return recipes.draw(errors, scores, TITLE)


def draw_spread():
    moves = [[0.5] * len(spread.GROUPS)] * len(spread.RATIOS)
    return spread.draw({"prior": moves, "network": moves}, [1.4] * len(spread.GROUPS), TITLE)


def draw_kl_schedule():
    for name in kl_schedule.SCHEDULES:
        line = {"step": 1, "seconds": 1.0, "weight/kl": 1.0, "validate/ssim": 0.9, "train/kl": 500.0}
        (Path("log") / f"kl-{name}").mkdir(parents=True)
        (Path("log") / f"kl-{name}" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    heads = sheets.sheet([np.zeros((6, 192, 192), np.uint8)] * 4, title="a title", row_names=["monotonic"] * 4)
    return kl_schedule.draw({name: torch.rand(8, 6, 8) for name in kl_schedule.SCHEDULES}, heads, TITLE)


def draw_scores():
    names = dict.fromkeys(SAMPLE_SCORES, 99.0)
    allowed = {name: {"middle": 1.0, "low": 0.8, "high": 1.2} for name in names}
    return page.draw_scores({"allowed": allowed, "samples": names, "real": names, "through": names}, TITLE)


def draw_samples():
    measures = {part: {"spectrum": torch.rand(9, RINGS) + 1, "areas": torch.rand(9, 32, 3) * 9000,
                       "adjacent": torch.rand(9, 31), "reslice": torch.rand(9, 32) + 1}
                for part in ("real", "samples", "reference")}  # fmt: skip
    measures |= {part: {"relative": torch.rand(9, 32)} for part in ("near", "near_real")}
    result = {"samples": {"noise": 1.1, "copies": 0.01, "copies_limit": 0.8}, "real": {"noise": 1.0}}
    return page.draw_samples(result, measures, TITLE)


def draw_ledger():
    ours = {"codec": "vqvae (a_long_name_of_a_run), perceptual decoder", "bits": 6720, "ssim": 0.9}
    rows = [ours, {"codec": "block KLT f8 d8", "numbers": 5376, "ssim": 0.9},
            {"codec": "k-means 8x8, K 1024", "bits": 6720, "ssim": 0.8}]  # fmt: skip
    result = {"ssim": 0.9, "entropy_bits": 6200, "prior_bits": 3947, "ssim_per_z": {0: 0.9}}
    result |= {"ssim_per_z_interval": {0: [0.8, 1]}, "spectrum": {"frequency": [0.1], "power_ratio": [1.0]}}
    return ledger.draw_ledger(rows, result, "validate")


def draw_reslices():
    return volume.reslices(phantom_case(0, 1)[0], "sampled brain 0, age 38, sex M: seed 0, dpm in 20 steps, perceptual")


@pytest.mark.parametrize("draw", [draw_age, draw_recipes, draw_spread, draw_kl_schedule, draw_scores, draw_samples,
                                  draw_ledger, draw_reslices], ids=lambda draw: draw.__name__)  # fmt: skip
def test_letters_are_large_enough_on_a_page_and_none_is_cut(draw, tmp_path, monkeypatch):
    """At least 9 pixels where the plot, 110 pixels per inch, is shrunk to PAGE."""
    monkeypatch.chdir(tmp_path)
    figure = draw()
    figure.draw_without_rendering()
    shrink = min(1, sheets.PAGE / (110 * figure.get_figwidth()))
    sizes = [text.get_fontsize() / 72 * 110 * shrink for text in figure.findobj(Text) if text.get_text()]
    assert min(sizes) >= 9
    drawn, whole = figure.get_tightbbox(), figure.get_size_inches()  # in inches from the lower left corner
    assert (drawn.min > -0.02).all() and (drawn.max < whole + 0.02).all()
