"""Laws of pixelCNN.py: a distribution over grids in reading order, exact draws from it, and what a run promises."""

import json
import math
import re
import shutil
import sys
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import pixelCNN
import prestage_train
from dataset import list_slices, load_slices
from logger import read_log
from model_VAE import VAE, VQVAE, load_first_stage
from parts.quantizer import FiniteScalarQuantizer
from pixelCNN import PixelCNN, PixelCNN2, digits_of, draw, gumbel_noise, load_prior, sample_brain
from training import checkpoints

FIRST = ["--preset", "demo", "--steps", "3", "--report-every", "2", "--channels", "8", "--patch", "4"]
FIRST += ["--codebook-size", "16", "--latent-channels", "4", "--batch-size", "4"]
TINY = ["--steps", "3", "--report-every", "2", "--channels", "8", "--layers", "2", "--batch-size", "4"]
ONE_STEP = ["--minutes", "1e-6"]  # a limit that is over when the first step is done


@pytest.fixture
def tiny(awaken):
    """tiny(grid=(3, 7)): a PixelCNN in evaluation mode, no weight of which is zero; with grids, a PixelCNN2.

    Not fewer than 16 channels: of 8, all may be negative, and the ReLU of the head lets no gradient through.
    """

    def build(**changes) -> PixelCNN | PixelCNN2:
        sizes = {"codebook_size": 5, "grid": (4, 5), "channels": 16, "layers": 3, "kernel": 3}
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


@pytest.fixture(scope="module")
def first_stages(phantom_folder, tmp_path_factory):
    """first_stages("--model", "vqvae2"): the weights file of a first stage trained for three steps. Read only."""
    made = {}

    def build(*flags: str) -> Path:
        if flags not in made:
            folder = tmp_path_factory.mktemp("first")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                argv = ["prestage_train.py", "--data", str(phantom_folder), "--name", "codes", *FIRST, *flags]
                patch.setattr(sys, "argv", argv)
                prestage_train.main()
            made[flags] = folder / "model_ckpt/codes/model.safetensors"
        return made[flags]

    return build


@pytest.fixture(scope="module")
def first_stage(first_stages) -> Path:
    """The weights file of a VQ-VAE with 16 codes on a grid of 6x7, trained for three steps. Read only."""
    return first_stages()


@pytest.fixture
def start(run_main, phantom_folder, first_stage):
    """start("--steps", 3): runs the script on the tiny first stage; returns (exit status, stdout, stderr)."""
    return lambda *flags: run_main(pixelCNN, "--data", phantom_folder, "--first-stage", first_stage, *TINY, *flags)


@pytest.fixture
def train(start):
    """train("--steps", 3): as start, but checks that it ends well, and returns what it printed."""

    def run(*flags) -> str:
        status, out, errors = start(*flags)
        assert status == 0, errors
        return out

    return run


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


# --------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("kernel, layers", [(3, 6), (5, 3)])
def test_logits_depend_on_all_earlier_codes_and_on_no_other(tiny, kernel, layers):
    """In reading order, by gradient, at every position: never on itself or a later one, and there is no blind spot."""
    model = tiny(grid=(4, 6), kernel=kernel, layers=layers)
    for r in range(4):
        for c in range(6):
            earlier = torch.arange(24).view(4, 6) < 6 * r + c
            assert torch.equal(dependence(model, r, c), earlier), (r, c)


def test_a_shallow_network_sees_its_neighbours_first(tiny):
    """One layer sees the codes within reach, above to the right too; each further layer adds as much."""
    assert dependence(tiny(grid=(5, 7), layers=1), 3, 3).nonzero().tolist() == [
        [1, 2], [1, 3], [1, 4], [2, 2], [2, 3], [2, 4], [3, 1], [3, 2]
    ]  # fmt: skip
    assert dependence(tiny(grid=(5, 7), layers=2), 3, 3)[2].tolist() == [False, True, True, True, True, True, False]


def test_later_codes_leave_earlier_logits_as_they_are(tiny):
    """The same law by trial: whatever is written from (2, 3) on, the logits up to and at (2, 3) do not move."""
    model, z = tiny(), torch.arange(3)
    idx = torch.randint(5, (3, 4, 5))
    other = idx.flatten(1).clone()
    other[:, 13:] = (other[:, 13:] + 1) % 5
    a, b = (model.logits(grid, z)[0].flatten(2) for grid in (idx, other.view_as(idx)))
    assert torch.allclose(a[..., :14], b[..., :14], atol=1e-6)
    assert (a[..., 14:] - b[..., 14:]).abs().amax((0, 1)).min() > 1e-4


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


def test_digits_are_those_of_the_quantiser():
    """The same reading of a code as FiniteScalarQuantizer's, up to 2^61 codes."""
    levels = (8, 5, 3, *[16] * 13)
    quantizer = FiniteScalarQuantizer(levels)
    idx = torch.randint(quantizer.codebook_size, (2, 3, 4))
    assert torch.equal(torch.stack(digits_of(idx, levels), dim=-1), quantizer.digits(idx))
    with pytest.raises(ValueError, match="levels"):
        PixelCNN(codebook_size=7, levels=(2, 3), grid=(2, 2), channels=8, layers=1)


def test_no_parameter_is_idle(tiny):
    """Each has a gradient, except those of the last layer's vertical output, which nobody reads."""
    idx, z = torch.randint(6, (2, 4, 6)), torch.arange(2)
    sizes = {"codebook_size": 6, "levels": (2, 3)}
    for model, codes in ((tiny(codebook_size=6, grid=(4, 6)), idx), (tiny(grid=(4, 6), **sizes), idx),
                         (tiny(grids=((2, 3), (4, 6)), **sizes), (idx[:, :2, :3], idx))):  # fmt: skip
        model.bits(codes, z).sum().backward()
        idle = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
        assert {name.removeprefix("top.").removeprefix("bottom.") for name in idle} <= {"layers.2.out_v"}


def test_a_plain_network_has_the_parameters_it_always_had(tiny):
    """Weights of earlier runs can still be read."""
    names = {name.split(".")[0] for name in tiny().state_dict()}
    assert names == {"embed_idx", "position", "embed_z", "layers", "head"}
    assert tiny().embed_idx.weight.shape == (5, 16)


def test_bits_are_the_sum_of_the_codes_surprisals(tiny):
    """-log2 p of each code given those before it, by hand."""
    model, z, idx = tiny(), torch.tensor([0, 31]), torch.randint(5, (2, 4, 5))
    p = model.logits(idx, z)[0].detach().double().softmax(1)
    by_hand = [-sum(math.log2(p[b, idx[b, r, c], r, c]) for r in range(4) for c in range(5)) for b in range(2)]
    bits = model.bits(idx, z)
    assert bits.dtype == torch.float32 and bits.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_a_uniform_head_costs_the_fixed_length(tiny):
    """h w log2 K bits."""
    model = tiny(codebook_size=7)
    torch.nn.init.zeros_(model.head[-1].weight)
    torch.nn.init.zeros_(model.head[-1].bias)
    bits = model.bits(torch.randint(7, (3, 4, 5)), torch.arange(3))
    assert bits.tolist() == pytest.approx([20 * math.log2(7)] * 3, rel=1e-5)


def test_the_probabilities_of_all_grids_sum_to_one(tiny):
    """All 16 grids of 2x2 with two codes, at three z."""
    model = tiny(codebook_size=2, grid=(2, 2))
    grids = torch.tensor(list(product((0, 1), repeat=4))).view(16, 2, 2)
    for z in (0, 15, 31):
        p = 2 ** -model.bits(grids, torch.full((16,), z)).double()
        assert p.sum().item() == pytest.approx(1, abs=1e-5)
        assert p.max() > 1.5 * p.min()  # and it is not the uniform one


def all_codes(model: PixelCNN | PixelCNN2) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Every grid of codes, or every pair of top and bottom grid, that the model knows: [N, h, w]."""
    sizes = [math.prod(grid) for grid in model.grids]
    K = model.codebook_size if isinstance(model, PixelCNN) else model.top.codebook_size
    every = torch.tensor(list(product(range(K), repeat=sum(sizes))))
    grids = [part.view(-1, *grid) for part, grid in zip(every.split(sizes, dim=1), model.grids)]
    return grids[0] if isinstance(model, PixelCNN) else tuple(grids)


SMALL = {
    "digits": {"codebook_size": 6, "levels": (2, 3), "grid": (1, 3)},
    "two grids": {"codebook_size": 2, "grids": ((1, 1), (2, 2))},
    "two grids of digits": {"codebook_size": 4, "levels": (2, 2), "grids": ((1, 1), (2, 2))},
}


@pytest.mark.parametrize("sizes", SMALL.values(), ids=SMALL)
def test_digits_and_two_grids_are_distributions_and_drawn_as_such(tiny, sizes):
    """All probabilities sum to one, and the frequencies of 10 000 draws are 2^-bits, in up to 16 bins."""
    model, n = tiny(**sizes), 10_000
    codes = all_codes(model)
    grids = pixelCNN.grids_of(codes)
    p = 2 ** -model.bits(codes, torch.full((len(grids[0]),), 5)).detach().double()
    assert p.sum().item() == pytest.approx(1, abs=1e-5) and p.max() > 1.5 * p.min()

    noise = pixelCNN.each_grid(lambda one: gumbel(n, *one.shape), model.gumbel_noise())
    drawn = pixelCNN.grids_of(model.sample(torch.full((n,), 5), noise))
    digits = torch.cat([grid.flatten(1) for grid in drawn], dim=1)
    place = sizes["codebook_size"] ** torch.arange(digits.shape[1]).flip(0)
    count = torch.bincount((digits * place).sum(1), minlength=len(p)).double()
    bins = ((p.cumsum(0) - p / 2) * 16).long().clamp(max=15)
    expected = n * torch.zeros(16, dtype=torch.float64).index_add_(0, bins, p)
    count = torch.zeros(16, dtype=torch.float64).index_add_(0, bins, count)
    filled = expected > 0
    assert (
        filled.sum() > 8 and ((count - expected) ** 2 / expected)[filled].sum() < 44.3
    )  # 99.99 % for 15 degrees of freedom


def test_z_changes_the_distribution(tiny):
    """At every position, the first included; and only its own grid's."""
    model, idx = tiny(), torch.randint(5, (1, 4, 5)).expand(2, -1, -1)
    a, b = (model.logits(idx, torch.tensor([3, other]))[0] for other in (20, 21))
    assert torch.allclose(a[0], b[0], atol=1e-6)
    assert (a[1] - b[1]).abs().amax(0).min() > 1e-4 and (a[1] - a[0]).abs().amax(0).min() > 1e-3


def test_the_position_changes_the_distribution(tiny):
    """The head of a brain is not its middle: with equal codes all around, the logits still differ."""
    model = tiny(grid=(9, 9), layers=1)
    logits = model.logits(torch.zeros(1, 9, 9, dtype=torch.long), torch.zeros(1))[0]
    assert (logits[0, :, 4, 4] - logits[0, :, 5, 5]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("kernel, layers, grid", [(3, 3, (4, 5)), (5, 2, (6, 7)), (5, 1, (3, 2)), (3, 2, (1, 6))])
def test_the_cached_sample_is_the_naive_one(tiny, kernel, layers, grid):
    """Token for token, at any temperature, for several draws."""
    for seed, temperature in enumerate((1.0, 0.5, 1.7)):
        torch.manual_seed(seed)
        model = tiny(codebook_size=11, grid=grid, kernel=kernel, layers=layers)
        z, noise = torch.tensor([2, 17, 31]), gumbel(3, 11, *grid)
        idx = model.sample(z, noise, temperature)
        assert idx.dtype == torch.int64 and torch.equal(idx, model.sample_naive(z, noise, temperature))
        assert len(idx.unique()) > 3 and not torch.equal(idx, model.sample(z, noise, 30.0))


@pytest.mark.parametrize("top_p", [1.0, 0.6])
@pytest.mark.parametrize("levels", [None, (3, 4, 2)])
def test_the_cached_sample_of_digits_and_of_two_grids_is_the_naive_one(tiny, levels, top_p):
    """Token for token too; the bottom codes follow the top ones."""
    model = tiny(grids=((2, 3), (4, 6)), codebook_size=24, levels=levels)
    z = torch.tensor([2, 17])
    noise = tuple(torch.stack(noise) for noise in zip(model.gumbel_noise(), model.gumbel_noise()))
    top, bottom = model.sample(z, noise, 0.8, top_p)
    assert torch.equal(top, model.top.sample_naive(z, noise[0], 0.8, top_p))
    assert torch.equal(bottom, model.bottom.sample_naive(z, noise[1], 0.8, top_p, top))
    assert top.shape == (2, 2, 3) and 0 <= bottom.min() and bottom.max() < 24 and len(bottom.unique()) > 3
    assert not torch.equal(bottom, model.bottom.sample(z, noise[1], 0.8, top_p, (top + 1) % 24))


def test_a_huge_codebook_is_no_trouble(tiny):
    """2^60 codes in 15 digits: bits near the fixed length, and codes within range."""
    model = tiny(codebook_size=2**60, levels=(16,) * 15, grid=(2, 3))
    z, noise = torch.arange(4), torch.stack([model.gumbel_noise() for _ in range(4)])
    idx = model.sample(z, noise)
    assert 0 <= idx.min() and 2**50 < idx.max() < 2**60 and torch.equal(idx, model.sample_naive(z, noise))
    bits = model.bits(torch.randint(2**60, (4, 2, 3)), z)
    assert bits.isfinite().all() and 300 < bits.mean() < 600


def test_top_p_draws_from_the_nucleus_in_proportion(tiny):
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
    noise = gumbel_noise(tiny(grid=(100, 200)), 3, 0)[0].flatten(1).T[:, :, None, None]
    for temperature in (1.0, 2.5):
        z = torch.full((n,), 12)
        logits = model.logits(torch.zeros(1, 1, 1, dtype=torch.long), z[:1])[0][0, :, 0, 0]
        expected = n * (logits / temperature).softmax(0)
        count = torch.bincount(model.sample(z, noise, temperature).flatten(), minlength=5)
        assert ((count - expected) ** 2 / expected).sum() < 23.5
        assert (n / 5 - expected).abs().max() > 1000  # a uniform draw would have been noticed


def test_samples_have_the_likelihood_that_the_model_gives_them(tiny):
    """Frequencies of whole grids, drawn code after code, are 2^-bits."""
    model, n = tiny(codebook_size=2, grid=(2, 2)), 20_000
    z = torch.full((n,), 5)
    number = (model.sample(z, gumbel(n, 2, 2, 2)).flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1)
    count = torch.bincount(number, minlength=16)
    grids = torch.tensor(list(product((0, 1), repeat=4))).view(16, 2, 2)
    expected = n * 2 ** -model.bits(grids, z[:16])
    assert ((count - expected) ** 2 / expected).sum() < 44.3  # 99.99 % for 15 degrees of freedom


def test_a_temperature_near_zero_takes_the_likeliest_code(tiny):
    """Whatever the noise."""
    model, z = tiny(), torch.arange(4)
    greedy = model.sample(z, torch.zeros(4, 5, 4, 5))
    assert torch.equal(model.sample(z, gumbel(4, 5, 4, 5), 1e-6), greedy)
    assert torch.equal(model.logits(greedy, z)[0].argmax(1), greedy)
    assert not torch.equal(model.sample(z, gumbel(4, 5, 4, 5)), greedy)


def test_a_brain_is_a_function_of_seed_and_number(tiny):
    """The same alone, after others, or in one batch with them; its 32 slices share one noise."""
    model, device = tiny(grid=(3, 4)), torch.device("cpu")
    brains = [sample_brain(model, 7, i, 0.9, device) for i in range(3)]
    torch.manual_seed(99)
    assert torch.equal(sample_brain(model, 7, 2, 0.9, device), brains[2])
    noise = torch.cat([gumbel_noise(model, 7, i) for i in range(3)])
    assert torch.equal(noise[:32], noise[:1].expand(32, -1, -1, -1))
    together = model.sample(torch.arange(32).repeat(3), noise, 0.9)
    assert torch.equal(together, torch.cat(brains))
    assert not torch.equal(brains[0], brains[1])
    assert not torch.equal(sample_brain(model, 8, 2, 0.9, device), brains[2])


# ------------------------------------------------------------------------------------------------------ what a run does


def test_train_and_sample_leave_what_the_layout_promises(train, first_stage):
    """Weights, log, pictures; a 4x8 sheet and 32 slices per brain that dataset.py reads, and the GIF."""
    out = train("--sample", "--brains", 2, "--temperature", 0.8)
    assert "training it first" in out and re.search(r"step 3 .*validate/bits \d+", out)
    model, inside, description = load_prior("pixelcnn")
    assert model.grid == (6, 7) and model.codebook_size == 16 and description["data"]["slices"] == 96
    expected = load_first_stage(first_stage)
    assert all(torch.equal(a, b) for a, b in zip(inside.state_dict().values(), expected.state_dict().values()))
    run = json.loads(Path("log/pixelcnn/run.json").read_text())
    assert run["script"] == "pixelCNN.py" and run["parameters"] == sum(p.numel() for p in model.parameters())
    log = read_log(Path("log/pixelcnn"))
    assert [line["step"] for line in log if "validate/bits" in line] == [2, 3]
    assert [line["step"] for line in log if "train/bits" in line] == [1, 2, 3]
    assert {path.name for path in Path("pixelcnn_vis").glob("*.png")} == {"sample_000002.png", "sample_000003.png"}

    samples = Path("pixelcnn_vis/samples")
    assert [slice_[:2] for slice_ in list_slices(samples, "test")] == [(i, z) for i in range(2) for z in range(32)]
    slices = load_slices(samples, "test", 64)
    for i in range(2):
        pixels = pixelCNN.decode_codes(inside, sample_brain(model, 0, i, 0.8, torch.device("cpu")))
        assert np.array_equal(slices.images[32 * i : 32 * i + 32], pixels)
        voxels = np.asanyarray(nibabel.load(samples / f"brain_{i:03d}.nii.gz").dataobj)
        assert np.array_equal(voxels.transpose(2, 0, 1), pixels)
        sheet = np.asarray(Image.open(samples / f"brain_{i:03d}.png").convert("L"))
        assert sheet.shape[0] > 4 * 128 and sheet.shape[1] > 8 * 128
    with Image.open(samples / "process.gif") as gif:
        assert gif.n_frames > 5 and gif.width == 4 * gif.height == 4 * 64
    assert (samples / "process.gif").stat().st_size < 3_000_000


FSQ, TWO_GRIDS = ("--quantizer", "fsq", "--levels", "4", "3", "5"), ("--model", "vqvae2", "--patch", "2")


@pytest.mark.parametrize("flags", [FSQ, TWO_GRIDS, TWO_GRIDS + FSQ], ids=["fsq", "vqvae2", "vqvae2 of fsq"])
def test_other_codes_are_trained_and_sampled_by_the_same_commands(flags, first_stages, start, run_main):
    """Finite scalar quantisation, VQ-VAE-2, and both: resumed, sampled from the one file, GIF; bits of each grid."""
    first = first_stages(*flags)
    for more in (ONE_STEP, ()):
        status, out, errors = start("--first-stage", first, *more)
        assert status == 0, errors
    status, out, errors = run_main(pixelCNN, "--sample", "--top-p", "0.9")
    assert status == 0 and "top-p 0.9" in out, errors
    model, inside, description = load_prior("pixelcnn")
    two = "vqvae2" in flags
    assert description["kind"] == model.kind == ("pixelcnn2" if two else "pixelcnn")
    assert model.grids == (inside.grids if two else ((6, 7),))
    line = [line for line in read_log(Path("log/pixelcnn")) if "validate/bits" in line][-1]
    if two:
        parts = line["validate/top_bits"] + line["validate/bottom_bits"]
        assert line["validate/bits"] == pytest.approx(parts, rel=1e-5)
    brain = sample_brain(model, 0, 0, 1.0, torch.device("cpu"), 0.9)
    slices = load_slices(Path("pixelcnn_vis/samples"), "test", 64)
    assert np.array_equal(slices.images, pixelCNN.decode_codes(inside, brain))
    frames = pixelCNN.filling_frames(inside, brain, [4, 12, 20, 28])
    assert len(frames) == 1 + sum(grid[0] for grid in model.grids)
    assert np.array_equal(frames[-1], np.hstack(pixelCNN.decode_codes(inside, brain)[[4, 12, 20, 28]]))
    with Image.open("pixelcnn_vis/samples/process.gif") as gif:
        assert gif.n_frames > 1


def test_the_gif_fills_the_grid_row_by_row(tiny, tiny_sizes):
    """It begins with the corner's code everywhere and ends with the brain."""
    vqvae, idx = VQVAE(codebook_size=5, **tiny_sizes).eval(), torch.randint(5, (32, 12, 14))
    with torch.no_grad():
        vqvae.linear.analysis.weight.normal_()
        frames = pixelCNN.filling_frames(vqvae, idx, [4, 12, 20, 28])
    assert len(frames) == 13 and frames[0].shape == (64, 4 * 64)
    assert np.array_equal(frames[-1], np.hstack(pixelCNN.decode_codes(vqvae, idx)[[4, 12, 20, 28]]))
    assert not any(np.array_equal(a, frames[-1]) for a in frames[:-1])


def test_training_lowers_the_bits_of_brains_never_seen(train):
    """The averaged weights beat the fixed length, which is where a network that knows nothing starts."""
    train("--steps", 60, "--report-every", 30, "--learning-rate", 0.02, "--dropout", 0)
    bits = [line["validate/bits"] for line in read_log(Path("log/pixelcnn")) if "validate/bits" in line]
    assert bits[-1] < bits[0] and bits[-1] < 0.8 * 42 * 4


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(train):
    """Stopped after every single step: the same weights for use, and the same state."""
    assert "stopped" not in train("--name", "straight")
    for step in range(1, 4):
        out = train("--name", "stopped", *ONE_STEP)
        assert (f"stopped after {step} of 3 steps" in out) == (step < 3)
        assert weights("stopped")[1]["kind"] == "pixelcnn"  # from the first stop on, there is something to sample from
    assert "is finished after 3 steps" in train("--name", "stopped")
    one, other = last("straight"), last("stopped")
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    one, other = weights("straight")[0], weights("stopped")[0]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_stop_is_no_report(train, monkeypatch):
    """Neither patience nor the choice of the best weights depends on how often a run was interrupted."""
    worse = iter(range(100))  # the first report is the best
    monkeypatch.setattr(pixelCNN, "validate", lambda *args: {"bits": float(next(worse))})
    states = {}
    for name, stops in {"straight": 0, "stopped": 4}.items():
        for _ in range(stops):
            train("--name", name, "--steps", 5, "--report-every", 2, "--patience", 3, *ONE_STEP)
        out = train("--name", name, "--steps", 5, "--report-every", 2, "--patience", 3)
        assert "finished" not in out
        states[name] = (last(name)["step"], last(name)["stale"], weights(name)[1]["step"])
    assert states["straight"] == (5, 2, 2)
    assert states["stopped"] == states["straight"]


def test_patience_ends_a_run_with_its_best_weights_and_can_be_raised(train, monkeypatch):
    """As the line that ends it says: raise --steps or --patience to go on."""
    bits = iter([9.0, 8.0, *[8.5] * 100])
    monkeypatch.setattr(pixelCNN, "validate", lambda *args: {"bits": next(bits)})
    flags = ["--steps", 12, "--report-every", 1]
    out = train(*flags, "--patience", 3)
    assert "not improved for 3 reports" in out and "the same command continues" not in out
    assert last()["step"] == 5 and last()["best"] == 8.0
    assert weights()[1]["step"] == 2
    out = train(*flags, "--patience", 3)
    assert "finished after 5 steps; raise --steps or --patience" in out
    assert "resumed at step 5" in train(*flags, "--patience", 5) and last()["step"] == 7


def test_what_does_not_fit_is_one_line(train, start, run_main, phantom_folder, first_stage, tiny_sizes):
    """No first stage, one without codes, another one on resume, and weights of another kind; nothing is written."""

    def refused(*words, module=pixelCNN, flags=()):
        status, _, errors = run_main(module, "--data", phantom_folder, *flags)
        assert status == 2 and len(errors.splitlines()) == 1 and all(word in errors for word in words), errors

    refused("there are no weights at vqvae", "python prestage_train.py")
    vae = VAE(**tiny_sizes)
    description = {"kind": "vae", "preset": "demo", "model_kwargs": tiny_sizes, "data": {}, "step": 1}
    checkpoints.save_weights(Path("model_ckpt/vae/model.safetensors"), vae.state_dict(), description)
    refused("vae", "no codes", "--model vqvae", flags=["--first-stage", "vae"])
    refused("vae", "pixelcnn", flags=["--sample", "--name", "vae"])
    assert not Path("log").exists()

    train(*ONE_STEP)
    before = {path: path.read_bytes() for path in Path("model_ckpt/pixelcnn").iterdir()}
    refused("pixelcnn", "no first stage", flags=["--first-stage", "pixelcnn", "--name", "other"])
    shutil.copy(first_stage, "codes.safetensors")
    refused("--first-stage codes.safetensors", "contradicts", flags=["--first-stage", "codes.safetensors"])
    refused("--layers 3", "contradicts", flags=["--first-stage", first_stage, "--layers", 3])
    tensors, description = checkpoints.load_weights(first_stage)
    keep = first_stage.read_bytes()
    try:  # the same path, but trained further
        checkpoints.save_weights(first_stage, {name: 1.01 * tensor for name, tensor in tensors.items()}, description)
        status, _, errors = start()
        assert status == 2 and len(errors.splitlines()) == 1 and "another first stage" in errors
    finally:
        first_stage.write_bytes(keep)
    assert {path: path.read_bytes() for path in Path("model_ckpt/pixelcnn").iterdir()} == before and len(before) == 2
    assert "resumed at step 1" in train()


def test_one_file_is_enough_to_sample(train, run_main, monkeypatch, first_stage, tmp_path):
    """The weights carry their first stage: elsewhere, without it and without the data, they draw the same brain."""
    train("--sample", "--out", tmp_path / "here")
    (tmp_path / "elsewhere/model_ckpt/mine").mkdir(parents=True)
    shutil.copy("model_ckpt/pixelcnn/model.safetensors", tmp_path / "elsewhere/model_ckpt/mine")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(pixelCNN, "load_first_stage", None)
    assert run_main(pixelCNN, "--sample", "--name", "mine")[0] == 0
    for file in (tmp_path / "here").iterdir():
        assert file.read_bytes() == (Path("mine_vis/samples") / file.name).read_bytes()


def test_without_a_run_of_ones_own_the_released_weights_are_sampled(train, run_main, monkeypatch, tmp_path):
    """The same brain as from the run they are; --name FILE draws it too. A setting of training asks for training."""
    train("--sample", "--out", tmp_path / "here")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy("model_ckpt/pixelcnn/model.safetensors", tmp_path / "elsewhere/pixelcnn.safetensors")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(checkpoints, "RELEASED", tmp_path / "elsewhere")
    status, printed, _ = run_main(pixelCNN, "--sample")
    assert status == 0 and "released weights" in printed
    assert run_main(pixelCNN, "--sample", "--name", "pixelcnn.safetensors", "--out", "named")[0] == 0
    for file in (tmp_path / "here").iterdir():
        assert file.read_bytes() == (Path("pixelcnn_vis/samples") / file.name).read_bytes()
        assert file.read_bytes() == (Path("named") / file.name).read_bytes()
    status, printed, errors = run_main(pixelCNN, "--sample", "--channels", 16)
    assert status == 2 and "training it first" in printed and "no weights at vqvae" in errors


def test_two_processes_train_one_run(run_script, phantom_folder, first_stage, tmp_path):
    """torchrun with gloo: one log, one checkpoint, one process speaks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    flags = ("--data", phantom_folder, "--first-stage", first_stage, *TINY)
    done = run_script("pixelCNN.py", *flags, launcher=launcher, threads=1, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run pixelcnn:") == 1
    assert checkpoints.load_checkpoint(tmp_path / "model_ckpt/pixelcnn/last.pt", "pixelCNN.py")["step"] == 3
