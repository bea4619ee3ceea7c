"""What does the slice index z do in a first stage, in its decoder and in its discriminator?

    python playground/z_conditioning.py --first-stage vqvae        # a VAE or VQ-VAE: run name, folder or weights file

Every slice is encoded with its own z, and that one latent is decoded with the right z, with a z a quarter of the brain
further on, and with the z of another slice (a random permutation). Printed: the scores against the real slices of the
first eight validation brains. The more a wrong z costs, the more the decoder leans on z; equal scores mean that the
latent already says everything. Where the run's discriminator is there (model_ckpt/NAME/texture.pt), it judges every
real validation slice with the right z and with that of another slice; 0.5 as the share of slices for which the right z
gets the higher mean logit is what a coin would do, z ignored. The picture has slices of a brain as columns; its last
two rows are what a wrong z changes against the right one, x5, mid-grey is nothing. Anterior is right.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import util
from dataset import Slices, find_data, has_masks, load_slices, to_uint8
from model_discriminator import PatchDiscriminator
from parts.autoencoder import Autoencoder
from pictures import sheets
from prestage_train import SCRIPT
from scores.metrics import mean_scores, slice_scores
from training.checkpoints import fill_model, load_checkpoint
from training.stages import load_first_stage


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", metavar="RUN", default="vqvae", help="run name, folder or file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--seed", type=util.seed, default=0, help="of the permutation (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/z_conditioning.png"), help="picture (default: %(default)s)")
    return parser


def permuted(z: Tensor, seed: int) -> Tensor:
    """The z of other slices."""
    return z[torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))]


def load_discriminator(checkpoint: Path) -> PatchDiscriminator:
    """The discriminator of a checkpoint model_ckpt/NAME/texture.pt."""
    critic = PatchDiscriminator()
    fill_model(critic, load_checkpoint(checkpoint, SCRIPT)["critic"], checkpoint)
    return critic.eval().requires_grad_(False)


@torch.no_grad()
def judge(critic: PatchDiscriminator, model: Autoencoder, data: Slices, seed: int) -> tuple[Tensor, Tensor]:
    """Mean logit of each real slice with the right z and with another's, [N] each, where the two z differ."""
    device, wrong, logits = model.latent_mean.device, permuted(data.z, seed), []
    for index in (wrong != data.z).nonzero()[:, 0].split(32):
        x, z, _ = data.batch(index, device)
        planes = critic.planes(model.crop(x), model.faithful(model.encode(x, z), z)[0])
        logits.append(torch.stack([critic(planes, told).mean((1, 2, 3)) for told in (z, wrong[index].to(z))]))
    right, shuffled = torch.cat(logits, 1).cpu()
    return right, shuffled


@torch.no_grad()
def main() -> None:
    args = flags().parse_args()
    device, folder = util.pick_device(args.device), find_data(args.data)
    model = load_first_stage(args.first_stage, device)
    data = load_slices(folder, "validate", model.image_size, masks=has_masks(folder, "validate"))
    index = torch.isin(data.case, data.case.unique()[:8]).nonzero()[:, 0]
    z, Z = data.z[index], data.slices_per_brain
    told = {"right z": z, f"z + {Z // 4}": (z + Z // 4) % Z, "shuffled z": permuted(z, args.seed)}
    decoded = {name: [] for name in told}
    for part in torch.arange(len(index)).split(32):
        x, own, _ = data.batch(index[part], device)
        latent = model.encode(x, own)
        for name, pictures in decoded.items():
            pictures.append(to_uint8(model.decode(latent, told[name][part].to(device)))[:, 0].cpu())
    decoded = {name: torch.cat(pictures) for name, pictures in decoded.items()}
    real, masks = data.images[index].cpu(), data.masks[index] if data.masks is not None else None
    for name, pictures in decoded.items():
        scores = mean_scores([slice_scores(pictures, real, masks)])
        print(f"decoded with {name:10s}  " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))

    checkpoint = Path(model.description["path"]).with_name("texture.pt")
    if checkpoint.is_file():
        right, shuffled = judge(load_discriminator(checkpoint).to(device), model, data, args.seed)
        print(
            f"discriminator, {len(right)} real slices: mean logit {right.mean():+.4f} with the right z, "
            f"{shuffled.mean():+.4f} with a shuffled z; the right z gets the higher in "
            f"{(right > shuffled).float().mean():.1%}"
        )
    else:
        print(f"discriminator: left out, there is no {checkpoint}")

    one = (data.case[index] == data.case[index[0]]).nonzero()[:, 0]
    shown = one[len(one) // 8 :: max(1, len(one) // 6)]  # the outermost show little brain
    rows, captions = {"real": real[shown]}, [f"z = {n}" for n in z[shown]]
    for name, pictures in decoded.items():
        rows[name] = pictures[shown]
        captions += [f"told z = {n}" for n in told[name][shown]]
    for name in list(told)[1:]:
        change = rows[name].int() - rows["right z"].int()
        rows[f"{name}, change x5"] = (128 + 5 * change).clamp(0, 255).to(torch.uint8)
        captions += [f"mean {part.abs().float().mean():.2f}" for part in change]
    page = sheets.sheet(
        sheets.heads([pictures.numpy() for pictures in rows.values()]),
        title=f"{Path(args.first_stage).stem}, validate case {int(data.case[index[0]])}: decoded with right and wrong "
        "z; change against the right z, mid-grey is none, and its mean size in grey levels; anterior right",
        row_names=list(rows),
        captions=captions,
        zoom=max(1, 192 // model.image_size),
    )
    sheets.save_picture(args.out, page)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
