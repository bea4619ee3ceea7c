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
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import util
from dataset import Slices, find_data, has_masks, load_slices, to_uint8
from model_VAE import load_first_stage
from parts.autoencoder import Autoencoder
from parts.quantizer import digits_of
from pictures import sheets
from pixelCNN import PRIORS, PixelCNN, PixelCNN2, load_prior
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
from scores.page import evaluate_samples
from training import checkpoints
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
        own, released = checkpoints.run_weights("pixelcnn"), checkpoints.RELEASED / "pixelcnn.safetensors"
        fitting = [path for path in (own, released) if path.is_file() and fits(checkpoints.load_weights(path)[1])]
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


# ------------------------------------------------------------------------------------------------------------- report

COLUMNS = {"ssim": "SSIM", "brain_ssim": "brain SSIM", "ms_ssim": "MS-SSIM", "psnr": "PSNR, dB"}


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
    whose = "of a draw " if "ssim_drawn" in result else ""
    lines.append("power kept        " + whose + ", ".join(f"{ratio[k]:.2f} at {frequency[k]:.2f}" for k in shown)
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


def evaluate_reconstruction(args: argparse.Namespace) -> None:
    """The command with --reconstruction."""
    device = util.pick_device(args.device)
    model = load_first_stage(args.reconstruction, device, args.decoder)
    prior = find_prior(args.prior, model, device)
    folder = find_data(args.data)
    data = load_slices(folder, args.split, model.image_size, masks=has_masks(folder, args.split))
    result = score_reconstruction(model, data, device, prior=prior)

    name = f"{model.kind} ({Path(args.reconstruction).stem})"
    name += ", perceptual decoder" if args.decoder == "perceptual" else ""
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
    sheets.save_picture(out.with_suffix(".png"), draw(rows, result, args.split))
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
