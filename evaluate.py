"""Scores of a first stage on a split, beside what codecs without a network reach on the same slices.

    python evaluate.py --reconstruction vqvae               # a run, its folder, or a weights file
    python evaluate.py --reconstruction vqvae --floors      # also k-means at the same grid and K, block KLT, AVIF

SSIM is Wang et al. 2004 (util.ssim_map) after clamping and rounding to 8 bits, averaged over the whole picture; half of
every picture is black, so brain SSIM, the same map averaged over the tissue mask, stands beside it. Quality means
nothing without its price, so bits per image stand there too. Writes DIR/reconstruction_SPLIT.json and .png.
"""

import io
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import util
from dataset import Slices, find_data, has_masks, load_slices, to_uint8
from model_VAE import VAE, VQVAE, load_first_stage

# ------------------------------------------------------------------------------------------------------------ metrics


def slice_scores(x_hat: Tensor, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Scores of each slice.

    Args:
        x_hat, x: uint8 [B, H, W], reconstructed and real.
        mask: uint8 [B, H, W], non-zero on the brain, or None.
    Returns {"ssim", "psnr" in dB, and with masks "brain_ssim", NaN where no brain is}, each float64 [B].
    """
    a, b = (image.double()[:, None] / 255 for image in (x_hat, x))
    similarity = util.ssim_map(a, b)
    error = (a - b).square().mean((1, 2, 3)).clamp(min=1e-10)
    scores = {"ssim": similarity.mean((1, 2, 3)), "psnr": -10 * error.log10()}
    if mask is not None:
        brain = (mask[:, None, 5:-5, 5:-5] > 0).to(similarity)
        scores["brain_ssim"] = (similarity * brain).sum((1, 2, 3)) / brain.sum((1, 2, 3))
    return scores


def mean_scores(scores: list[dict[str, Tensor]]) -> dict[str, float]:
    """Means over all slices of a list of slice_scores, leaving out slices without brain where that is asked."""
    return {name: float(torch.cat([s[name] for s in scores]).nanmean()) for name in scores[0]}


def entropy_bits(idx: np.ndarray, codebook_size: int) -> float:
    """Zero-order entropy, bits per code, of integers idx of any shape."""
    share = np.bincount(idx.ravel(), minlength=codebook_size) / idx.size
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


def code_usage(idx: np.ndarray, codebook_size: int) -> dict[str, float]:
    """{"usage": share of codes that occur, "perplexity": 2^entropy} of integers idx of any shape."""
    return {"usage": len(np.unique(idx)) / codebook_size, "perplexity": 2 ** entropy_bits(idx, codebook_size)}


def brain_positions(masks: Tensor, model: VQVAE) -> Tensor:
    """bool [B, h, w]: the code positions of uint8 masks [B, H, W] whose block holds brain."""
    inside = model.crop((masks[:, None] > 0).float())
    return F.max_pool2d(inside, model.factor)[:, 0] > 0


# ------------------------------------------------------------------------------------------------------ a first stage


@torch.no_grad()
def score_reconstruction(model: VAE | VQVAE, data: Slices, device: torch.device, batch_size: int = 32) -> dict:
    """Mean scores, per-z SSIM, and the price in bits (VQVAE) or in numbers and KL bits (VAE) over a whole split."""
    scores, codes, brain, kl = [], [], [], 0.0
    for index in tqdm(torch.arange(len(data)).split(batch_size), desc="reconstruct", unit="batch", disable=None):
        x, z, _ = data.batch(index, device)
        if isinstance(model, VQVAE):
            idx = model.encode_indices(x, z)
            x_hat = model.decode_indices(idx, z)
            codes.append(idx.cpu().numpy())
            if data.masks is not None:
                brain.append(brain_positions(data.masks[index], model).numpy())
        else:
            x_hat = model.decode(model.encode(x, z), z)
            mean, log_variance = model.posterior(x, z)
            kl += float(model.kl_bits(mean, log_variance).sum())
        masks = data.masks[index] if data.masks is not None else None
        scores.append(slice_scores(to_uint8(x_hat)[:, 0].cpu(), data.images[index].cpu(), masks))
    _, h, w = model.latent_shape
    result = mean_scores(scores) | {"numbers": math.prod(model.latent_shape), "grid": [h, w]}
    per_slice = torch.cat([s["ssim"] for s in scores])
    result["ssim_per_z"] = {int(z): float(per_slice[data.z == z].mean()) for z in data.z.unique()}
    if isinstance(model, VQVAE):
        codes = np.concatenate(codes)
        result |= {
            "codebook_size": model.codebook_size,
            "fixed_bits": model.fixed_bits,
            "entropy_bits": entropy_bits(codes, model.codebook_size) * h * w,
        } | code_usage(codes, model.codebook_size)
        if brain:
            used = code_usage(codes[np.concatenate(brain)], model.codebook_size)
            result |= {f"brain_{name}": value for name, value in used.items()}
    else:
        result["kl_bits"] = kl / len(data)
    return result


# ------------------------------------------------------------------------- floors: codecs without a network, same box


def to_blocks(model: VAE | VQVAE, pictures: Tensor) -> Tensor:
    """The f x f blocks of the coded box, float32 [B, h * w, f * f] with grey 0..1, of uint8 [B, S, S]."""
    x = model.crop(pictures[:, None].float() / 255)
    return F.unfold(x, model.factor, stride=model.factor).transpose(1, 2)


def from_blocks(model: VAE | VQVAE, blocks: Tensor) -> Tensor:
    """The pictures, uint8 [B, S, S], of what to_blocks returns."""
    x = F.fold(blocks.transpose(1, 2), model.box[2:], model.factor, stride=model.factor)
    return to_uint8(model.pad(2 * x - 1))[:, 0]


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
    for k in range(K - 1):  # far from all centres so far, with probability as the squared distance
        centres[k] = candidates[torch.multinomial(distance + 1e-12, 1, generator=generator)[0]]
        to_new = (candidates - centres[k]).square().sum(1)
        distance = torch.minimum(distance, to_new) if k else to_new

    for _ in tqdm(range(iterations), desc=f"k-means, K {K}", disable=None):
        idx, distance = _nearest(pool, centres)
        count = torch.bincount(idx, minlength=K - 1)
        mean = torch.zeros_like(centres).index_add_(0, idx, pool) / count.clamp(min=1)[:, None]
        empty = (count == 0).nonzero()[:, 0]
        mean[empty] = pool[distance.topk(len(empty)).indices]  # to the vectors that are served worst
        centres = mean
    return torch.cat([centres, torch.zeros(1, centres.shape[1])])


def _nearest(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest centre and squared distance to it, for each of [N, D]."""
    parts = [
        (v.square().sum(1, keepdim=True) + centres.square().sum(1) - 2 * v @ centres.T).min(1)
        for v in vectors.split(16_384)
    ]
    return torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])


@torch.no_grad()
def score_floors(model: VAE | VQVAE, train: Slices, data: Slices, cases: int = 60) -> list[dict]:
    """Rows {"codec", "bits" or "numbers", scores} of simple codecs on the split `data`.

    k-means has the model's grid and K, the block KLT its grid and width; both are fitted to the first training cases.
    """
    C, h, w = model.latent_shape
    f, rows = model.factor, []

    def score(codec: str, reconstruct: Callable[[Tensor], Tensor]) -> dict:
        scores = []
        for index in tqdm(torch.arange(len(data)).split(32), desc=codec, unit="batch", disable=None):
            real = data.images[index].cpu()
            masks = data.masks[index] if data.masks is not None else None
            scores.append(slice_scores(reconstruct(real), real, masks))
        return {"codec": codec, **mean_scores(scores)}

    chosen = torch.isin(train.case, train.case.unique()[:cases])
    blocks = to_blocks(model, train.images.cpu()[chosen]).flatten(0, 1)
    if isinstance(model, VQVAE):
        centres = kmeans(blocks, model.codebook_size)

        def quantise(real: Tensor) -> Tensor:
            vectors = to_blocks(model, real)
            return from_blocks(model, centres[_nearest(vectors.flatten(0, 1), centres)[0]].view_as(vectors))

        rows.append({**score(f"k-means {f}x{f}, K {model.codebook_size}", quantise), "bits": model.fixed_bits})

    basis = torch.linalg.eigh((blocks.T @ blocks).double())[1].flip(1)[:, :C].float()
    row = score(f"block KLT f{f} d{C}", lambda real: from_blocks(model, to_blocks(model, real) @ basis @ basis.T))
    rows.append({**row, "numbers": C * h * w})

    for quality in (1, 5, 10, 20, 30):
        sizes: list[int] = []
        row = score(f"AVIF quality {quality}", partial(avif, quality=quality, sizes=sizes))
        rows.append({**row, "bits": 8 * float(np.mean(sizes))})
    return rows


def avif(pictures: Tensor, quality: int, sizes: list[int]) -> Tensor:
    """uint8 [B, H, W] through AVIF and back; appends the sizes in bytes."""
    decoded = []
    for picture in pictures.numpy():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "AVIF", quality=quality)
        sizes.append(buffer.tell())
        decoded.append(np.array(Image.open(buffer).convert("L")))
    return torch.from_numpy(np.stack(decoded))


# ------------------------------------------------------------------------------------------------------------- report


def table(rows: list[dict]) -> str:
    """A Markdown table of codecs: price, SSIM, brain SSIM, PSNR."""
    lines = ["| codec | bits per image | numbers | SSIM | brain SSIM | PSNR, dB |", "|---|---|---|---|---|---|"]
    for row in rows:
        bits = f"{row['bits']:,.0f}" if "bits" in row else "-"
        numbers = f"{row['numbers']:,}" if "numbers" in row else "-"
        brain = f"{row['brain_ssim']:.4f}" if "brain_ssim" in row else "-"
        lines.append(f"| {row['codec']} | {bits} | {numbers} | {row['ssim']:.4f} | {brain} | {row['psnr']:.2f} |")
    return "\n".join(lines)


def draw(rows: list[dict], result: dict, split: str):
    """Left: quality against bits of every codec that has bits. Right: SSIM of the first stage for every z."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    score = "brain_ssim" if "brain_ssim" in result else "ssim"
    for n, row in enumerate(row for row in rows if "bits" in row):
        left.scatter(
            row["bits"],
            row[score],
            s=70 if n == 0 else 30,
            marker="*" if n == 0 else "o",
            color="C3" if n == 0 else "C0",
        )
        left.annotate(row["codec"], (row["bits"], row[score]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    left.set(
        xscale="log",
        xlabel="bits per image",
        ylabel=score.replace("_", " ").replace("ssim", "SSIM"),
        title=f"quality and its price on {split}",
    )
    left.margins(x=0.35)
    right.plot(list(result["ssim_per_z"]), list(result["ssim_per_z"].values()), marker=".")
    right.set(xlabel="slice index z", ylabel="SSIM", title="first stage, per slice index (0 is the lowest)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = util.plain_parser(__doc__)
    parser.add_argument(
        "--reconstruction",
        metavar="RUN",
        default="vqvae",
        help="first stage: run name, folder or weights file (default: %(default)s)",
    )
    parser.add_argument("--data", metavar="FOLDER", help="as in training")
    parser.add_argument(
        "--split",
        choices=("train", "validate", "test"),
        default="validate",
        help="tune on validate, open test once (default: %(default)s)",
    )
    parser.add_argument("--floors", action="store_true", help="also fit and score k-means, block KLT and AVIF")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the folder of the weights")
    args = parser.parse_args()
    device = util.pick_device(args.device)
    model = load_first_stage(args.reconstruction, device)
    folder = find_data(args.data)
    data = load_slices(folder, args.split, model.image_size, masks=has_masks(folder, args.split))
    result = score_reconstruction(model, data, device)
    price = {"bits": result["fixed_bits"]} if "fixed_bits" in result else {}  # a VAE's mean is real-valued
    path = Path(model.description["path"])
    rows = [{"codec": f"{model.kind} ({args.reconstruction})", **price, **result}]
    if args.floors:
        rows += score_floors(model.cpu(), load_slices(folder, "train", model.image_size), data)
    out = args.out or path.parent
    report = {"weights": str(path), "data": data.describe(), "result": result, "rows": rows}
    util.write_file(out / f"reconstruction_{args.split}.json", json.dumps(report, indent=2).encode())
    util.save_picture(out / f"reconstruction_{args.split}.png", draw(rows, result, args.split))
    print(table(rows))
    print("  ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float | int)))
    print(f"scores: {out}/reconstruction_{args.split}.json and .png")


if __name__ == "__main__":
    util.command(main)
