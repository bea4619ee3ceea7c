"""Scores of a first stage, or of new brains, on a split.

    python evaluate.py --reconstruction vqvae               # a run, its folder, or a weights file
    python evaluate.py --reconstruction vqvae --no-floors   # without k-means, block KLT and AVIF, which take minutes
    python evaluate.py --samples diffusion                  # what a second stage has drawn: NAME_vis/samples
    python evaluate.py --samples FOLDER                     # any folder of case_NNN_slice_Z.nii.png, whole brains

Reconstructions. SSIM is Wang et al. 2004 (util.ssim_map) after clamping and rounding to 8 bits, averaged over the whole
picture; half of every picture is black, so brain SSIM, the same map averaged over the tissue mask, stands beside it.
Quality means nothing without its price, so bits per image stand there too, and what codecs without a network reach on
the same slices. Writes DIR/reconstruction_SPLIT.json and .png.

Samples. Every score is computed twice in the same way, against the same training brains: of the sampled brains, and of
as many held-out real ones, which is the floor. Writes DIR/samples_SPLIT.json, .md (a page), .png and _nearest.png.

Brackets hold 95 % intervals, by bootstrap over cases: the slices of one head are no independent observations.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import util
from dataset import SLICES_PER_CASE, Slices, find_data, has_masks, list_slices, load_slices, read_png, to_uint8
from floors import score_floors
from metrics import (
    COUNTABLE,
    RINGS,
    adjacent_ssim,
    all_scores,
    bootstrap_interval,
    centred_interval,
    code_usage,
    curve_over_z,
    decibel,
    diversity,
    entropy_bits,
    frechet_distance,
    join,
    kernel_means,
    latent_statistics,
    manifold_scores,
    mmd2,
    nearest,
    noise_level,
    patch_histograms,
    radial_spectrum,
    random_features,
    reslice_spectrum,
    slice_scores,
    sliced_wasserstein,
    summarise,
    texture_features,
    thumbnails,
    wasserstein,
)
from model_VAE import Autoencoder, load_first_stage
from pixelCNN import PRIORS, PixelCNN, PixelCNN2, load_prior
from quantizer import digits_of
from scorer import OWN, TISSUES, Scorer, find_scorer, read_slices
from util import UserError

# ------------------------------------------------------------------------------------------------------ a first stage


def score_codec(data: Slices, codec: str, reconstruct: Callable[[Tensor], Tensor]) -> dict:
    """{"codec", means and intervals of all_scores} on a split of a function from real to decoded uint8 [B, S, S]."""
    scores = []
    for index in tqdm(torch.arange(len(data)).split(32), desc=codec, unit="batch", disable=None):
        real, masks = data.images[index].cpu(), data.masks[index] if data.masks is not None else None
        scores.append(all_scores(reconstruct(real), real, masks))
    return {"codec": codec, **summarise(join(scores), data.case)}


def brain_positions(masks: Tensor, model: Autoencoder, grid: tuple[int, int] | None = None) -> Tensor:
    """bool [B, h, w]: the positions of a grid, the latent's unless given, whose block of masks [B, H, W] has brain.

    Of pictures instead of masks: those whose block is not black.
    """
    inside = model.crop((masks[:, None] > 0).float())
    return F.adaptive_max_pool2d(inside, grid or model.latent_shape[1:])[:, 0] > 0


def code_statistics(
    idx: np.ndarray, codebook_size: int, levels: tuple[int, ...] | None = None, brain: np.ndarray | None = None
) -> dict:
    """What one grid of codes costs and uses.

    Args:
        idx: int64 [N, h, w].
        levels: of a product code. With more than COUNTABLE codes the entropy is the sum of the channels', an upper
            bound, and usage is left out.
        brain: bool [N, h, w], the positions that hold brain, or None.
    Returns {"grid", "codebook_size", "entropy_bits" per image, and where codes can be counted "usage", "perplexity",
    and with brain "brain_usage", "brain_perplexity"}.
    """
    positions = idx[0].size
    result = {"grid": list(idx.shape[1:]), "codebook_size": codebook_size}
    if codebook_size > COUNTABLE:
        digits = digits_of(idx, levels or [codebook_size])
        return result | {"entropy_bits": positions * sum(entropy_bits(digit) for digit in digits)}
    result |= {"entropy_bits": positions * entropy_bits(idx)} | code_usage(idx, codebook_size)
    if brain is not None and brain.any():
        result |= {f"brain_{name}": value for name, value in code_usage(idx[brain], codebook_size).items()}
    return result


@torch.no_grad()
def score_reconstruction(
    model: Autoencoder,
    data: Slices,
    device: torch.device,
    batch_size: int = 32,
    prior: PixelCNN | PixelCNN2 | None = None,
    seed: int = 0,
) -> dict:
    """Means with intervals, curves over z, power by frequency, and the price in bits, over a whole split.

    Args:
        prior: adds "prior_bits", what the codes cost under it.
        seed: of the permutation of z for the scores "*_shuffled_z", own z to the encoder, another's to the decoder,
            and of the grain, for a decoder that takes it: "*_drawn", and power, are those of a draw.
    """
    has_codes = hasattr(model, "encode_indices")
    encode, decode = (model.encode_indices, model.decode_indices) if has_codes else (model.encode, model.decode)
    generator = torch.Generator().manual_seed(seed)
    wrong_z = data.z[torch.randperm(len(data), generator=generator)]
    scores, codes, brain, moments = [], [], [], {}
    power = torch.zeros(2, RINGS, dtype=torch.float64)  # reconstructed, real
    for index in tqdm(torch.arange(len(data)).split(batch_size), desc="reconstruct", unit="batch", disable=None):
        x, z, _ = data.batch(index, device)
        real, masks = data.images[index].cpu(), data.masks[index] if data.masks is not None else None
        latent = encode(x, z)
        decoded, misled = (to_uint8(decode(latent, at))[:, 0].cpu() for at in (z, wrong_z[index].to(device)))
        score = all_scores(decoded, real, masks)
        told_wrong = slice_scores(misled, real, masks)
        if model.draws:  # the scores above are those of its centre
            drawn = to_uint8(decode(latent, z, model.draw_grain(len(z), generator)))[:, 0].cpu()
            score |= {f"{name}_drawn": value for name, value in slice_scores(drawn, real, masks).items()}
        score |= {f"{name}_shuffled_z": told_wrong[name] for name in ("ssim", "brain_ssim") if name in told_wrong}
        power += torch.stack([radial_spectrum(p).sum(0) for p in (drawn if model.draws else decoded, real)])
        if has_codes:
            grids = [latent] if isinstance(latent, Tensor) else list(latent)
            codes.append([idx.cpu().numpy() for idx in grids])
            if masks is not None:
                brain.append([brain_positions(masks, model, idx.shape[1:]).numpy() for idx in grids])
            if prior is not None:
                score["prior_bits"] = prior.bits(latent, z).double().cpu()
        else:
            mean, log_variance = model.posterior(x, z)
            score["kl_bits"] = model.kl_bits(mean, log_variance).double().cpu()
            where = {"": torch.ones(len(x), *mean.shape[2:], dtype=torch.bool), "head_": brain_positions(real, model)}
            where |= {"brain_": brain_positions(masks, model)} if masks is not None else {}
            parts = torch.stack([mean.double(), mean.double().square(), log_variance.double().exp()]).cpu()
            for name, inside in where.items():
                total = torch.einsum("pbchw,bhw->pc", parts, inside.double())
                known = moments.get(name, (0, 0))
                moments[name] = (known[0] + total, known[1] + inside.sum())
        scores.append(score)

    per_slice = join(scores)
    result = summarise(per_slice, data.case)
    result |= {"numbers": math.prod(model.latent_shape), "grid": list(model.latent_shape[1:])}
    for name in ("ssim", "brain_ssim"):
        if name in result:
            curve, interval = curve_over_z(per_slice[name], data.z, data.case)
            result |= {f"{name}_per_z": curve, f"{name}_per_z_interval": interval}
    result["spectrum"] = {  # frequency: the middle of each ring, cycles per pixel
        "frequency": [(k + 0.5) * 0.5 / RINGS for k in range(RINGS)],
        "power_ratio": (power[0] / power[1].clamp(min=1e-12)).tolist(),
    }
    if has_codes:
        return result | {"fixed_bits": model.fixed_bits} | _price_of_grids(model, codes, brain)
    for name, (total, count) in moments.items():
        if count:
            result |= {name + key: value for key, value in latent_statistics(*(total / count)).items()}
    return result


def _price_of_grids(model: Autoencoder, codes: list[list[np.ndarray]], brain: list[list[np.ndarray]]) -> dict:
    """code_statistics of the only grid, or, of several, "entropy_bits" of all and "levels", a list of them."""
    grids = [np.concatenate(level) for level in zip(*codes)]
    on_brain = [np.concatenate(level) for level in zip(*brain)] or [None] * len(grids)
    factors = getattr(model.quantizer, "levels", None)
    levels = [
        code_statistics(idx, model.codebook_size, factors, inside) for idx, inside in zip(grids, on_brain, strict=True)
    ]
    if len(levels) == 1:
        return levels[0]
    return {"entropy_bits": sum(level["entropy_bits"] for level in levels), "levels": levels}


def find_prior(run: str | None, model: Autoencoder, device: torch.device) -> PixelCNN | PixelCNN2 | None:
    """The PixelCNN of a run; unless one is named, the run pixelcnn or the released one if it was trained on this stage.

    Raises UserError when the named one does not fit; says how to get one when there is none.
    """
    if not hasattr(model, "encode_indices"):
        if run is not None:
            raise UserError(f"--prior {run}: a {model.kind} has no codes; leave --prior out")
        return None

    def fits(description: dict) -> bool:
        trained_on = description.get("first_stage", {}).get("digest")
        return description["kind"] in PRIORS and trained_on == model.description["digest"]

    if run is None:
        own, released = util.run_weights("pixelcnn"), util.RELEASED / "pixelcnn.safetensors"
        fitting = [path for path in (own, released) if path.is_file() and fits(util.load_weights(path)[1])]
        if not fitting:
            first_stage = model.description["path"]
            print(
                "bits under a prior: left out; train one with: "
                f"python pixelCNN.py --first-stage {first_stage}" + (" --name NEW" if own.is_file() else "")
            )
            return None
        run = fitting[0]
    prior, _, description = load_prior(run, device)
    if not fits(description):
        raise UserError(f"--prior {run} was trained on another first stage; name one trained on this, or leave it out")
    return prior


# ------------------------------------------------------------------------------------------------------- sampled brains

SPACES = {"trained": "trained encoder", "random": "random network", "texture": "histogram and texture"}
REFERENCE = 64  # training brains, evenly spread, that both sampled and held-out ones are compared with
# name: (what it is called, unit, group on the page); the order is that of the page
SAMPLE_SCORES = {
    **{f"frechet_{space}": (f"Frechet distance, {name}", "", "distance") for space, name in SPACES.items()},
    **{f"mmd2_{space}": (f"MMD², {name}, x 1000", "", "distance") for space, name in SPACES.items()},
    "sliced_wasserstein": ("sliced Wasserstein, mean of levels, x 1000", "", "distance"),
    "sliced_wasserstein_finest": ("sliced Wasserstein, finest level, x 1000", "", "distance"),
    "spectrum": ("power spectrum, rms difference", "dB", "distance"),
    "csf_wasserstein": ("CSF area, 1-Wasserstein", "mm²", "distance"),
    "grey_wasserstein": ("grey-matter area, 1-Wasserstein", "mm²", "distance"),
    "white_wasserstein": ("white-matter area, 1-Wasserstein", "mm²", "distance"),
    "adjacent_profile": ("SSIM of neighbouring slices, mean difference of 31 pairs", "", "distance"),
    "reslice_spectrum": ("spectrum along z, rms difference", "dB", "distance"),
    "precision": ("precision", "", "value"),
    "recall": ("recall", "", "value"),
    "density": ("density", "", "value"),
    "coverage": ("coverage", "", "value"),
    "diversity": ("MS-SSIM of different brains", "", "value"),
    "noise": ("noise level", "grey levels", "value"),
    "z_error": ("error of z", "slices", "value"),
    "adjacent_ssim": ("SSIM of neighbouring slices", "", "value"),
    "copies": ("slices nearer to training than 99 % of held-out ones", "share", "copies"),
    "copied_brains": ("brains nearer to training than any held-out one", "share", "copies"),
}


def load_samples(run: str, limit: int | None) -> tuple[Tensor, list[int], Path]:
    """Whole brains uint8 [n, 32, S, S], their numbers, and the folder, of a second stage's run or a folder of slices.

    Cases that lack slices are left out, and said. Raises UserError where fewer than two brains are left.
    """
    folder = Path(run) if Path(run).is_dir() else Path(f"{run}_vis") / "samples"
    if not folder.is_dir():
        raise UserError(
            f"--samples {run}: neither a folder nor a run with {folder}; "
            f"draw some with: python stable_diffusion.py --name {Path(run).name} --sample --brains 35"
        )
    files: dict[int, dict[int, Path]] = {}
    for case, z, path in list_slices(folder, "samples"):
        files.setdefault(case, {})[z] = path
    whole = {case: of for case, of in files.items() if of.keys() == set(range(SLICES_PER_CASE))}
    if len(whole) < len(files):
        print(f"{len(files) - len(whole)} of {len(files)} brains have not all 32 slices and are left out")
    cases = list(whole)[:limit]
    if len(cases) < 2:
        raise UserError(f"{folder} has {len(cases)} whole brains; scores of samples need two, and trust needs dozens")
    pictures = [[read_png(whole[case][z]) for z in range(SLICES_PER_CASE)] for case in cases]
    shapes = {picture.shape for brain in pictures for picture in brain}
    if len(shapes) > 1 or len(set(*shapes)) > 1:
        raise UserError(f"{folder} has pictures of {sorted(shapes)} pixels; squares of one size are expected")
    return torch.from_numpy(np.array(pictures)), cases, folder


def measure(brains: Tensor, scorer: Scorer, title: str) -> dict[str, Tensor]:
    """Everything about each brain by itself that scores are made of, [n, ...] each, of uint8 [n, 32, S, S]."""
    found = []
    for brain in tqdm(brains, desc=f"measure {title}", unit="brain", disable=None):
        seen = read_slices(scorer, brain)
        found.append(
            {
                "trained": seen["features"],
                "random": random_features(brain),
                "texture": texture_features(brain),
                "areas": seen["areas"],
                "z_error": (seen["z"] - torch.arange(len(brain))).abs(),
                "noise": noise_level(brain),
                "spectrum": radial_spectrum(brain).mean(0).float(),
                "adjacent": adjacent_ssim(brain[None])[0].float(),
                "reslice": reslice_spectrum(brain[None])[0].float(),
                "patches": patch_histograms(brain),
            }
        )
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def measure_real(data: Slices, cases: Tensor, scorer: Scorer, digest: str) -> dict[str, Tensor]:
    """measure of the given cases of a split, and their "diversity"; kept in data/cache, since real brains stay.

    The key holds the slices, the scorer (by its digest) and the code that measures.
    """
    code = [Path(__file__).parent / name for name in ("metrics.py", "scorer.py")]
    key = hashlib.blake2b(f"{data.digest} {cases.tolist()} {digest}".encode(), digest_size=8)
    for path in code:
        key.update(path.read_bytes())
    cache = Path("data/cache") / f"{data.split}_measures_{data.images.shape[-1]}_{key.hexdigest()}.safetensors"
    if cache.is_file():
        return safetensors.torch.load_file(cache)
    brains = torch.stack([data.images[data.case == case] for case in cases])
    found = measure(brains, scorer, data.split) | {"diversity": diversity(brains)}
    util.write_file(cache, safetensors.torch.save(found))
    return found


def statistics_of(x: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, tuple[Callable, int]]:
    """Scores as functions of brain indices (of a bootstrap resample), and how many brains these count.

    x, reference: measure of the brains scored, also with "diversity", and of those they are compared with. Features
    are in units of the reference's standard deviations.
    """
    n, scores = len(x["areas"]), {}
    for space in SPACES:
        mean, sd = reference[space].flatten(0, 1).mean(0), reference[space].flatten(0, 1).std(0).clamp(min=1e-6)
        a, b = ((part[space] - mean) / sd for part in (x, reference))
        width = float(torch.pdist(b.flatten(0, 1)[:: max(1, len(b) // 16)]).median())
        blocks = [kernel_means(*pair, width) for pair in ((a, a), (a, b), (b, b))]
        scores[f"frechet_{space}"] = lambda i, a=a, b=b: frechet_distance(a[i].flatten(0, 1), b.flatten(0, 1)), n
        scores[f"mmd2_{space}"] = lambda i, blocks=blocks: 1000 * mmd2(*blocks, i), n
        if space == "trained":
            as_many = b[torch.linspace(0, len(b) - 1, min(n, len(b))).long()]
            for name, values in manifold_scores(a, as_many).items():
                scores[name] = lambda i, values=values: float(values[i].mean()), len(values)

    patches, spectrum, reslice = (reference[name].mean(0) for name in ("patches", "spectrum", "reslice"))
    scores["sliced_wasserstein"] = (
        lambda i: float(sliced_wasserstein(x["patches"][i].mean(0), patches).mean()), n)  # fmt: skip
    scores["sliced_wasserstein_finest"] = (
        lambda i: float(sliced_wasserstein(x["patches"][i].mean(0), patches)[0]), n)  # fmt: skip
    for name, known in (("spectrum", spectrum), ("reslice", reslice)):
        key = "reslice_spectrum" if name == "reslice" else name
        scores[key] = (
            lambda i, name=name, known=known: float(decibel(x[name][i].mean(0), known).square().mean().sqrt()), n,
        )  # fmt: skip
    for k, tissue in enumerate(TISSUES):
        scores[f"{tissue}_wasserstein"] = (
            lambda i, k=k: float(wasserstein(x["areas"][i, :, k], reference["areas"][:, :, k]).mean()), n,
        )  # fmt: skip
    profile = reference["adjacent"].mean(0)
    scores["adjacent_profile"] = lambda i: float((x["adjacent"][i].mean(0) - profile).abs().mean()), n
    for name, key in (("noise", "noise"), ("z_error", "z_error"), ("adjacent_ssim", "adjacent"), ("diversity",) * 2):
        scores[name] = lambda i, key=key: float(x[key][i].mean()), n
    return scores


def with_intervals(scores: dict[str, tuple[Callable, int]], resamples: int) -> dict:
    """{name: value, name_interval: 95 %} of statistics_of."""
    result = {}
    for name, (statistic, count) in tqdm(scores.items(), desc="bootstrap", unit="score", disable=None):
        result[name] = statistic(torch.arange(count))
        least = -math.inf if name.startswith("mmd2") else 0.0
        result[f"{name}_interval"] = centred_interval(statistic, count, resamples, least=least)
    return result


def copy_scores(near: dict[str, Tensor], near_real: dict[str, Tensor]) -> dict:
    """Shares of slices and brains that lie nearer to training ones than held-out ones do, and the limits.

    By relative distance (metrics.nearest). "copies" are below the 1st percentile of held-out slices, so 1 in 100 of
    new ones is too; "copies_excess" is the share beyond that. "copied_brains" are below all held-out brains.
    """
    limit = float(near_real["relative"].quantile(0.01))
    brain_limit = float(near_real["brain_relative"].min())
    result = {"copies_limit": limit, "brain_limit": brain_limit}
    for name, values in (
        ("copies", (near["relative"] < limit).double().mean(1)),
        ("copied_brains", (near["brain_relative"] < brain_limit).double()),
    ):
        interval = bootstrap_interval(values, torch.arange(len(values)))
        result |= {name: float(values.mean()), f"{name}_interval": interval}
    return result | {"copies_excess": max(0.0, (result["copies"] - 0.01) / 0.99)}


def score_samples(
    brains: Tensor, train: Slices, held_out: Slices, scorer: Scorer, digest: str, resamples: int = 200
) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """All scores of sampled brains uint8 [n, 32, S, S], beside those of as many held-out ones.

    Args:
        train, held_out: real slices of the samples' size.
        digest: of the scorer's weights.
        resamples: of the bootstrap over brains.
    Returns (scores, measures): {"brains", "reference_brains", "samples", "real": {score: value, score_interval}}, and
    {"samples", "real", "reference", "near", "near_real"}, what the pictures are drawn of.
    """
    known, real_cases = (whole_cases(data) for data in (train, held_out))
    n = min(len(brains), len(real_cases))
    if n < len(brains):
        print(f"{n} of {len(brains)} brains are scored: there are no more held-out ones to set beside them")
    chosen = {
        "reference": (train, known[torch.linspace(0, len(known) - 1, min(REFERENCE, len(known))).long()]),
        "real": (held_out, real_cases[torch.linspace(0, len(real_cases) - 1, n).long()]),
    }
    measures = {name: measure_real(data, cases, scorer, digest) for name, (data, cases) in chosen.items()}
    measures["samples"] = measure(brains[:n], scorer, "samples") | {"diversity": diversity(brains[:n])}
    small = torch.stack([thumbnails(train.images[train.case == case]) for case in known])
    everyone = torch.stack([held_out.images[held_out.case == case] for case in real_cases])
    measures["near"], measures["near_real"] = (nearest(part.cpu(), small.cpu()) for part in (brains[:n], everyone))
    result = {"brains": n, "reference_brains": len(chosen["reference"][1]), "training_brains": len(known)}
    for name in ("samples", "real"):
        result[name] = with_intervals(statistics_of(measures[name], measures["reference"]), resamples)
        near = measures["near" if name == "samples" else "near_real"]
        result[name] |= copy_scores(near, measures["near_real"])
    return result, measures


def whole_cases(data: Slices) -> Tensor:
    """int64: the cases of a split that have all 32 slices. Raises UserError where fewer than two have."""
    cases, count = data.case.unique(return_counts=True)
    if (count == SLICES_PER_CASE).sum() < 2:
        raise UserError(f"{data.split} in {data.folder} has fewer than two whole brains; give more with --data")
    return cases[count == SLICES_PER_CASE]


# ------------------------------------------------------------------------------------------------------------- report

COLUMNS = {"ssim": "SSIM", "brain_ssim": "brain SSIM", "ms_ssim": "MS-SSIM", "psnr": "PSNR, dB"}


def with_interval(row: dict, name: str, form: str = ".4f") -> str:
    """A mean and, where it is known, its interval, such as 0.9513 [0.9490, 0.9534]; a dash for what is missing."""
    if name not in row:
        return "-"
    interval = row.get(f"{name}_interval")
    return f"{row[name]:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def table(rows: list[dict]) -> str:
    """A Markdown table of codecs: price and scores."""
    lines = [f"| codec | bits per image | numbers | {' | '.join(COLUMNS.values())} |", "|---" * 7 + "|"]
    for row in rows:
        kl = f"{row['kl_bits']:,.0f} (KL)" if "kl_bits" in row else "-"
        cells = [row["codec"], f"{row['bits']:,.0f}" if "bits" in row else kl]
        cells += [f"{row['numbers']:,}" if "numbers" in row else "-"]
        cells += [with_interval(row, name, ".2f" if name == "psnr" else ".4f") for name in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ledger(result: dict) -> str:
    """What the table has no column for, a line each: bits, codes or latent, shuffled z, power by frequency."""
    lines = []
    if "fixed_bits" in result:
        factors = " of the channels" if result.get("codebook_size", 0) > COUNTABLE else ""
        lines.append(f"bits per image    {result['fixed_bits']:,.0f} at fixed length, "
                     f"{result['entropy_bits']:,.0f} by zero-order entropy{factors}")  # fmt: skip
        if "prior_bits" in result:
            lines[-1] += f", {with_interval(result, 'prior_bits', ',.0f')} under the PixelCNN"
    for level in result.get("levels", [result] if "fixed_bits" in result else []):
        h, w = level["grid"]
        lines.append(f"codes             {h}x{w} out of {level['codebook_size']:,}")
        if "usage" in level:
            lines[-1] += f": usage {level['usage']:.3f}, perplexity {level['perplexity']:,.0f}"
        if "brain_usage" in level:
            lines[-1] += f"; on brain {level['brain_usage']:.3f}, {level['brain_perplexity']:,.0f}"
    if "kl_bits" in result:
        lines += [f"KL                {with_interval(result, 'kl_bits', ',.0f')} bits per image"]
        for name, where in {"": "over all positions", "head_": "over the head", "brain_": "over the brain"}.items():
            if f"{name}noise_share" in result:
                share = result[f"{name}noise_share_per_channel"]
                lines.append(
                    f"latent            noise share {where} {result[f'{name}noise_share']:.4f} (by channel "
                    f"{min(share):.4f} to {max(share):.4f}); {result[f'{name}active_channels']} of {len(share)} "
                    "channels active"
                )
    lines.append(f"shuffled z        SSIM {with_interval(result, 'ssim_shuffled_z')}, own z {result['ssim']:.4f}")
    if "brain_ssim" in result:
        wrong = with_interval(result, "brain_ssim_shuffled_z")
        lines[-1] += f"; brain SSIM {wrong}, own z {result['brain_ssim']:.4f}"
    if "ssim_drawn" in result:
        brain = f", brain SSIM {with_interval(result, 'brain_ssim_drawn')}" if "brain_ssim_drawn" in result else ""
        lines.append(f"a draw            SSIM {with_interval(result, 'ssim_drawn')}{brain}")
    frequency, ratio = np.array(result["spectrum"]["frequency"]), result["spectrum"]["power_ratio"]
    shown = [int(np.abs(frequency - f).argmin()) for f in (0.05, 0.1, 0.2, 0.3, 0.4)]
    lines.append("power kept        " + ", ".join(f"{ratio[k]:.2f} at {frequency[k]:.2f}" for k in shown)
                 + " cycles per pixel")  # fmt: skip
    return "\n".join(lines)


def draw(rows: list[dict], result: dict, split: str):
    """Three panels: quality against bits with the floors; SSIM for every z; power kept at every frequency."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    score, ours = "brain_ssim" if "brain_ssim" in result else "ssim", rows[0]
    figure.suptitle(f"{ours['codec']} on {split}")

    prices = {"at fixed length": ours.get("bits"), "by the KL": result.get("kl_bits")}
    prices |= {"by zero-order entropy": result.get("entropy_bits"), "under the PixelCNN": result.get("prior_bits")}
    points = [(bits, ours, f"{ours['codec']}, bits {how}") for how, bits in prices.items() if bits]
    points += [(row["bits"], row, row["codec"]) for row in rows[1:] if "bits" in row]
    for n, (bits, row, label) in enumerate(points):
        low, high = row.get(f"{score}_interval") or (row[score], row[score])
        style = (
            {"marker": "*", "markersize": 11, "color": "C3"}
            if row is ours
            else {"marker": "o" if "k-means" in row["codec"] else "s", "color": "C0"}
        )
        filled = "none" if row is ours and n else "full"
        reach = [[row[score] - low], [high - row[score]]]
        left.errorbar(bits, row[score], reach, capsize=3, linestyle="none", label=label, fillstyle=filled, **style)
    for row in rows[1:]:
        if "bits" not in row:
            label = f"{row['codec']}, {row['numbers']:,} real numbers"
            left.axhline(row[score], color="grey", linestyle="--", linewidth=1, label=label)
    left.set(
        xlim=(0, 1.15 * max(bits for bits, _, _ in points)),
        xlabel="bits per image",
        ylabel=COLUMNS[score],
        title="quality and its price; bars: 95 % over cases",
    )
    left.xaxis.set_major_locator(MaxNLocator(6))
    left.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    left.legend(fontsize=8)

    for name in ("ssim", "brain_ssim"):
        if f"{name}_per_z" not in result:
            continue
        curve, interval = result[f"{name}_per_z"], result[f"{name}_per_z_interval"]
        middle.plot(list(curve), list(curve.values()), marker=".", label=COLUMNS[name])
        known = {z: ends for z, ends in interval.items() if ends}
        if known:
            middle.fill_between(list(known), *zip(*known.values()), alpha=0.25)
    middle.set(xlabel="slice index z (0 is the lowest)", ylabel="similarity", title="by slice; band: 95 % over cases")
    middle.legend()

    right.plot(result["spectrum"]["frequency"], result["spectrum"]["power_ratio"], marker=".")
    right.axhline(1, color="grey", linestyle="--", linewidth=1)
    right.set(
        xlabel="spatial frequency, cycles per pixel",
        ylabel="power, reconstructed / real",
        title="power kept (1: as sharp and as noisy as the real)",
        ylim=(0, None),
    )
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    return figure


# ------------------------------------------------------------------------------------------------- report on samples


def verdict(samples: dict, real: dict, name: str) -> str:
    """Whether the intervals of a score of samples and of real brains overlap."""
    (low, high), (real_low, real_high) = (part[f"{name}_interval"] for part in (samples, real))
    return "as real" if low <= real_high and real_low <= high else "differs"


def sample_rows(result: dict) -> dict[str, list[list[str]]]:
    """{group: rows of [score, samples, real, samples / real, verdict]} of a result of score_samples."""
    samples, real, rows = result["samples"], result["real"], {}
    for name, (title, unit, group) in SAMPLE_SCORES.items():
        form = ".2%" if group == "copies" else ".3f" if max(abs(samples[name]), abs(real[name])) < 10 else ".1f"
        ratio = samples[name] / real[name] if real[name] > 0 and not name.startswith("mmd2") else math.nan
        cells = [
            f"{title}{f', {unit}' if unit else ''}",
            *(with_interval(part, name, form) for part in (samples, real)),
        ]
        cells += ["-" if math.isnan(ratio) else f"{ratio:.2f}"]
        rows.setdefault(group, []).append([*cells, verdict(samples, real, name)])
    return rows


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown of cells."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def page(report: dict, name: str) -> str:
    """The page on samples: what was compared, tables, pictures, how to read it."""
    result, scorer = report["result"], report["scorer"]
    rows, n, split = sample_rows(result), result["brains"], report["data"]["held_out"]["split"]
    columns = ["samples", f"real ({split})", "samples / real", "verdict"]
    alike = sum(row[-1] == "as real" for group in rows.values() for row in group)
    seen = scorer["accuracy"]["validate"]
    dice = ", ".join(f"{seen[f'dice_{tissue}']:.2f} {tissue}" for tissue in TISSUES)
    nearest_of_all = ", ".join(format(pair["relative_distance"], ".2f") for pair in report["nearest"][:3])
    return f"""# Scores of samples

{n} brains of 32 slices from `{report["samples"]["folder"]}`, beside {n} held-out real ones (`{split}`). Both are
compared in the same way with the same {result["reference_brains"]} training brains; copies are looked for among all
{result["training_brains"]}. Brackets hold 95 % intervals over brains. "as real" means that the intervals of samples and
of real brains overlap; that is so in {alike} of {len(SAMPLE_SCORES)} scores.

## Distance from training brains

Lower is nearer. The column "real" is the floor: so much do new people differ from those trained on. A ratio of 1 is as
good as real; far below 1 is no merit but a sign of copies or of too little variety. MMD² is unbiased, so it lies around
0 for real brains and has no ratio.

{markdown_table(["distance", *columns], rows["distance"])}

## Values

None is better high or low: right is what real brains have.

{markdown_table(["score", *columns], rows["value"])}

![Plots]({name}.png)

*Blue: real held-out brains; red: samples. Bands hold the middle 95 % of brains, bars 95 % intervals of the score.*

## Copies

{markdown_table(["copies", *columns], rows["copies"])}

Compared are distances to the nearest training brain over the mean of those to the next five: near 1 for a new head, 0
for a copy. New heads have 1 % of their slices below the limit, the 1st percentile of held-out slices, here
{result["samples"]["copies_limit"]:.2f}; beyond that are {result["samples"]["copies_excess"]:.1%} of the samples. The
nearest have {nearest_of_all}.

![Nearest pairs]({name}_nearest.png)

## What measured it

Tissue, z and the features "trained encoder" are read by `{scorer["path"]}` (digest {scorer["digest"]}), trained on
{scorer["data"]["cases"]} cases. On the held-out slices it was tested on it has Dice {dice}, and errs in z by
{seen["z_error"]:.2f} slices. Scores of two runs can be compared where scorer, split and number of brains are the same.
All numbers are in `{name}.json`; README.md, Scores of samples, defines each.
"""


def draw_samples(result: dict, measures: dict[str, dict[str, Tensor]], title: str):
    """Six panels: scores over their floors; power by frequency; tissues, neighbours and power along z; nearest ones."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(17, 10), layout="constrained")
    figure.suptitle(title)
    samples, real, reference = (measures[name] for name in ("samples", "real", "reference"))
    forest, power, areas, neighbours, along, near = axes.flat

    names = [
        name
        for name, (_, _, group) in SAMPLE_SCORES.items()
        if group == "distance" and not name.startswith("mmd2") and result["real"][name] > 0
    ]
    for part, color, shift in (("real", "C0", 0.15), ("samples", "C3", -0.15)):
        for row, name in enumerate(reversed(names)):
            floor, (low, high) = result["real"][name], result[part][f"{name}_interval"]
            value, low, high = (max(number / floor, 0.05) for number in (result[part][name], low, high))
            label = f"{part} (interval over brains)" if row == 0 else None
            forest.plot([low, high], [row + shift] * 2, color=color, linewidth=2)
            forest.plot(value, row + shift, "o", color=color, label=label)
    forest.axvline(1, color="grey", linestyle="--", linewidth=1)
    forest.set(
        xscale="log", xlabel="score over that of real brains (1: as real)", title="distance from training brains"
    )
    ticks = [
        tick
        for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
        if forest.get_xlim()[0] <= tick <= forest.get_xlim()[1]
    ]
    forest.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    forest.minorticks_off()
    forest.set_yticks(range(len(names)), [SAMPLE_SCORES[name][0] for name in reversed(names)], fontsize=8)

    def curves(axis, x, values: dict[str, Tensor]) -> None:
        """Mean over brains and the middle 95 % of them, of [n, K]."""
        for (label, known), color in zip(values.items(), ("C0", "C3")):
            low, high = known.double().quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
            axis.plot(x, known.mean(0), color=color, label=label)
            axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)

    both = {"real": real, "samples": samples}
    frequency = [(k + 0.5) * 0.5 / RINGS for k in range(RINGS)]
    mean = reference["spectrum"].mean(0)
    curves(power, frequency, {label: decibel(part["spectrum"], mean) for label, part in both.items()})
    noise = f"noise level {result['samples']['noise']:.2f}, real {result['real']['noise']:.2f}"
    power.set(xlabel="spatial frequency, cycles per pixel", ylabel="dB over training brains", title=f"power; {noise}")
    for k, (tissue, style) in enumerate(zip(TISSUES, (":", "--", "-"))):
        for (label, part), color in zip(both.items(), ("C0", "C3")):
            spread = part["areas"][..., k].double()
            areas.plot(spread.mean(0) / 100, style, color=color, label=f"{tissue}, {label}")
            low, high = spread.quantile(torch.tensor([0.025, 0.975]).double(), dim=0) / 100
            areas.fill_between(range(SLICES_PER_CASE), low, high, color=color, alpha=0.12, linewidth=0)
    areas.set(xlabel="slice index z", ylabel="area, cm²", title="tissue areas as read by the scorer")
    curves(neighbours, range(SLICES_PER_CASE - 1), {label: part["adjacent"] for label, part in both.items()})
    neighbours.set(xlabel="slice index z", ylabel="SSIM of slices z and z + 1", title="neighbouring slices")
    mean, cycles = reference["reslice"].mean(0), torch.arange(1, SLICES_PER_CASE) / (2 * SLICES_PER_CASE)
    curves(along, cycles, {label: decibel(part["reslice"], mean)[:, 1:] for label, part in both.items()})
    along.set(xlabel="frequency along z, cycles per slice", ylabel="dB over training brains", title="power along z")
    for label, key, color in (("held-out slices", "near_real", "C0"), ("samples", "near", "C3")):
        distance = measures[key]["relative"].flatten()
        near.hist(distance, 60, range=(0, 1.05), density=True,
                  histtype="stepfilled", alpha=0.5, color=color, label=label)  # fmt: skip
    limit, share = result["samples"]["copies_limit"], result["samples"]["copies"]
    near.axvline(
        limit, color="k", linestyle="--", linewidth=1, label=f"limit {limit:.3f}: {share:.1%} of samples below"
    )
    near.set(
        xlabel="distance to the nearest training brain over the next five (0: a copy)", ylabel="density", title="copies"
    )
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left" if axis is near else "best")
    return figure


def nearest_pairs(near: dict[str, Tensor], cases: list[int], known: Tensor, limit: float, count: int = 8) -> list[dict]:
    """The samples nearest to a training slice, of as many brains as possible: {"case", "z",
    "relative_distance", "distance", "below_limit", "training_case", "training_z"}, the nearest first."""
    distance, z = near["relative"].min(1)
    order = distance.argsort()[:count].tolist()
    pairs = [(i, int(z[i])) for i in order]
    more = near["relative"].flatten().argsort().tolist()  # where there are few brains, several of one
    pairs += [pair for n in more if (pair := divmod(n, SLICES_PER_CASE)) not in pairs][: count - len(pairs)]
    return sorted(
        (
            {
                "case": cases[i],
                "z": at,
                "relative_distance": float(near["relative"][i, at]),
                "distance": float(near["distance"][i, at]),
                "below_limit": bool(near["relative"][i, at] < limit),
                "training_case": int(known[near["brain"][i, at]]),
                "training_z": int(near["z"][i, at]),
            }
            for i, at in pairs
        ),
        key=lambda pair: pair["relative_distance"],
    )


def draw_nearest(pairs: list[dict], brains: Tensor, cases: list[int], train: Slices, limit: float):
    """Three rows, a pair per column: the sample, the nearest training slice, their difference around grey."""
    rows, captions = [[], [], []], [[], [], []]
    for pair in pairs:
        ours = brains[cases.index(pair["case"]), pair["z"]]
        theirs = train.images[(train.case == pair["training_case"]) & (train.z == pair["training_z"])][0]
        apart = (128 + (ours.float() - theirs.float()) / 2).round().to(torch.uint8)
        for row, picture in zip(rows, (ours, theirs, apart)):
            row.append(picture.numpy())
        captions[0].append(f"sample {pair['case']}, z = {pair['z']}: {pair['relative_distance']:.2f}")
        captions[1].append(f"training {pair['training_case']}, z = {pair['training_z']}")
        captions[2].append("BELOW THE LIMIT" if pair["below_limit"] else "")
    copies = sum(pair["below_limit"] for pair in pairs)
    title = "the samples nearest to a training slice, by distance over that to the next five brains "
    title += f"(0: a copy, 1: a new head); limit {limit:.2f}, {copies} of those shown are below"
    zoom = max(1, 192 // brains.shape[-1])
    return util.sheet(
        [np.stack(row) for row in rows],
        title=title,
        row_names=["sample", "nearest", "difference"],
        captions=[caption for row in captions for caption in row],
        zoom=zoom,
    )


def evaluate_samples(args: argparse.Namespace) -> None:
    """The command with --samples."""
    began = time.monotonic()
    if args.split == "train":
        raise UserError("--split train: samples are set beside held-out brains; choose validate (or, once, test)")
    brains, cases, samples = load_samples(args.samples, args.limit_brains)
    folder, size = find_data(args.data), brains.shape[-1]
    train, held_out = (load_slices(folder, split, size) for split in ("train", args.split))
    scorer, description = find_scorer(args.scorer)
    seen = description["accuracy"]["validate"]
    print(
        f"scorer: {description['path']}, Dice of CSF {seen['dice_csf']:.2f}, grey {seen['dice_grey']:.2f}, white "
        f"{seen['dice_white']:.2f}, error of z {seen['z_error']:.2f} slices"
        + ("" if Path(description["path"]) == OWN else "; train one on your data with: python scorer.py")
    )
    scorer.to(util.pick_device(args.device))
    result, measures = score_samples(brains, train, held_out, scorer, description["digest"])

    limit = result["samples"]["copies_limit"]
    pairs = nearest_pairs(measures["near"], cases, whole_cases(train), limit)
    kept = ("path", "digest", "data", "accuracy", "step")
    report = {
        "samples": {
            "folder": str(samples),
            "cases": cases[: result["brains"]],
            "digest": hashlib.blake2b(brains.numpy(), digest_size=8).hexdigest(),
        },
        "data": {"train": train.describe(), "held_out": held_out.describe()},
        "scorer": {key: description[key] for key in kept},
        "result": result,
        "nearest": pairs,
    }
    out, name = args.out or samples, f"samples_{args.split}"
    util.write_file(out / f"{name}.json", json.dumps(report, indent=2, allow_nan=False).encode())
    util.save_picture(
        out / f"{name}.png",
        draw_samples(
            result, measures, f"{result['brains']} brains of {samples} beside as many real ones ({args.split})"
        ),
    )
    util.save_picture(out / f"{name}_nearest.png", draw_nearest(pairs, brains, cases, train, limit))
    util.write_file(out / f"{name}.md", page(report, name).encode())
    rows = [row for group in sample_rows(result).values() for row in group]
    print(markdown_table(["score", "samples", f"real ({args.split})", "samples / real", "verdict"], rows))
    print(f"page: {out}/{name}.md, with .json, .png and _nearest.png; {time.monotonic() - began:.0f} s")


def evaluate_reconstruction(args: argparse.Namespace) -> None:
    """The command with --reconstruction."""
    device = util.pick_device(args.device)
    model = load_first_stage(args.reconstruction, device, args.decoder)
    prior = find_prior(args.prior, model, device)
    folder = find_data(args.data)
    data = load_slices(folder, args.split, model.image_size, masks=has_masks(folder, args.split))
    result = score_reconstruction(model, data, device, prior=prior)

    name = f"{model.kind} ({args.reconstruction})" + (", perceptual decoder" if args.decoder == "perceptual" else "")
    ours = [key for key in result if key.removesuffix("_interval") in (*COLUMNS, "numbers", "kl_bits")]
    rows = [{"codec": name, **{key: result[key] for key in ours}}]
    if "fixed_bits" in result:  # a VAE's mean is real-valued: its KL is the price of a sample, not of what is scored
        rows[0]["bits"] = result["fixed_bits"]
    if not args.no_floors:
        bits = result.get("fixed_bits", result.get("kl_bits"))
        train = load_slices(folder, "train", model.image_size)
        rows += score_floors(model, train, data, partial(score_codec, data), bits, result.get("codebook_size"))

    weights = Path(model.description["path"])
    out = (
        args.out or weights.parent
    ) / f"reconstruction_{args.split}{'_perceptual' if args.decoder == 'perceptual' else ''}"
    report = {"weights": str(weights), "decoder": args.decoder, "data": data.describe(), "result": result, "rows": rows}
    util.write_file(out.with_suffix(".json"), json.dumps(report, indent=2, allow_nan=False).encode())
    util.save_picture(out.with_suffix(".png"), draw(rows, result, args.split))
    print(f"{table(rows)}\n\n{ledger(result)}")
    print(f"scores: {out}.json and .png")


def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add(
        "--reconstruction",
        metavar="RUN",
        default="vqvae",
        help="first stage: run name, folder or weights file (default: %(default)s)",
    )
    add("--samples", metavar="RUN", help="score new brains instead: a second stage's run, or a folder of slices")
    add("--limit-brains", type=util.positive_int, metavar="N", help="of the samples, the first N; default: all")
    add("--scorer", metavar="RUN", help="of samples: run or file; default: the run scorer, else the released one")
    util.add_decoder_flag(parser, "fidelity", "fidelity")
    add("--data", metavar="FOLDER", help="as in training")
    add(
        "--split",
        choices=("train", "validate", "test"),
        default="validate",
        help="tune on validate, open test once (default: %(default)s)",
    )
    add(
        "--prior",
        metavar="RUN",
        help="PixelCNN that prices the codes: run name, folder or weights file; default: the run pixelcnn, if it was "
        "trained on this first stage",
    )
    add("--no-floors", action="store_true", help="leave out k-means, block KLT and AVIF, which take minutes")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="default: the folder of the weights, or of the samples")
    args = parser.parse_args()
    if args.samples:
        evaluate_samples(args)
    else:
        evaluate_reconstruction(args)


if __name__ == "__main__":
    util.command(main)
