"""Layers of several networks: residual block, self-attention, mixing of slices, resampling, embeddings of numbers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util import sinusoidal_encoding


def norm(channels: int) -> nn.GroupNorm:
    """Group normalisation (Wu and He 2018) with groups of about 16 channels, else with one group."""
    groups = max(1, channels // 16)
    return nn.GroupNorm(groups if channels % groups == 0 else 1, channels)


def gaussian_window(slices: int, width: float) -> Tensor:
    """float32 [slices, slices]: exp(-(i - j)^2 / (2 width^2)), whose rows smooth along z by an sd of `width` slices."""
    z = torch.arange(slices)
    return torch.exp(-((z[:, None] - z) ** 2) / (2 * width**2))


def cosines(count: int, size: int) -> Tensor:
    """[count, size]: the slowest `count` rows of the orthonormal cosine transform of type II of `size` numbers."""
    k = torch.arange(size)
    rows = torch.cos(math.pi * (k + 0.5) * k[:count, None] / size) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def zero(layer: nn.Module) -> nn.Module:
    """The layer with all weights zero: a residual branch that ends in it adds nothing before training."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Embedding(nn.Module):
    """Numbers [B] (slice index z, diffusion time) to vectors [B, dim]: sinusoidal encoding, then a small MLP.

    With `unknown`, a number may be NaN, which means that it is not known and has a learned vector of its own.
    """

    def __init__(self, dim: int, encoding: int = 64, unknown: bool = False):
        super().__init__()
        self.encoding = encoding
        self.mlp = nn.Sequential(nn.Linear(encoding, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.unknown = nn.Parameter(torch.zeros(dim)) if unknown else None

    def forward(self, values: Tensor) -> Tensor:
        if self.unknown is None:
            return self.mlp(sinusoidal_encoding(values, self.encoding))
        # a NaN that reached the MLP would spoil its gradient even where torch.where drops the result
        known = self.mlp(sinusoidal_encoding(values.float().nan_to_num(), self.encoding))
        return torch.where(values.isnan()[:, None], self.unknown.to(known.dtype), known)


class CategoryEmbedding(nn.Module):
    """Numbers [B] out of `categories` to a learned vector each, [B, dim]; NaN and other numbers share one more."""

    def __init__(self, dim: int, categories: tuple[float, ...]):
        super().__init__()
        self.register_buffer("categories", torch.tensor(categories), persistent=False)
        self.vectors = nn.Parameter(0.1 * torch.randn(len(categories) + 1, dim))

    def forward(self, values: Tensor) -> Tensor:
        match = values.float()[:, None] == self.categories
        return self.vectors[torch.where(match.any(1), match.int().argmax(1), len(self.categories))]


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + embedding))), with SiLU as act (He et al. 2016, pre-activation).

    The embedding [B, embedding_dim], of z or of time and z, is added to every position after the first convolution.
    """

    def __init__(self, channels_in: int, channels_out: int, embedding_dim: int):
        super().__init__()
        self.norm1, self.conv1 = norm(channels_in), nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.embed = nn.Linear(embedding_dim, channels_out)
        self.norm2, self.conv2 = norm(channels_out), zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.embed(F.silu(embedding))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """x + project(softmax(q k^T / sqrt(d)) v) over all positions, q, k, v by 1x1 convolutions (Vaswani et al. 2017)."""

    def __init__(self, channels: int, head_channels: int = 32):
        super().__init__()
        self.heads = next(n for n in range(max(1, channels // head_channels), 0, -1) if channels % n == 0)
        self.norm, self.qkv = norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.project = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2).unbind(1)
        # torch's fused kernel takes several times longer backwards on a CPU, and on a GPU it may sum in any order
        h = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v  # [B, heads, H * W, C / heads]
        return x + self.project(h.transpose(-1, -2).reshape(B, C, H, W))


class SliceMixing(nn.Module):
    """x + project(shift(norm(x))) over contiguous slices of a brain: each slice sees its neighbours in z.

    The shift (Lin, Gan, Han 2019) hands a third of the channels on to the next slice and a third back to the previous
    slice; the first and the last slice are their own neighbours. Followed by `project`, a 1x1 convolution, it is a
    convolution of width 3 along z, at a third of the cost.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.project = norm(channels), zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, slices: int) -> Tensor:
        """x [n * slices, C, H, W]: n brains, or windows of brains, one after the other."""
        h = self.norm(x).unflatten(0, (-1, slices))
        up, stay, down = h.tensor_split(3, dim=2)
        up = torch.cat([up[:, :1], up[:, :-1]], dim=1)
        down = torch.cat([down[:, 1:], down[:, -1:]], dim=1)
        return x + self.project(torch.cat([up, stay, down], dim=2).flatten(0, 1))


class Downsample(nn.Conv2d):
    """[B, C, H, W] to [B, channels_out, H / 2, W / 2]: a strided convolution."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """[B, C, H, W] to [B, channels_out, *size], by default twice the size: nearest neighbour, then a convolution.

    A transposed convolution would leave a checkerboard.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
