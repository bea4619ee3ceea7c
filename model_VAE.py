"""The first stage: encoder, decoder, and the autoencoders VAE, VQVAE and VQVAE2 made of them and of a quantiser.

    x [B, 1, S, S] --crop--> box --encoder--> latent [B, C, h, w] --decoder--> box --pad--> x

Both halves are a block-linear path plus a network. The linear path starts as the Karhunen-Loeve transform of f x f
blocks of the training slices, and the network's last convolution starts at zero, so training begins where the best
linear block codec ends. What `encode` returns has mean 0 and standard deviation 1 per channel over the training set.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runs
import util
from grain import Grain, noise_of_slices
from module import Downsample, Embedding, ResBlock, SelfAttention, Upsample, norm, zero
from quantizer import FiniteScalarQuantizer, VectorQuantizer


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


class VAE(Autoencoder):
    """Variational autoencoder (Kingma and Welling 2014) with a mean and a variance for every latent number."""

    kind = "vae"

    def __init__(self, *, latent_channels: int, **sizes):
        super().__init__(
            latent_channels=latent_channels,
            encoder_outputs=2 * latent_channels,
            linear_channels=latent_channels,
            **sizes,
        )
        with torch.no_grad():  # the posterior starts narrow, so that the decoder first learns to decode
            self.encoder.out[-1].bias[latent_channels:] = -4

    @torch.no_grad()
    def start(self, x: Tensor, z: Tensor) -> None:
        """Sets the linear path from training slices x [N, 1, S, S]."""
        self.linear.start(self.crop(x) + 1, whiten=True)

    def posterior(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, float32 [B, C, h, w], of q(latent | x, z), before normalisation."""
        linear, out = self._encode(self.crop(x), z)
        residual, log_variance = out.chunk(2, dim=1)
        return (linear + residual).float(), log_variance.float().clamp(-30, 20)

    @staticmethod
    def kl_bits(mean: Tensor, log_variance: Tensor) -> Tensor:
        """KL(q || N(0, 1)) of each image, [B]: (mu^2 + s^2 - 1 - log s^2) / 2 nats a number (ibid., appendix B)."""
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)) / math.log(2)

    def _latent(self, x: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A sample of the posterior, and {"kl": mean bits per image}."""
        mean, log_variance = self.posterior(x, z)
        latent = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return latent, {"kl": self.kl_bits(mean, log_variance).mean()}

    def encode(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalised posterior mean, float32 [B, C, h, w], of x [B, 1, S, S] in [-1, 1] and z int64 [B]."""
        self._check(x, z)
        return self._normalise(self.posterior(x, z)[0])

    def prior_latent(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents [count, C, h, w] drawn from the prior N(0, 1) of the training loss."""
        noise = torch.randn(count, *self.latent_shape, generator=generator).to(self.latent_mean.device)
        return self._normalise(noise)


def make_quantizer(
    quantizer: str, codebook_size: int | None, levels: tuple[int, ...] | None, dim: int, options: dict
) -> VectorQuantizer | FiniteScalarQuantizer:
    """The quantiser named "vq", of codebook_size codes of `dim` numbers, or "fsq", of `dim` levels."""
    if quantizer == "vq":
        return VectorQuantizer(codebook_size, dim, **options)
    if quantizer != "fsq":
        raise ValueError(f"quantizer {quantizer} is neither vq nor fsq")
    if len(levels) != dim:
        raise ValueError(f"{len(levels)} levels do not fit {dim} latent channels")
    return FiniteScalarQuantizer(levels)


def quantise(quantizer: nn.Module, latent: Tensor) -> Tensor:
    """idx int64 [B, h, w] of the codes nearest to unnormalised vectors [B, C, h, w]."""
    B, C, h, w = latent.shape
    return quantizer.nearest(latent.float().movedim(1, -1).reshape(-1, C)).view(B, h, w)


def draw_codes(quantizer: nn.Module, count: int, grid: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """idx int64 [count, h, w] drawn one by one, as often as training used them (vq), or uniformly (fsq)."""
    if isinstance(quantizer, VectorQuantizer):
        idx = torch.multinomial(quantizer.count.cpu(), count * math.prod(grid), replacement=True, generator=generator)
        return idx.view(count, *grid)
    return torch.randint(quantizer.codebook_size, (count, *grid), generator=generator)


class VQVAE(Autoencoder):
    """Vector-quantised autoencoder (van den Oord et al. 2017): the latent is a grid of codes out of K.

    Args:
        quantizer: "vq", a learned codebook, or "fsq", finite scalar quantisation.
        codebook_size: K of a vq.
        levels: of an fsq, one per latent channel; K is their product.
        quantizer_options: further keywords of VectorQuantizer.
    """

    kind = "vqvae"

    def __init__(
        self,
        *,
        latent_channels: int,
        quantizer: str = "vq",
        codebook_size: int | None = None,
        levels: tuple[int, ...] | None = None,
        quantizer_options: dict | None = None,
        **sizes,
    ):
        super().__init__(
            latent_channels=latent_channels,
            encoder_outputs=latent_channels,
            linear_channels=latent_channels,
            **sizes,
        )
        self.quantizer = make_quantizer(quantizer, codebook_size, levels, latent_channels, quantizer_options or {})
        self.codebook_size = self.quantizer.codebook_size

    @property
    def fixed_bits(self) -> float:
        """Bits per image at a fixed length per code: h w log2 K."""
        return self.latent_shape[1] * self.latent_shape[2] * math.log2(self.codebook_size)

    @torch.no_grad()
    def start(self, x: Tensor, z: Tensor) -> None:
        """Sets the linear path, then the codes, from training slices x [N, 1, S, S] and z [N]."""
        self.linear.start(self.crop(x) + 1, whiten=isinstance(self.quantizer, FiniteScalarQuantizer))
        vectors = torch.cat([self.vectors(*part) for part in zip(x.split(32), z.split(32), strict=True)])
        self.quantizer.start(vectors.movedim(1, -1).flatten(0, 2))

    def vectors(self, x: Tensor, z: Tensor) -> Tensor:
        """Encoder output float32 [B, C, h, w] before quantisation."""
        linear, residual = self._encode(self.crop(x), z)
        return (linear + residual).float()

    def _unrounded(self, x: Tensor, z: Tensor) -> Tensor:
        return self.quantizer.unrounded(self.vectors(x, z))

    def _latent(self, x: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes, and {"codebook": commitment (and codebook) loss}. Training mode moves the codebook."""
        vectors = self.vectors(x, z)
        latent, _, loss = self.quantizer(vectors)
        return self._for_both(latent, lambda: self.quantizer.unrounded(vectors)), {"codebook": loss}

    def encode_indices(self, x: Tensor, z: Tensor) -> Tensor:
        """idx int64 [B, h, w] in [0, K) of x [B, 1, S, S] in [-1, 1] and z int64 [B]."""
        self._check(x, z)
        return quantise(self.quantizer, self.vectors(x, z))

    def decode_indices(self, idx: Tensor, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """x float32 [B, 1, S, S] in [-1, 1] of int64 idx [B, h, w] and z int64 [B]; noise as in decode."""
        self._check_grid("idx", idx, self.latent_shape[1:], z)
        return self.pad(self._decode(self.quantizer.lookup(idx), z, noise).clamp(-1, 1))

    def encode(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalised latent before quantisation, float32 [B, C, h, w], of x [B, 1, S, S] in [-1, 1] and z int64 [B].

        A second stage over latents learns these, as if the quantiser were the decoder's first layer (Rombach et al.
        2022, section 3.1): they hang together along z and decode better than the codes nearest to them.
        """
        self._check(x, z)
        return self._normalise(self._unrounded(x, z))

    def prior_latent(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents [count, C, h, w] of codes drawn one by one, as draw_codes does."""
        idx = draw_codes(self.quantizer, count, self.latent_shape[1:], generator)
        return self._normalise(self.quantizer.lookup(idx.to(self.latent_mean.device)))


class VQVAE2(Autoencoder):
    """Two-level vector-quantised autoencoder (Razavi et al. 2019): coarse top codes, and bottom codes given the top.

    A top code stands for 2f x 2f pixels, a bottom code for f x f. The bottom encoder sees the slice and what the top
    codes say about it, and its linear path codes the difference. The latent of `encode` is [top, doubled | bottom].

    Args: as VQVAE; latent_channels is the length of a code at either level, and both have K codes.
    """

    kind = "vqvae2"

    def __init__(
        self,
        *,
        latent_channels: int,
        quantizer: str = "vq",
        codebook_size: int | None = None,
        levels: tuple[int, ...] | None = None,
        quantizer_options: dict | None = None,
        **sizes,
    ):
        C = latent_channels
        super().__init__(latent_channels=2 * C, encoder_inputs=2, encoder_outputs=C, linear_channels=C, **sizes)
        patch, channels, multipliers, blocks, embedding_dim = self.sizes
        _, h, w = self.latent_shape
        if h % 2 or w % 2:
            raise ValueError(f"a grid of {h}x{w} codes cannot be halved for the top level")
        self.encoder_top = Encoder(1, C, patch, channels, (*multipliers, multipliers[-1]), blocks, embedding_dim)
        self.linear_top = LinearPath(C, 2 * self.factor)
        self.quantizer_top, self.quantizer = (
            make_quantizer(quantizer, codebook_size, levels, C, quantizer_options or {}) for _ in range(2)
        )
        self.codebook_size, self.grids = self.quantizer.codebook_size, ((h // 2, w // 2), (h, w))

    def keep_decoders(self) -> None:
        """Drops both encoders."""
        super().keep_decoders()
        self.encoder_top = None

    @property
    def fixed_bits(self) -> float:
        """Bits per image at a fixed length per code, of both levels."""
        return sum(math.prod(grid) for grid in self.grids) * math.log2(self.codebook_size)

    @torch.no_grad()
    def start(self, x: Tensor, z: Tensor) -> None:
        """Sets both linear paths and both codebooks from training slices x [N, 1, S, S] and z [N], top first."""
        box, whiten = self.crop(x) + 1, isinstance(self.quantizer, FiniteScalarQuantizer)
        parts = list(zip(x.split(32), z.split(32), strict=True))
        self.linear_top.start(box, whiten)
        self.quantizer_top.start(torch.cat([self.top_vectors(*p) for p in parts]).movedim(1, -1).flatten(0, 2))
        top = [self._quantised_top(*part) for part in parts]
        self.linear.start(box - torch.cat([self.linear_top.decode(t) for t in top]), whiten)
        vectors = torch.cat([self.bottom_vectors(*part, t) for part, t in zip(parts, top, strict=True)])
        self.quantizer.start(vectors.movedim(1, -1).flatten(0, 2))

    def top_vectors(self, x: Tensor, z: Tensor) -> Tensor:
        """Top encoder output float32 [B, C, h / 2, w / 2] before quantisation."""
        box = self.crop(x)
        return (self.linear_top.encode(box + 1) + self.encoder_top(box, self.embed_z(z))).float()

    def _quantised_top(self, x: Tensor, z: Tensor) -> Tensor:
        return self.quantizer_top.lookup(quantise(self.quantizer_top, self.top_vectors(x, z)))

    def bottom_vectors(self, x: Tensor, z: Tensor, top: Tensor) -> Tensor:
        """Bottom encoder output float32 [B, C, h, w], given the quantised top [B, C, h / 2, w / 2]."""
        box, known = self.crop(x), self.linear_top.decode(top) - 1
        seen = torch.cat([box, known], dim=1)
        return (self.linear.encode(box - known) + self.encoder(seen, self.embed_z(z))).float()

    def _join(self, top: Tensor, bottom: Tensor) -> Tensor:
        return torch.cat([F.interpolate(top, scale_factor=2.0, mode="nearest"), bottom], dim=1)

    def _split(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        top, bottom = latent.chunk(2, dim=1)
        return F.avg_pool2d(top, 2), bottom

    def _linear_decode(self, latent: Tensor) -> Tensor:
        top, bottom = self._split(latent.float())
        return self.linear_top.decode(top) + self.linear.decode(bottom)

    def _unrounded(self, x: Tensor, z: Tensor) -> Tensor:
        top = self.quantizer_top.unrounded(self.top_vectors(x, z))
        return self._join(top, self.quantizer.unrounded(self.bottom_vectors(x, z, top)))

    def _latent(self, x: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes of both levels, and {"codebook": losses of both quantisers}. Training mode moves the codebooks."""
        top, _, loss_top = self.quantizer_top(self.top_vectors(x, z))
        bottom, _, loss_bottom = self.quantizer(self.bottom_vectors(x, z, top))
        latent = self._for_both(self._join(top, bottom), lambda: self._unrounded(x, z))
        return latent, {"codebook": loss_top + loss_bottom}

    def encode_indices(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """(top int64 [B, h / 2, w / 2], bottom int64 [B, h, w]) of x [B, 1, S, S] in [-1, 1] and z int64 [B]."""
        self._check(x, z)
        idx_top = quantise(self.quantizer_top, self.top_vectors(x, z))
        vectors = self.bottom_vectors(x, z, self.quantizer_top.lookup(idx_top))
        return idx_top, quantise(self.quantizer, vectors)

    def _lookup(self, idx: tuple[Tensor, Tensor]) -> Tensor:
        return self._join(self.quantizer_top.lookup(idx[0]), self.quantizer.lookup(idx[1]))

    def decode_indices(self, idx: tuple[Tensor, Tensor], z: Tensor, noise: Tensor | None = None) -> Tensor:
        """x float32 [B, 1, S, S] in [-1, 1] of (top, bottom) as encode_indices gives them, and z int64 [B]."""
        for name, level, grid in zip(("top idx", "bottom idx"), idx, self.grids, strict=True):
            self._check_grid(name, level, grid, z)
        return self.pad(self._decode(self._lookup(idx), z, noise).clamp(-1, 1))

    def encode(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalised latent before quantisation, float32 [B, 2 C, h, w], as that of VQVAE."""
        self._check(x, z)
        return self._normalise(self._unrounded(x, z))

    def prior_latent(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents [count, 2 C, h, w] of codes drawn one by one, as draw_codes does."""
        quantizers = (self.quantizer_top, self.quantizer)
        idx = (draw_codes(q, count, g, generator) for q, g in zip(quantizers, self.grids, strict=True))
        return self._normalise(self._lookup(tuple(level.to(self.latent_mean.device) for level in idx)))


MODELS = {model.kind: model for model in (VAE, VQVAE, VQVAE2)}


def latent_digest(weights: dict[str, Tensor]) -> str:
    """16 hexadecimal digits of all that latents depend on: first stages that differ in their decoders share them."""
    return runs.digest_of({name: w for name, w in weights.items() if not name.startswith(("decoder.", "perceptual."))})


def load_first_stage(
    run: str | Path, device: torch.device | str = "cpu", decoder: str | None = "fidelity"
) -> Autoencoder:
    """The frozen autoencoder of a weights file, a run's folder or a run's name, in evaluation mode on `device`.

    `decoder` is "fidelity", "perceptual", or None for the perceptual one where it was trained. Raises UserError when
    there is no such file or no such decoder.
    """
    path = runs.find_weights(run, f"python prestage_train.py --model {run if run in MODELS else f'vqvae --name {run}'}")
    weights, description = runs.load_weights(path)
    if description["kind"] not in MODELS:
        raise util.UserError(f"{path} is a {description['kind']}, no first stage; give a run of prestage_train.py")
    description |= {"digest": latent_digest(weights), "path": str(path)}
    return build_first_stage(description, weights, path, decoder).to(device)


def build_first_stage(
    description: dict, weights: dict[str, Tensor], path: Path, decoder: str | None = "fidelity"
) -> Autoencoder:
    """The frozen autoencoder of weights and their description {"kind", "model_kwargs", ...}; `path` is for messages.

    Weights without an encoder, as a released second stage has them, make a first stage that only decodes.

    The description stays on the model as `description`, for those who store it beside their own weights.
    """
    model = MODELS[description["kind"]](**description["model_kwargs"])
    model.description = description
    if not any(name.startswith("encoder.") for name in weights):
        model.keep_decoders()
    runs.fill_model(model, weights, path)
    trained = model.perceptual is not None and description.get("perceptual_steps", 1) > 0
    decoder = decoder or ("perceptual" if trained else "fidelity")
    if decoder == "perceptual" and model.perceptual is not None and not trained:
        raise util.UserError(f"--decoder perceptual: the one in {path} is not trained yet; train past --gan-start")
    try:
        model.use_decoder(decoder)
    except ValueError as error:
        raise util.UserError(f"--decoder {decoder}: {error}; train one with --gan-weight above 0 ({path})") from None
    model.eval().requires_grad_(False)
    return model.to(memory_format=torch.channels_last)  # convolutions run twice as fast


def save_second_stage(path: Path, prior: nn.Module, first_stage: Autoencoder, description: dict) -> None:
    """Writes a prior and the first stage it was trained on into one file, so that sampling needs one path."""
    weights = {f"prior.{name}": tensor for name, tensor in prior.state_dict().items()}
    weights |= {f"first_stage.{name}": tensor for name, tensor in first_stage.state_dict().items()}
    runs.save_weights(path, weights, {"kind": prior.kind, **description, "first_stage": first_stage.description})


def load_second_stage(
    run: str | Path, model_class: type, device: torch.device | str, decoder: str | None = "fidelity"
) -> tuple[nn.Module, Autoencoder, dict]:
    """(prior, first stage, description) of a run or file, frozen. Raises UserError if the prior is no model_class."""
    path = runs.find_weights(run, f"python {model_class.script} --name {run}")
    weights, description = runs.load_weights(path)
    if description["kind"] != model_class.kind:
        raise util.UserError(f"{path} is a {description['kind']}, no {model_class.kind}; name a run of that kind")
    try:
        prior = model_class(**description["model_kwargs"]).eval().requires_grad_(False)
    except TypeError:
        raise util.UserError(f"{path} has settings that this version does not know; train it anew") from None
    runs.fill_model(prior, runs.part_of(weights, "prior."), path)
    first_stage = build_first_stage(description["first_stage"], runs.part_of(weights, "first_stage."), path, decoder)
    return prior.to(device), first_stage.to(device), description
