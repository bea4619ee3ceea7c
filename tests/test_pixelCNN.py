"""Laws of pixelCNN.py: a distribution over grids in reading order, exact draws from it, and what a run promises."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pixelCNN
from dataset import load_slices
from logger import read_log
from pixelCNN import PRIORS, PixelCNN, PixelCNN2, brain_noise, decode_brain, draw, sample_brain
from training import checkpoints
from training import run as training_run
from training.stages import load_second_stage

ONE_STEP = ["--minutes", 1e-9]  # a limit that is over when the first step is done


@pytest.fixture
def in_double():
    """Numbers of 64 bits: results computed in two ways, or in other batches, then round to the same codes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tiny(awaken):
    """tiny(grid=(3, 7)): a PixelCNN in evaluation mode, no weight of which is zero; with grids, a PixelCNN2."""

    def build(**changes) -> PixelCNN | PixelCNN2:
        sizes = {"codebook_size": 5, "grid": (4, 5), "layers": 3, "kernel": 3}
        sizes["channels"] = 16  # of 8, all may be negative, and the ReLU of the head lets no gradient through
        if "grids" in changes:
            sizes.pop("grid")
        model = awaken((PixelCNN2 if "grids" in changes else PixelCNN)(**{**sizes, **changes}).eval(), 0.3)
        for level in [model] if isinstance(model, PixelCNN) else [model.top, model.bottom]:
            standardise(level)
        return model

    return build


@torch.no_grad()
def standardise(model: PixelCNN) -> None:
    """Makes the logits of every digit have mean 0 and sd 1, or one code could win all draws."""
    top = torch.randint(model.codebook_size, (8, *(n // 2 for n in model.grid)))
    logits = model.logits(torch.randint(model.codebook_size, (8, *model.grid)), torch.arange(0, 32, 4), top)
    mean, last = torch.cat([digit.mean((0, 2, 3)) for digit in logits]), model.head[-1]
    sd = torch.cat([(digit - digit.mean((0, 2, 3), True)).std().expand(digit.shape[1]) for digit in logits])
    last.weight.div_(sd[:, None, None, None])
    last.bias.sub_(mean).div_(sd)


def last(name: str = "pixelcnn") -> dict:
    return checkpoints.load_checkpoint(Path(f"model_ckpt/{name}/last.pt"), "pixelCNN.py")


def weights(name: str = "pixelcnn") -> tuple[dict[str, torch.Tensor], dict]:
    return checkpoints.load_weights(Path(f"model_ckpt/{name}/model.safetensors"))


def gumbel(*shape: int) -> torch.Tensor:
    return -torch.log(-torch.log(torch.rand(shape).clamp(1e-20, 1 - 1e-7)))


def inputs_with_gradient(model: PixelCNN, r: int, c: int, digit: int = 0) -> dict[str, torch.Tensor]:
    """Which codes the logits of a digit at (r, c) have a gradient from: bool [h, w] by the embedding they entered by.

    embed_idx are the codes, digit_0, digit_1 the position's own digits, embed_top the top codes [h / 2, w / 2].
    """
    seen = {}

    def keep(name):
        def hook(module, args, out):
            seen[name] = out
            out.retain_grad()

        return hook

    hooks = [model.embed_idx.register_forward_hook(keep("embed_idx"))]
    if model.embed_top is not None:
        hooks.append(model.embed_top[0].register_forward_hook(keep("embed_top")))
    original = model.embed_digits and model.embed_digits.of_digit

    def of_digit(i, values):
        keep(f"digit_{i}")(None, None, out := original(i, values))
        return out

    with pytest.MonkeyPatch.context() as patch:
        if original:
            patch.setattr(model.embed_digits, "of_digit", of_digit)
        top = torch.randint(model.codebook_size, (1, *(n // 2 for n in model.grid)))
        logits = model.logits(torch.randint(model.codebook_size, (1, *model.grid)), torch.tensor([9]), top)[digit]
    for hook in hooks:
        hook.remove()
    (logits[0, :, r, c] * torch.randn(logits.shape[1])).sum().backward()
    none = {name: torch.zeros_like(out) for name, out in seen.items()}
    return {name: (none[name] if out.grad is None else out.grad)[0].abs().amax(0) > 0 for name, out in seen.items()}


def dependence(model: PixelCNN, r: int, c: int) -> torch.Tensor:
    """bool [h, w]: which codes the logits at (r, c) have a gradient from."""
    return inputs_with_gradient(model, r, c)["embed_idx"]


@pytest.mark.parametrize("kernel, layers", [(3, 6), (5, 3)])
def test_logits_depend_on_all_earlier_codes_and_on_no_other(tiny, kernel, layers):
    """In reading order, by gradient, at every position: never on itself or a later one, and there is no blind spot."""
    model = tiny(grid=(4, 6), kernel=kernel, layers=layers)
    for r in range(4):
        for c in range(6):
            earlier = torch.arange(24).view(4, 6) < 6 * r + c
            assert torch.equal(dependence(model, r, c), earlier), (r, c)


def test_digits_depend_on_earlier_codes_and_on_the_digits_before(tiny):
    """By gradient: the whole of every earlier code, and of the code itself only the digits before this one."""
    model = tiny(grid=(3, 4), codebook_size=2 * 3 * 4, levels=(2, 3, 4))
    for r, c in ((0, 0), (1, 2), (2, 3)):
        earlier, here = torch.arange(12).view(3, 4) < 4 * r + c, torch.zeros(3, 4, dtype=torch.bool)
        here[r, c] = True
        for i in range(3):
            seen = inputs_with_gradient(model, r, c, digit=i)
            assert torch.equal(seen["embed_idx"], earlier)
            for j in range(2):
                assert torch.equal(seen[f"digit_{j}"], here & (j < i)), (r, c, i, j)


@pytest.mark.parametrize("levels", [None, (3, 2)])
def test_bottom_codes_depend_on_all_top_codes_around_and_on_earlier_bottom_codes(tiny, levels):
    """By gradient: top codes below and to the right too, the bottom's own past as ever; no code of the bottom yet."""
    model = tiny(grids=((2, 3), (4, 6)), codebook_size=6, levels=levels, layers=6).bottom
    for r, c in ((0, 0), (1, 4), (3, 5)):
        seen = inputs_with_gradient(model, r, c)
        assert torch.equal(seen["embed_idx"], torch.arange(24).view(4, 6) < 6 * r + c)
        near_r, near_c = torch.arange(2) - r // 2, torch.arange(3) - c // 2
        assert seen["embed_top"][(near_r.abs()[:, None] <= 1) & (near_c.abs() <= 1)].all()
    assert inputs_with_gradient(model, 3, 5)["embed_top"].all()


def test_no_parameter_is_idle(tiny):
    """Each has a gradient, except those of the last layer's vertical output, which nobody reads."""
    idx, z = torch.randint(6, (2, 4, 6)), torch.arange(2)
    sizes = {"codebook_size": 6, "levels": (2, 3)}
    for model, codes in ((tiny(codebook_size=6, grid=(4, 6)), idx), (tiny(grid=(4, 6), **sizes), idx),
                         (tiny(grids=((2, 3), (4, 6)), **sizes), (idx[:, :2, :3], idx))):  # fmt: skip
        model.bits(codes, z).sum().backward()
        idle = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
        assert {name.removeprefix("top.").removeprefix("bottom.") for name in idle} <= {"layers.2.out_v"}


def test_bits_are_the_sum_of_the_codes_surprisals(tiny):
    model, z, idx = tiny(), torch.tensor([0, 31]), torch.randint(5, (2, 4, 5))
    p = model.logits(idx, z)[0].detach().double().softmax(1)
    by_hand = [-sum(math.log2(p[b, idx[b, r, c], r, c]) for r in range(4) for c in range(5)) for b in range(2)]
    bits = model.bits(idx, z)
    assert bits.dtype == torch.float32 and bits.tolist() == pytest.approx(by_hand, rel=1e-5)


SMALL = {
    "codes": {"codebook_size": 3, "grid": (2, 2)},
    "digits": {"codebook_size": 6, "levels": (2, 3), "grid": (1, 3)},
    "two grids": {"codebook_size": 2, "grids": ((1, 1), (2, 2))},
    "two grids of digits": {"codebook_size": 4, "levels": (2, 2), "grids": ((1, 1), (2, 2))},
}


@pytest.mark.parametrize("sizes", SMALL.values(), ids=SMALL)
def test_all_kinds_are_distributions_and_drawn_as_such(tiny, sizes):
    """All probabilities sum to one at any z, and the frequencies of 10 000 draws are 2^-bits, in up to 16 bins."""
    model, n = tiny(**sizes), 10_000
    sizes_of_grids = [math.prod(grid) for grid in model.grids]
    every = torch.tensor(list(product(range(sizes["codebook_size"]), repeat=sum(sizes_of_grids))))
    codes = tuple(part.view(-1, *grid) for part, grid in zip(every.split(sizes_of_grids, dim=1), model.grids))
    for z in (0, 31, 5):
        p = 2 ** -model.bits(codes if "grids" in sizes else codes[0], torch.full((len(every),), z)).detach().double()
        assert p.sum().item() == pytest.approx(1, abs=1e-5) and p.max() > 1.5 * p.min()

    noise = pixelCNN.each_grid(lambda one: gumbel(n, *one.shape), model.gumbel_noise())
    drawn = pixelCNN.grids_of(model.sample(torch.full((n,), 5), noise))
    digits = torch.cat([grid.flatten(1) for grid in drawn], dim=1)
    place = sizes["codebook_size"] ** torch.arange(digits.shape[1]).flip(0)
    count = torch.bincount((digits * place).sum(1), minlength=len(p)).double()
    bins = ((p.cumsum(0) - p / 2) * 16).long().clamp(max=15)
    expected = n * torch.zeros(16, dtype=torch.float64).index_add_(0, bins, p)
    count = torch.zeros(16, dtype=torch.float64).index_add_(0, bins, count)
    count, expected = count[expected > 0], expected[expected > 0]
    assert len(count) > 8 and ((count - expected) ** 2 / expected).sum() < 44.3  # 99.99 % for 15 degrees of freedom


def test_z_and_the_position_change_the_distribution(tiny):
    """z at every position, the first included, and only its own grid's; and the head of a brain is not its middle."""
    model, idx = tiny(), torch.randint(5, (1, 4, 5)).expand(2, -1, -1)
    a, b = (model.logits(idx, torch.tensor([3, other]))[0] for other in (20, 21))
    assert torch.allclose(a[0], b[0], atol=1e-6)
    assert (a[1] - b[1]).abs().amax(0).min() > 1e-4 and (a[1] - a[0]).abs().amax(0).min() > 1e-3
    alike = tiny(grid=(9, 9), layers=1).logits(torch.zeros(1, 9, 9, dtype=torch.long), torch.zeros(1))[0][0]
    assert (alike[:, 4, 4] - alike[:, 5, 5]).abs().max() > 1e-3


@pytest.mark.parametrize("kernel, layers, grid", [(3, 3, (4, 5)), (5, 2, (6, 7)), (5, 1, (3, 2)), (3, 2, (1, 6))])
def test_the_cached_sample_is_the_naive_one(tiny, in_double, kernel, layers, grid):
    """Token for token, at any temperature, for several draws."""
    for seed, temperature in enumerate((1.0, 0.5, 1.7)):
        torch.manual_seed(seed)
        model = tiny(codebook_size=11, grid=grid, kernel=kernel, layers=layers)
        z, noise = torch.tensor([2, 17, 31]), gumbel(3, 11, *grid)
        idx = model.sample(z, noise, temperature)
        assert idx.dtype == torch.int64 and torch.equal(idx, model.sample_naive(z, noise, temperature))
        assert len(idx.unique()) > 3 and not torch.equal(idx, model.sample(z, noise, 0.01))


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("levels", [None, (3, 4, 2)])
def test_the_cached_sample_of_digits_and_of_two_grids_is_the_naive_one(tiny, in_double, levels, top_p):
    model = tiny(grids=((2, 3), (4, 6)), codebook_size=24, levels=levels)
    z = torch.tensor([2, 17])
    noise = tuple(torch.stack(noise) for noise in zip(model.gumbel_noise(), model.gumbel_noise()))
    top, bottom = model.sample(z, noise, 0.8, top_p)
    assert torch.equal(top, model.top.sample_naive(z, noise[0], 0.8, top_p))
    assert torch.equal(bottom, model.bottom.sample_naive(z, noise[1], 0.8, top_p, top))
    assert top.shape == (2, 2, 3) and 0 <= bottom.min() and bottom.max() < 24 and len(bottom.unique()) > 3
    assert not torch.equal(bottom, model.bottom.sample(z, noise[1], 0.8, top_p, (top + 1) % 24))


def test_a_huge_codebook_is_no_trouble(tiny, in_double):
    model = tiny(codebook_size=2**60, levels=(16,) * 15, grid=(2, 3))
    z, noise = torch.arange(4), torch.stack([model.gumbel_noise() for _ in range(4)])
    idx = model.sample(z, noise)
    assert 0 <= idx.min() and 2**50 < idx.max() < 2**60 and torch.equal(idx, model.sample_naive(z, noise))
    bits = model.bits(torch.randint(2**60, (4, 2, 3)), z)
    assert bits.isfinite().all() and 300 < bits.mean() < 600
    with pytest.raises(ValueError, match="levels"):
        PixelCNN(codebook_size=7, levels=(2, 3), grid=(2, 2), channels=8, layers=1)


def test_top_p_draws_from_the_nucleus_in_proportion(tiny, in_double):
    """Of probabilities 0.5, 0.3, 0.15, 0.05, in any order: the fewest with top_p together; 1 is off, 0 is greedy."""
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    n, noise = 20_000, gumbel(20_000, 4)
    logits = p.log().expand(n, -1)
    for top_p, nucleus in ((0.0, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.9, [0, 1, 3])):
        count = torch.bincount(draw(logits, noise, 1.0, top_p), minlength=4)
        assert count.nonzero()[:, 0].tolist() == nucleus
        expected = n * p[nucleus] / p[nucleus].sum()
        assert ((count[nucleus] - expected) ** 2 / expected).sum() < 18.5  # 99.99 % for 2 degrees of freedom
    assert torch.equal(draw(logits, noise, 1.0, 1.0), (logits + noise).argmax(1))
    count = torch.bincount(draw(logits, noise, 3.0, 0.51), minlength=4)  # the nucleus of the tempered distribution
    assert count.nonzero()[:, 0].tolist() == [1, 3]

    model, z, noise = tiny(), torch.arange(4), gumbel(4, 5, 4, 5)
    assert torch.equal(model.sample(z, noise, 1.0, 1.0), model.sample(z, noise))
    assert torch.equal(model.sample(z, noise, 1.0, 0.0), model.sample(z, torch.zeros_like(noise)))
    idx = model.sample(z, noise, 1.0, 0.5)
    p, order = model.logits(idx, z)[0].softmax(1).sort(1, descending=True)
    likelier = (p.cumsum(1) - p).gather(1, (order == idx[:, None]).long().argmax(1, keepdim=True))
    assert likelier.max() < 0.5 and not torch.equal(idx, model.sample(z, noise))


def test_draws_follow_the_softmax(tiny):
    """Gumbel noise, added to logits over the temperature: chi-square of 20 000 draws below its 99.99 % quantile."""
    model, n = tiny(grid=(1, 1)), 20_000
    noise = brain_noise(tiny(grid=(100, 200)), 3, 0)[0].flatten(1).T[:, :, None, None]
    for temperature in (1.0, 2.5):
        z = torch.full((n,), 12)
        logits = model.logits(torch.zeros(1, 1, 1, dtype=torch.long), z[:1])[0][0, :, 0, 0]
        expected = n * (logits / temperature).softmax(0)
        count = torch.bincount(model.sample(z, noise, temperature).flatten(), minlength=5)
        assert ((count - expected) ** 2 / expected).sum() < 23.5
        assert (n / 5 - expected).abs().max() > 1000  # a uniform draw would have been noticed


def test_a_brain_is_a_function_of_seed_and_number(tiny, in_double):
    """The same alone, after others, or in one batch with them; its slices share one noise."""
    model = tiny(grid=(3, 4), slices_per_brain=20)
    brains = [sample_brain(model, 7, i, 0.9) for i in range(3)]
    torch.manual_seed(99)
    assert torch.equal(sample_brain(model, 7, 2, 0.9), brains[2]) and len(brains[2]) == 20
    noise = torch.cat([brain_noise(model, 7, i) for i in range(3)])
    assert torch.equal(noise[:20], noise[:1].expand(20, -1, -1, -1))
    together = model.sample(torch.arange(20).repeat(3), noise, 0.9)
    assert torch.equal(together, torch.cat(brains))
    assert not torch.equal(brains[0], brains[1])
    assert not torch.equal(sample_brain(model, 8, 2, 0.9), brains[2])


FSQ, TWO_GRIDS = ("--levels", "4", "3", "5"), ("--model", "vqvae2", "--patch", "2")


@pytest.mark.parametrize("flags", [FSQ, TWO_GRIDS, TWO_GRIDS + FSQ], ids=["fsq", "vqvae2", "vqvae2 of fsq"])
def test_other_codes_are_trained_and_sampled_by_the_same_commands(flags, first_stages, train, run_main):
    """Finite scalar quantisation, VQ-VAE-2, and both: resumed, sampled from the one file, GIF; bits of each grid."""
    first = first_stages(*flags)
    for more in (ONE_STEP, ()):
        out = train("--first-stage", first, *more)
    assert "resumed at step 1" in out
    status, out, errors = run_main(pixelCNN, "--sample", "--top-p", "0.9")
    assert status == 0 and "top-p 0.9" in out, errors
    model, inside = load_second_stage("pixelcnn", PRIORS)
    two = "vqvae2" in flags
    assert model.description["kind"] == model.kind == ("pixelcnn2" if two else "pixelcnn")
    assert model.grids == (inside.grids if two else ((6, 8),))
    line = [line for line in read_log(Path("log/pixelcnn")) if "validate/bits" in line][-1]
    if two:
        parts = line["validate/top_bits"] + line["validate/bottom_bits"]
        assert line["validate/bits"] == pytest.approx(parts, rel=1e-5)
    brain = sample_brain(model, 0, 0, 1.0, 0.9)
    slices = load_slices(Path("pixelcnn_vis/samples"), "train", 64)
    assert np.array_equal(slices.images, decode_brain(inside, brain))
    with Image.open("pixelcnn_vis/samples/process.gif") as gif:
        assert gif.n_frames > 1


def test_training_lowers_the_bits_of_brains_never_seen(train):
    out = train("--steps", 60, "--learning-rate", 0.02, "--dropout", 0)
    bits = [line["validate/bits"] for line in read_log(Path("log/pixelcnn")) if "validate/bits" in line]
    assert bits[-1] < bits[0] and bits[-1] < 0.8 * 48 * 4
    assert f"best on validate: {min(bits):.0f} bits per image; 192 at fixed length" in out


def test_a_stop_is_no_report(train, monkeypatch):
    """Neither patience nor the choice of the best weights depends on how often a run was interrupted."""
    worse = iter(range(100))  # the first report is the best
    monkeypatch.setattr(pixelCNN, "validate", lambda *args: {"bits": float(next(worse))})
    monkeypatch.setattr(training_run, "REPORTS", 3)
    states = {}
    for name, stops in {"straight": 0, "stopped": 4}.items():
        for _ in range(stops):
            train("--name", name, "--steps", 5, *ONE_STEP)
        assert "stopping" not in train("--name", name, "--steps", 5)
        states[name] = (last(name)["step"], last(name)["patience"]["stale"], weights(name)[1]["step"])
    assert states["straight"] == states["stopped"] == (5, 2, 2)


def test_patience_ends_a_run_with_its_best_weights_and_can_be_raised(train, monkeypatch):
    bits = iter([9.0, 8.0, *[8.5] * 100])
    monkeypatch.setattr(pixelCNN, "validate", lambda *args: {"bits": next(bits)})
    monkeypatch.setattr(training_run, "REPORTS", 12)
    out = train("--steps", 12, "--patience", 3)
    assert "not improved for 3 reports" in out and "the same command continues" not in out
    assert last()["step"] == 5 and last()["patience"] == {"best": 8.0, "stale": 3}
    assert weights()[1]["step"] == 2
    out = train("--steps", 12)  # the patience of the run
    assert "best on validate: 8 bits" in out and last()["step"] == 5
    assert "resumed at step 5" in train("--steps", 12, "--patience", 5) and last()["step"] == 7
