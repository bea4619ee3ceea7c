"""Floors: the scores of codecs without a network on the same slices, which evaluate.py prints beside a first stage.

k-means and the block Karhunen-Loeve transform see exactly what the model sees, the f x f blocks of its coded box, and
pay for the same grid; AVIF codes the whole picture at the quality whose files come closest to the model's bits. A first
stage that does not beat them was not worth its training.
"""

import io
from bisect import bisect_right
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor

import util
from dataset import Slices, to_uint8
from parts.autoencoder import Autoencoder, karhunen_loeve
from parts.quantizer import lloyd, nearest_code

Codec = Callable[[Tensor], Tensor]  # real to reconstructed pictures, both uint8 [B, S, S]
LARGEST_KMEANS = 8192  # codes; beyond it k-means takes hours and has few vectors per centre to learn from


@torch.no_grad()
def score_floors(
    model: Autoencoder,
    train: Slices,
    data: Slices,
    score: Callable[[str, Codec], dict],
    bits: float,
    codebook_size: int | None = None,
    brains: int = 60,
) -> list[dict]:
    """Rows {"codec", "bits" or "numbers", scores} of the codecs on the split `data`.

    Args:
        model: gives box, block size and width; its network is not used.
        train: the codecs are fitted to the blocks of its first `brains` brains.
        score: the scores on `data` of a codec, called with its name and the function from real to decoded pictures.
        bits: per image, which AVIF is to match.
        codebook_size: K for k-means on the model's grid; None leaves k-means out.
    """
    has_avif = features.check("avif")
    if not has_avif:  # said before the minutes of k-means
        print("AVIF: left out, since this Pillow was built without it; pip install --upgrade pillow brings it")
    f, (C, h, w), rows = model.factor, model.latent_shape, []
    C = min(C, f * f)  # a block has no more coordinates
    chosen = torch.isin(train.case, train.case.unique()[:brains])
    blocks = to_blocks(model, train.images.cpu()[chosen]).flatten(0, 1)
    if codebook_size is not None and codebook_size <= LARGEST_KMEANS:
        centres = kmeans(blocks, codebook_size)
        scores = score(f"k-means {f}x{f}, K {codebook_size}", partial(quantise, model, centres))
        rows.append({**scores, "bits": h * w * float(np.log2(codebook_size))})
    elif codebook_size is not None:
        print(f"k-means: left out, since K {codebook_size:,} is above {LARGEST_KMEANS:,}")
    scores = score(f"block KLT f{f} d{C}", partial(project, model, karhunen_loeve(blocks, C)[0].float()))
    rows.append({**scores, "numbers": C * h * w})
    if has_avif:
        quality, sizes = avif_quality(data.images, bits), []
        scores = score(f"AVIF quality {quality}", partial(avif, quality=quality, sizes=sizes))
        rows.append({**scores, "bits": 8 * float(np.mean(sizes))})
    return rows


# ------------------------------------------------------------------------------------------- blocks of the coded box


def to_blocks(model: Autoencoder, pictures: Tensor) -> Tensor:
    """The f x f blocks of the coded box, float32 [B, h * w, f * f] with grey 0..1, of uint8 [B, S, S]."""
    x = model.crop(pictures[:, None].float() / 255)
    return F.unfold(x, model.factor, stride=model.factor).transpose(1, 2)


def from_blocks(model: Autoencoder, blocks: Tensor) -> Tensor:
    """The pictures, uint8 [B, S, S], of blocks as to_blocks returns them."""
    x = F.fold(blocks.transpose(1, 2), model.box[2:], model.factor, stride=model.factor)
    return to_uint8(model.pad(2 * x - 1))[:, 0]


def project(model: Autoencoder, basis: Tensor, pictures: Tensor) -> Tensor:
    """Every block of uint8 [B, S, S] from its C coordinates in the orthonormal rows of basis [C, f * f]."""
    return from_blocks(model, to_blocks(model, pictures) @ basis.T @ basis)


# ------------------------------------------------------------------------------------------------------------ k-means


def quantise(model: Autoencoder, centres: Tensor, pictures: Tensor) -> Tensor:
    """Every block of uint8 [B, S, S] replaced by the nearest of centres [K, f * f]."""
    vectors = to_blocks(model, pictures)
    return from_blocks(model, centres[nearest_code(vectors.flatten(0, 1), centres)].view_as(vectors))


@torch.no_grad()
def kmeans(vectors: Tensor, K: int, seed: int = 0, iterations: int = 40, at_most: int = 300_000) -> Tensor:
    """Centres [K, D] of at most `at_most` vectors [N, D] >= 0, by Lloyd's algorithm from a k-means++ start.

    The last centre is zero, since black needs one and no more (Arthur and Vassilvitskii 2007 for the start).
    """
    generator = torch.Generator().manual_seed(seed)
    pool = vectors[vectors.amax(1) > 0]
    pool = pool[torch.randperm(len(pool), generator=generator)[:at_most]]

    candidates, distance = pool[:30_000], torch.ones(min(len(pool), 30_000))
    centres = torch.zeros(K - 1, pool.shape[1])
    for k in util.progress(range(K - 1), f"k-means start, K {K}", unit="centre"):
        # far from all centres so far, with probability as the squared distance
        centres[k] = candidates[torch.multinomial(distance + 1e-12, 1, generator=generator)[0]]
        to_new = (candidates - centres[k]).square().sum(1)
        distance = torch.minimum(distance, to_new) if k else to_new

    steps = util.progress(range(iterations), f"k-means, K {K}", unit="iteration")
    return torch.cat([lloyd(pool, centres, steps, generator=generator), torch.zeros(1, centres.shape[1])])


# --------------------------------------------------------------------------------------------------------------- AVIF


def avif(pictures: Tensor, quality: int, sizes: list[int]) -> Tensor:
    """uint8 [B, H, W] through AVIF and back; appends the sizes in bytes of the pictures' own data.

    The container around it, 270 bytes or so whatever the picture, is left out: our codes have none either.
    """
    decoded = []
    for picture in pictures.numpy():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "AVIF", quality=quality)
        sizes.append(buffer.tell() - buffer.getvalue().index(b"mdat") - 4)
        decoded.append(np.array(Image.open(buffer).convert("L")))
    return torch.from_numpy(np.stack(decoded))


def avif_quality(pictures: Tensor, bits: float, slices: int = 32) -> int:
    """The quality 0..100 whose files come nearest to `bits` per image, on average over `slices` spread slices.

    pictures: uint8 [N, S, S]. Files grow with quality, so bisection finds the two neighbours around `bits`.
    """
    spread = torch.linspace(0, len(pictures) - 1, min(slices, len(pictures))).round().long()
    watched = pictures.cpu()[spread]

    @cache
    def bits_at(quality: int) -> float:
        sizes: list[int] = []
        avif(watched, quality, sizes)
        return 8 * float(np.mean(sizes))

    above = bisect_right(range(101), bits, key=bits_at)  # the first quality that costs more
    return min(range(max(0, above - 1), min(100, above) + 1), key=lambda quality: abs(bits_at(quality) - bits))
