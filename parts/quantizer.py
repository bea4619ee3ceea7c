"""Quantisers: each turns latent vectors [B, C, h, w] into a grid of codes idx int64 [B, h, w] and back.

VectorQuantizer learns a codebook; FiniteScalarQuantizer rounds every number to a few levels and has none. Both work in
float32 whatever the autocast, and share one interface: `forward`, `nearest`, `lookup`, `unrounded`, `start`,
`codebook_size`.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def rotate_onto(e: Tensor, q: Tensor) -> Tensor:
    """q as a rotation and scaling of e, so that the gradient of e is the gradient of q turned back.

    The rotation trick (Fifty et al. 2024, eq. 3 and 4): q = |q| / |e| (e - 2 r r^T e + 2 q' e'^T e) with e', q' the
    unit vectors and r that of e' + q', all of them constants, |q| / |e| at most 4. Where e or q is next to zero, and
    has no direction, the gradient passes straight through instead.

    Args:
        e, q: float32 [N, C].
    """
    with torch.no_grad():
        e_norm, q_norm = e.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
        e_unit, q_unit = e / e_norm.clamp(min=1e-6), q / q_norm.clamp(min=1e-6)
        r = F.normalize(e_unit + q_unit, dim=1)
        scale = (q_norm / e_norm.clamp(min=1e-6)).clamp(max=4)
        directed = (e_norm > 1e-3) & (q_norm > 1e-3)
    rotated = scale * (e - 2 * r * (r * e).sum(1, keepdim=True) + 2 * q_unit * (e_unit * e).sum(1, keepdim=True))
    carrier = torch.where(directed, rotated, e)
    return carrier + (q - carrier).detach()


class VectorQuantizer(nn.Module):
    """Nearest code of a learned codebook (van den Oord et al. 2017).

    The codebook follows exponential moving averages of the vectors that chose each code (ibid., appendix A.1), or, with
    ema=False, the gradient of the codebook loss ||sg[e] - q||^2. Codes that hardly anything chooses are replaced.

    Args:
        codebook_size: K.
        dim: length of a code.
        commitment: beta, the weight of ||e - sg[q]||^2, which ties the encoder to the codes.
        ema: whether moving averages or the gradient move the codes.
        sphere: vectors and codes are divided by their length, so that direction alone counts (Yu et al. 2022, 3.2).
        rotation: the gradient of the code reaches the encoder by the rotation trick instead of straight through.
        decay: of the moving averages.
        revive_below: a code chosen less often than this, where 1 is its fair share of all choices, is replaced by a
            vector of the batch.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        commitment: float = 0.25,
        *,
        ema: bool = True,
        sphere: bool = False,
        rotation: bool = False,
        decay: float = 0.99,
        revive_below: float = 0.05,
    ):
        super().__init__()
        self.codebook_size, self.commitment, self.ema, self.sphere = codebook_size, commitment, ema, sphere
        self.rotation, self.decay, self.revive_below = rotation, decay, revive_below
        codebook = self._project(torch.randn(codebook_size, dim))
        if ema:
            self.register_buffer("codebook", codebook)
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("count", torch.ones(codebook_size))  # how often chosen; 1 is the fair share of a code
        self.register_buffer("total", codebook.clone())  # sum of the vectors in the same unit

    def _project(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1) if self.sphere else vectors

    def nearest(self, vectors: Tensor) -> Tensor:
        """int64 [N]: the code nearest to each of float32 [N, dim] in Euclidean distance (angle, on the sphere)."""
        codes = self._project(self.codebook)
        with torch.autocast(vectors.device.type, enabled=False):
            parts = vectors.float().split(max(1, 2**26 // self.codebook_size))  # no more distances than memory likes
            return torch.cat([torch.addmm(codes.square().sum(1), v, codes.T, alpha=-2).argmin(1) for v in parts])

    def lookup(self, idx: Tensor) -> Tensor:
        """Codes [B, dim, h, w] of int64 idx [B, h, w]."""
        return F.embedding(idx, self._project(self.codebook)).movedim(-1, 1)

    def unrounded(self, latent: Tensor) -> Tensor:
        """float32 [B, dim, h, w]: what is rounded of a latent of that shape, on the scale of the codes."""
        return self._project(latent.float())

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns quantised latent with a gradient to the encoder, idx int64 [B, h, w], loss.

        latent: [B, dim, h, w]. In training mode the codebook moves, after it was used.
        """
        with torch.autocast(latent.device.type, enabled=False):
            B, C, h, w = latent.shape
            e = latent.float().movedim(1, -1).reshape(-1, C)
            vectors = self._project(e)
            if self.sphere:  # what has next to no length, as black has, has no direction to learn
                vectors = torch.where(e.norm(dim=1, keepdim=True) > 1e-2, vectors, vectors.detach())
            idx = self.nearest(vectors.detach())
            quantised = self.lookup(idx.view(B, h, w)).movedim(1, -1).reshape(-1, C)
            loss = self.commitment * F.mse_loss(vectors, quantised.detach())
            if not self.ema:
                loss = loss + F.mse_loss(quantised, vectors.detach())
            quantised = quantised.detach()
            passed = rotate_onto(vectors, quantised) if self.rotation else vectors + (quantised - vectors).detach()
            if self.training:
                self._follow(vectors.detach(), idx)
        return passed.view(B, h, w, C).movedim(-1, 1), idx.view(B, h, w), loss

    @torch.no_grad()
    def _follow(self, vectors: Tensor, idx: Tensor) -> None:
        count = torch.bincount(idx, minlength=len(self.count)).to(vectors.dtype)
        total = torch.zeros_like(self.total).index_add_(0, idx, vectors)
        if dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        fair = count.sum() / self.codebook_size
        self.count.lerp_(count / fair, 1 - self.decay)
        self.total.lerp_(total / fair, 1 - self.decay)
        if self.ema:
            self.codebook.copy_(self._project(self.total / self.count.clamp(min=1e-5)[:, None]))
        dead = self.count < self.revive_below
        if dead.any():  # averages too start anew, or the next update would undo the revival
            chosen = vectors[torch.randint(len(vectors), (int(dead.sum()),), device=vectors.device)]
            if dist.is_initialized():
                dist.broadcast(chosen, 0)
            self.codebook.data[dead] = chosen
            self.count[dead] = 2 * self.revive_below
            self.total[dead] = 2 * self.revive_below * chosen

    @torch.no_grad()
    def start(self, vectors: Tensor, iterations: int = 20) -> None:
        """k-means on encoder outputs float32 [N, dim], N >= K; empty clusters restart at vectors drawn at random."""
        K = self.codebook_size
        if len(vectors) < K:
            raise ValueError(f"{len(vectors)} vectors cannot start {K} codes")
        vectors = self._project(vectors)
        distinct = torch.unique(vectors, dim=0)  # half of all vectors are the black background
        distinct = distinct if len(distinct) >= K else vectors
        self.codebook.data.copy_(distinct[torch.randperm(len(distinct))[:K]])
        for _ in range(iterations):
            idx = self.nearest(vectors)
            count = torch.bincount(idx, minlength=K)
            mean = torch.zeros_like(self.total).index_add_(0, idx, vectors) / count.clamp(min=1)[:, None]
            empty = count == 0
            mean[empty] = distinct[torch.randint(len(distinct), (int(empty.sum()),))]
            self.codebook.data.copy_(self._project(mean))
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
        """int64 [N]: the code of each of float32 [N, C]."""
        u = ((vectors.float() - self.centre) / self.width).tanh()
        digits = (self.L * (u + 1) / 2).long().clamp(min=0).minimum(self.L - 1)
        return (digits * self.place).sum(-1)

    def lookup(self, idx: Tensor) -> Tensor:
        """Codes [B, C, h, w] of int64 idx [B, h, w]."""
        return (self.centre + self.width * self._step(self.digits(idx))).movedim(-1, 1)

    def unrounded(self, latent: Tensor) -> Tensor:
        """float32 [B, C, h, w]: what is rounded of a latent of that shape, up to the outermost codes."""
        ends = torch.stack([torch.zeros_like(self.L), self.L - 1])
        low, high = (self.centre + self.width * self._step(ends)).view(2, -1, 1, 1)
        return latent.float().maximum(low).minimum(high)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns quantised latent, idx int64 [B, h, w], and 0: this quantiser needs no loss of its own.

        The rounding passes the gradient straight through; that of tanh and its inverse fades outside the bins.
        """
        with torch.autocast(latent.device.type, enabled=False):
            vectors = latent.float().movedim(1, -1)
            idx = self.nearest(vectors)
            u = ((vectors - self.centre) / self.width).tanh()
            rounded = u + (self._middle(self.digits(idx)) - u).detach()
            quantised = (self.centre + self.width * rounded.atanh()).movedim(-1, 1)
        return quantised, idx, latent.new_zeros(())

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """Spreads the bins over encoder outputs float32 [N, C], with 0, which black has, in the middle of a bin."""
        lit = vectors[vectors.abs().amax(1) > 1e-3]
        if len(lit) == 0:
            raise ValueError("black vectors alone cannot start the levels")
        low, high = torch.quantile(lit[:: max(1, len(lit) // 100_000)], lit.new_tensor([0.005, 0.995]), dim=0)
        low, high = low.clamp(max=0), high.clamp(min=0)  # else the shift below could leave all of them in one bin
        self.width.copy_((high - low).clamp(min=1e-3) / 3)  # the outer half of a per cent saturates: tanh 1.5 = 0.905
        self.centre.copy_((low + high) / 2)
        self.centre.copy_(-self.width * self._step(self.digits(self.nearest(torch.zeros_like(low)))))
