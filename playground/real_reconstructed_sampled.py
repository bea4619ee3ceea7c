"""How do new slices look beside real ones, and how much of the difference is the first stage's?

    python playground/real_reconstructed_sampled.py

Rows: slices of a real validation brain; the same through the codes of the VQ-VAE; a brain drawn by latent diffusion and
one by PixelCNN, both decoded by that VQ-VAE. Columns: slice index z; anterior is right.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import pixelCNN
import stable_diffusion
import util
from dataset import find_data, load_slices
from model_VAE import VQVAE
from pictures import sheets
from training.stages import load_first_stage, load_second_stage
from util import UserError


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    add = parser.add_argument
    add("--first-stage", default="vqvae", metavar="RUN", help="a VQ-VAE (default: %(default)s)")
    add("--diffusion", default="diffusion", metavar="RUN", help="latent diffusion on it (default: %(default)s)")
    add("--pixelcnn", default="pixelcnn", metavar="RUN", help="PixelCNN on it (default: %(default)s)")
    add("--data", metavar="FOLDER", help="as in training")
    add("--seed", type=util.seed, default=0, help="of the new brains (default: %(default)s)")
    add("--out", type=Path, default=Path("playground_vis/real_reconstructed_sampled.png"),
        help="picture (default: %(default)s)")  # fmt: skip
    return parser


@torch.no_grad()
def main() -> None:
    args = flags().parse_args()
    first_stage = load_first_stage(args.first_stage, decoder=None)
    if not isinstance(first_stage, VQVAE):
        raise UserError(f"--first-stage {args.first_stage} is a {first_stage.kind}; name a VQ-VAE")
    data = load_slices(find_data(args.data), "validate", first_stage.image_size)
    whole = data.whole_cases()
    if not len(whole):
        raise UserError(f"no brain of {data.folder} has all slices; python dataset.py {data.folder} lists the missing")
    x, z, case = data.batch(whole[0])
    idx = first_stage.encode_indices(x, z)
    rows = {f"real, case {int(case[0])}": data.images[whole[0]].numpy()}
    rows["reconstructed"] = pixelCNN.decode_brain(first_stage, idx, args.seed)

    diffusion, decoder = load_second_stage(args.diffusion, stable_diffusion.MODELS)
    drawn = stable_diffusion.draw_brains(diffusion, decoder, stable_diffusion.Sampling(seed=args.seed))
    rows["new, diffusion"] = next(drawn)[0]
    pixelcnn, decoder = load_second_stage(args.pixelcnn, pixelCNN.PRIORS)
    rows["new, PixelCNN"] = pixelCNN.decode_brain(decoder, pixelCNN.sample_brain(pixelcnn, args.seed), args.seed)

    Z = len(z)
    shown = list(range(Z))[Z // 12 :: max(1, Z // 6)]
    page = sheets.sheet(
        sheets.heads([slices[shown] for slices in rows.values()]),
        title=f"real, reconstructed and new slices; seed {args.seed}; grey 0..255, anterior is right",
        row_names=list(rows),
        captions=[f"z = {n}" for _ in rows for n in shown],
        zoom=max(1, 256 // first_stage.image_size),
    )
    sheets.save_picture(args.out, page)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
