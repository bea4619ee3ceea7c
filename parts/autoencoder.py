"""Parts of the autoencoders of the first stage: encoder, decoder, linear path, and the class that joins them.

    x [B, 1, S, S] --crop--> box --encoder--> latent [B, C, h, w] --decoder--> box --pad--> x

Both halves are a block-linear path plus a network. Before training, the linear path is set to the Karhunen-Loeve
transform of f x f blocks of the training slices and the network's last convolution to zero, so training begins where
the best linear block codec ends.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.layout import MOST_SLICES
from module import Downsample, Embedding, ResBlock, SelfAttention, Upsample, norm, zero
from parts.texture import Texture, noise_of_slices


class Encoder(nn.Module):
    """[B, channels_in, H, W] to [B, channels_out, H / f, W / f], f = patch 2^(levels - 1); z is added in every block.

    The stem is a pixel unshuffle: one grey channel at full resolution needs no convolutions of its own.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        patch: int,
        widths: tuple[int, ...],
        blocks: int,
        embedding_dim: int,
    ):
        super().__init__()
        first, last = widths[0], widths[-1]
        self.stem = nn.Sequential(nn.PixelUnshuffle(patch), nn.Conv2d(channels_in * patch**2, first, 3, padding=1))
        self.levels, self.downs = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.downs.append(Downsample(widths[level - 1], width) if level else nn.Identity())
            self.levels.append(nn.ModuleList([ResBlock(width, width, embedding_dim) for _ in range(blocks)]))
        self.attention, self.mid = SelfAttention(last), ResBlock(last, last, embedding_dim)
        self.out = nn.Sequential(norm(last), nn.SiLU(), zero(nn.Conv2d(last, channels_out, 3, padding=1)))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.stem(x)
        for down, blocks in zip(self.downs, self.levels):
            h = down(h)
            for block in blocks:
                h = block(h, embedding)
        return self.out(self.mid(self.attention(h), embedding))


class Decoder(nn.Module):
    """[B, channels_in, h, w] to [B, 1, h f, w f]: the encoder's mirror image."""

    def __init__(self, channels_in: int, patch: int, widths: tuple[int, ...], blocks: int, embedding_dim: int):
        super().__init__()
        widths = widths[::-1]
        first, last = widths[0], widths[-1]
        self.stem = nn.Conv2d(channels_in, first, 3, padding=1)
        self.mid, self.attention = ResBlock(first, first, embedding_dim), SelfAttention(first)
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.ups.append(Upsample(widths[level - 1], width) if level else nn.Identity())
            self.levels.append(nn.ModuleList([ResBlock(width, width, embedding_dim) for _ in range(blocks)]))
        self.out = nn.Sequential(
            norm(last), nn.SiLU(), zero(nn.Conv2d(last, patch**2, 3, padding=1)), nn.PixelShuffle(patch)
        )

    def features(self, latent: Tensor, embedding: Tensor) -> Tensor:
        """[B, widths[0], H / patch, W / patch]: the picture is read from these."""
        h = self.attention(self.mid(self.stem(latent), embedding))
        for up, blocks in zip(self.ups, self.levels):
            h = up(h)
            for block in blocks:
                h = block(h, embedding)
        return h

    def forward(self, latent: Tensor, embedding: Tensor) -> Tensor:
        return self.out(self.features(latent, embedding))


def karhunen_loeve(blocks: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The linear code of blocks [N, D] with the least squared error, as float64 (basis [dim, D], sd [dim]).

    The orthonormal rows are the eigenvectors of the second moment about zero, not about the mean, so that black, which
    is zero here, codes as exactly zero. Black blocks are left out.
    """
    blocks = blocks[blocks.abs().amax(1) > 0].double()
    basis = torch.linalg.eigh(blocks.T @ blocks)[1].flip(1)[:, :dim].T
    return basis, (blocks @ basis.T).std(0).clamp(min=1e-6)


class LinearPath(nn.Module):
    """A linear code of f x f blocks: pictures [B, 1, H, W] with black 0 to [B, C, H / f, W / f] and back, in float32.

    bf16 would round a latent of 8 to 1/32, and near -1 has steps of half a grey level.
    """

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor = factor
        self.analysis = nn.Conv2d(1, channels, factor, factor, bias=False)
        self.synthesis = nn.ConvTranspose2d(channels, 1, factor, factor, bias=False)

    def encode(self, x: Tensor) -> Tensor:
        """[B, C, h, w] of x [B, 1, H, W]."""
        with torch.autocast(x.device.type, enabled=False):
            return self.analysis(x.float())

    def decode(self, latent: Tensor) -> Tensor:
        """[B, 1, H, W] of latent [B, C, h, w]."""
        with torch.autocast(latent.device.type, enabled=False):
            return self.synthesis(latent.float())

    @torch.no_grad()
    def fit(self, x: Tensor, whiten: bool) -> None:
        """Becomes the Karhunen-Loeve transform of the blocks of x [N, 1, H, W].

        The latent gets unit variance: each channel by itself (whiten), or all by one factor, which keeps distances.
        """
        C, f = self.analysis.weight.shape[0], self.factor
        basis, sd = karhunen_loeve(F.unfold(x, f, stride=f).transpose(1, 2).reshape(-1, f * f), C)
        scale = sd if whiten else sd.square().mean().sqrt().expand(C)
        self.analysis.weight.copy_((basis / scale[:, None]).view(C, 1, f, f))
        self.synthesis.weight.copy_((basis * scale[:, None]).view(C, 1, f, f))


class Autoencoder(nn.Module):
    """Base of VAE, VQVAE and VQVAE2: coded box, encoder, decoder, texture, linear path, scale of the latents.

    The codec is all but the texture, and is trained first, to be faithful. Then it stays as it is, and the texture
    learns to draw what the faithful picture leaves out. `decoder_in_use` says what decodes for the eye: the fidelity
    decoder alone, or the perceptual one, which is that and the texture.

    Args:
        image_size: S.
        box: (top, left, height, width) of the part that is coded; the rest of every picture is black.
        patch: pixels a side that the stem folds into channels.
        widths: channels of each level, from the pixels inwards; every level but the first halves the sides.
        blocks: residual blocks a level.
        latent_channels: C of the latent.
        perceptual: whether there is a texture.
    Raises ValueError for a box or latent that does not fit the factor patch 2^(levels - 1).
    """

    def __init__(
        self,
        *,
        image_size: int,
        box: tuple[int, int, int, int],
        patch: int,
        widths: tuple[int, ...],
        blocks: int,
        latent_channels: int,
        encoder_inputs: int = 1,
        encoder_outputs: int,
        linear_channels: int,
        perceptual: bool = False,
    ):
        super().__init__()
        self.image_size, self.box, widths = image_size, tuple(box), tuple(widths)
        self.factor = patch * 2 ** (len(widths) - 1)
        height, width = self.box[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"box of {height}x{width} pixels is not divisible by the factor {self.factor}")
        if linear_channels > self.factor**2:
            raise ValueError(
                f"{linear_channels} latent channels are more than the {self.factor**2} pixels they stand for"
            )
        self.latent_shape = (latent_channels, height // self.factor, width // self.factor)
        self.sizes = (patch, widths, blocks, 2 * widths[0])
        self.embed_z = Embedding(2 * widths[0])
        self.encoder = Encoder(encoder_inputs, encoder_outputs, *self.sizes)
        self.decoder, self.texture = Decoder(latent_channels, *self.sizes), None
        if perceptual:
            with torch.random.fork_rng(devices=[]):  # other weights are the same with and without it
                self.texture = Texture(widths[0])
        self.decoder_in_use, self.frozen, self.slices_per_brain = "fidelity", False, MOST_SLICES
        self.linear = LinearPath(linear_channels, self.factor)
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latent_sd", torch.ones(latent_channels, 1, 1))

    # ---- two decoders

    def freeze(self) -> None:
        """From now on nothing changes: no gradients, and evaluation mode, whatever train() of a module around it says.

        In training mode a forward pass alone would move a codebook. What is given to a frozen first stage is checked.
        """
        self.frozen = True
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Autoencoder":
        return super().train(mode and not self.frozen)

    def use_decoder(self, name: str) -> None:
        """Lets "fidelity" or "perceptual" decode from now on. Raises ValueError where there is no such decoder."""
        if name not in ("fidelity", "perceptual"):
            raise ValueError(f"decoder {name} is neither fidelity nor perceptual")
        if name == "perceptual" and self.texture is None:
            raise ValueError("this first stage has no perceptual decoder")
        self.decoder_in_use = name

    def keep_decoders(self) -> None:
        """Drops the encoder: a second stage does not need it once it is trained, and its file is smaller without."""
        self.encoder = None

    # ---- picture <-> box

    def crop(self, x: Tensor) -> Tensor:
        """The coded box of x [B, 1, S, S]."""
        top, left, height, width = self.box
        return x[..., top : top + height, left : left + width]

    def pad(self, x: Tensor) -> Tensor:
        """The whole picture [B, 1, S, S] of a box, black (-1) around it."""
        top, left, height, width = self.box
        return F.pad(x, (left, self.image_size - left - width, top, self.image_size - top - height), value=-1.0)

    # ---- box <-> latent as the network has it, not yet normalised

    def _encode(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Linear code [B, C, h, w] and network output [B, encoder_outputs, h, w] of a box; to the former black is 0."""
        return self.linear.encode(x + 1), self.encoder(x, self.embed_z(z))

    def _linear_decode(self, latent: Tensor) -> Tensor:
        return self.linear.decode(latent)

    def _decode(self, latent: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """(faithful box float32 [B, 1, H, W], the features that it is read from).

        The box may leave [-1, 1] a little, mostly below -1 where it is black.
        """
        features = self.decoder.features(latent, self.embed_z(z))
        return self._linear_decode(latent) - 1 + self.decoder.out(features).float(), features

    # ---- training

    def _latent(self, x: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The latent that training decodes, not normalised, and its own losses."""
        raise NotImplementedError

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """For training the codec: the box float32 [B, 1, H, W], and {"kl" or "codebook": loss}.

        x: [B, 1, S, S] in [-1, 1]; z: int64 [B].
        """
        latent, losses = self._latent(x, z)
        return self._decode(latent, z)[0], losses

    @torch.no_grad()
    def faithful(self, latent: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the texture begins with: boxes float32 [B, 1, H, W] in [-1, 1] of normalised latents, and features."""
        box, features = self._decode(self._denormalise(latent), z)
        return box.clamp(-1, 1), features

    # ---- use

    def decode(self, latent: Tensor, z: Tensor) -> Tensor:
        """The faithful x float32 [B, 1, S, S] in [-1, 1] of a normalised latent [B, C, h, w] and z int64 [B].

        Models with codes decode latents between the codes too: rounded to codes, a brain would flicker along z.
        """
        self._check_grid("latent", latent, self.latent_shape, z)
        return self.pad(self._decode(self._denormalise(latent), z)[0].clamp(-1, 1))

    def draw(
        self, latent: Tensor, z: Tensor, generator: torch.Generator, slices_per_brain: int | None = None
    ) -> Tensor:
        """As decode, but by the decoder in use: the perceptual one draws texture, for slices of ONE brain.

        Its noise is of the whole brain, drawn by the generator on the CPU. z are all its slices in their order, or,
        where slices_per_brain is given, some of 0 .. slices_per_brain - 1.
        """
        if self.decoder_in_use == "fidelity":
            return self.decode(latent, z)
        self._check_grid("latent", latent, self.latent_shape, z)
        white = noise_of_slices(slices_per_brain or len(z), *self.box[2:], generator)
        white = white[z.cpu()] if slices_per_brain else white
        box, features = self.faithful(latent, z)
        return self.pad(self.texture(box, features, white.to(box.device), z).clamp(-1, 1))

    def reconstruct(self, x: Tensor, z: Tensor) -> Tensor:
        """x [B, 1, S, S] at z int64 [B] coded and decoded, by way of the codes where the model has codes."""
        return self.decode(self.encode(x, z), z)

    @torch.no_grad()
    def set_latent_statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Sets the scale from (x, z) batches: afterwards `encode` has mean 0 and sd 1 per channel over them."""
        self.latent_mean.zero_()
        self.latent_sd.fill_(1)
        count, total, square = 0, 0, 0
        for x, z in batches:
            latent = self.encode(x, z).double()
            count += latent[:, 0].numel()
            total, square = total + latent.sum((0, 2, 3)), square + latent.square().sum((0, 2, 3))
        mean = total / count
        self.latent_mean.copy_(mean.view(-1, 1, 1))
        self.latent_sd.copy_((square / count - mean.square()).clamp(min=1e-12).sqrt().view(-1, 1, 1))

    @torch.no_grad()
    def channel_weight(self) -> Tensor:
        """[C, 1, 1], mean 1: how far one sd of each channel of the normalised latent moves a picture (linear path).

        Squared errors weighted by the square of this would be squared errors of the picture. Weighted by this itself,
        they lie between those and errors that count alike in all channels, since fine detail matters more to the eye
        than to a squared error.
        """
        C, h, w = self.latent_shape
        latent = torch.eye(C, device=self.latent_sd.device)[:, :, None, None].expand(C, C, h, w)
        moved = self._linear_decode(latent * self.latent_sd).square().sum((1, 2, 3)).sqrt()
        return (moved / moved.mean()).view(-1, 1, 1)

    def _normalise(self, latent: Tensor) -> Tensor:
        return (latent.float() - self.latent_mean) / self.latent_sd

    def _denormalise(self, latent: Tensor) -> Tensor:
        return latent.float() * self.latent_sd + self.latent_mean

    def _check(self, x: Tensor, z: Tensor) -> None:
        if self.encoder is None:
            raise ValueError(
                "this first stage only decodes: its encoder was left out; load the file of the first stage"
            )
        self._check_grid("x", x, (1, self.image_size, self.image_size), z)
        if self.frozen and not -1.001 <= float(x.amin()) <= float(x.amax()) <= 1.001:  # also where one is NaN
            raise ValueError(f"x must lie in [-1, 1], not {float(x.amin()):g} to {float(x.amax()):g}; dataset.to_float "
                             "makes it of pixels 0 to 255")  # fmt: skip

    def _check_grid(self, name: str, grid: Tensor, shape: tuple[int, ...], z: Tensor) -> None:
        """Raises ValueError unless shape and types are right: float32, or int64 of codes, and z int64 from 0 on."""
        if grid.shape[1:] != shape or z.shape != grid.shape[:1]:
            raise ValueError(
                f"{name} must be [B, {', '.join(map(str, shape))}] and z [B], "
                f"not {list(grid.shape)} and {list(z.shape)}"
            )
        wanted = torch.int64 if name.startswith("idx") else torch.float32
        if grid.dtype != wanted or z.dtype != torch.int64 or self.latent_mean.dtype != torch.float32:
            raise ValueError(f"{name} must be {wanted}, z int64 and weights float32, not {grid.dtype}, {z.dtype} and "
                             f"{self.latent_mean.dtype}; for half precision use torch.autocast")  # fmt: skip
        if self.frozen and not 0 <= int(z.min()) <= int(z.max()) < self.slices_per_brain:
            raise ValueError(f"z must be slices 0 to {self.slices_per_brain - 1}, not {int(z.min())} to {int(z.max())}")
        if self.frozen and wanted == torch.float32 and not torch.isfinite(grid).all():
            raise ValueError(f"{name} is not finite")
