"""Laws of the drawings of the report: their numbers are those of the models, their pseudo-code runs, all is legible."""

import argparse
import re
import runpy
from functools import cache, partial
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from matplotlib.text import Text

import prestage_train
from model_diffusion import LatentDiffusion, sample_ddim, sampling_times
from model_discriminator import PatchDiscriminator
from parts.gaussian_prior import Noisy
from pictures.drawings import STYLE, WIDTH, Page, svg_of
from playground import ideas
from training.presets import PRESETS

FIGURES = Path(__file__).resolve().parents[2] / "figures"
DRAWINGS = pytest.mark.parametrize("drawing", ideas.DRAWINGS, ids=lambda drawing: drawing.__name__)


@cache
def page_of(drawing) -> Page:
    with torch.no_grad(), matplotlib.rc_context(STYLE):
        return drawing()


def run(code: str, names: dict) -> dict:
    """All names after the code ran."""
    Path("code.py").write_text(code)
    return runpy.run_path("code.py", names)


def svg_of_drawing(drawing) -> str:
    return svg_of(partial(page_of, drawing))


def words_in(svg: str) -> list[str]:
    return re.findall(r"<!-- (.*?) -->", svg, re.DOTALL)


@DRAWINGS
def test_figures_say_what_the_script_draws(drawing):
    """And they are small, and XML."""
    drawn, kept = svg_of_drawing(drawing), (FIGURES / f"idea_{drawing.__name__}.svg").read_text()
    assert len(words_in(drawn)) > 10 and words_in(drawn) == words_in(kept), (
        "run python playground/ideas.py --out figures"
    )
    sizes = [ElementTree.fromstring(svg).get("viewBox") for svg in (drawn, kept)]
    assert sizes[0] == sizes[1] and len(kept) < 70_000 and svg_of_drawing(drawing) == drawn


@DRAWINGS
def test_letters_are_large_enough_and_none_is_cut_or_covered(drawing):
    """11 pixels at least; 13 where there are indices, which are 0.7 times as large."""
    page = page_of(drawing)
    with matplotlib.rc_context(STYLE):
        page.figure.draw_without_rendering()
        texts = [text for text in page.figure.findobj(Text) if text.get_text().strip()]
        boxes = [text.get_window_extent() for text in texts]
    per_pixel = page.figure.dpi / 96
    for text, box in zip(texts, boxes):
        least = 13 if re.search(r"\$[^$]*[_^]", text.get_text()) else 11
        assert text.get_fontsize() / 0.75 >= least, text.get_text()
        assert 0 < box.x0 and box.x1 < WIDTH * per_pixel and 0 < box.y0 and box.y1 < page.height * per_pixel, text
    for one, words in zip(boxes, texts):
        covered = [other for box, other in zip(boxes, texts) if other is not words and one.padded(-2).overlaps(box)]
        assert not covered, (words, covered)


def test_field_of_view_is_where_a_verdict_has_a_gradient():
    critic = PatchDiscriminator(channels=(4, 4, 4, 4)).eval()
    size, stride, first = ideas.field_of_view(critic)
    x = torch.randn(1, 3, 96, 120, requires_grad=True)
    verdicts = critic(x, torch.tensor([3]))[0, 0]
    for row, column in ((4, 5), (6, 9)):
        (gradient,) = torch.autograd.grad(verdicts[row, column], x, retain_graph=True)
        for at, axis in ((row, 1), (column, 0)):
            seen = gradient[0].abs().amax((0, 1 + axis)).nonzero()[:, 0].tolist()
            assert seen == list(range(first + stride * at, first + stride * at + size))


@pytest.fixture
def model() -> LatentDiffusion:
    model = LatentDiffusion(latent_shape=(2, 4, 4), widths=(8,), blocks=1, slices_per_brain=3).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.channel_weight.uniform_(0.5, 2)
    return model


@torch.no_grad()
def test_pseudo_code_is_the_loss_and_a_sampler_of_the_project(model):
    x_0, noise, z, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.arange(3), torch.tensor([10, 500, 900])
    alpha, sigma = (torch.cat([level, level.new_tensor([end])]) for level, end in ((model.alpha, 1), (model.sigma, 0)))
    levels = {"alpha": alpha.float().view(-1, 1, 1, 1), "sigma": sigma.float().view(-1, 1, 1, 1), "z": z}

    def network(x, t, z):
        level = levels["alpha"][t].expand(3, 1, 1, 1), levels["sigma"][t].expand(3, 1, 1, 1)
        guess, sd, seen = model.gaussian(Noisy(x, *level, z, 1 if isinstance(t, torch.Tensor) else 3, None))
        t = t if isinstance(t, torch.Tensor) else torch.full((3,), t)
        return guess + sd * model.unet(seen, guess, t, z)

    names = levels | {"x_0": x_0, "noise": noise, "t": t, "network": network, "mean": torch.mean,
                      "weight": levels["sigma"] ** -2, "channel_weight": model.channel_weight}  # fmt: skip
    assert torch.allclose(run(ideas.TRAINING, names)["loss"], model(x_0, z, t, noise, slices=1).mean(), rtol=1e-4)

    *_, sampled = sample_ddim(lambda x, t: model.denoise(x, t, z), noise, model.alpha, model.sigma, steps=6)
    times = sampling_times(model.alpha, model.sigma, 6)
    names = levels | {"x": noise, "network": network, "steps": list(zip(times, [*times[1:], -1]))}
    assert torch.allclose(run(ideas.SAMPLING, names)["x"], sampled, atol=1e-4)


def test_shapes_in_the_drawings_are_those_of_preset_small():
    settings = {"latent_channels": 8, **PRESETS["prestage_train.py"]["small"]}
    for kind, drawing in (("vae", ideas.vae), ("vqvae", ideas.vqvae), ("vqvae2", ideas.vqvae2)):
        model, _ = prestage_train.build(argparse.Namespace(model=kind, levels=None, **settings), (32, 16, 192, 224))
        words = " ".join(words_in(svg_of_drawing(drawing)))
        assert ideas.shape(*model.latent_shape) in words
        if kind != "vae":
            assert all(ideas.shape(*grid) in words for grid in model.grids)
        if kind == "vqvae2":
            assert f"K = {model.codebook_size:,}" in words and f"{model.fixed_bits:,.0f} bits" in words
    heads, channels = model.encoder.attention.heads, settings["widths"][-1]
    positions = model.latent_shape[1] * model.latent_shape[2]
    words = " ".join(words_in(svg_of_drawing(ideas.attention)))
    assert (
        ideas.shape(heads, positions, channels // heads) in words and ideas.shape(heads, positions, positions) in words
    )
