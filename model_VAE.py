"""The first stage: encoder, decoder, quantiser, and the two autoencoders VAE and VQVAE made of them.

    x [B, 1, S, S] --crop--> box --encoder--> latent [B, C, h, w] --decoder--> box --pad--> x

Both halves are a block-linear path plus a network. The linear path starts as the Karhunen-Loeve transform of f x f
blocks of the training slices, and the network's last convolution starts at zero, so training begins where the best
linear block codec ends. What `encode` returns has mean 0 and standard deviation 1 per channel over the training set.
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import util
from module import Downsample, Embedding, ResBlock, SelfAttention, Upsample, norm, zero


class Encoder(nn.Module):
    """[B, 1, H, W] to [B, channels_out, H / f, W / f] with f = patch 2^(levels - 1); z is added in every block.

    The stem is a pixel unshuffle: one grey channel at full resolution needs no convolutions of its own.
    """

    def __init__(
        self,
        channels_out: int,
        patch: int,
        channels: int,
        channel_multipliers: tuple[int, ...],
        blocks: int,
        embedding_dim: int,
    ):
        super().__init__()
        width = [channels * m for m in channel_multipliers]
        self.stem = nn.Sequential(nn.PixelUnshuffle(patch), nn.Conv2d(patch**2, width[0], 3, padding=1))
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
    """[B, channels_in, h, w] to [B, 1, h f, w f], the encoder's mirror image."""

    def __init__(
        self,
        channels_in: int,
        patch: int,
        channels: int,
        channel_multipliers: tuple[int, ...],
        blocks: int,
        embedding_dim: int,
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

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial loss (Esser et al. 2021, eq. 7)."""
        return self.out[2].weight

    def forward(self, latent: Tensor, embedding: Tensor) -> Tensor:
        h = self.attention(self.mid(self.stem(latent), embedding))
        for up, blocks in zip(self.ups, self.levels):
            h = up(h)
            for block in blocks:
                h = block(h, embedding)
        return self.out(h)


class VectorQuantizer(nn.Module):
    """Nearest code of a learned codebook (van den Oord et al. 2017), in float32 whatever the autocast.

    The codebook follows exponential moving averages of the vectors that chose each code (ibid., appendix A.1), or, with
    ema=False, the gradient of the codebook loss ||sg[e] - q||^2. Codes that hardly anything chooses are replaced.

    Args:
        codebook_size: K.
        dim: length of a code.
        commitment: beta, the weight of ||e - sg[q]||^2, which ties the encoder to the codes.
        decay: of the moving averages.
        revive_below: a code that fewer vectors per step choose, on average, is replaced by one of the batch.
    """

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        commitment: float = 0.25,
        ema: bool = True,
        decay: float = 0.99,
        revive_below: float = 0.5,
    ):
        super().__init__()
        self.commitment, self.ema, self.decay, self.revive_below = commitment, ema, decay, revive_below
        codebook = torch.randn(codebook_size, dim)
        if ema:
            self.register_buffer("codebook", codebook)
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("count", torch.ones(codebook_size))  # vectors per step and code
        self.register_buffer("total", codebook.clone())  # their sum

    def nearest(self, vectors: Tensor) -> Tensor:
        """int64 [N]: the code nearest to each of float32 [N, dim] in Euclidean distance."""
        codes = self.codebook
        with torch.autocast(vectors.device.type, enabled=False):
            parts = vectors.float().split(65_536)  # k-means asks for more than memory likes at once
            return torch.cat([(codes.square().sum(1) - 2 * v @ codes.T).argmin(1) for v in parts])  # without |v|^2

    def lookup(self, idx: Tensor) -> Tensor:
        """Codes [B, dim, h, w] of int64 idx [B, h, w]."""
        return F.embedding(idx, self.codebook).movedim(-1, 1)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns quantised latent (the gradient passes straight through), idx int64 [B, h, w], loss.

        latent: [B, dim, h, w]. In training mode the codebook moves, after it was used.
        """
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float()
            B, C, h, w = latent.shape
            vectors = latent.movedim(1, -1).reshape(-1, C)
            idx = self.nearest(vectors.detach())
            quantised = self.lookup(idx.view(B, h, w))
            loss = self.commitment * F.mse_loss(latent, quantised.detach())
            if not self.ema:
                loss = loss + F.mse_loss(quantised, latent.detach())
            straight_through = latent + (quantised - latent).detach()
            if self.training:
                self._follow(vectors.detach(), idx)
        return straight_through, idx.view(B, h, w), loss

    @torch.no_grad()
    def _follow(self, vectors: Tensor, idx: Tensor) -> None:
        count = torch.bincount(idx, minlength=len(self.count)).to(vectors.dtype)
        total = torch.zeros_like(self.total).index_add_(0, idx, vectors)
        if dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        if self.ema:
            self.codebook.copy_(self.total / self.count.clamp(min=1e-5)[:, None])
        dead = self.count < self.revive_below
        if dead.any():  # averages too start anew, or the next update would undo the revival
            chosen = vectors[torch.randint(len(vectors), (int(dead.sum()),), device=vectors.device)]
            if dist.is_initialized():
                dist.broadcast(chosen, 0)
            self.codebook.data[dead] = chosen
            self.count[dead] = 2 * self.revive_below
            self.total[dead] = 2 * self.revive_below * chosen

    @torch.no_grad()
    def start(self, vectors: Tensor, iterations: int = 20) -> None:
        """k-means on encoder outputs float32 [N, dim], N >= K; empty clusters restart at vectors drawn at random."""
        K = len(self.count)
        if len(vectors) < K:
            raise ValueError(f"{len(vectors)} vectors cannot start {K} codes")
        distinct = torch.unique(vectors, dim=0)  # half of all vectors are the black background
        distinct = distinct if len(distinct) >= K else vectors
        self.codebook.data.copy_(distinct[torch.randperm(len(distinct))[:K]])
        for _ in range(iterations):
            idx = self.nearest(vectors)
            count = torch.bincount(idx, minlength=K)
            mean = torch.zeros_like(self.total).index_add_(0, idx, vectors) / count.clamp(min=1)[:, None]
            empty = count == 0
            mean[empty] = distinct[torch.randint(len(distinct), (int(empty.sum()),))]
            self.codebook.data.copy_(mean)
        self.count.fill_(4 * self.revive_below)
        self.total.copy_(self.codebook * self.count[:, None])


class Autoencoder(nn.Module):
    """What VAE and VQVAE share: box, encoder, decoder, linear path, scale of the latents.

    Args:
        image_size: S.
        box: (top, left, height, width) of the part that is coded; the rest of every picture is black.
        patch: pixels a side that the stem folds into channels.
        channels, channel_multipliers, blocks: the first level's width, each level's relative to it, ResBlocks a level.
        latent_channels: C of the latent.
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
        encoder_outputs: int,
    ):
        super().__init__()
        self.image_size, self.box = image_size, tuple(box)
        self.factor = patch * 2 ** (len(channel_multipliers) - 1)
        height, width = self.box[2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"box of {height}x{width} pixels is not divisible by the factor {self.factor}")
        if latent_channels > self.factor**2:
            raise ValueError(
                f"{latent_channels} latent channels are more than the {self.factor**2} pixels they stand for"
            )
        self.latent_shape = (latent_channels, height // self.factor, width // self.factor)
        embedding_dim = 2 * channels
        self.embed_z = Embedding(embedding_dim)
        sizes = (patch, channels, channel_multipliers, blocks, embedding_dim)
        self.encoder, self.decoder = Encoder(encoder_outputs, *sizes), Decoder(latent_channels, *sizes)
        self.analysis = nn.Conv2d(1, latent_channels, self.factor, self.factor, bias=False)
        self.synthesis = nn.ConvTranspose2d(latent_channels, 1, self.factor, self.factor, bias=False)
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latent_sd", torch.ones(latent_channels, 1, 1))

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
        """Linear path [B, C, h, w] and network output [B, encoder_outputs, h, w] of a box; to the former black is 0."""
        with torch.autocast(x.device.type, enabled=False):  # bf16 rounds a latent of 8 to 1/32
            linear = self.analysis(x.float() + 1)
        return linear, self.encoder(x, self.embed_z(z))

    def _decode(self, latent: Tensor, z: Tensor) -> Tensor:
        """The box, float32; may leave [-1, 1] a little, mostly below -1 where the picture is black."""
        with torch.autocast(latent.device.type, enabled=False):  # bf16 near -1 has steps of half a grey level
            linear = self.synthesis(latent.float()) - 1
        return linear + self.decoder(latent, self.embed_z(z)).float()

    @torch.no_grad()
    def start_linear_path(self, x: Tensor, whiten: bool) -> None:
        """Sets analysis and synthesis to the block Karhunen-Loeve transform of slices x [N, 1, S, S].

        The eigenvectors are those of the second moment about black, not about the mean, so black codes as exactly zero.
        The latent gets unit variance: each channel by itself (whiten), or all by one factor, which keeps distances.
        """
        C, f = self.latent_shape[0], self.factor
        blocks = F.unfold(self.crop(x) + 1, f, stride=f).transpose(1, 2).reshape(-1, f * f).double()
        blocks = blocks[blocks.abs().amax(1) > 0]
        basis = torch.linalg.eigh(blocks.T @ blocks)[1].flip(1)[:, :C].T  # [C, f * f], orthonormal rows
        sd = (blocks @ basis.T).std(0).clamp(min=1e-6)
        scale = sd if whiten else sd.square().mean().sqrt().expand(C)
        self.analysis.weight.copy_((basis / scale[:, None]).view(C, 1, f, f))
        self.synthesis.weight.copy_((basis * scale[:, None]).view(C, 1, f, f))

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

    def _normalise(self, latent: Tensor) -> Tensor:
        return (latent.float() - self.latent_mean) / self.latent_sd

    def _denormalise(self, latent: Tensor) -> Tensor:
        return latent.float() * self.latent_sd + self.latent_mean

    def _check(self, x: Tensor, z: Tensor) -> None:
        if x.shape[1:] != (1, self.image_size, self.image_size) or z.shape != x.shape[:1]:
            raise ValueError(
                f"x must be [B, 1, {self.image_size}, {self.image_size}] and z [B], "
                f"not {list(x.shape)} and {list(z.shape)}"
            )

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
        super().__init__(latent_channels=latent_channels, encoder_outputs=2 * latent_channels, **sizes)
        with torch.no_grad():  # the posterior starts narrow, so that the decoder first learns to decode
            self.encoder.out[-1].bias[latent_channels:] = -4

    def posterior(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, float32 [B, C, h, w], of q(latent | x, z), before normalisation."""
        linear, out = self._encode(self.crop(x), z)
        residual, log_variance = out.chunk(2, dim=1)
        return (linear + residual).float(), log_variance.float().clamp(-30, 20)

    @staticmethod
    def kl_bits(mean: Tensor, log_variance: Tensor) -> Tensor:
        """KL(q || N(0, 1)) of each image, [B]: (mu^2 + s^2 - 1 - log s^2) / 2 nats a number (ibid., appendix B)."""
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)) / math.log(2)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstructed box of a posterior sample, and {"kl": mean bits per image}."""
        mean, log_variance = self.posterior(x, z)
        latent = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self._decode(latent, z), {"kl": self.kl_bits(mean, log_variance).mean()}

    def encode(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalised posterior mean, float32 [B, C, h, w], of x [B, 1, S, S] in [-1, 1] and z int64 [B]."""
        self._check(x, z)
        return self._normalise(self.posterior(x, z)[0])

    def decode(self, latent: Tensor, z: Tensor) -> Tensor:
        """x float32 [B, 1, S, S] in [-1, 1] of a normalised latent [B, C, h, w] and z int64 [B]."""
        self._check_grid("latent", latent, self.latent_shape, z)
        return self.pad(self._decode(self._denormalise(latent), z).clamp(-1, 1))

    def prior_latent(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents [count, C, h, w] drawn from the prior N(0, 1) of the training loss."""
        noise = torch.randn(count, *self.latent_shape, generator=generator).to(self.latent_mean.device)
        return self._normalise(noise)


class VQVAE(Autoencoder):
    """Vector-quantised autoencoder (van den Oord et al. 2017): the latent is a grid of codes out of K."""

    kind = "vqvae"

    def __init__(
        self, *, latent_channels: int, codebook_size: int, commitment: float = 0.25, ema_codebook: bool = True, **sizes
    ):
        super().__init__(latent_channels=latent_channels, encoder_outputs=latent_channels, **sizes)
        self.quantizer = VectorQuantizer(codebook_size, latent_channels, commitment, ema_codebook)
        self.codebook_size = codebook_size

    @property
    def fixed_bits(self) -> float:
        """Bits per image at a fixed length per code: h w log2 K."""
        return self.latent_shape[1] * self.latent_shape[2] * math.log2(self.codebook_size)

    def vectors(self, x: Tensor, z: Tensor) -> Tensor:
        """Encoder output float32 [B, C, h, w] before quantisation."""
        linear, residual = self._encode(self.crop(x), z)
        return (linear + residual).float()

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstructed box, and {"codebook": commitment (and codebook) loss}. Training mode moves the codebook."""
        quantised, _, loss = self.quantizer(self.vectors(x, z))
        return self._decode(quantised, z), {"codebook": loss}

    def encode_indices(self, x: Tensor, z: Tensor) -> Tensor:
        """idx int64 [B, h, w] in [0, K) of x [B, 1, S, S] in [-1, 1] and z int64 [B]."""
        self._check(x, z)
        return self.nearest(self.vectors(x, z))

    def nearest(self, latent: Tensor) -> Tensor:
        """idx int64 [B, h, w] of the codes nearest to unnormalised vectors [B, C, h, w]."""
        B, C, h, w = latent.shape
        return self.quantizer.nearest(latent.movedim(1, -1).reshape(-1, C)).view(B, h, w)

    def decode_indices(self, idx: Tensor, z: Tensor) -> Tensor:
        """x float32 [B, 1, S, S] in [-1, 1] of int64 idx [B, h, w] and z int64 [B]."""
        self._check_grid("idx", idx, self.latent_shape[1:], z)
        return self.pad(self._decode(self.quantizer.lookup(idx), z).clamp(-1, 1))

    def encode(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalised quantised latent, float32 [B, C, h, w], of x [B, 1, S, S] in [-1, 1] and z int64 [B]."""
        return self._normalise(self.quantizer.lookup(self.encode_indices(x, z)))

    def decode(self, latent: Tensor, z: Tensor) -> Tensor:
        """x float32 [B, 1, S, S] in [-1, 1] of the codes nearest to a normalised latent [B, C, h, w]."""
        self._check_grid("latent", latent, self.latent_shape, z)
        return self.decode_indices(self.nearest(self._denormalise(latent)), z)

    def prior_latent(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents [count, C, h, w] of codes drawn one by one as often as training used them."""
        _, h, w = self.latent_shape
        idx = torch.multinomial(self.quantizer.count.cpu(), count * h * w, replacement=True, generator=generator)
        return self._normalise(self.quantizer.lookup(idx.view(count, h, w).to(self.latent_mean.device)))


MODELS = {model.kind: model for model in (VAE, VQVAE)}


def load_first_stage(run: str | Path, device: torch.device | str = "cpu") -> VAE | VQVAE:
    """The frozen autoencoder of a weights file, a run's folder or a run's name, in evaluation mode on `device`."""
    path = util.find_weights(run, f"python prestage_train.py --model {run if run in MODELS else f'vqvae --name {run}'}")
    weights, description = util.load_weights(path)
    if description["kind"] not in MODELS:
        raise util.UserError(f"{path} is a {description['kind']}, no first stage; give a run of prestage_train.py")
    description |= {"digest": util.digest_of(weights), "path": str(path)}
    return build_first_stage(description, weights, path).to(device)


def build_first_stage(description: dict, weights: dict[str, Tensor], path: Path) -> VAE | VQVAE:
    """The frozen autoencoder of weights and their description {"kind", "model_kwargs", ...}; `path` is for messages.

    The description stays on the model as `description`, for those who store it beside their own weights.
    """
    model = MODELS[description["kind"]](**description["model_kwargs"])
    model.description = description
    model = util.fill_model(model, weights, path).eval().requires_grad_(False)
    return model.to(memory_format=torch.channels_last)  # convolutions run twice as fast


def save_second_stage(path: Path, prior: nn.Module, first_stage: Autoencoder, description: dict) -> None:
    """Writes a prior and the first stage it was trained on into one file, so that sampling needs one path."""
    weights = {f"prior.{name}": tensor for name, tensor in prior.state_dict().items()}
    weights |= {f"first_stage.{name}": tensor for name, tensor in first_stage.state_dict().items()}
    util.save_weights(path, weights, {"kind": prior.kind, **description, "first_stage": first_stage.description})


def load_second_stage(
    run: str | Path, model_class: type, device: torch.device | str
) -> tuple[nn.Module, Autoencoder, dict]:
    """(prior, first stage, description) of a run or file, frozen. Raises UserError if the prior is no model_class."""
    path = util.find_weights(run, f"python {model_class.script} --name {run}")
    weights, description = util.load_weights(path)
    if description["kind"] != model_class.kind:
        raise util.UserError(f"{path} is a {description['kind']}, no {model_class.kind}; name a run of that kind")
    prior = model_class(**description["model_kwargs"]).eval().requires_grad_(False)
    util.fill_model(prior, util.part_of(weights, "prior."), path)
    first_stage = build_first_stage(description["first_stage"], util.part_of(weights, "first_stage."), path)
    return prior.to(device), first_stage.to(device), description
