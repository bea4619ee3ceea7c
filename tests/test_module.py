"""Laws of module.py: blocks begin as the identity, attention is attention, embeddings tell their numbers apart."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from module import CategoryEmbedding, Downsample, Embedding, ResBlock, SelfAttention, SliceMixing, Upsample, cosines


@pytest.mark.parametrize("channels", [6, 32, 40])
def test_blocks_begin_as_the_identity(channels):
    """So that a deep network first passes its input on; with other channels a ResBlock begins as its skip."""
    x, embedding = torch.randn(2, channels, 4, 6), torch.randn(2, 10)
    assert torch.equal(ResBlock(channels, channels, 10)(x, embedding), x)
    assert torch.equal(SelfAttention(channels)(x), x)
    assert torch.equal(SliceMixing(channels)(x, 2), x)
    block = ResBlock(channels, 7, 10)
    assert_close(block(x, embedding), F.conv2d(x, block.skip.weight, block.skip.bias))


def test_a_res_block_is_its_formula(awaken):
    """x + conv(act(norm(conv(act(norm(x))) + embedding)))."""
    block, x, embedding = awaken(ResBlock(32, 32, 10)), torch.randn(2, 32, 5, 5), torch.randn(2, 10)
    h = block.conv1(F.silu(F.group_norm(x, 2, block.norm1.weight, block.norm1.bias)))
    h = h + (F.silu(embedding) @ block.embed.weight.T + block.embed.bias)[..., None, None]
    h = block.conv2(F.silu(F.group_norm(h, 2, block.norm2.weight, block.norm2.bias)))
    assert torch.allclose(block(x, embedding), x + h, atol=1e-6) and h.abs().max() > 1e-3


@pytest.mark.parametrize("channels, heads", [(16, 1), (64, 2)])
def test_attention_equals_the_naive_softmax(awaken, channels, heads):
    layer, x = awaken(SelfAttention(channels)).double(), torch.randn(2, channels, 3, 4).double()
    d = channels // heads
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).split(channels, dim=1)
    out = torch.zeros_like(q)
    for b in range(2):
        for head in range(heads):
            at = slice(head * d, (head + 1) * d)
            for i in range(12):
                weight = torch.softmax(torch.stack([q[b, at, i] @ k[b, at, j] / d**0.5 for j in range(12)]), 0)
                out[b, at, i] = v[b, at] @ weight
    expected = x + layer.project(out.view_as(x))
    assert torch.allclose(layer(x), expected, atol=1e-10) and (expected - x).abs().max() > 1e-3


def test_attention_is_permutation_equivariant(awaken):
    """Positions have no order to it, and pictures of a batch do not see each other."""
    layer, x, order = awaken(SelfAttention(32), 0.2), torch.randn(2, 32, 4, 4), torch.randperm(16)
    y = layer(x).flatten(2)
    assert torch.allclose(layer(x.flatten(2)[..., order].view_as(x)).flatten(2), y[..., order], atol=1e-5)
    assert torch.allclose(layer(x[:1]).flatten(2), y[:1], atol=1e-5)
    assert not torch.allclose(y, x.flatten(2), atol=1e-2)


def test_resampling_halves_and_comes_back_also_from_odd_sizes():
    """The skip connections of a UNet on 7 x 9 latents need sizes to be given."""
    x = torch.randn(1, 4, 7, 9)
    low = Downsample(4, 6)(x)
    assert low.shape == (1, 6, 4, 5)
    up = Upsample(6, 4)
    assert up(low, x.shape[-2:]).shape == x.shape
    assert torch.equal(up(low), up(low, (8, 10)))


def test_cosines_are_an_orthonormal_basis_from_slow_to_fast():
    rows = cosines(20, 20)
    assert_close(rows @ rows.T, torch.eye(20))
    assert (rows.sign().diff(dim=1) != 0).sum(1).tolist() == list(range(20))
    assert_close(cosines(3, 20), rows[:3])


@pytest.mark.parametrize("slices", [1, 2, 6])
def test_mixing_reaches_the_neighbours_in_one_s_own_brain(awaken, slices):
    """One step up and one down per layer, and never into the next brain of the batch."""
    mixing, x = awaken(SliceMixing(7), 0.5), torch.randn(12, 7, 2, 3)
    out = mixing(x, slices)
    for n in (0, 3, 5, 6, 11):
        other = x.clone()
        other[n] += torch.randn(7, 2, 3)
        changed = (mixing(other, slices) != out).flatten(1).any(1).nonzero().flatten().tolist()
        brain = range(n // slices * slices, (n // slices + 1) * slices)
        assert changed == [m for m in (n - 1, n, n + 1) if m in brain]


def test_mixing_equal_slices_is_a_convolution_within_each(awaken):
    """Beyond the ends the last slice goes on, so that equal slices, and a slice alone, have no border."""
    mixing, x = awaken(SliceMixing(9), 0.5), torch.randn(1, 9, 4, 4)
    alone = mixing(x, 1)
    assert torch.allclose(mixing(x.expand(5, -1, -1, -1), 5), alone.expand(5, -1, -1, -1), atol=1e-6)
    h = F.group_norm(x, 1, mixing.norm.weight, mixing.norm.bias)
    assert torch.allclose(alone, x + F.conv2d(h, mixing.project.weight, mixing.project.bias), atol=1e-6)


def test_embeddings_tell_numbers_apart_and_the_unknown_has_a_vector_of_its_own():
    """All 32 indices of slices, from the first step on. NaN means unknown; it leaves no NaN in any gradient."""
    vectors = Embedding(16)(torch.arange(32))
    distance = torch.cdist(vectors, vectors) + torch.eye(32)
    assert vectors.shape == (32, 16) and distance.min() > 0.02 * vectors.std()
    embedding = Embedding(6, unknown=True)
    torch.nn.init.normal_(embedding.unknown)
    out = embedding(torch.tensor([3.0, torch.nan, 5.0]))
    assert torch.equal(out[1], embedding.unknown)
    assert_close(out[::2], embedding(torch.tensor([3, 5])))
    out.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in embedding.parameters())
    categories = CategoryEmbedding(5, (0, 0.5, 2))  # 1 is none of them
    out = categories(torch.tensor([2, torch.nan, 0, 0.5, 1, 2]))
    assert torch.equal(out, categories.vectors[[2, 3, 0, 1, 3, 2]]) and len(out.unique(dim=0)) == 4
