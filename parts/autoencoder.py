"""What the autoencoders of the first stage are made of: encoder, decoder, linear path, and what the models share.

    x [B, 1, S, S] --crop--> box --encoder--> latent [B, C, h, w] --decoder--> box --pad--> x

Both halves are a block-linear path plus a network. The linear path starts as the Karhunen-Loeve transform of f x f
blocks of the training slices, and the network's last convolution starts at zero, so training begins where the best
linear block codec ends.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module import Downsample, Embedding, ResBlock, SelfAttention, Upsample, norm, zero
from parts.grain import Grain, noise_of_slices


class Encoder(nn.Module):
    """[B, channels_in, H, W] to [B, channels_out, H / f, W / f], f = patch 2^(levels - 1); z is added in every block.

    The stem is a pixel unshuffle: one grey channel at full resolution needs no convolutions of its own.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        patch: int,
        channels: int,
        channel_multipliers: tuple[int, ...],
        blocks: int,
        embedding_dim: int,
    ):
        super().__init__()
        width = [channels * m for m in channel_multipliers]
        self.stem = nn.Sequential(nn.PixelUnshuffle(patch), nn.Conv2d(channels_in * patch**2, width[0], 3, padding=1))
        self.levels, self.downs = nn.ModuleList(), nn.ModuleList()
        for level, w in enumerate(width):
            self.downs.append(Downsample(width[level - 1], w) if level else nn.Identity())
            self.levels.append(nn.ModuleList([ResBlock(w, w, embedding_dim) for _ in range(blocks)]))
        self.attention, self.mid = SelfAttention(width[-1]), ResBlock(width[-1], width[-1], embedding_dim)
        self.out = nn.Sequential(norm(width[-1]), nn.SiLU(), zero(nn.Conv2d(width[-1], channels_out, 3, padding=1)))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.stem(x)
        for down, blocks in zip(self.downs, self.levels):
            h = down(h)
            for block in blocks:
                h = block(h, embedding)
        return self.out(self.mid(self.attention(h), embedding))


class Decoder(nn.Module):
    """[B, channels_in, h, w] to [B, 1, h f, w f], the encoder's mirror image; with `grain`, one that can draw."""

    def __init__(
        self,
        channels_in: int,
        patch: int,
        channels: int,
        channel_multipliers: tuple[int, ...],
        blocks: int,
        embedding_dim: int,
        grain: bool = False,
    ):
        super().__init__()
        width = [channels * m for m in reversed(channel_multipliers)]
        self.stem = nn.Conv2d(channels_in, width[0], 3, padding=1)
        self.mid, self.attention = ResBlock(width[0], width[0], embedding_dim), SelfAttention(width[0])
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, w in enumerate(width):
            self.ups.append(Upsample(width[level - 1], w) if level else nn.Identity())
            self.levels.append(nn.ModuleList([ResBlock(w, w, embedding_dim) for _ in range(blocks)]))
        self.out = nn.Sequential(
            norm(width[-1]), nn.SiLU(), zero(nn.Conv2d(width[-1], patch**2, 3, padding=1)), nn.PixelShuffle(patch)
        )
        self.grain = Grain(width[-1], patch) if grain else None

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial loss (Esser et al. 2021, eq. 7)."""
        return self.out[2].weight

    def features(self, latent: Tensor, embedding: Tensor) -> Tensor:
        """[B, channels, H / patch, W / patch]: what picture and grain are read from."""
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
    def start(self, x: Tensor, whiten: bool) -> None:
        """Becomes the Karhunen-Loeve transform of the blocks of x [N, 1, H, W].

        The latent gets unit variance: each channel by itself (whiten), or all by one factor, which keeps distances.
        """
        C, f = self.analysis.weight.shape[0], self.factor
        basis, sd = karhunen_loeve(F.unfold(x, f, stride=f).transpose(1, 2).reshape(-1, f * f), C)
        scale = sd if whiten else sd.square().mean().sqrt().expand(C)
        self.analysis.weight.copy_((basis / scale[:, None]).view(C, 1, f, f))
        self.synthesis.weight.copy_((basis * scale[:, None]).view(C, 1, f, f))


class Autoencoder(nn.Module):
    """What the three models share: box, encoder, decoders, linear path, scale of the latents.

    The fidelity decoder is trained with the encoder. The perceptual decoder, if there is one, begins as its copy and is
    then trained by itself, also against a discriminator, so that both read the same latents; `decoder_in_use` says
    which decodes. With `grain` the perceptual decoder takes noise too, and then draws from p(x | latent).

    Args:
        image_size: S.
        box: (top, left, height, width) of the part that is coded; the rest of every picture is black.
        patch: pixels a side that the stem folds into channels.
        channels, channel_multipliers, blocks: the first level's width, each level's relative to it, blocks a level.
        latent_channels: C of the latent.
        perceptual: whether there is a second decoder.
        grain: whether that one takes noise.
    """

    def __init__(
        self,
        *,
        image_size: int,
        box: tuple[int, int, int, int],
        patch: int,
        channels: int,
        channel_multipliers: tuple[int, ...],
        blocks: int,
        latent_channels: int,
        encoder_inputs: int = 1,
        encoder_outputs: int,
        linear_channels: int,
        perceptual: bool = False,
        grain: bool = False,
    ):
        super().__init__()
        self.image_size, self.box = image_size, tuple(box)
        self.factor = patch * 2 ** (len(channel_multipliers) - 1)
        height, width = self.box[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"box of {height}x{width} pixels is not divisible by the factor {self.factor}")
        if linear_channels > self.factor**2:
            raise ValueError(
                f"{linear_channels} latent channels are more than the {self.factor**2} pixels they stand for"
            )
        self.latent_shape = (latent_channels, height // self.factor, width // self.factor)
        self.sizes = (patch, channels, tuple(channel_multipliers), blocks, 2 * channels)
        self.embed_z = Embedding(2 * channels)
        self.encoder = Encoder(encoder_inputs, encoder_outputs, *self.sizes)
        self.decoder = Decoder(latent_channels, *self.sizes)
        self.perceptual = None
        if perceptual:
            with torch.random.fork_rng(devices=[]):  # what comes after draws as if there were no second decoder
                self.perceptual = Decoder(latent_channels, *self.sizes, grain=grain)
            self.perceptual.load_state_dict(self.decoder.state_dict(), strict=False)
        self.decoder_in_use = "fidelity"
        self.linear = LinearPath(linear_channels, self.factor)
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latent_sd", torch.ones(latent_channels, 1, 1))

    # ---- two decoders, one latent

    def use_decoder(self, name: str) -> None:
        """Lets "fidelity" or "perceptual" decode from now on, and be what training changes.

        The encoder, the quantiser and the linear path belong to the fidelity decoder; they freeze with it.
        """
        if name not in ("fidelity", "perceptual"):
            raise ValueError(f"decoder {name} is neither fidelity nor perceptual")
        if name == "perceptual" and self.perceptual is None:
            raise ValueError("this first stage has no perceptual decoder")
        self.decoder_in_use = name
        for parameter in self.parameters():
            parameter.requires_grad_(name == "fidelity")
        if self.perceptual is not None:
            for parameter in self.perceptual.parameters():
                parameter.requires_grad_(name == "perceptual")

    @property
    def draws(self) -> bool:
        """Whether the decoder in use takes noise."""
        return self.decoder_in_use == "perceptual" and self.perceptual.grain is not None

    def start_perceptual(self) -> None:
        """Makes the perceptual decoder a copy of the fidelity decoder, and uses it."""
        self.use_decoder("perceptual")
        self.perceptual.load_state_dict(self.decoder.state_dict(), strict=False)  # a grain is its own

    def draw_grain(self, slices: int, generator: torch.Generator | None = None) -> Tensor | None:
        """The noise that `decode` takes for neighbouring slices of one brain, [slices, 1, H, W]; None if it takes none.

        N(0, 1) in every slice, drawn on the CPU, and smooth along z.
        """
        if not self.draws:
            return None
        return noise_of_slices(slices, *self.box[2:], generator).to(self.latent_mean.device)

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

    def _picture(self, decoder: Decoder, latent: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """(the box, float32, features for the grain); may leave [-1, 1] a little, mostly below -1 where it is black."""
        features = decoder.features(latent, self.embed_z(z))
        return self._linear_decode(latent) - 1 + decoder.out(features).float(), features

    def _decode(self, latent: Tensor, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """The box by the decoder in use, with grain made of the noise if there is any."""
        decoder = self.perceptual if self.decoder_in_use == "perceptual" else self.decoder
        box, features = self._picture(decoder, latent, z)
        if noise is None:
            return box
        if not self.draws:
            raise ValueError("this decoder takes no noise")
        self._check_grid("noise", noise, (1, *self.box[2:]), z)
        return decoder.grain.draw(box, noise, decoder.grain.log_sd(features))

    def _latent(self, x: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What training decodes of x, and the losses that belong to it."""
        raise NotImplementedError

    def forward(self, x: Tensor, z: Tensor, still: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstructed box [B, 1, H, W] for training, and the losses of the latent.

        still: the slices x before augmentation. With them {"grain": ...} is among the losses where the decoder in use
        draws: interpolation takes away the very texture that grain has to learn.
        """
        with torch.set_grad_enabled(self.decoder_in_use == "fidelity" and torch.is_grad_enabled()):
            latent, losses = self._latent(x, z)
        box = self._decode(latent, z)
        if self.draws and still is not None:
            with torch.no_grad():
                picture, features = self._picture(self.perceptual, self._latent(still, z)[0], z)
            grain = self.perceptual.grain
            losses["grain"] = grain.loss(self.crop(still), picture, grain.log_sd(features))
        return box, losses

    def decode(self, latent: Tensor, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """x float32 [B, 1, S, S] in [-1, 1] of a normalised latent [B, C, h, w] and z int64 [B].

        Models with codes decode what lies between them too: rounding to codes would let a head flicker along z.
        noise: where `draws`, [B, 1, H, W] of draw_grain; with None, the same picture every time.
        """
        self._check_grid("latent", latent, self.latent_shape, z)
        return self.pad(self._decode(self._denormalise(latent), z, noise).clamp(-1, 1))

    def reconstruct(self, x: Tensor, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """What is left of x [B, 1, S, S] at z int64 [B] after coding, by way of the codes where the model has codes."""
        if hasattr(self, "encode_indices"):
            return self.decode_indices(self.encode_indices(x, z), z, noise)
        return self.decode(self.encode(x, z), z, noise)

    @torch.no_grad()
    def set_latent_statistics(self, batches) -> None:
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

        Squared errors weighted by its square would be those of the picture; by itself it stands between that and all
        channels alike, since fine detail matters more to the eye than to the square.
        """
        C, h, w = self.latent_shape
        latent = torch.eye(C, device=self.latent_sd.device)[:, :, None, None].expand(C, C, h, w)
        moved = self._linear_decode(latent * self.latent_sd).square().sum((1, 2, 3)).sqrt()
        return (moved / moved.mean()).view(-1, 1, 1)

    def _normalise(self, latent: Tensor) -> Tensor:
        return (latent.float() - self.latent_mean) / self.latent_sd

    def _denormalise(self, latent: Tensor) -> Tensor:
        return latent.float() * self.latent_sd + self.latent_mean

    def keep_decoders(self) -> None:
        """Drops the encoder: a second stage that was trained needs it no more, and its file is smaller without."""
        self.encoder = None

    def _check(self, x: Tensor, z: Tensor) -> None:
        if self.encoder is None:
            raise ValueError(
                "this first stage only decodes: its encoder was left out; load the file of the first stage"
            )
        if x.shape[1:] != (1, self.image_size, self.image_size) or z.shape != x.shape[:1]:
            raise ValueError(
                f"x must be [B, 1, {self.image_size}, {self.image_size}] and z [B], "
                f"not {list(x.shape)} and {list(z.shape)}"
            )

    def _for_both(self, quantised: Tensor, unrounded: Callable[[], Tensor]) -> Tensor:
        """What models with codes decode in training: the codes, and with the perceptual decoder every other slice's
        latent before rounding instead. Both kinds of second stage decode with that one, over codes and over latents.
        """
        if self.decoder_in_use == "fidelity":
            return quantised
        odd = torch.arange(len(quantised), device=quantised.device).view(-1, 1, 1, 1) % 2 == 1
        return torch.where(odd, unrounded(), quantised)

    def _check_grid(self, name: str, grid: Tensor, shape: tuple[int, ...], z: Tensor) -> None:
        if grid.shape[1:] != shape or z.shape != grid.shape[:1]:
            raise ValueError(
                f"{name} must be [B, {', '.join(map(str, shape))}] and z [B], "
                f"not {list(grid.shape)} and {list(z.shape)}"
            )
