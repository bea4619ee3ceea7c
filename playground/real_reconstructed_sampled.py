"""How do new slices look beside real ones, and how much of the difference is the first stage's?

    python playground/real_reconstructed_sampled.py

Rows: slices of a real validation case; the same through the codes of the VQ-VAE; a brain drawn by latent diffusion and
one by PixelCNN, both decoded by that VQ-VAE. Columns: slice index z; anterior is right.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import util
from dataset import SLICES_PER_CASE, find_data, load_slices, to_uint8
from heads.people import draw_person
from model_diffusion import LatentDiffusion
from model_VAE import load_first_stage, load_second_stage
from pictures import sheets
from pixelCNN import PixelCNN, decode_codes, sample_brain
from stable_diffusion import decode_brain, sample_latents
from stable_diffusion import flags as diffusion_flags

SHOWN = [2, 7, 12, 17, 22, 27]


@torch.no_grad()
def main() -> None:
    parser = util.plain_parser(__doc__)
    parser.add_argument("--first-stage", default="vqvae", metavar="RUN", help="default: %(default)s")
    parser.add_argument("--diffusion", default="diffusion", metavar="RUN", help="default: %(default)s")
    parser.add_argument("--pixelcnn", default="pixelcnn", metavar="RUN", help="default: %(default)s")
    parser.add_argument("--data", metavar="FOLDER", help="as in training")
    parser.add_argument("--seed", type=int, default=0, help="of the new brains (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("playground_vis/real_reconstructed_sampled.png"),
                        help="default: %(default)s")  # fmt: skip
    args = parser.parse_args()
    device = torch.device("cpu")
    first_stage = load_first_stage(args.first_stage, decoder=None)
    grain = first_stage.draw_grain(SLICES_PER_CASE, util.brain_generator(args.seed, 0, "grain"))
    grain = grain if grain is None else grain[SHOWN]
    data = load_slices(find_data(args.data), "validate", first_stage.image_size)
    x, z, case = data.batch((data.case == data.case[0]).nonzero()[:, 0][SHOWN])
    rows = [to_uint8(x)[:, 0].numpy(), to_uint8(first_stage.reconstruct(x, z, grain))[:, 0].numpy()]
    diffusion, decoder, description = load_second_stage(args.diffusion, LatentDiffusion, device, decoder=None)
    settings, _ = util.parse_flags(diffusion_flags(), ["--seed", str(args.seed)])
    person = draw_person({}, description, args.seed, 0)
    latent = sample_latents(diffusion, range(1), settings, device, person=person)[-1]
    rows.append(decode_brain(decoder, latent, args.seed)[SHOWN])
    pixelcnn, decoder, _ = load_second_stage(args.pixelcnn, PixelCNN, device, decoder=None)
    grain = decoder.draw_grain(SLICES_PER_CASE, util.brain_generator(args.seed, 0, "grain"))
    rows.append(decode_codes(decoder, sample_brain(pixelcnn, args.seed, 0, 1.0, device), grain=grain)[SHOWN])
    names = [f"real, case {int(case[0])}", "reconstructed", "new, diffusion", "new, PixelCNN"]
    captions = [f"z = {n}" for _ in rows for n in SHOWN]
    title = f"real, reconstructed and new slices; seed {args.seed}; grey 0..255, anterior is right"
    page = sheets.sheet(rows, title=title, row_names=names, captions=captions, zoom=256 // x.shape[-1])
    sheets.save_picture(args.out, page)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    util.command(main)
