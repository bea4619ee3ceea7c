"""The models of the first stage: VAE, VQVAE and VQVAE2.

The latents that `encode` returns have mean 0 and standard deviation 1 per channel over the training set.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import util
from parts.autoencoder import Autoencoder, Encoder, LinearPath
from parts.quantizer import make_quantizer


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
        with torch.no_grad():  # the posterior is narrow at first, so that the decoder first learns to decode
            self.encoder.out[-1].bias[latent_channels:] = -4

    @torch.no_grad()
    def fit(self, x: Tensor, z: Tensor) -> None:
        """Sets the linear path from training slices x [N, 1, S, S]."""
        self.linear.fit(self.crop(x) + 1, whiten=True)

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
        latent = mean + (0.5 * log_variance).exp() * util.draw_together(torch.randn_like, mean)
        return latent, {"kl": self.kl_bits(mean, log_variance).mean()}

    def encode(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalised posterior mean, float32 [B, C, h, w], of x [B, 1, S, S] in [-1, 1] and z int64 [B]."""
        self._check(x, z)
        return self._normalise(self.posterior(x, z)[0])

    def prior_latent(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents [count, C, h, w] drawn from the prior N(0, 1) of the training loss."""
        noise = torch.randn(count, *self.latent_shape, generator=generator).to(self.latent_mean.device)
        return self._normalise(noise)


def quantise(quantizer: nn.Module, latent: Tensor) -> Tensor:
    """idx int64 [B, h, w] of the codes nearest to unnormalised vectors [B, C, h, w]."""
    B, C, h, w = latent.shape
    return quantizer.nearest(latent.float().movedim(1, -1).reshape(-1, C)).view(B, h, w)


def fit_codes(quantizer: nn.Module, latents: list[Tensor]) -> None:
    """Sets the codes from unnormalised vectors, a list of [B, C, h, w]."""
    quantizer.fit(torch.cat(latents).movedim(1, -1).flatten(0, 2))


class CodeAutoencoder(Autoencoder):
    """Base of VQVAE and VQVAE2: the latent is rounded to codes out of K on one grid, or on several.

    idx is int64 [B, h, w] where there is one grid, else a tuple with such a tensor for every grid.
    """

    codebook_size: int
    grids: tuple[tuple[int, int], ...]

    def _lookup(self, idx: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The unnormalised latent [B, C, h, w] of codes."""
        raise NotImplementedError

    def _before_rounding(self, x: Tensor, z: Tensor) -> Tensor:
        """The unnormalised latent [B, C, h, w] that is rounded to codes, as far as codes reach."""
        raise NotImplementedError

    def _random_codes(self, count: int, generator: torch.Generator | None) -> Tensor | tuple[Tensor, ...]:
        """idx of `count` slices, each code drawn by itself."""
        raise NotImplementedError

    def encode_indices(self, x: Tensor, z: Tensor) -> Tensor | tuple[Tensor, ...]:
        """idx with numbers in [0, K) of x [B, 1, S, S] in [-1, 1] and z int64 [B]."""
        raise NotImplementedError

    @property
    def fixed_bits(self) -> float:
        """Bits per image at a fixed length per code: h w log2 K, over all grids."""
        return sum(math.prod(grid) for grid in self.grids) * math.log2(self.codebook_size)

    def encode(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalised latent before rounding, float32 [B, C, h, w], of x [B, 1, S, S] in [-1, 1] and z int64 [B].

        A second stage over latents learns these, as if the quantiser were the decoder's first layer (Rombach et al.
        2022, section 3.1): they are correlated along z and decode better than the codes nearest to them.
        """
        self._check(x, z)
        return self._normalise(self._before_rounding(x, z))

    def dequantise(self, idx: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Normalised latent float32 [B, C, h, w] of codes."""
        return self._normalise(self._lookup(idx))

    def decode_indices(self, idx: Tensor | tuple[Tensor, ...], z: Tensor) -> Tensor:
        """x float32 [B, 1, S, S] in [-1, 1] of codes and z int64 [B], faithful."""
        grids = idx if isinstance(idx, tuple) else (idx,)
        for level, (grid, size) in enumerate(zip(grids, self.grids, strict=True)):
            self._check_grid(f"idx[{level}]" if len(grids) > 1 else "idx", grid, size, z)
        return self.pad(self._decode(self._lookup(idx), z)[0].clamp(-1, 1))

    def reconstruct(self, x: Tensor, z: Tensor) -> Tensor:
        return self.decode_indices(self.encode_indices(x, z), z)

    def prior_latent(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents [count, C, h, w] of codes drawn one by one, see random_codes of the quantiser."""
        return self.dequantise(self._random_codes(count, generator))


class VQVAE(CodeAutoencoder):
    """Vector-quantised autoencoder (van den Oord et al. 2017): the latent is a grid of codes out of K.

    Args:
        latent_channels: length of a code.
        codebook_size: K of a learned codebook; or
        levels: of finite scalar quantisation (Mentzer et al. 2023), one per latent channel; K is their product.
    """

    kind = "vqvae"

    def __init__(
        self,
        *,
        latent_channels: int,
        codebook_size: int | None = None,
        levels: tuple[int, ...] | None = None,
        **sizes,
    ):
        super().__init__(
            latent_channels=latent_channels,
            encoder_outputs=latent_channels,
            linear_channels=latent_channels,
            **sizes,
        )
        self.quantizer = make_quantizer(codebook_size, levels, latent_channels)
        self.codebook_size, self.grids = self.quantizer.codebook_size, (self.latent_shape[1:],)

    @torch.no_grad()
    def fit(self, x: Tensor, z: Tensor) -> None:
        """Sets the linear path, then the codes, from training slices x [N, 1, S, S] and z [N]."""
        self.linear.fit(self.crop(x) + 1, self.quantizer.whiten)
        fit_codes(self.quantizer, [self.vectors(*part) for part in zip(x.split(32), z.split(32), strict=True)])

    def vectors(self, x: Tensor, z: Tensor) -> Tensor:
        """Encoder output float32 [B, C, h, w] before quantisation."""
        linear, residual = self._encode(self.crop(x), z)
        return (linear + residual).float()

    def _before_rounding(self, x: Tensor, z: Tensor) -> Tensor:
        return self.quantizer.clamp(self.vectors(x, z))

    def _latent(self, x: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes, and {"codebook": commitment loss}. Training moves the codebook."""
        codes, _, loss = self.quantizer(self.vectors(x, z))
        return codes, {"codebook": loss}

    def encode_indices(self, x: Tensor, z: Tensor) -> Tensor:
        """idx int64 [B, h, w] in [0, K) of x [B, 1, S, S] in [-1, 1] and z int64 [B]."""
        self._check(x, z)
        return quantise(self.quantizer, self.vectors(x, z))

    def _lookup(self, idx: Tensor) -> Tensor:
        return self.quantizer.lookup(idx)

    def _random_codes(self, count: int, generator: torch.Generator | None) -> Tensor:
        return self.quantizer.random_codes((count, *self.grids[0]), generator).to(self.latent_mean.device)


class VQVAE2(CodeAutoencoder):
    """Two-level vector-quantised autoencoder (Razavi et al. 2019): coarse top codes, and bottom codes given the top.

    A top code stands for 2f x 2f pixels, a bottom code for f x f. The bottom encoder sees the slice and the picture
    that the top codes make of it, and its linear path codes the difference. The latent of `encode` is
    [top, doubled | bottom].

    Args: as VQVAE; latent_channels is the length of a code at either level, and both have K codes.
    """

    kind = "vqvae2"

    def __init__(
        self,
        *,
        latent_channels: int,
        codebook_size: int | None = None,
        levels: tuple[int, ...] | None = None,
        **sizes,
    ):
        C = latent_channels
        super().__init__(latent_channels=2 * C, encoder_inputs=2, encoder_outputs=C, linear_channels=C, **sizes)
        patch, widths, blocks, embedding_dim = self.sizes
        _, h, w = self.latent_shape
        if h % 2 or w % 2:
            raise ValueError(f"a grid of {h}x{w} codes cannot be halved for the top level")
        self.encoder_top = Encoder(1, C, patch, (*widths, widths[-1]), blocks, embedding_dim)
        self.linear_top = LinearPath(C, 2 * self.factor)
        self.quantizer_top, self.quantizer = (make_quantizer(codebook_size, levels, C) for _ in range(2))
        self.codebook_size, self.grids = self.quantizer.codebook_size, ((h // 2, w // 2), (h, w))

    def keep_decoders(self) -> None:
        """Drops both encoders."""
        super().keep_decoders()
        self.encoder_top = None

    @torch.no_grad()
    def fit(self, x: Tensor, z: Tensor) -> None:
        """Sets both linear paths and both codebooks from training slices x [N, 1, S, S] and z [N], top first."""
        box, whiten = self.crop(x) + 1, self.quantizer.whiten
        parts = list(zip(x.split(32), z.split(32), strict=True))
        self.linear_top.fit(box, whiten)
        fit_codes(self.quantizer_top, [self.top_vectors(*part) for part in parts])
        top = [self._quantised_top(*part) for part in parts]
        self.linear.fit(box - torch.cat([self.linear_top.decode(t) for t in top]), whiten)
        fit_codes(self.quantizer, [self.bottom_vectors(*part, t) for part, t in zip(parts, top, strict=True)])

    def top_vectors(self, x: Tensor, z: Tensor) -> Tensor:
        """Top encoder output float32 [B, C, h / 2, w / 2] before quantisation."""
        box = self.crop(x)
        return (self.linear_top.encode(box + 1) + self.encoder_top(box, self.embed_z(z))).float()

    def _quantised_top(self, x: Tensor, z: Tensor) -> Tensor:
        return self.quantizer_top.lookup(quantise(self.quantizer_top, self.top_vectors(x, z)))

    def bottom_vectors(self, x: Tensor, z: Tensor, top: Tensor) -> Tensor:
        """Bottom encoder output float32 [B, C, h, w], given the quantised top [B, C, h / 2, w / 2]."""
        box, known = self.crop(x), self.linear_top.decode(top) - 1
        both = torch.cat([box, known], dim=1)
        return (self.linear.encode(box - known) + self.encoder(both, self.embed_z(z))).float()

    def _join(self, top: Tensor, bottom: Tensor) -> Tensor:
        return torch.cat([F.interpolate(top, scale_factor=2.0, mode="nearest"), bottom], dim=1)

    def _split(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        top, bottom = latent.chunk(2, dim=1)
        return F.avg_pool2d(top, 2), bottom

    def _linear_decode(self, latent: Tensor) -> Tensor:
        top, bottom = self._split(latent.float())
        return self.linear_top.decode(top) + self.linear.decode(bottom)

    def _before_rounding(self, x: Tensor, z: Tensor) -> Tensor:
        top = self.quantizer_top.clamp(self.top_vectors(x, z))
        return self._join(top, self.quantizer.clamp(self.bottom_vectors(x, z, top)))

    def _latent(self, x: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes of both levels, and {"codebook": losses of both quantisers}. Training moves the codebooks."""
        top, _, loss_top = self.quantizer_top(self.top_vectors(x, z))
        bottom, _, loss_bottom = self.quantizer(self.bottom_vectors(x, z, top))
        return self._join(top, bottom), {"codebook": loss_top + loss_bottom}

    def encode_indices(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """(top int64 [B, h / 2, w / 2], bottom int64 [B, h, w]) of x [B, 1, S, S] in [-1, 1] and z int64 [B]."""
        self._check(x, z)
        idx_top = quantise(self.quantizer_top, self.top_vectors(x, z))
        vectors = self.bottom_vectors(x, z, self.quantizer_top.lookup(idx_top))
        return idx_top, quantise(self.quantizer, vectors)

    def _lookup(self, idx: tuple[Tensor, Tensor]) -> Tensor:
        return self._join(self.quantizer_top.lookup(idx[0]), self.quantizer.lookup(idx[1]))

    def _random_codes(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        levels = zip((self.quantizer_top, self.quantizer), self.grids, strict=True)
        idx = [quantizer.random_codes((count, *grid), generator) for quantizer, grid in levels]
        return tuple(level.to(self.latent_mean.device) for level in idx)


MODELS = {model.kind: model for model in (VAE, VQVAE, VQVAE2)}
