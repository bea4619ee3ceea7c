"""Laws of quantizer.py: both quantisers against brute force, gradients against matrices, codes against their bins."""

import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from parts import quantizer as quantizer_module
from parts.quantizer import FiniteScalarQuantizer, VectorQuantizer, rotate_onto


def to_latent(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [N, dim] as a latent [1, dim, 1, N]."""
    return vectors.T[None, :, None]


def to_vectors(latent: torch.Tensor) -> torch.Tensor:
    """A latent [B, dim, h, w] as vectors [N, dim]."""
    return latent.movedim(1, -1).flatten(0, 2)


# ------------------------------------------------------------------------------------------------------- learned codes


@pytest.mark.parametrize("ema", [True, False])
def test_codes_are_the_nearest_by_brute_force(ema):
    quantizer = VectorQuantizer(37, 5, ema=ema).eval()
    latent = torch.randn(2, 5, 6, 7)
    quantised, idx, _ = quantizer(latent)
    for b, i, j in ((0, 0, 0), (1, 5, 6), (1, 2, 3), (0, 4, 1)):
        distance = [(latent[b, :, i, j] - code).norm().item() for code in quantizer.codebook]
        assert idx[b, i, j] == min(range(37), key=distance.__getitem__)
    exact = torch.cdist(latent.movedim(1, -1).reshape(-1, 5), quantizer.codebook).argmin(1)
    assert torch.equal(idx.flatten(), exact)
    assert torch.allclose(quantised, quantizer.lookup(idx), atol=1e-6)


def test_the_gradient_passes_straight_through():
    quantizer, latent = VectorQuantizer(8, 3).eval(), torch.randn(2, 3, 4, 4, requires_grad=True)
    quantised, _, _ = quantizer(latent)
    weight = torch.randn_like(quantised)
    (quantised * weight).sum().backward()
    assert torch.equal(latent.grad, weight)


@pytest.mark.parametrize("commitment", [0.25, 2.0])
def test_the_commitment_weight_is_on_the_commitment_term(commitment):
    """beta pulls the encoder; the codebook's own pull is 1 whatever beta (a popular code base has it the other way)."""
    latent = torch.randn(1, 3, 1, 5, requires_grad=True)
    quantizer = VectorQuantizer(4, 3, commitment, ema=False).eval()
    _, idx, loss = quantizer(latent)
    codes = quantizer.codebook.detach()[idx[0, 0]]
    vectors = latent.detach()[0, :, 0].T
    loss.backward()
    assert torch.allclose(latent.grad[0, :, 0].T, commitment * 2 * (vectors - codes) / 15, atol=1e-6)
    pull = torch.zeros(4, 3).index_add_(0, idx[0, 0], 2 * (codes - vectors) / 15)
    assert torch.allclose(quantizer.codebook.grad, pull, atol=1e-6)
    quantizer_ema = VectorQuantizer(4, 3, commitment, ema=True).eval()
    quantizer_ema.codebook.copy_(quantizer.codebook)
    assert torch.allclose(quantizer_ema(latent)[2], commitment * (vectors - codes).square().mean())


def test_quantisation_is_float32_under_autocast():
    """bf16 has 8 bits: it chooses other codes."""
    quantizer, latent = VectorQuantizer(256, 8).eval(), torch.randn(4, 8, 16, 16)
    for given in (latent, latent.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            quantised, idx, loss = quantizer(given)
            alone = quantizer.nearest(given.movedim(1, -1).reshape(-1, 8)).view_as(idx)
        assert quantised.dtype == loss.dtype == torch.float32 and torch.equal(idx, quantizer(given.float())[1])
        assert torch.equal(alone, idx)


def test_the_ema_codebook_converges_to_the_cluster_means():
    centres = torch.tensor([[5.0, 0.0], [-5.0, 1.0], [0.0, 7.0]])
    vectors = centres.repeat(50, 1) + 0.5 * torch.randn(150, 2)
    quantizer = VectorQuantizer(3, 2, decay=0.9).train()
    quantizer.codebook.copy_(centres + 1)
    quantizer.total.copy_(quantizer.codebook)
    for _ in range(200):
        quantizer(to_latent(vectors))
    assert torch.allclose(quantizer.codebook, vectors.view(50, 3, 2).mean(0), atol=1e-4)
    assert torch.allclose(quantizer.count, torch.ones(3), atol=1e-4)  # each is chosen as often as is fair


def test_counts_and_revivals_do_not_depend_on_the_batch_size():
    """1 is a code's fair share of all choices, so a codebook may be larger than the batch."""
    few, many = (VectorQuantizer(5, 2, decay=0.5, revive_below=0.3).train() for _ in range(2))
    many.load_state_dict(few.state_dict())
    vectors = few.codebook[[0, 0, 0, 1, 1, 2]] + 1e-3
    few(to_latent(vectors))
    many(to_latent(vectors.repeat(10, 1)))
    expected = 0.5 + 0.5 * torch.tensor([3.0, 2, 1, 0, 0]) * 5 / 6
    assert torch.allclose(few.count, expected) and torch.allclose(many.count, expected)
    assert torch.allclose(few.codebook, many.codebook, atol=1e-6)
    few(to_latent(vectors))  # 0.5 halves to 0.25, below 0.3: the two that nothing chose are revived
    assert torch.allclose(few.count[3:], torch.tensor(0.6)) and (few.count[:3] > 0.6).all()


def test_evaluation_does_not_move_the_codebook():
    quantizer, latent = VectorQuantizer(8, 3).eval(), torch.randn(1, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(latent)
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    quantizer.train()(latent)
    assert not all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())


@pytest.mark.parametrize("ema", [True, False])
def test_a_revived_code_survives_the_next_update(ema):
    """Its averages start anew with it; left as they were they would draw it back at once."""
    quantizer = VectorQuantizer(4, 2, ema=ema, decay=0.9, revive_below=0.5).train()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0], [-50.0, 50.0]]))
    quantizer.total.copy_(quantizer.codebook)
    vectors = torch.rand(40, 2)
    for _ in range(20):
        quantizer(to_latent(vectors))
        if quantizer.codebook.abs().max() < 2:
            break
    revived = quantizer.codebook[2:].detach().clone()
    assert revived.abs().max() <= 1  # both are among the data now
    quantizer(to_latent(quantizer.codebook[:1].detach().expand(40, 2)))  # all choose another code
    assert torch.allclose(quantizer.codebook[2:], revived, atol=1e-5)


def test_the_k_means_start_finds_k_points_however_unequal():
    """Half of all vectors are the black background; drawn blindly it would take half of the codes."""
    points = torch.randn(16, 4)
    vectors = torch.cat([points, points[:1].expand(500, 4), points[1:3].repeat(50, 1)])
    quantizer = VectorQuantizer(16, 4)
    quantizer.start(vectors[torch.randperm(len(vectors))])
    assert torch.cdist(points, quantizer.codebook).amin(1).max() < 1e-5
    assert len(quantizer.nearest(vectors).unique()) == 16


def test_the_k_means_start_uses_every_code_and_lowers_the_error():
    clusters = 3 * torch.randn(32, 4)
    vectors = torch.cat([clusters.repeat(20, 1) + 0.1 * torch.randn(640, 4), torch.zeros(640, 4)])
    quantizer = VectorQuantizer(32, 4)

    def error():
        return torch.cdist(vectors, quantizer.codebook).amin(1).square().mean()

    quantizer.start(vectors, iterations=0)
    drawn = error()
    torch.manual_seed(0)
    quantizer.start(vectors)
    assert len(quantizer.nearest(vectors).unique()) == 32 and error() < 0.9 * drawn
    with pytest.raises(ValueError, match="31 vectors"):
        quantizer.start(vectors[:31])


def test_processes_keep_one_codebook(tmp_path):
    """Under torchrun each process has vectors of its own; revived codes too must be the same everywhere."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = f"""
import sys; sys.path.insert(0, {str(Path(quantizer_module.__file__).parents[1])!r})
import torch, torch.distributed as dist
from parts.quantizer import VectorQuantizer
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://localhost:{port}", rank=rank, world_size=2)
for ema in (True, False):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 3, ema=ema, decay=0.5, revive_below=0.2).train()
    with torch.no_grad():
        quantizer.codebook[:8] += 100
    torch.manual_seed(rank)
    for _ in range(4):
        quantizer(torch.randn(1, 3, 4, 4))
    print(quantizer.codebook.abs().max().item() < 50, quantizer.codebook.sum().item(), quantizer.count.sum().item())
"""
    begin = [sys.executable, "-c", script]
    both = [subprocess.Popen([*begin, str(rank)], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert [line.split()[0] for line in said[0]] == ["True", "True"]  # codes were revived
    assert said[0] == said[1]


# ---------------------------------------------------------------------------------------------------------- the sphere


def unit(codes: torch.Tensor) -> bool:
    """Whether all have length one."""
    return torch.allclose(codes.detach().norm(dim=1), torch.ones(len(codes)), atol=1e-5)


@pytest.mark.parametrize("ema", [True, False])
def test_on_the_sphere_the_nearest_code_has_the_largest_cosine(ema):
    """By brute force; the length of a vector changes nothing."""
    quantizer = VectorQuantizer(23, 5, ema=ema, sphere=True).eval()
    with torch.no_grad():
        quantizer.codebook.mul_(1 if ema else 0.3)  # a gradient step may leave the sphere, lookups must not
    latent = 7 * torch.randn(2, 5, 4, 3)
    quantised, idx, loss = quantizer(latent)
    vectors, codes = to_vectors(latent), F.normalize(quantizer.codebook.detach(), dim=1)
    cosine = F.cosine_similarity(vectors[:, None], codes[None], dim=2)
    assert torch.equal(idx.flatten(), cosine.argmax(1)) and len(idx.unique()) > 5
    assert torch.equal(quantizer(latent * (0.1 + torch.rand(2, 1, 4, 3)))[1], idx)
    assert unit(to_vectors(quantised)) and unit(to_vectors(quantizer.lookup(idx)))
    squared = (2 - 2 * cosine.amax(1)).mean() / 5  # of unit vectors
    assert torch.isclose(loss, squared * (0.25 if ema else 1.25), rtol=1e-4)


def test_on_the_sphere_codes_keep_unit_length():
    """As they are built, after k-means, after updates, and after a revival, which survives the next update."""
    quantizer = VectorQuantizer(8, 3, sphere=True, decay=0.9, revive_below=0.3).train()
    assert unit(quantizer.codebook)
    vectors = 5 * torch.randn(200, 3)
    quantizer.start(vectors)
    assert unit(quantizer.codebook) and len(quantizer.nearest(F.normalize(vectors, dim=1)).unique()) == 8
    cone = torch.tensor([9.0, 0.0, 0.0]) + torch.randn(200, 3)  # most codes point elsewhere, and starve
    started = quantizer.codebook.clone()
    for step in range(40):
        before, counts = quantizer.codebook.clone(), quantizer.count.clone()
        quantizer(to_latent(cone))
        assert unit(quantizer.codebook) and not torch.equal(quantizer.codebook, before)
        if (quantizer.count > counts).sum() > 4 and step > 20:
            break
    assert (quantizer.codebook[:, 0] > 0.5).all() and not (started[:, 0] > 0.5).all()  # all revived on the cone
    revived = quantizer.codebook.clone()
    quantizer(to_latent(revived[:1].expand(200, 3)))
    assert unit(quantizer.codebook) and torch.allclose(quantizer.codebook[1:], revived[1:], atol=1e-5)


# --------------------------------------------------------------------------------------------------- the rotation trick


def rotation(e: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The matrix that turns e's direction into q's in the plane of both and leaves the rest alone."""
    a, b = F.normalize(e, dim=0), F.normalize(q, dim=0)
    across = F.normalize(b - (a @ b) * a, dim=0)
    angle = torch.atan2((b - (a @ b) * a).norm(), a @ b)
    return torch.linalg.matrix_exp(angle * (across[:, None] * a - a[:, None] * across))


def test_the_rotation_trick_is_a_rotation_and_a_scaling():
    """Value q; the gradient is that of |q| / |e| R e with R constant, R by the matrix exponential."""
    e, q = torch.randn(20, 4, requires_grad=True), torch.randn(20, 4)
    e.data[:, 0].add_(2)  # no |q| / |e| reaches the limit
    turned, weight = rotate_onto(e, q), torch.randn(20, 4)
    assert torch.allclose(turned, q, rtol=1e-6, atol=1e-6)
    (turned * weight).sum().backward()
    for vector, code, upstream, gradient in zip(e.detach().double(), q.double(), weight.double(), e.grad.double()):
        matrix, scale = rotation(vector, code), code.norm() / vector.norm()
        assert scale < 4 and torch.allclose(scale * matrix @ vector, code, atol=1e-9)
        assert torch.allclose(gradient, scale * matrix.T @ upstream, atol=1e-4)
        assert (gradient - upstream).norm() > 1e-3  # not straight through


def test_the_rotation_trick_stays_finite_and_limited():
    """Opposite and equal directions have a gradient; a tiny vector does not blow it up beyond fourfold."""
    e = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.01, 0.0]], requires_grad=True)
    q = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    turned, weight = rotate_onto(e, q), torch.randn(3, 2)
    assert torch.allclose(turned, q, atol=1e-5)
    (turned * weight).sum().backward()
    assert torch.allclose(e.grad.norm(dim=1), weight.norm(dim=1) * torch.tensor([1.0, 1.0, 4.0]), rtol=1e-4)
    assert torch.allclose(e.grad[1], weight[1], atol=1e-5)


def test_without_a_direction_the_gradient_passes_straight_through():
    e = torch.stack([torch.zeros(3), torch.randn(3), torch.zeros(3)]).requires_grad_()
    q = torch.stack([torch.randn(3), torch.zeros(3), torch.zeros(3)])
    turned, weight = rotate_onto(e, q), torch.randn(3, 3)
    assert torch.allclose(turned, q, atol=1e-6)
    (turned * weight).sum().backward()
    assert torch.equal(e.grad, weight)


@pytest.mark.parametrize("sphere", [False, True])
def test_the_quantiser_passes_gradients_as_its_flag_says(sphere):
    """Straight or rotated, through the division by the length on the sphere; the values are the same."""
    straight = VectorQuantizer(8, 3, sphere=sphere).eval()
    rotated = VectorQuantizer(8, 3, sphere=sphere, rotation=True).eval()
    rotated.load_state_dict(straight.state_dict())
    weight = torch.randn(2, 3, 2, 2)
    gradients, values = [], []
    latent = torch.randn(2, 3, 2, 2)
    for quantizer in (straight, rotated):
        given = latent.clone().requires_grad_()
        values.append(quantizer(given)[0])
        (values[-1] * weight).sum().backward()
        gradients.append(to_vectors(given.grad))
    assert torch.allclose(values[0], values[1], atol=1e-6)
    vectors = to_vectors(latent).requires_grad_()
    on = F.normalize(vectors, dim=1) if sphere else vectors
    codes = to_vectors(straight.lookup(straight(latent)[1]))
    for passed, gradient in zip((on, rotate_onto(on, codes)), gradients):
        (expected,) = torch.autograd.grad((passed * to_vectors(weight)).sum(), vectors, retain_graph=True)
        assert torch.allclose(gradient, expected, atol=1e-5)
    assert not torch.allclose(gradients[0], gradients[1], atol=1e-3)


# ----------------------------------------------------------------------------------------- finite scalar quantisation


def fsq(*levels: int) -> FiniteScalarQuantizer:
    """One whose bins lie somewhere else in every channel."""
    quantizer = FiniteScalarQuantizer(levels)
    quantizer.centre.copy_(torch.linspace(-1, 2, len(levels)))
    quantizer.width.copy_(torch.linspace(0.5, 3, len(levels)))
    return quantizer


@pytest.mark.parametrize("levels", [(2,), (8, 5, 5, 5), (3, 2, 7), (16, 16, 2)])
def test_every_code_is_its_own_nearest(levels):
    """nearest(lookup(idx)) == idx for all, so no code is unreachable; lookups of different codes differ."""
    quantizer = fsq(*levels)
    assert quantizer.codebook_size == math.prod(levels)
    idx = torch.arange(quantizer.codebook_size)
    codes = quantizer.lookup(idx.view(1, 1, -1))
    assert torch.equal(quantizer.nearest(to_vectors(codes)), idx)
    assert len(to_vectors(codes).unique(dim=0)) == len(idx) and torch.isfinite(codes).all()


def test_a_code_is_its_digits_in_mixed_radix():
    """The first digit is the least significant; every digit is below its number of levels."""
    quantizer, levels = fsq(3, 2, 7), (3, 2, 7)
    digits = quantizer.digits(torch.arange(42))
    counted = [[i % 3, i // 3 % 2, i // 6] for i in range(42)]
    assert digits.tolist() == counted and len(set(map(tuple, counted))) == 42
    low, high = quantizer.nearest(torch.tensor([[-99.0] * 3, [99.0] * 3])).tolist()
    assert (low, high) == (0, 41)
    for channel, place in enumerate((1, 3, 6)):  # one channel at its top, the others at their bottom
        vector = torch.full((1, 3), -99.0)
        vector[0, channel] = 99
        assert quantizer.nearest(vector).item() == place * (levels[channel] - 1)


def test_the_quantised_value_is_the_middle_of_its_bin():
    """In u = tanh((e - centre) / width) the bins are equal parts of [-1, 1]."""
    quantizer = fsq(4, 5)
    latent = 3 * torch.randn(2, 2, 8, 8)
    quantised, idx, loss = quantizer(latent)
    for channel, L in enumerate((4, 5)):
        u, u_hat = (
            ((t[:, channel].double() - quantizer.centre[channel]) / quantizer.width[channel]).tanh()
            for t in (latent, quantised)
        )
        digit = ((u + 1) / 2 * L).floor().clamp(max=L - 1)
        assert torch.allclose(u_hat, (digit + 0.5) * 2 / L - 1, atol=1e-5) and len(digit.unique()) == L
        assert ((u - u_hat).abs() <= 1 / L + 1e-5).all()
    assert torch.allclose(quantised, quantizer.lookup(idx), atol=1e-5) and loss == 0


@pytest.mark.parametrize("kind", ["vq", "sphere", "fsq"])
def test_unrounded_is_what_is_rounded_on_the_scale_of_the_codes(kind):
    """Its code is the latent's; of unit length on the sphere, never beyond the outermost codes of fsq."""
    quantizer = (fsq(8, 5, 5) if kind == "fsq" else VectorQuantizer(16, 3, sphere=kind == "sphere")).eval()
    latent = 3 * torch.randn(2, 3, 4, 5)
    unrounded = quantizer.unrounded(latent)
    assert unrounded.shape == latent.shape and not torch.allclose(unrounded, quantizer(latent)[0], atol=1e-3)
    assert torch.equal(quantizer(unrounded)[1], quantizer(latent)[1])
    codes = quantizer.lookup(torch.arange(quantizer.codebook_size)[None, None])
    assert torch.allclose(quantizer.unrounded(codes), codes, atol=1e-6)
    if kind == "sphere":
        assert torch.allclose(unrounded.norm(dim=1), torch.ones(2, 4, 5))
    elif kind == "fsq":
        low, high = codes.amin((0, 2, 3)), codes.amax((0, 2, 3))
        assert torch.equal(unrounded, latent.maximum(low.view(3, 1, 1)).minimum(high.view(3, 1, 1)))
        inside = ((latent > low.view(3, 1, 1)) & (latent < high.view(3, 1, 1))).nonzero(as_tuple=True)
        assert torch.equal(unrounded[inside], latent[inside])
    else:
        assert torch.equal(unrounded, latent)


def test_the_gradient_passes_inside_the_bins_and_fades_outside():
    """1 in the middle of a bin, near 1 within; next to nothing far outside, where it would push without effect."""
    quantizer = fsq(9, 9)
    middles = quantizer.lookup(torch.tensor([[[0, 20, 40, 61, 80]]]))
    for latent, low, high in ((middles, 0.999, 1.001), (middles + 0.01, 0.9, 1.1), (middles + 50, 0, 1e-3)):
        latent = latent.clone().requires_grad_()
        quantizer(latent)[0].sum().backward()
        assert low <= latent.grad.min() and latent.grad.max() <= high


def test_zero_stays_exactly_zero_after_the_start():
    """Black has the vector 0; levels even or odd, data one-sided or not, it keeps a bin's middle."""
    quantizer = FiniteScalarQuantizer((8, 5, 2, 7))
    vectors = torch.randn(500, 4) * torch.tensor([1.0, 0.01, 30.0, 2.0]) + torch.tensor([0.5, 0.0, -20.0, 9.0])
    quantizer.start(torch.cat([vectors, torch.zeros(700, 4)]))
    for count in (1, 999):  # vectorised and scalar arithmetic may differ in the last bit
        zero = quantizer.lookup(quantizer.nearest(torch.zeros(count, 4)).view(1, 1, count))
        assert torch.equal(zero, torch.zeros_like(zero))
    assert quantizer(torch.zeros(1, 4, 1, 1))[0].abs().max() < 1e-5


def test_the_start_spreads_the_bins_over_the_vectors():
    """Every level is in use, whatever scale and offset, and black, which is most of all, has no say in it."""
    quantizer = FiniteScalarQuantizer((8, 5, 5, 5))
    lit = torch.randn(4000, 4) * torch.tensor([1.0, 0.1, 30.0, 2.0]) + torch.tensor([0.0, 0.1, 30.0, -6.0])
    quantizer.start(torch.cat([lit, torch.zeros(40_000, 4)]))
    digits = quantizer.digits(quantizer.nearest(lit))
    for channel, L in enumerate((8, 5, 5, 5)):
        share = torch.bincount(digits[:, channel], minlength=L) / len(lit)
        assert len(share) == L and share.min() > 0 and share.max() < 0.6
    error = to_vectors(quantizer.lookup(quantizer.nearest(lit).view(1, 1, -1))) - lit
    assert (error.std(0) < 0.5 * lit.std(0)).all()


def test_codes_are_exact_up_to_the_largest_codebook():
    """2^61 codes: no float on the way from digits to idx and back."""
    quantizer = FiniteScalarQuantizer((8,) * 20 + (2,))
    assert quantizer.codebook_size == 2**61
    digits = torch.stack([torch.randint(L, (200,)) for L in quantizer.levels], dim=1)
    digits[0] = torch.tensor(quantizer.levels) - 1
    idx = torch.tensor([sum(d * 8**i for i, d in enumerate(row)) for row in digits.tolist()])
    assert idx[0] == 2**61 - 1 and torch.equal(quantizer.digits(idx), digits)
    codes = to_vectors(quantizer.lookup(idx.view(1, 1, -1)))
    assert torch.equal(quantizer.nearest(codes), idx)


def test_levels_that_make_no_codes_are_refused():
    for levels in ((8, 1), (0, 4), (8,) * 21):
        with pytest.raises(ValueError, match="levels"):
            FiniteScalarQuantizer(levels)


def test_scalar_quantisation_is_float32_under_autocast_and_learns_nothing():
    quantizer, latent = fsq(64, 64), torch.randn(2, 2, 16, 16)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    for given in (latent, latent.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            quantised, idx, _ = quantizer.train()(given)
        assert quantised.dtype == torch.float32 and torch.equal(idx, quantizer(given.float())[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    assert not list(quantizer.parameters())
