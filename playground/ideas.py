"""What does each idea of the report look like? Nine schematic drawings, for its part "The ideas, one by one".

    python playground/ideas.py                  # writes playground_vis/idea_*.svg
    python playground/ideas.py --out figures    # those of the report

Needs no data: a slice of the phantom goes through the released weights, and every shape and number is read from these
models or from the code. pictures/drawings.py says what boxes and colours mean.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import cache
from itertools import combinations, pairwise, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

import util
from dataset import to_float
from heads.phantom import phantom_case
from model_diffusion import RECIPES, noise_levels
from model_discriminator import PatchDiscriminator
from model_VAE import VQVAE, VQVAE2
from module import norm
from parts.autoencoder import Autoencoder
from parts.quantizer import lloyd, nearest_code
from pictures.drawings import DARK, GREY, ORANGE, YELLOW, Page, Place, svg_of
from stable_diffusion import Sampling
from training.checkpoints import RELEASED
from training.stages import load_first_stage

Z = 15  # of the slice that is shown


def flags() -> argparse.ArgumentParser:
    """This script's command line."""
    parser = util.plain_parser(__doc__)
    folder = Path("playground_vis")
    parser.add_argument(
        "--out", type=Path, default=folder, metavar="FOLDER", help="for the pictures (default: %(default)s)"
    )
    return parser


# ------------------------------------------------------------------------------------------ slices, models and numbers


@cache
def head() -> tuple[Tensor, Tensor]:
    """All slices of a phantom head: x float32 [32, 1, 256, 256] in [-1, 1] and z int64 [32]."""
    images = phantom_case(0, 1)[0]
    return to_float(torch.from_numpy(images)[:, None]), torch.arange(len(images))


def the_slice() -> tuple[Tensor, Tensor]:
    x, z = head()
    return x[Z : Z + 1], z[Z : Z + 1]


@cache
def released(name: str) -> Autoencoder:
    return load_first_stage(RELEASED / f"{name}.safetensors")


@cache
def two_levels() -> VQVAE2:
    """A VQ-VAE-2 as large as the released VQ-VAE, before training: linear paths and codes are set from the phantom."""
    kwargs = released("vqvae_f8").description["model_kwargs"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VQVAE2(**{name: value for name, value in kwargs.items() if name != "perceptual"})
        model.fit(*(part[Z % 4 :: 4] for part in head()))
    return model.eval()


def shape(*sizes: int) -> str:
    """Such as [8, 24, 28]."""
    return f"[{', '.join(map(str, sizes))}]"


def grey(values: Tensor) -> np.ndarray:
    """Numbers [H, W] as grey 0..1; the outermost hundredth at either end is cut off."""
    low, high = values.float().quantile(torch.tensor([0.01, 0.99]))
    return ((values - low) / (high - low)).clamp(0, 1).numpy()


def small(x: Tensor, scale: float = 3 / 8) -> np.ndarray:
    """A picture [1, 1, H, W] in [-1, 1] as grey 0..1, `scale` times as large."""
    return (F.interpolate(x, scale_factor=scale, mode="area")[0, 0] / 2 + 0.5).clamp(0, 1).numpy()


def white(*sizes: int) -> Tensor:
    """Noise, always the same."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------ drawings
# fmt: off
# a drawing is a list of things and their places, one a line


def two_stages() -> Page:
    """From slice to codes and back; what stage two learns; how both make a new brain."""
    model, (x, z), page = released("vqvae_f8"), the_slice(), Page(620)
    latent, idx = model.encode(x, z), model.encode_indices(x, z)
    (C, h, w), slices, first = model.latent_shape, model.slices_per_brain, latent[0, 0]

    page.title(18, "Stage one: write a slice in few numbers, and read it back")
    top, left, height, width = model.box
    seen = page.picture(76, 122, 104, 104, small(x), above=f"slice $x$ {shape(*x.shape[1:])}",
                        below=f"dashed: the coded\nbox, {height} × {width}")
    scale = seen.w / model.image_size
    page.outline(seen.left[0] + (left + width / 2) * scale, seen.top[1] + (top + height / 2) * scale,
                 width * scale, height * scale, edgecolor="white", linestyle="--")
    encoder = page.box(203, 122, 84, 52, "encoder")
    maps = page.picture(334, 122, 98, 84, grey(first), 3, above=f"latent {shape(C, h, w)}",
                        below="drawn: its first channel;\na VAE stops here")
    codes = page.picture(504, 122, 98, 84, grey(idx[0]), above=f"codes idx {shape(h, w)}",
                         below=f"each of K = {model.codebook_size:,}:\n{model.fixed_bits:,.0f} bits a slice")
    decoder = page.box(635, 122, 84, 52, "decoder")
    back = page.picture(764, 122, 104, 104, small(model.decode_indices(idx, z)), above=r"reconstruction $\hat{x}$",
                        below="loss: mean error\nand SSIM against $x$")
    page.chain(seen, encoder, maps)
    page.arrow(maps.right, codes.left, words="nearest\ncode")
    page.chain(codes, decoder, back)
    height_of = page.box(419, 236, 250, 24, f"z: height of the slice, 0 to {slices - 1}", "plain")
    page.arrow(height_of.left, (203, 236), encoder.bottom)
    page.arrow(height_of.right, (635, 236), decoder.bottom)

    page.line((14, 264), (826, 264), color=GREY, linewidth=0.6)
    page.title(283, "Stage two: stage one stays as it is; learn which of these numbers make a brain")
    page.text(280, 308, "either latent diffusion: remove noise")
    page.text(694, 308, "or a PixelCNN: one code after the other")
    alpha, sigma = (level[600] for level in noise_levels("cosine", 1000))
    noise, brain = white(h, w), shape(slices, C, h, w)
    clean = page.picture(60, 370, 84, 72, grey(first), 4, below=f"latents of a head\n{brain}")
    noised = page.picture(216, 370, 84, 72, grey(alpha * first + sigma * noise), 4)
    unet = page.box(348, 370, 76, 52, "UNet")
    guess = page.box(466, 370, 102, 52, "guess at clean\nlatents:\nsquared error", "loss", 11)
    page.arrow(clean.right, noised.left, words="+ noise")
    page.chain(noised, unet, guess)
    page.enter(unet, "t, z, age, sex, CDR")
    known = np.where(np.arange(h * w).reshape(h, w) < 11 * w + 13, grey(idx[0]), 1)
    written = page.picture(590, 370, 84, 72, known, below="codes so far")
    pixelcnn = page.box(694, 370, 74, 52, "PixelCNN")
    following = page.box(788, 370, 76, 52, "next code:\ncross-\nentropy", "loss", 11)
    page.chain(written, pixelcnn, following)
    page.enter(pixelcnn, "z")

    page.line((14, 446), (826, 446), color=GREY, linewidth=0.6)
    page.title(465, f"Sampling: {slices} matching slices of a new brain; nothing is learned here")
    start = page.picture(60, 528, 84, 56, grey(noise), 4, below=f"noise {brain}")
    denoise = page.box(222, 528, 124, 44, f"UNet, {Sampling().steps} times:\nless noise each time", "frozen", 11)
    latents = page.sheets(382, 528, 84, 56, 4, inside="latents")
    page.chain(start, denoise, latents)
    empty = page.box(60, 598, 84, 24, "empty grid", "plain")
    write = page.box(222, 598, 124, 24, "PixelCNN, all z", "frozen")
    found = page.box(382, 598, 84, 24, "codes", "plain")
    page.chain(empty, write, found)
    decode = page.box(574, 560, 108, 60, "decoder of\nstage one,\nwith z", "frozen")
    page.arrow(latents.right, (474, 528), (474, 548), (520, 548))
    page.arrow(found.right, (474, 598), (474, 572), (520, 572))
    page.text(498, 528, "either", 11)
    page.text(490, 600, "or", 11)
    page.chain(decode, page.sheets(734, 560, 84, 72, 5, inside=f"{slices} slices"))
    return page


def vae() -> Page:
    """Mean and variance, a draw, and what both losses compare."""
    model, (x, z), page = released("vae_f8d8"), the_slice(), Page(420)
    mean, log_variance = model.posterior(x, z)
    sd, sizes = (0.5 * log_variance).exp(), shape(*model.latent_shape)

    seen = page.picture(60, 140, 92, 92, small(x), above="slice $x$")
    encoder = page.box(170, 140, 76, 52, "encoder")
    page.text(315, 14, r"q(latent | $x$, z) $= N(\mu, s^2)$", 13)
    both = page.box(315, 140, 168, 232, "", "plain")
    page.picture(311, 78, 84, 72, grey(mean[0, 0]), 3, below=rf"mean $\mu$ {sizes}")
    page.picture(311, 190, 84, 72, grey(sd[0, 0]), 3, below=f"sd $s$ {sizes}")
    drawn = page.picture(500, 140, 84, 72, grey((mean + sd * white(*mean.shape))[0, 0]), 3,
                         above=r"latent $= \mu + s \cdot$ noise")
    page.sheets(500, 234, 64, 40, 3, inside="noise", below="from $N(0, 1)$, new each time")
    page.arrow((500, 206), (500, 176))
    decoder = page.box(640, 140, 76, 52, "decoder")
    back = page.picture(770, 140, 92, 92, small(model.reconstruct(x, z)), above=r"reconstruction $\hat{x}$")
    page.chain(seen, encoder, both)
    page.arrow((both.right[0], 140), drawn.left, words="draw")
    page.chain(drawn, decoder, back)
    page.enter(encoder, "z")
    page.enter(decoder, "z")

    bells, grid = page.inset(84, 342, 140, 66), np.linspace(-4, 4, 81)
    bells.plot(grid, np.exp(-(grid**2) / 2), "k--", linewidth=1)
    bells.plot(grid, 2 * np.exp(-((grid - 1.6) ** 2) / 2 / 0.5**2), color=DARK, linewidth=1.8)  # same area
    bells.axis("off")
    page.text(46, 338, "prior\n$N(0, 1)$", 11)
    page.text(132, 318, "q")
    page.text(84, 384, "one number of the latent", 11)
    price = page.box(315, 342, 288, 62, "price: bits that q tells beyond the prior\n"
                     r"kl $= \Sigma \, (\mu^2 + s^2 - 1 - \log \, s^2) \, / \, (2 \, \ln \, 2)$", "loss", 13)
    likeness = page.box(690, 342, 252, 62, r"likeness: how far $\hat{x}$ is from $x$" "\n"
                        r"mean $|\hat{x} - x|$ + 0.5 (1 $-$ SSIM)", "loss", 13)
    page.arrow(both.bottom, price.top, linestyle="--", color=ORANGE)
    page.arrow(back.bottom, (back.x, likeness.top[1]), linestyle="--", color=ORANGE)
    page.text(495, 398, r"Loss = likeness + weight · kl per pixel. Gradients pass through the draw to $\mu$ and $s$.")
    return page


def vqvae() -> Page:
    """The chain with its straight-through gradient, and the embedding space."""
    model, (x, z), page = released("vqvae_f8"), the_slice(), Page(566)
    vectors, idx, quantizer = model.vectors(x, z), model.encode_indices(x, z), model.quantizer
    (C, h, w), K = model.latent_shape, quantizer.codebook_size

    seen = page.picture(54, 122, 84, 84, small(x), below="slice $x$")
    encoder = page.box(150, 122, 68, 48, "encoder")
    outputs = page.picture(258, 122, 84, 72, grey(vectors[0, 0]), 3, below=f"vectors $e$ {shape(C, h, w)}")
    codes = page.picture(426, 122, 84, 72, grey(idx[0]), below=f"idx {shape(h, w)},\neach 0 to {K - 1:,}")
    rounded = page.picture(576, 122, 84, 72, grey(quantizer.lookup(idx)[0, 0]), 3,
                           below=f"entries $q$ {shape(C, h, w)}")
    decoder = page.box(692, 122, 68, 48, "decoder")
    back = page.picture(788, 122, 84, 84, small(model.decode_indices(idx, z)), below=r"reconstruction $\hat{x}$")
    page.chain(seen, encoder, outputs)
    page.arrow(outputs.right, codes.left, words="nearest\nentry")
    page.arrow(codes.right, rounded.left, words="look\nup")
    page.chain(rounded, decoder, back)
    page.arrow((580, 74), (580, 34), (262, 34), (262, 74), color=ORANGE, linestyle="--")
    page.text(421, 20, "backwards, the gradient goes straight from $q$ to $e$", color=ORANGE)
    page.enter(encoder, "z", 14)
    page.enter(decoder, "z", 14)

    page.text(244, 232, f"The embedding space (2 of {C} numbers; 9 of {K:,} entries)", 13)
    embedding_space(page.inset(244, 400, 440, 310), entries=9)
    page.axes.plot(500, 262, "o", color="black", markersize=4)
    page.text(528, 262, "a vector $e$, one for each place of the grid", ha="left")
    page.axes.plot(500, 306, "s", color=ORANGE, markersize=8)
    page.text(528, 306, "an entry $c_k$ of the codebook; grey lines\nbound what is nearer to it than to others",
              13, ha="left")
    page.line((486, 352), (514, 352), color=DARK, linewidth=0.8)
    page.text(528, 352, "a vector snaps to its nearest entry:\nits code is idx $= k$, and $q = c_k$", 13, ha="left")
    page.box(658, 412, 340, 52, "commitment: vectors stay near their entries\n"
             rf"$L = \beta \cdot$ mean$(e - \mathrm{{sg}}[q])^2$, $\beta = {quantizer.commitment:g}$", "loss", 13)
    page.box(658, 476, 340, 52, "entries follow the mean of their vectors:\n"
             rf"moving averages, $\gamma = {quantizer.decay:g}$", "plain", 13)
    page.text(658, 532, "sg[ ]: constant when gradients are taken.\n"
              r"Encoder and decoder learn from the error of $\hat{x}$.", 11)
    return page


def embedding_space(axes: Axes, entries: int) -> None:
    """Entries by k-means on vectors in a plane, and the borders between them."""
    size, generator = torch.tensor([4.4, 3.1]), torch.Generator().manual_seed(4)
    vectors = 0.15 + torch.rand(45, 2, generator=generator) * (size - 0.3)
    entries = lloyd(vectors, vectors[:entries], range(30), generator=generator)
    for one, other in combinations(entries, 2):  # a border is the part of their bisector where no third entry is nearer
        line = (one + other) / 2 + torch.linspace(-4, 4, 4001)[:, None] * (other - one).flip(0) * torch.tensor([-1, 1])
        nobody_nearer = torch.cdist(line, entries).min(1).values > (line - one).norm(dim=1) - 1e-4
        border = line[nobody_nearer & ((line > 0) & (line < size)).all(1)]
        if len(border):
            axes.plot(*border[[0, -1]].T, color="#9ca3af", linewidth=0.8)
    ways = torch.stack([vectors, entries[nearest_code(vectors, entries)], torch.full_like(vectors, math.nan)], dim=1)
    axes.plot(*ways.view(-1, 2).T, color=DARK, linewidth=0.8)
    axes.plot(*vectors.T, "o", color="black", markersize=3)
    axes.plot(*entries.T, "s", color=ORANGE, markersize=8)
    axes.set(xlim=(0, float(size[0])), ylim=(0, float(size[1])), xticks=[], yticks=[])


def attention() -> Page:
    """Queries, keys and values of all positions, with the shapes of the autoencoder's layer."""
    model, page = released("vqvae_f8"), Page(440)
    heads, (features, weights) = model.encoder.attention.heads, attention_weights(model)
    C, h, w = features.shape
    n, d = h * w, C // heads

    given = page.sheets(48, 170, 60, 50, 5, inside="$h$", below=f"features\n{shape(C, h, w)}")
    project = page.box(166, 170, 84, 62, "norm, then\n1×1 convo-\nlution to 3 C")
    page.chain(given, project)
    q, k, v = (page.sheets(280, 84 + 86 * row, 26, 50, 4, inside=f"${'qkv'[row]}$",
                           below=("queries", "keys", f"values\neach {shape(heads, n, d)}")[row]) for row in range(3))
    for part in (q, k, v):
        page.arrow(project.right, (234, 170), (234, part.y), part.left)
    dots = page.box(404, 127, 88, 44, r"$q k^T / \sqrt{d}$", "plain", 13)
    page.arrow(q.right, (330, 84), (330, 118), (360, 118))
    page.arrow(k.right, (330, 170), (330, 136), (360, 136))
    softmax = page.box(498, 127, 64, 44, "softmax", "plain")
    shares = page.sheets(590, 127, 72, 64, 4, inside="weights,\nrows sum\nto 1", above=shape(heads, n, n))
    page.chain(dots, softmax, shares)
    times, add = page.sign(590, 256, "×"), page.sign(738, 28, "+")
    page.arrow((590, 159), times.top)
    page.arrow(v.right, times.left)
    mixed = page.sheets(648, 256, 26, 50, 4, below=shape(heads, n, d))
    out = page.box(738, 256, 88, 50, "project: 1×1\nconvolution")
    page.chain(times, mixed, out)
    page.arrow(out.top, add.bottom)
    page.arrow((48, 128), (48, 28), add.left)
    page.text(380, 18, "the input goes on as it is: the residual path", 11)
    page.arrow(add.right, (780, 28))
    page.text(806, 28, "output")
    page.text(796, 48, shape(C, h, w), 11)

    page.text(14, 330, "One row of weights as a map", 13, ha="left")
    page.text(14, 384, f"How much the marked position takes\nfrom each of the {n}: also from far places,\nin both "
              f"hemispheres. Mean of {heads} heads;\ntrained encoder, slice of the phantom.", 11, ha="left")
    row, column = h // 2, w // 2
    seen = page.picture(370, 376, 126, 108, small(model.crop(the_slice()[0]), 1 / 2))
    taken = page.picture(540, 376, 126, 108, grey(weights[row * w + column].view(h, w)))
    cell = seen.w / w
    for place in (seen, taken):
        page.outline(place.left[0] + (column + 0.5) * cell, place.top[1] + (row + 0.5) * cell, cell, cell,
                     edgecolor=YELLOW, linewidth=1.4)
    page.chain(seen, taken)
    page.text(720, 376, f"$n = {h} \\cdot {w} = {n}$ positions,\nC = {C} channels,\n{heads} heads of $d = {d}$")
    return page


def attention_weights(model: VQVAE) -> tuple[Tensor, Tensor]:
    """Features [C, h, w] that the encoder's attention gets of the slice, and its weights [n, n], mean over heads."""
    got, layer = [], model.encoder.attention
    hook = layer.register_forward_hook(lambda module, inputs, output: got.append(inputs[0]))
    model.encode(*the_slice())
    hook.remove()
    q, k, _ = layer.qkv(layer.norm(got[0])).view(3, layer.heads, -1, got[0][0, 0].numel()).unbind(0)
    return got[0][0], (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1).mean(0)


def normalisations() -> Page:
    """Which numbers of a batch share a mean and a variance, in four normalisations."""
    page, layer = Page(330), norm(128)
    channels, group = layer.num_channels, layer.num_channels // layer.num_groups
    columns = [  # name, which cells (n, c) share, and words
        ("batch", lambda n, c: c == 1, "one channel, over all\nslices of the batch", "a slice depends on\nthe others of its batch"),  # noqa: E501
        ("layer", lambda n, c: n == 0, "one slice,\nover all channels", "all channels share\none scale"),
        ("instance", lambda n, c: (n, c) == (0, 1), "one slice\nand one channel", "forgets how strong\na channel is"),
        ("group", lambda n, c: n == 0 and c < 2, f"one slice, {group} of\n{channels} channels here",
         "a slice is coded alike\nalone or in a batch"),
    ]
    for x, (name, shares, words, effect) in zip(range(40, 840, 208), columns):
        cube(page, x, 88, shares)
        page.text(x + 60, 24, f"{name} normalisation" + (" (here)" if name == "group" else ""), 13)
        page.text(x + 60, 200, words, va="top")
        page.text(x + 60, 246, effect, va="top")
    page.text(420, 305, "coloured: numbers that share one mean and one variance. "
              "N: slices of the batch, C: channels, HW: positions")
    return page


def cube(page: Page, x: float, y: float, shares: Callable[[int, int], bool]) -> None:
    """N x C x P cells in oblique projection, N into the page; (x, y) is the front's top left corner."""
    N, C, P = 3, 6, 4

    def at(*corners: tuple[float, float, float]) -> list[tuple[float, float]]:
        return [(x + 20 * c + 11 * n, y + 20 * p - 8 * n) for n, c, p in corners]

    for n, c in product(range(N), range(C)):
        faces = [at((n, c, 0), (n, c + 1, 0), (n + 1, c + 1, 0), (n + 1, c, 0))]
        faces += [at((0, c, 0), (0, c + 1, 0), (0, c + 1, P), (0, c, P))] if n == 0 else []
        faces += [at((n, C, 0), (n + 1, C, 0), (n + 1, C, P), (n, C, P))] if c == C - 1 else []
        for face in faces if shares(n, c) else []:
            page.area(face, "#6f9fd8")
    folds = [at((0, c, P), (0, c, 0), (N, c, 0)) for c in range(C + 1)]  # edges of cells, over two faces each
    folds += [at((0, 0, p), (0, C, p), (N, C, p)) for p in range(P + 1)]
    folds += [at((n, 0, 0), (n, C, 0), (n, C, P)) for n in range(1, N + 1)]
    for fold in folds:
        page.line(*fold, linewidth=0.7)
    page.text(x + 60, y + 91, "C")
    page.text(x - 16, y + 40, "HW")
    page.text(x + 7, y - 18, "N")


def field_of_view(critic: PatchDiscriminator) -> tuple[int, int, int]:
    """(pixels a side that one verdict depends on, pixels from one verdict to the next, first pixel of the first)."""
    size, stride, first = 1, 1, 0
    for conv in (critic.first, *critic.convs, critic.last, critic.head):
        size += (conv.kernel_size[0] - 1) * stride
        first -= conv.padding[0] * stride
        stride *= conv.stride[0]
    return size, stride, first


def patchgan() -> Page:
    """What one verdict of the discriminator sees, and its layers."""
    model, (x, z), page = released("vqvae_f8"), the_slice(), Page(520)
    with torch.random.fork_rng(devices=[]):
        critic, box = PatchDiscriminator().eval(), model.crop(x)
    logits = critic(box.expand(-1, 3, -1, -1), z)
    (size, stride, first), (height, width), (rows, columns) = field_of_view(critic), box.shape[2:], logits.shape[2:]

    seen = page.picture(126, 132, width, height, small(box, 1 / 2),
                        above=f"coded box {shape(height, width)} of a slice")
    verdicts = page.sheets(718, 132, stride * columns, stride * rows, 1, above=f"verdicts {shape(rows, columns)}")
    (left, _), (_, top) = verdicts.left, verdicts.top
    for n in range(1, columns):
        page.line((left + stride * n, top), (left + stride * n, top + verdicts.h), linewidth=0.3)
    for n in range(1, rows):
        page.line((left, top + stride * n), (left + verdicts.w, top + stride * n), linewidth=0.3)
    row, column, middle = 5, 15, first + size / 2
    one = Place(left + stride * (column + 0.5), top + stride * (row + 0.5), stride, stride)
    field = Place(seen.left[0] + middle + stride * column, seen.top[1] + middle + stride * row, size, size)
    page.outline(*field, edgecolor=YELLOW, linewidth=2)
    page.outline(*one, facecolor=YELLOW)
    for side in (-0.5, 0.5):
        page.line((field.right[0], field.y + side * size), (one.left[0], one.y + side * stride), linewidth=0.8)
    page.text(424, 150, f"One verdict sees {size} × {size} pixels; the field\nof the next one lies {stride} pixels "
              "further.\nThe higher, the more it looks real.")

    given = page.sheets(48, 316, 48, 42, 3, inside=r"$x$ or $\hat{x}$", below=shape(3, height, width))
    vector = page.box(48, 412, 64, 40, "z, as a\nvector $a$")
    kernels = {conv: "×".join(map(str, conv.kernel_size)) for conv in critic.modules() if isinstance(conv, nn.Conv2d)}
    before, after = [f"{kernels[critic.first]},\n", "", ""], ["", "", f",\n{kernels[critic.last]}"]
    for n, conv in enumerate(critic.convs):
        step = page.box(130 + 148 * n, 316, 76, 50, f"{before[n]}{kernels[conv]} / {conv.stride[0]}{after[n]}")
        made = page.sheets(198 + 148 * n, 316, 44 - 8 * n, 44 - 8 * n, 3 + n, inside=r"$\phi$" if n == 2 else "",
                           below=shape(conv.out_channels, height // 2 ** (n + 1), width // 2 ** (n + 1)))
        page.chain(given, step, made)
        page.arrow((step.x, 412), step.bottom)
        given = made
    last, add = page.box(626, 316, 76, 50, kernels[critic.head]), page.sign(710, 316, "+")
    agreement = page.box(626, 412, 120, 50, r"$\langle V a, \phi \rangle \, / \, C$", size=13)
    page.chain(given, last, add)
    page.arrow(add.right, (748, 316))
    page.text(790, 308, "$D(x, z)$", 13)
    page.text(790, 326, shape(*logits.shape[1:]), 11)
    page.chain(vector, agreement)
    page.arrow((552, 316), (552, 400), (agreement.left[0], 400))
    page.arrow(agreement.right, (add.x, 412), add.bottom)
    page.text(300, 424, "Boxes: convolutions, k×k / stride. $a$ is added after each with a stride.", 11)
    page.box(147, 484, 274, 54, "critic: real slices above drawn ones\n"
             r"$L_D = E[\ln(1 + e^{D(\hat{x}, z) - D(x, z)})]$", "loss", 13)
    page.box(428, 484, 268, 54, "texture: drawn slices above real ones\n"
             r"$L_G = E[\ln(1 + e^{D(x, z) - D(\hat{x}, z)})]$", "loss", 13)
    page.box(698, 484, 252, 54, "texture: like the slice after a blur $b$\n"
             r"$L_b =$ mean$|b(\hat{x}) - b(x)|$", "loss", 13)
    return page


def vqvae2() -> Page:
    """Top codes, the picture that they make, and bottom codes of what is left."""
    model, (x, z), page = two_levels(), the_slice(), Page(462)
    idx_top, idx = model.encode_indices(x, z)
    known = model.pad((model.linear_top.decode(model.quantizer_top.lookup(idx_top)) - 1).clamp(-1, 1))
    f = model.factor

    seen = page.picture(62, 220, 96, 96, small(x), above="slice $x$")
    encode_top = page.box(210, 78, 120, 54, "encoder$_t$ and\nlinear path $A_t$", size=13)
    top = page.picture(392, 78, 84, 72, grey(idx_top[0]),
                       above=f"top codes {shape(*idx_top.shape[1:])}, one for {2 * f} × {2 * f} pixels")
    alone = page.picture(392, 210, 96, 96, small(known))
    page.text(392, 278, "$A'_t \\, q_t$: the picture that\nthe top codes make alone", 13)
    encode_bottom = page.box(210, 362, 148, 70, "encoder$_b$ sees both;\nlinear path $A_b$ codes\nthe difference",
                             size=13)
    bottom = page.picture(392, 362, 84, 72, grey(idx[0]),
                          below=f"bottom codes {shape(*idx.shape[1:])}, one for {f} × {f} pixels")
    join = page.box(540, 220, 100, 66, f"top, doubled,\nand bottom:\n{shape(*model.latent_shape)}", "plain")
    decoder = page.box(658, 220, 92, 66, "decoder and\nlinear paths\n$A'_t$, $A'_b$", size=13)
    back = page.picture(776, 220, 96, 96, small(model.decode_indices((idx_top, idx), z)),
                        above=r"reconstruction $\hat{x}$")
    page.arrow(seen.right, (126, 220), (126, 78), encode_top.left)
    page.arrow((126, 220), (126, 362), encode_bottom.left)
    page.chain(encode_top, top)
    page.arrow(top.bottom, alone.top)
    page.arrow(alone.left, (210, 210), encode_bottom.top)
    page.chain(encode_bottom, bottom)
    page.arrow(top.right, (540, 78), join.top)
    page.arrow(bottom.right, (540, 362), join.bottom)
    page.chain(join, decoder, back)
    for place in (encode_top, encode_bottom, decoder):
        page.enter(place, "z", 14)
    page.text(420, 446, f"Either level has K = {model.codebook_size:,} codes; together {model.fixed_bits:,.0f} bits "
              "a slice. Pictures: before training, when the linear paths do it all.", 11)
    return page


def residual() -> Page:
    """The residual block with its embedding, and SiLU."""
    model, page = released("vqvae_f8"), Page(330)
    block = model.encoder.levels[0][0]
    out, into, *kernel = block.conv1.weight.shape
    kernel = "×".join(map(str, kernel))

    places = [page.sheets(38, 130, 44, 44, 4, inside="$h$", below=shape(into, *model.latent_shape[1:]))]
    layers = ["norm$_1$", "SiLU", f"conv$_1$\n{kernel}", "+", "norm$_2$", "SiLU", f"conv$_2$\n{kernel}", "+"]
    for x, words in zip(range(122, 840, 84), layers):
        kind = "plain" if words == "SiLU" else "network"
        places.append(page.sign(x, 130, "+") if words == "+" else page.box(x, 130, 58, 46, words, kind, 13))
    page.chain(*places)
    page.arrow(places[-1].right, (766, 130))
    page.text(796, 130, "output")
    page.text(784, 150, shape(out, *model.latent_shape[1:]), 11)
    skip = page.box(416, 46, 230, 38, "skip: as it is, or a 1×1 convolution\nwhere the number of channels changes",
                    "plain", 11)
    page.arrow((38, 96), (38, 46), skip.left)
    page.arrow(skip.right, (710, 46), places[-1].top)
    page.text(626, 172, "begins at zero: at first\nthe block changes nothing", 11)

    number = page.box(92, 268, 156, 54, "z by cosines and an MLP;\nin the UNet a sum: t, z,\nage, sex, CDR", size=11)
    vector = page.sheets(252, 268, 126, 30, 1, inside=f"embedding {shape(block.embed.in_features)}")
    silu = page.box(374, 268, 58, 30, "SiLU", "plain", 13)
    embed = page.box(374, 206, 58, 40, "linear\n$W$", size=13)
    page.chain(number, vector, silu)
    page.arrow(silu.top, embed.bottom)
    page.arrow(embed.top, places[4].bottom)
    page.text(420, 206, "the same at\nevery position", 11, ha="left")

    curve, grid = page.inset(660, 262, 220, 90), torch.linspace(-5, 5, 101)
    curve.plot(grid, F.relu(grid), "--", color=GREY, linewidth=1.2)
    curve.plot(grid, F.silu(grid), color=DARK, linewidth=1.8)
    curve.axhline(0, color="black", linewidth=0.5, zorder=0)
    curve.axvline(0, color="black", linewidth=0.5, zorder=0)
    curve.axis("off")
    page.text(576, 264, "SiLU(h) =\nh · sigmoid(h)", 11)
    page.text(752, 284, "dashed: ReLU", 11)
    return page


TRAINING = """\
x_t = alpha[t] * x_0 + sigma[t] * noise
guess = network(x_t, t, z)
error = guess - x_0
loss = mean(weight[t] * channel_weight * error**2)"""
SAMPLING = """\
for t, s in steps:
    guess = network(x, t, z)
    noise = (x - alpha[t] * guess) / sigma[t]
    x = alpha[s] * guess + sigma[s] * noise"""


def diffusion() -> Page:
    """Noise is added in known steps; the way back is learned."""
    page, T = Page(440), 1000
    alpha, sigma = noise_levels(RECIPES["v"].schedule, T)
    x = F.interpolate(the_slice()[0], scale_factor=7 / 32, mode="area")[0, 0]
    x = (x - x.mean()) / x.std()
    page.text(420, 22, r"forwards, nothing to learn: $x_t = \alpha_t \, x_0 + \sigma_t \cdot$ noise", 13)
    page.text(420, 218, "backwards, learned: guess at $x_0$, then step to less noise", 13, color=ORANGE)
    places = []
    for n, t in enumerate((0, T // 4, T // 2, 3 * T // 4, T - 1)):
        noised = ((alpha[t] * x + sigma[t] * white(*x.shape) + 2) / 5).clamp(0, 1)
        places.append(page.picture(80 + 170 * n, 104, 112, 112, noised.numpy(),
                                   below=f"t = {t}\nalpha {alpha[t]:.2f}, sigma {sigma[t]:.2f}"))
    for one, other in pairwise(places):
        page.arrow((one.right[0] + 4, 84), (other.left[0] - 4, 84))
        page.arrow((other.left[0] - 4, 124), (one.right[0] + 4, 124), color=ORANGE, linestyle="--")

    for x, words, code in ((208, "Training: slices, t and noise at random", TRAINING),
                           (632, "Sampling: begin with x = noise", SAMPLING)):
        page.text(x - 194, 256, words, 13, ha="left")
        page.outline(x, 314, 388, 88, edgecolor=GREY)
        page.text(x - 186, 314, code, ha="left", family="DejaVu Sans Mono")
    page.text(14, 400, "weight, channel_weight: how much an error counts at t and in a channel.  steps: t and the next "
              f"lower s,\n{Sampling().steps} times. This is DDIM; the default, DPM-Solver++, extrapolates the guess.  "
              "The pictures show noise\non the pixels of a slice; in the project, x_0 is the latent of a slice.",
              ha="left")
    return page


# fmt: on
DRAWINGS = (two_stages, vae, vqvae, attention, normalisations, patchgan, vqvae2, residual, diffusion)


@torch.no_grad()
def draw(drawing: Callable[[], Page]) -> str:
    """The SVG of one of the DRAWINGS."""
    return svg_of(drawing)


def main() -> None:
    args = flags().parse_args()
    for drawing in DRAWINGS:
        path = args.out / f"idea_{drawing.__name__}.svg"
        util.write_file(path, draw(drawing).encode())
        print(f"picture: {path}")


if __name__ == "__main__":
    util.command(main)
