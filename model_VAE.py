"""The models of the first stage, VAE, VQVAE and VQVAE2, and the files of both stages.

What `encode` returns has mean 0 and standard deviation 1 per channel over the training set.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import util
from parts.autoencoder import Autoencoder, Encoder, LinearPath
from parts.quantizer import FiniteScalarQuantizer, VectorQuantizer
from training import checkpoints


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
    return checkpoints.digest_of({name: w for name, w in weights.items() if not name.startswith(("decoder.", "perceptual."))})


def load_first_stage(
    run: str | Path, device: torch.device | str = "cpu", decoder: str | None = "fidelity"
) -> Autoencoder:
    """The frozen autoencoder of a weights file, a run's folder or a run's name, in evaluation mode on `device`.

    `decoder` is "fidelity", "perceptual", or None for the perceptual one where it was trained. Raises UserError when
    there is no such file or no such decoder.
    """
    path = checkpoints.find_weights(run, f"python prestage_train.py --model {run if run in MODELS else f'vqvae --name {run}'}")
    weights, description = checkpoints.load_weights(path)
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
    checkpoints.fill_model(model, weights, path)
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
    checkpoints.save_weights(path, weights, {"kind": prior.kind, **description, "first_stage": first_stage.description})


def load_second_stage(
    run: str | Path, model_class: type, device: torch.device | str, decoder: str | None = "fidelity"
) -> tuple[nn.Module, Autoencoder, dict]:
    """(prior, first stage, description) of a run or file, frozen. Raises UserError if the prior is no model_class."""
    path = checkpoints.find_weights(run, f"python {model_class.script} --name {run}")
    weights, description = checkpoints.load_weights(path)
    if description["kind"] != model_class.kind:
        raise util.UserError(f"{path} is a {description['kind']}, no {model_class.kind}; name a run of that kind")
    try:
        prior = model_class(**description["model_kwargs"]).eval().requires_grad_(False)
    except TypeError:
        raise util.UserError(f"{path} has settings that this version does not know; train it anew") from None
    checkpoints.fill_model(prior, checkpoints.part_of(weights, "prior."), path)
    first_stage = build_first_stage(description["first_stage"], checkpoints.part_of(weights, "first_stage."), path, decoder)
    return prior.to(device), first_stage.to(device), description
