"""The ledger of a first stage: how good its reconstructions of a split are, and what they cost in bits.

SSIM is Wang et al. 2004 (util.ssim_map) after clamping and rounding to 8 bits, averaged over the whole picture. Half of
every picture is black, so brain SSIM, the mean of the same map over the tissue mask, stands beside it. Quality means
nothing without its price, so bits per image stand there too, and codecs without a network on the same slices.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import util
from dataset import Slices, to_uint8
from parts.autoencoder import Autoencoder
from parts.quantizer import digits_of
from pictures import sheets
from scores.floors import score_floors
from scores.metrics import (
    COUNTABLE,
    RINGS,
    all_scores,
    code_usage,
    curve_over_z,
    entropy_bits,
    join,
    latent_statistics,
    radial_spectrum,
    slice_scores,
    summarise,
    with_interval,
)

COLUMNS = {"ssim": "SSIM", "brain_ssim": "brain SSIM", "ms_ssim": "MS-SSIM", "psnr": "PSNR, dB"}
REGIONS = {"": "over all positions", "head_": "over the head", "brain_": "over the brain"}  # of a VAE's latent


def write_ledger(
    model: Autoencoder,
    data: Slices,
    train: Slices | None,
    out: Path,
    *,
    prior: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict, list[dict]]:
    """Scores a first stage on a split and writes the files `out`.json and .png.

    Args:
        model: a loaded first stage: it has a `description` with "path".
        train: slices to which the codecs without a network are fitted; None leaves these out.
        prior: a PixelCNN of this first stage, which prices the codes.
    Returns (result of score_reconstruction, rows of the table: the model's, then the codecs').
    """
    result = score_reconstruction(model, data, device, prior=prior)
    weights, decoder = Path(model.description["path"]), model.decoder_in_use
    name = f"{model.kind} ({weights.parent.name if weights.name == 'model.safetensors' else weights.stem})"
    name += ", perceptual decoder" if decoder == "perceptual" else ""
    ours = [key for key in result if key.removesuffix("_interval") in (*COLUMNS, "numbers", "kl_bits")]
    rows = [{"codec": name, **{key: result[key] for key in ours}}]
    if "fixed_bits" in result:  # the KL of a VAE is no such price: what is scored is its mean, of real numbers
        rows[0]["bits"] = result["fixed_bits"]
    if train is not None:
        bits = result.get("fixed_bits", result.get("kl_bits"))
        rows += score_floors(model, train, data, partial(score_codec, data), bits, result.get("codebook_size"))
    report = {"weights": str(weights), "decoder": decoder, "data": data.describe(), "result": result, "rows": rows}
    util.write_file(out.with_suffix(".json"), json.dumps(report, indent=2, allow_nan=False).encode())
    sheets.save_picture(out.with_suffix(".png"), draw_ledger(rows, result, data.split))
    return result, rows


def score_codec(data: Slices, codec: str, reconstruct: Callable[[Tensor], Tensor]) -> dict:
    """{"codec", means and intervals of all_scores} on a split of a function from real to decoded uint8 [B, S, S]."""
    scores = []
    for index in util.progress(torch.arange(len(data)).split(data.slices_per_brain), codec, unit="batch"):
        real, masks = _pictures(data, index)
        scores.append(all_scores(reconstruct(real), real, masks))
    return {"codec": codec, **summarise(join(scores), data.case)}


@torch.no_grad()
def score_reconstruction(
    model: Autoencoder,
    data: Slices,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    prior: nn.Module | None = None,
    seed: int = 0,
) -> dict:
    """Means with intervals, curves over z, power by frequency, and the price in bits, over a whole split.

    Args:
        batch_size: slices at a time, by default those of one brain; where the decoder draws texture, the slices of a
            batch are decoded as neighbours of one brain.
        prior: adds "prior_bits", what the codes cost under it.
        seed: of the wrong z (a permutation of all slices' z) that the decoder gets for the scores "*_shuffled_z", and
            of the texture for "*_drawn" and for the power, where the decoder draws it.
    """
    generator = torch.Generator().manual_seed(seed)
    wrong_z = data.z[torch.randperm(len(data), generator=generator)]
    price = CodePrice(model, prior) if hasattr(model, "encode_indices") else LatentPrice(model)
    scores, power = [], torch.zeros(2, RINGS, dtype=torch.float64)  # reconstructed, real
    batches = torch.arange(len(data)).split(batch_size or data.slices_per_brain)
    for index in util.progress(batches, "reconstruct", unit="batch"):
        x, z, _ = data.batch(index, device)
        real, masks = _pictures(data, index)
        latent, bits = price.add(x, z, real, masks)
        decoded, told_wrong = (_decode(model, latent, at) for at in (z, wrong_z[index].to(device)))
        score = all_scores(decoded, real, masks) | bits
        if model.decoder_in_use == "perceptual":
            decoded = _decode(model, latent, z, generator)
            score |= {f"{name}_drawn": value for name, value in slice_scores(decoded, real, masks).items()}
        wrong = slice_scores(told_wrong, real, masks)
        score |= {f"{name}_shuffled_z": wrong[name] for name in ("ssim", "brain_ssim") if name in wrong}
        scores.append(score)
        power += torch.stack([radial_spectrum(pictures).sum(0) for pictures in (decoded, real)])

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
    return result | price.summary()


def _pictures(data: Slices, index: Tensor) -> tuple[Tensor, Tensor | None]:
    """Slices and masks uint8 [B, S, S] at positions of a split, on the CPU; None where there are no masks."""
    return data.images[index].cpu(), data.masks[index] if data.masks is not None else None


def _decode(
    model: Autoencoder, latent: Tensor | tuple[Tensor, ...], z: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """uint8 [B, S, S], on the CPU, of a latent, or of codes, at z; with a generator the picture with its texture."""
    codes = hasattr(model, "decode_indices")
    if generator is not None:
        x = model.draw(model.dequantise(latent) if codes else latent, z, generator)
    else:
        x = model.decode_indices(latent, z) if codes else model.decode(latent, z)
    return to_uint8(x)[:, 0].cpu()


# ------------------------------------------------------------------------------------------------------ price in codes


class CodePrice:
    """What the codes of a split cost and how evenly they are used, taken in batch by batch."""

    def __init__(self, model: Autoencoder, prior: nn.Module | None):
        self.model, self.prior = model, prior
        self.codes, self.on_brain = [], []  # of each batch: its grids, from coarse to fine where there are two

    def add(
        self, x: Tensor, z: Tensor, real: Tensor, masks: Tensor | None
    ) -> tuple[Tensor | tuple[Tensor, ...], dict[str, Tensor]]:
        """(codes, {"prior_bits" float64 [B]} where there is a prior) of slices x [B, 1, S, S] at z [B]."""
        codes = self.model.encode_indices(x, z)
        grids = [codes] if isinstance(codes, Tensor) else list(codes)
        self.codes.append([idx.cpu().numpy() for idx in grids])
        if masks is not None:
            self.on_brain.append([brain_positions(masks, self.model, idx.shape[1:]).numpy() for idx in grids])
        return codes, {} if self.prior is None else {"prior_bits": self.prior.bits(codes, z).double().cpu()}

    def summary(self) -> dict:
        """{"fixed_bits"} and code_statistics of the only grid, or, of several, "entropy_bits" of all and "levels"."""
        grids = [np.concatenate(level) for level in zip(*self.codes)]
        on_brain = [np.concatenate(level) for level in zip(*self.on_brain)] or [None] * len(grids)
        factors, size = getattr(self.model.quantizer, "levels", None), self.model.codebook_size
        levels = [code_statistics(idx, size, factors, inside) for idx, inside in zip(grids, on_brain, strict=True)]
        result = {"fixed_bits": self.model.fixed_bits}
        if len(levels) == 1:
            return result | levels[0]
        return result | {"entropy_bits": sum(level["entropy_bits"] for level in levels), "levels": levels}


def code_statistics(
    idx: np.ndarray, codebook_size: int, levels: tuple[int, ...] | None = None, brain: np.ndarray | None = None
) -> dict:
    """What one grid of codes costs and uses.

    Args:
        idx: int64 [N, h, w].
        levels: of a product code. With more than COUNTABLE codes the entropy is the sum of the channels' entropies, an
            upper bound, and usage is left out.
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


def brain_positions(masks: Tensor, model: Autoencoder, grid: tuple[int, int] | None = None) -> Tensor:
    """bool [B, h, w]: the positions of a grid, by default the latent's, whose block of masks [B, S, S] is not all 0.

    Of pictures instead of masks these are the positions that are not black.
    """
    inside = model.crop((masks[:, None] > 0).float())
    return F.adaptive_max_pool2d(inside, grid or model.latent_shape[1:])[:, 0] > 0


# ------------------------------------------------------------------------------------------------- price of a latent


class LatentPrice:
    """What the latents of a VAE cost and how much of them is noise, taken in batch by batch."""

    def __init__(self, model: Autoencoder):
        self.model = model
        self.sums = dict.fromkeys(REGIONS, 0.0)  # float64 [3, C]: of the posterior's mean, mean squared, variance
        self.counts = dict.fromkeys(REGIONS, 0)  # positions

    def add(self, x: Tensor, z: Tensor, real: Tensor, masks: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """(latent, {"kl_bits" float64 [B]}) of slices x [B, 1, S, S] at z [B]; real and masks are uint8 [B, S, S]."""
        mean, log_variance = self.model.posterior(x, z)
        inside = {"": torch.ones(len(x), *mean.shape[2:], dtype=torch.bool), "head_": brain_positions(real, self.model)}
        if masks is not None:
            inside["brain_"] = brain_positions(masks, self.model)
        parts = torch.stack([mean.double(), mean.double().square(), log_variance.double().exp()]).cpu()
        for region, positions in inside.items():
            self.sums[region] = self.sums[region] + torch.einsum("pbchw,bhw->pc", parts, positions.double())
            self.counts[region] += int(positions.sum())
        return self.model.encode(x, z), {"kl_bits": self.model.kl_bits(mean, log_variance).double().cpu()}

    def summary(self) -> dict:
        """latent_statistics of every region that has positions, their names after those of REGIONS."""
        result = {}
        for region, count in self.counts.items():
            if count:
                found = latent_statistics(*(self.sums[region] / count))
                result |= {region + name: value for name, value in found.items()}
        return result


# --------------------------------------------------------------------------------------------------------------- words


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


def ledger_lines(result: dict) -> str:
    """What the table has no column for, a line each: bits, codes or latent, shuffled z, texture, power by frequency."""
    lines = [*_code_lines(result), *_latent_lines(result)]
    lines.append(f"shuffled z        SSIM {with_interval(result, 'ssim_shuffled_z')}, own z {result['ssim']:.4f}")
    if "brain_ssim" in result:
        wrong = with_interval(result, "brain_ssim_shuffled_z")
        lines[-1] += f"; brain SSIM {wrong}, own z {result['brain_ssim']:.4f}"
    if "ssim_drawn" in result:
        brain = f", brain SSIM {with_interval(result, 'brain_ssim_drawn')}" if "brain_ssim_drawn" in result else ""
        lines.append(f"with texture      SSIM {with_interval(result, 'ssim_drawn')}{brain}")
    frequency, ratio = np.array(result["spectrum"]["frequency"]), result["spectrum"]["power_ratio"]
    rings = [int(np.abs(frequency - f).argmin()) for f in (0.05, 0.1, 0.2, 0.3, 0.4)]
    kept = ", ".join(f"{ratio[k]:.2f} at {frequency[k]:.2f}" for k in rings)
    lines.append(f"power kept        {'with texture ' if 'ssim_drawn' in result else ''}{kept} cycles per pixel")
    return "\n".join(lines)


def _code_lines(result: dict) -> list[str]:
    """Bits at fixed length, by entropy and under the prior; a line of use for each grid. None for a VAE."""
    if "fixed_bits" not in result:
        return []
    factors = " of the channels" if result.get("codebook_size", 0) > COUNTABLE else ""
    bits = f"{result['fixed_bits']:,.0f} at fixed length, {result['entropy_bits']:,.0f} by zero-order entropy{factors}"
    lines = [f"bits per image    {bits}"]
    if "prior_bits" in result:
        lines[-1] += f", {with_interval(result, 'prior_bits', ',.0f')} under the PixelCNN"
    for level in result.get("levels", [result]):
        h, w = level["grid"]
        lines.append(f"codes             {h}x{w} out of {level['codebook_size']:,}")
        if "usage" in level:
            lines[-1] += f": usage {level['usage']:.3f}, perplexity {level['perplexity']:,.0f}"
        if "brain_usage" in level:
            lines[-1] += f"; on brain {level['brain_usage']:.3f}, {level['brain_perplexity']:,.0f}"
    return lines


def _latent_lines(result: dict) -> list[str]:
    """The KL, and how much of each region's latent is noise. None for a model with codes."""
    if "kl_bits" not in result:
        return []
    lines = [f"KL                {with_interval(result, 'kl_bits', ',.0f')} bits per image"]
    for region, where in REGIONS.items():
        if f"{region}noise_share" in result:
            share = result[f"{region}noise_share_per_channel"]
            lines.append(
                f"latent            noise share {where} {result[f'{region}noise_share']:.4f} (by channel "
                f"{min(share):.4f} to {max(share):.4f}); {result[f'{region}active_channels']} of {len(share)} "
                "channels active"
            )
    return lines


# -------------------------------------------------------------------------------------------------------------- figure


def draw_ledger(rows: list[dict], result: dict, split: str):
    """Three panels: quality against bits, the codecs without a network among them; SSIM by z; power by frequency."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10.5, 9), layout="constrained")
    figure.suptitle(f"{rows[0]['codec']} on {split}")
    (above, left, right) = figure.subplot_mosaic([["prices", "prices"], ["curves", "power"]]).values()
    _draw_prices(above, rows, result)
    _draw_curves(left, result)
    right.plot(result["spectrum"]["frequency"], result["spectrum"]["power_ratio"], marker=".", color=sheets.COLOURS[0])
    right.axhline(1, color="grey", linestyle="--", linewidth=1)
    right.set(
        xlabel="spatial frequency, cycles per pixel",
        ylabel="power, reconstructed / real",
        title="power kept; 1: as sharp and noisy as real",
        ylim=(0, None),
    )
    for axis in (above, left, right):
        axis.grid(alpha=0.3)
    return figure


def _draw_prices(axis, rows: list[dict], result: dict) -> None:
    """Score against bits: the first row at each of its prices (a star at the first), codecs at theirs."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    score, ours = "brain_ssim" if "brain_ssim" in result else "ssim", rows[0]
    prices = {"at fixed length": ours.get("bits"), "by the KL": result.get("kl_bits")}
    prices |= {"by zero-order entropy": result.get("entropy_bits"), "under the PixelCNN": result.get("prior_bits")}
    stars = ({"marker": marker, "markersize": 9, "color": sheets.COLOURS[2]} for marker in "*^vD")
    points = [(bits, ours, f"{ours['codec']},\nbits {how}", next(stars)) for how, bits in prices.items() if bits]
    for row in rows[1:]:
        if "bits" in row:
            marker = "o" if "k-means" in row["codec"] else "s"
            points.append((row["bits"], row, row["codec"], {"marker": marker, "color": sheets.COLOURS[0]}))
        else:
            label = f"{row['codec']},\n{row['numbers']:,} real numbers"
            axis.axhline(row[score], color="grey", linestyle="--", linewidth=1, label=label)
    for bits, row, label, style in points:
        low, high = row.get(f"{score}_interval") or (row[score], row[score])
        style = style | {"linestyle": "none"}
        axis.errorbar(bits, row[score], [[row[score] - low], [high - row[score]]], capsize=3, label=label, **style)
    axis.set(
        xlim=(0, 1.15 * max(bits for bits, *_ in points)),
        xlabel="bits per image",
        ylabel=COLUMNS[score],
        title="quality and its price; bars: 95 % over brains",
    )
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))  # beside the panel, where it hides no point


def _draw_curves(axis, result: dict) -> None:
    """SSIM and brain SSIM by slice index, with bands where there are intervals."""
    for name, colour, marker in zip(("ssim", "brain_ssim"), sheets.COLOURS[::3], "o^", strict=True):
        if f"{name}_per_z" in result:
            curve, interval = result[f"{name}_per_z"], result[f"{name}_per_z_interval"]
            style = {"color": colour, "marker": marker, "markersize": 4, "label": COLUMNS[name]}
            axis.plot(list(curve), list(curve.values()), **style)
            known = {z: ends for z, ends in interval.items() if ends}
            if known:
                axis.fill_between(list(known), *zip(*known.values()), color=colour, alpha=0.25, linewidth=0)
    axis.set(xlabel="slice index z (0 is the lowest)", ylabel="similarity", title="by slice; band: 95 % over brains")
    axis.legend()
