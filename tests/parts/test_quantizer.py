"""Laws of quantizer.py: both quantisers against brute force, gradients against matrices, codes against their bins."""

import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parts import quantizer as quantizer_module
from parts.quantizer import FiniteScalarQuantizer, VectorQuantizer, lloyd, make_quantizer


def to_latent(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [N, dim] as a latent [1, dim, 1, N]."""
    return vectors.T[None, :, None]


def to_vectors(latent: torch.Tensor) -> torch.Tensor:
    """A latent [B, dim, h, w] as vectors [N, dim]."""
    return latent.movedim(1, -1).flatten(0, 2)


def test_codes_are_the_nearest_by_brute_force():
    quantizer, latent = VectorQuantizer(37, 5).eval(), torch.randn(2, 5, 6, 7)
    quantised, idx, _ = quantizer(latent)
    distance = (to_vectors(latent)[:, None].double() - quantizer.codebook.double()).norm(dim=2)
    chosen = distance.gather(1, idx.view(-1, 1))[:, 0]
    assert torch.allclose(chosen, distance.amin(1), atol=1e-5) and len(idx.unique()) > 10
    assert torch.allclose(quantised, quantizer.lookup(idx), atol=1e-6)


@pytest.mark.parametrize("commitment", [0.25, 2.0])
def test_the_gradient_passes_straight_through_and_the_loss_is_the_commitment(commitment):
    """beta ||e - sg[q]||^2 pulls the encoder; the codebook follows without a loss."""
    latent = torch.randn(1, 3, 1, 5, requires_grad=True)
    quantizer = VectorQuantizer(4, 3, commitment).eval()
    quantised, idx, loss = quantizer(latent)
    difference, weight = to_vectors(latent.detach()) - quantizer.codebook[idx[0, 0]], torch.randn_like(quantised)
    assert torch.allclose(loss, commitment * difference.square().mean())
    straight, pull = torch.autograd.grad((quantised * weight).sum(), latent)[0], torch.autograd.grad(loss, latent)[0]
    assert torch.equal(straight, weight)
    assert torch.allclose(to_vectors(pull), commitment * 2 * difference / 15, atol=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_quantisation_is_float32_under_autocast(kind, half):
    """bf16 has 8 bits: it chooses other codes."""
    quantizer = (VectorQuantizer(256, 8) if kind == "vq" else fsq(*[64] * 8)).eval()
    latent = torch.randn(4, 8, 16, 16)
    for given in (latent, latent.to(half)):
        with torch.autocast("cpu", half):
            quantised, idx, loss = quantizer(given)
        assert quantised.dtype == loss.dtype == torch.float32 and torch.equal(idx, quantizer(given.float())[1])


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


def test_only_training_with_gradients_moves_the_codebook_and_nothing_moves_levels():
    """So it stands still while another part of the model is trained on its codes."""
    scalar, learned, latent = fsq(64, 64, 64).train(), VectorQuantizer(8, 3).eval(), torch.randn(1, 3, 8, 8)
    before = [{name: tensor.clone() for name, tensor in q.state_dict().items()} for q in (scalar, learned)]
    learned(latent), scalar(latent)
    with torch.no_grad():
        learned.train()(latent)
    for quantizer, kept in zip((scalar, learned), before):
        assert all(torch.equal(kept[name], tensor) for name, tensor in quantizer.state_dict().items())
        assert not list(quantizer.parameters())
    learned(latent)
    assert all(not torch.equal(before[1][name], tensor) for name, tensor in learned.state_dict().items())


def test_a_revived_code_survives_the_next_update():
    """Its averages begin anew with it; left as they were they would draw it back at once."""
    quantizer = VectorQuantizer(4, 2, decay=0.9, revive_below=0.5).train()
    quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 50.0], [-50.0, 50.0]]))
    quantizer.total.copy_(quantizer.codebook)
    vectors = torch.rand(40, 2)
    for _ in range(20):
        quantizer(to_latent(vectors))
        if quantizer.codebook.abs().max() < 2:
            break
    revived = quantizer.codebook[2:].clone()
    assert revived.abs().max() <= 1  # both are among the data now
    quantizer(to_latent(quantizer.codebook[:1].expand(40, 2)))  # all choose another code
    assert torch.allclose(quantizer.codebook[2:], revived, atol=1e-5)


def test_lloyd_s_steps_lower_the_error_and_leave_no_code_empty():
    """By hand for one step; a code without vectors goes to a spare one."""
    vectors, codes = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.4], [9.0], [99.0]])
    assert lloyd(vectors, codes, range(1), spare=torch.tensor([[7.0]])).tolist() == [[0.5], [10.0], [7.0]]
    vectors, generator = torch.randn(400, 3), torch.Generator().manual_seed(0)
    errors = []
    for steps in (0, 1, 5, 30):
        codes = lloyd(vectors, vectors[:20] + 5, range(steps), generator=generator)
        errors.append(torch.cdist(vectors, codes).amin(1).square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


def test_the_k_means_start_finds_k_points_however_unequal():
    """Half of all vectors are the black background; drawn blindly it would take half of the codes."""
    points = torch.randn(16, 4)
    vectors = torch.cat([points, points[:1].expand(500, 4), points[1:3].repeat(50, 1)])
    quantizer = VectorQuantizer(16, 4)
    quantizer.fit(vectors[torch.randperm(len(vectors))])
    assert torch.cdist(points, quantizer.codebook).amin(1).max() < 1e-5
    assert len(quantizer.nearest(vectors).unique()) == 16
    with pytest.raises(ValueError, match="15 vectors"):
        quantizer.fit(vectors[:15])


def test_processes_keep_the_codebook_of_one_with_the_joined_batch(tmp_path):
    """Under torchrun each process has vectors of its own; the codes, revived ones too, are the same everywhere."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = f"""
import sys; sys.path.insert(0, {str(Path(quantizer_module.__file__).parents[1])!r})
import torch, torch.distributed as dist
from parts.quantizer import VectorQuantizer

def train(rank, world):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 3, decay=0.5, revive_below=0.2).train()
    quantizer.codebook[:8] += 100
    for _ in range(4):
        quantizer(torch.randn(2, 3, 4, 4).chunk(world)[rank])
    assert quantizer.codebook.abs().max() < 50  # codes were revived
    return quantizer.codebook.tolist(), quantizer.count.tolist()

one, rank = train(0, 1), int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://localhost:{port}", rank=rank, world_size=2)
print("equal" if train(rank, 2) == one else "unequal")
"""
    begin = [sys.executable, "-c", script]
    both = [subprocess.Popen([*begin, str(rank)], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert all(words.splitlines()[-1] == "equal" for words in said)  # older gloo speaks first


def fsq(*levels: int) -> FiniteScalarQuantizer:
    """One whose bins lie somewhere else in every channel."""
    quantizer = FiniteScalarQuantizer(levels)
    quantizer.centre.copy_(torch.linspace(-1, 2, len(levels)))
    quantizer.width.copy_(torch.linspace(0.5, 3, len(levels)))
    return quantizer


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


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_clamp_leaves_a_latent_as_far_as_codes_reach(kind):
    """Its code stays the same; scalar quantisation has outermost codes, a learned codebook has none."""
    quantizer = (fsq(8, 5, 5) if kind == "fsq" else VectorQuantizer(16, 3)).eval()
    latent = 3 * torch.randn(2, 3, 4, 5)
    clamped = quantizer.clamp(latent)
    assert not torch.allclose(clamped, quantizer(latent)[0], atol=1e-3)
    assert torch.equal(quantizer(clamped)[1], quantizer(latent)[1])
    codes = quantizer.lookup(torch.arange(quantizer.codebook_size)[None, None])
    assert torch.equal(quantizer.clamp(codes), codes)
    if kind == "fsq":
        low, high = codes.amin((0, 2, 3)).view(3, 1, 1), codes.amax((0, 2, 3)).view(3, 1, 1)
        assert torch.equal(clamped, latent.maximum(low).minimum(high)) and not torch.equal(clamped, latent)
    else:
        assert torch.equal(clamped, latent)


def test_a_quantiser_is_made_of_either_keyword():
    """And offers random codes: as often as training used them, or all alike."""
    vq, scalar = make_quantizer(6, None, 3), make_quantizer(None, (2, 3), 2)
    assert isinstance(vq, VectorQuantizer) and isinstance(scalar, FiniteScalarQuantizer)
    vq.count.copy_(torch.tensor([3.0, 1, 0, 0, 0, 0]))
    idx, uniform = (q.random_codes((100, 5, 8), torch.Generator().manual_seed(0)) for q in (vq, scalar))
    assert idx.shape == uniform.shape == (100, 5, 8) and idx.dtype == uniform.dtype == torch.int64
    assert idx.max() == 1 and (idx == 0).float().mean().item() == pytest.approx(0.75, abs=0.04)
    assert ((uniform.flatten().bincount() / 4000 - 1 / 6).abs() < 0.03).all()


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
    quantizer.fit(torch.cat([vectors, torch.zeros(700, 4)]))
    for count in (1, 999):  # vectorised and scalar arithmetic may differ in the last bit
        zero = quantizer.lookup(quantizer.nearest(torch.zeros(count, 4)).view(1, 1, count))
        assert torch.equal(zero, torch.zeros_like(zero))
    assert quantizer(torch.zeros(1, 4, 1, 1))[0].abs().max() < 1e-5


def test_the_start_spreads_the_bins_over_the_vectors():
    """Every level is in use, whatever scale and offset, and black, which is most of all, has no say in it."""
    quantizer = FiniteScalarQuantizer((8, 5, 5, 5))
    lit = torch.randn(4000, 4) * torch.tensor([1.0, 0.1, 30.0, 2.0]) + torch.tensor([0.0, 0.1, 30.0, -6.0])
    quantizer.fit(torch.cat([lit, torch.zeros(40_000, 4)]))
    digits = quantizer.digits(quantizer.nearest(lit))
    for channel, L in enumerate((8, 5, 5, 5)):
        share = torch.bincount(digits[:, channel], minlength=L) / len(lit)
        assert len(share) == L and share.min() > 0 and share.max() < 0.6
    error = to_vectors(quantizer.lookup(quantizer.nearest(lit).view(1, 1, -1))) - lit
    assert (error.std(0) < 0.5 * lit.std(0)).all()


@pytest.mark.parametrize("levels", [(2,), (8, 5, 5, 5), (3, 2, 7), (16, 16, 2), (8,) * 20 + (2,)])
def test_every_code_is_its_own_nearest_up_to_the_largest_codebook(levels):
    quantizer = fsq(*levels)
    assert quantizer.codebook_size == math.prod(levels) <= 2**61
    idx = torch.arange(min(quantizer.codebook_size, 9999)) + max(0, quantizer.codebook_size - 9999)  # the last ones
    codes = to_vectors(quantizer.lookup(idx.view(1, 1, -1)))
    assert torch.equal(quantizer.nearest(codes), idx)
    assert len(codes.unique(dim=0)) == len(idx) and torch.isfinite(codes).all()
    digits = torch.stack([torch.randint(L, (200,)) for L in levels], dim=1)
    place = [math.prod(levels[:i]) for i in range(len(levels))]
    idx = torch.tensor([sum(d * p for d, p in zip(row, place)) for row in digits.tolist()])
    assert torch.equal(quantizer.digits(idx), digits)
    for wrong in ((8, 1), (0, 4), (8,) * 21):
        with pytest.raises(ValueError, match="levels"):
            FiniteScalarQuantizer(wrong)
