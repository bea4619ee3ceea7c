"""What does the slice index z do in a first stage's decoder?

    python playground/z_conditioning.py --first-stage vqvae        # a VAE or VQ-VAE: run name, folder or weights file

Every slice is encoded with its own z, and that one latent is decoded with the right z, with z + 8 (modulo 32), and with
the z of another slice (a random permutation). Printed: the scores against the real slices of the first eight validation
cases. The more a wrong z costs, the more the decoder leans on z; equal scores mean that the latent already says
everything. Where the run's discriminator was trained (model_ckpt/NAME/last.pt), it judges every real validation slice
with the right z and with that of another slice; 0.5 as the share of slices for which the right z gets the higher mean
logit is what a coin would do, z ignored. The picture has six slices of a case as columns; its last two rows are what a
wrong z changes against the right one, x5, mid-grey is nothing. Anterior is right.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util
from dataset import SLICES_PER_CASE, Slices, find_data, has_masks, load_slices, to_uint8
from model_discriminator import PatchDiscriminator
from model_VAE import load_first_stage
from parts.autoencoder import Autoencoder
from pictures import sheets
from scores.metrics import mean_scores, slice_scores
from training import checkpoints

TRAINED_BY = "prestage_train.py"


def load_discriminator(weights: Path, device: torch.device) -> PatchDiscriminator | str:
    """The discriminator trained beside a weights file model_ckpt/NAME/model.safetensors, or why there is none."""
    checkpoint, name = weights.with_name("last.pt"), weights.resolve().parent.name
    if not checkpoint.is_file() or not (Path("log") / name / "run.json").is_file():
        return f"{checkpoint} and log/{name}/run.json are needed"
    settings, state = checkpoints.read_run(TRAINED_BY, name, {}), checkpoints.load_checkpoint(checkpoint, TRAINED_BY)
    if settings["gan_weight"] == 0 or state["step"] <= settings["discriminator_start"]:
        return f"run {name} has not trained one after {state['step']} steps"
    discriminator = PatchDiscriminator(channels=settings["discriminator_channels"])
    checkpoints.fill_model(discriminator, state["discriminator"], checkpoint)
    return discriminator.eval().requires_grad_(False).to(device)


def judge(
    discriminator: PatchDiscriminator, model: Autoencoder, data: Slices, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean logit of each real slice with the right z and with another's, [N] each, where the two z differ."""
    wrong = data.z[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
    logits = [[], []]
    for index in (wrong != data.z).nonzero()[:, 0].split(32):
        x, z, _ = data.batch(index, device)
        for told, means in zip((z, wrong[index].to(device)), logits, strict=True):
            means.append(discriminator(model.crop(x), told)[0].mean((1, 2, 3)).cpu())
    right, shuffled = (torch.cat(means) for means in logits)
    return right, shuffled


@torch.no_grad()
def main() -> None:
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", metavar="RUN", default="vqvae", help="run name, folder or file (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--seed", type=int, default=0, help="of the permutation (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/z_conditioning.png"), help="picture (default: %(default)s)")
    args = parser.parse_args()
    device = util.pick_device(args.device)
    model, folder = load_first_stage(args.first_stage, device), find_data(args.data)
    data = load_slices(folder, "validate", model.image_size, masks=has_masks(folder, "validate"))

    index = torch.isin(data.case, data.case.unique()[:8]).nonzero()[:, 0]
    z = data.z[index]
    permuted = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(args.seed))]
    decoders = {"true z": z, "z + 8": (z + 8) % SLICES_PER_CASE, "shuffled z": permuted}
    decoded = {}
    for name, told in decoders.items():
        parts = []
        for part in torch.arange(len(index)).split(32):
            x, own, _ = data.batch(index[part], device)
            parts.append(to_uint8(model.decode(model.encode(x, own), told[part].to(device)))[:, 0].cpu())
        decoded[name] = torch.cat(parts)
        truth = data.masks[index] if data.masks is not None else None
        scores = mean_scores([slice_scores(decoded[name], data.images[index].cpu(), truth)])
        print(f"decoded with {name:10s}  " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))

    discriminator = load_discriminator(Path(model.description["path"]), device)
    if isinstance(discriminator, str):
        print(f"discriminator: left out, {discriminator}")
    else:
        right, shuffled = judge(discriminator, model, data, device, args.seed)
        share = (right > shuffled).float().mean()
        print(
            f"discriminator, {len(right)} real slices: mean logit {right.mean():+.4f} with the right z, "
            f"{shuffled.mean():+.4f} with a shuffled z; the right z gets the higher in {share:.1%}"
        )

    own_case = (data.case[index] == data.case[index[0]]).nonzero()[:, 0]
    shown = own_case[torch.linspace(0, len(own_case) - 1, 8).round().long()[1:-1]]  # the outermost show little brain
    right, *wrong = (picture[shown].int() for picture in decoded.values())
    changes = [picture - right for picture in wrong]
    changed = [(128 + 5 * change).clamp(0, 255).to(torch.uint8) for change in changes]
    rows = [data.images[index[shown]].cpu(), *(picture[shown] for picture in decoded.values()), *changed]
    captions = [f"z = {n}" for n in z[shown].tolist()]
    captions += [f"decoded with z = {n}" for told in decoders.values() for n in told[shown].tolist()]
    captions += [f"mean |change| {change.abs().float().mean():.2f} of 255" for part in changes for change in part]
    names = ["real", *decoders, "z + 8, change x5", "shuffled, change x5"]
    title = (
        f"{args.first_stage}, validate case {int(data.case[index[0]])}: each latent decoded with the right z and with "
    )
    title += "wrong ones; change against the right z, mid-grey is none; anterior right"
    zoom = max(1, 192 // model.image_size)
    page = sheets.sheet([r.numpy() for r in rows], title=title, row_names=names, captions=captions, zoom=zoom)
    sheets.save_picture(args.out, page)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
