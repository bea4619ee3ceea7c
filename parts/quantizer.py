"""Quantisers: each turns latent vectors [B, C, h, w] into a grid of codes idx int64 [B, h, w] and back.

VectorQuantizer learns a codebook; FiniteScalarQuantizer rounds every number to a few levels and has none. Both work in
float32 whatever the autocast. Another quantiser is a class with their methods, `forward`, `nearest`, `lookup`, `clamp`,
`random_codes` and `fit`, their attributes `codebook_size` and `whiten`, and a line in `make_quantizer`.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import util


def make_quantizer(
    codebook_size: int | None, levels: tuple[int, ...] | None, dim: int
) -> "VectorQuantizer | FiniteScalarQuantizer":
    """Learned codes of `dim` numbers, codebook_size of them; or finite scalar quantisation to `dim` levels.

    Raises ValueError unless exactly one of codebook_size and levels is given, or if the levels are not `dim`.
    """
    if (codebook_size is None) == (levels is None):
        raise ValueError("either codebook_size, for learned codes, or levels, for finite scalar quantisation")
    if levels is None:
        return VectorQuantizer(codebook_size, dim)
    if len(levels) != dim:
        raise ValueError(f"{len(levels)} levels do not fit {dim} latent channels")
    return FiniteScalarQuantizer(levels)


def nearest_code(vectors: Tensor, codes: Tensor) -> Tensor:
    """int64 [N]: which of the codes [K, D] is nearest to each of the vectors [N, D]; Euclidean, both float32."""
    with torch.autocast(vectors.device.type, enabled=False):
        parts = vectors.split(max(1, 2**26 // len(codes)))  # a part's distances take 256 MB
        return torch.cat([torch.addmm(codes.square().sum(1), v, codes.T, alpha=-2).argmin(1) for v in parts])


def lloyd(
    vectors: Tensor,
    codes: Tensor,
    steps: Iterable,
    spare: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """k-means (Lloyd 1982): codes float32 [K, D] after as many steps as `steps` has elements.

    Each step moves every code to the mean of the vectors that are nearest to it, and one without any to a random one of
    the `spare` vectors [M, D], default: `vectors`.

    Args:
        vectors: float32 [N, D].
        codes: [K, D] to begin with.
        steps: such as range(20), or a progress bar of it.
    """
    spare = vectors if spare is None else spare
    for _ in steps:
        idx = nearest_code(vectors, codes)
        count = torch.bincount(idx, minlength=len(codes))
        codes = torch.zeros_like(codes).index_add_(0, idx, vectors) / count.clamp(min=1)[:, None]
        empty = count == 0
        codes[empty] = spare[torch.randint(len(spare), (int(empty.sum()),), generator=generator)]
    return codes


class VectorQuantizer(nn.Module):
    """Nearest code of a learned codebook (van den Oord et al. 2017).

    The codebook follows exponential moving averages of the vectors that chose each code (ibid., appendix A.1). Codes
    that hardly any vector chooses are replaced.

    Args:
        codebook_size: K.
        dim: length of a code.
        commitment: beta, the weight of ||e - sg[q]||^2, which ties the encoder to the codes.
        decay: of the moving averages.
        revive_below: a code chosen less often than this, where 1 is its fair share of all choices, is replaced by a
            vector of the batch.
    """

    whiten = False  # distances between vectors decide, so all channels are scaled alike

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        commitment: float = 0.25,
        *,
        decay: float = 0.99,
        revive_below: float = 0.05,
    ):
        super().__init__()
        self.codebook_size, self.commitment = codebook_size, commitment
        self.decay, self.revive_below = decay, revive_below
        self.register_buffer("codebook", torch.randn(codebook_size, dim))
        self.register_buffer("count", torch.ones(codebook_size))  # how often chosen; 1 is the fair share of a code
        self.register_buffer("total", self.codebook.clone())  # sum of the vectors in the same unit

    def nearest(self, vectors: Tensor) -> Tensor:
        """int64 [N]: the code nearest to each of [N, dim]."""
        return nearest_code(vectors.float(), self.codebook)

    def lookup(self, idx: Tensor) -> Tensor:
        """Codes [B, dim, h, w] of int64 idx [B, h, w]."""
        return F.embedding(idx, self.codebook).movedim(-1, 1)

    def clamp(self, latent: Tensor) -> Tensor:
        """float32 [B, dim, h, w]: a latent as far as codes reach, here anywhere."""
        return latent.float()

    def random_codes(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """idx int64 of this shape on the CPU, each drawn by itself, as often as training used it."""
        idx = torch.multinomial(self.count.cpu(), math.prod(shape), replacement=True, generator=generator)
        return idx.view(shape)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the quantised latent, idx int64 [B, h, w] and beta ||e - sg[q]||^2, of a latent [B, dim, h, w].

        The gradient passes straight through. In training mode, while gradients are on, the codebook moves after it was
        used.
        """
        with torch.autocast(latent.device.type, enabled=False):
            B, C, h, w = latent.shape
            vectors = latent.float().movedim(1, -1).reshape(-1, C)
            idx = self.nearest(vectors.detach())
            quantised = F.embedding(idx, self.codebook)
            loss = self.commitment * F.mse_loss(vectors, quantised)
            quantised = vectors + (quantised - vectors).detach()
            if self.training and torch.is_grad_enabled():
                self._follow(vectors.detach(), idx)
        return quantised.view(B, h, w, C).movedim(-1, 1), idx.view(B, h, w), loss

    @torch.no_grad()
    def _follow(self, vectors: Tensor, idx: Tensor) -> None:
        """Moves averages and codebook, without a branch on their values, for which a GPU would have to wait."""
        vectors, idx = util.joined(vectors), util.joined(idx)
        count = torch.zeros_like(self.count).index_add_(0, idx, vectors.new_ones(len(idx)))
        total = torch.zeros_like(self.total).index_add_(0, idx, vectors)
        chosen = vectors[torch.randint(len(vectors), (self.codebook_size,), device=vectors.device)]
        fair = count.sum() / self.codebook_size
        self.count.lerp_(count / fair, 1 - self.decay)
        self.total.lerp_(total / fair, 1 - self.decay)
        dead = (self.count < self.revive_below)[:, None]
        # averages too begin anew, or the next update would undo the revival
        self.count.masked_fill_(dead[:, 0], 2 * self.revive_below)
        self.total.copy_(torch.where(dead, 2 * self.revive_below * chosen, self.total))
        mean = self.total / self.count.clamp(min=1e-5)[:, None]
        self.codebook.copy_(torch.where(dead, chosen, mean))

    @torch.no_grad()
    def fit(self, vectors: Tensor, iterations: int = 20) -> None:
        """k-means on encoder outputs float32 [N, dim]. Raises ValueError if N < K."""
        K = self.codebook_size
        if len(vectors) < K:
            raise ValueError(f"{len(vectors)} vectors are too few for {K} codes")
        distinct = torch.unique(vectors, dim=0)  # half of all vectors are the black background
        distinct = distinct if len(distinct) >= K else vectors
        begin = distinct[torch.randperm(len(distinct))[:K]]
        self.codebook.copy_(lloyd(vectors, begin, range(iterations), distinct))
        self.count.fill_(1)
        self.total.copy_(self.codebook)


def digits_of(idx: Tensor, levels: tuple[int, ...]) -> list[Tensor]:
    """The digits of int64 codes, each of idx's shape, digit i below levels[i]: the least significant first."""
    digits = []
    for L in levels:
        digits.append(idx % L)
        idx = idx // L
    return digits


class FiniteScalarQuantizer(nn.Module):
    """Every number rounded to one of a few levels (Mentzer et al. 2023): no codebook to learn, so none to collapse.

    u = tanh((e - centre) / width) falls into one of L equal bins of [-1, 1]; the code is the middle of the bin, brought
    back by the inverse. A vector's code is its numbers' bins read as digits, the first the least significant.

    Args:
        levels: L of each number; the codebook has as many codes as their product.
    """

    whiten = True  # channels are rounded one by one, so each is scaled to fill its bins

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.levels = tuple(levels)
        self.codebook_size = math.prod(levels)
        if min(levels) < 2 or self.codebook_size >= 2**63:
            raise ValueError(f"levels {self.levels} must be 2 or more each, and their product below 2^63")
        place = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("L", torch.tensor(levels), persistent=False)
        self.register_buffer("place", torch.tensor(place), persistent=False)
        digits = torch.arange(max(levels))[:, None].minimum(self.L - 1)
        # a table, since atanh of many numbers and of few may differ in the last bit, and black would be off by it
        self.register_buffer("steps", self._middle(digits).atanh(), persistent=False)
        self.register_buffer("centre", torch.zeros(len(levels)))
        self.register_buffer("width", torch.ones(len(levels)))

    def digits(self, idx: Tensor) -> Tensor:
        """The digits int64 [..., C] of codes int64 [...]."""
        return torch.stack(digits_of(idx, self.levels), dim=-1)

    def _middle(self, digits: Tensor) -> Tensor:
        return (2 * digits + 1) / self.L - 1

    def _step(self, digits: Tensor) -> Tensor:
        """The atanh of the middles of the bins."""
        return self.steps[digits, torch.arange(len(self.levels), device=digits.device)]

    def nearest(self, vectors: Tensor) -> Tensor:
        """int64 [N]: the code of each of [N, C]."""
        u = ((vectors.float() - self.centre) / self.width).tanh()
        digits = (self.L * (u + 1) / 2).long().clamp(min=0).minimum(self.L - 1)
        return (digits * self.place).sum(-1)

    def lookup(self, idx: Tensor) -> Tensor:
        """Codes [B, C, h, w] of int64 idx [B, h, w]."""
        return (self.centre + self.width * self._step(self.digits(idx))).movedim(-1, 1)

    def clamp(self, latent: Tensor) -> Tensor:
        """float32 [B, C, h, w]: a latent as far as codes reach, here up to the outermost ones of each channel."""
        ends = torch.stack([torch.zeros_like(self.L), self.L - 1])
        low, high = (self.centre + self.width * self._step(ends)).view(2, -1, 1, 1)
        return latent.float().maximum(low).minimum(high)

    def random_codes(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """idx int64 of this shape on the CPU, each drawn by itself, all codes equally often."""
        return torch.randint(self.codebook_size, shape, generator=generator)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the quantised latent, idx int64 [B, h, w], and 0: this quantiser needs no loss of its own.

        The rounding passes the gradient straight through; that of tanh and its inverse fades outside the bins.
        """
        with torch.autocast(latent.device.type, enabled=False):
            vectors = latent.float().movedim(1, -1)
            idx = self.nearest(vectors)
            u = ((vectors - self.centre) / self.width).tanh()
            rounded = u + (self._middle(self.digits(idx)) - u).detach()
            quantised = (self.centre + self.width * rounded.atanh()).movedim(-1, 1)
        return quantised, idx, latent.new_zeros((), dtype=torch.float32)

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """Spreads the bins over encoder outputs float32 [N, C], with 0, which black has, in the middle of a bin."""
        lit = vectors[vectors.abs().amax(1) > 1e-3]
        if len(lit) == 0:
            raise ValueError("all vectors are black, which says nothing about the levels")
        low, high = torch.quantile(lit[:: max(1, len(lit) // 100_000)], lit.new_tensor([0.005, 0.995]), dim=0)
        low, high = low.clamp(max=0), high.clamp(min=0)  # else the shift below could leave all of them in one bin
        self.width.copy_((high - low).clamp(min=1e-3) / 3)  # the outer half of a per cent saturates: tanh 1.5 = 0.905
        self.centre.copy_((low + high) / 2)
        self.centre.copy_(-self.width * self._step(self.digits(self.nearest(torch.zeros_like(low)))))
