"""Pretrained generators of latents, as diffusers' folders hold them: drawn from and fine-tuned.

A frozen autoencoder makes latents of images, and a denoiser learns the way from noise to them
(latent diffusion, arXiv:2112.10752). The folder's scheduler says which way that is, its pipeline's
class how captions are read; see `pretrained.folder`.

B batch · H W pixels · h w C latents · K numbers
"""

import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta

from t2i_jax import errors, fields, losses, objective, plugins, randomness
from t2i_jax import space as spaces
from t2i_jax.data import inputs
from t2i_jax.models.types import Cond, Moments, Output
from t2i_jax.objective import Aux, Cached, Loss, Objective, Pictures
from t2i_jax.pretrained import folder as folders
from t2i_jax.pretrained import opener
from t2i_jax.sampling import guidance as guide
from t2i_jax.sampling import scheduler, solvers, tiles

NETS = ("model", folders.AUTOENCODER)  # that config.model describes
HELD_OUT_TIMES = tuple((i + 0.5) / 8 for i in range(8))

Guidance = Annotated[float, fields.at_least(0), fields.compiled_apart(guide.NONE)]
Steps = Annotated[int, fields.count()]
Side = Annotated[int, fields.at_least(0)]  # 0: that of the config
Solver = Annotated[str, fields.one_of(("", *solvers.SOLVERS))]


class Options(NamedTuple):
    """config.loss.

    text_dropout: share of captions that are read as empty ones.
    snr_gamma: limit of the weights by signal to noise, see `scheduler.min_snr`; 0 weighs all alike.
    offset: strength of the noise that a whole channel shares (offset noise).
    guidance: scale that FLUX.1 reads in training.
    train_text: the text encoders learn, too, from their own entry of config.optim.
    """

    text_dropout: fields.Share = 0.1
    snr_gamma: fields.Weight = 0.0
    offset: fields.Weight = 0.0
    guidance: fields.Weight = 1.0
    train_text: bool = False


def make(config) -> Objective:
    """Nets "model", "text" and "vae" of the folder that config.load.model names a part of;
    predictions sample, img2img, encode, loss_at_times; for config.cache states and moments.

    `config.model`: options of `from_config` of the denoiser and the autoencoder, such as
    model=dict(dtype="bfloat16").
    """
    family = Latent(config)
    predict = {"sample": family.sample, "img2img": family.img2img, "encode": family.encode}
    predict |= {"loss_at_times": family.loss_at_times, "parts": family.parts}
    predict |= {"states": family.states, "moments": family.moments}
    trained = ("model", "text") if family.options.train_text else ("model",)
    read = (
        *([inputs.origin(family.pixels)] if family.recipe.numbers == "sizes" else []),
        inputs.picture(family.pixels, augment=tuple(config.augment)),
        inputs.caption(family.captions.tokenizers),
    )
    cached = {"states": Cached("caption", ("text",))}
    cached["moments"] = Cached("image", (folders.AUTOENCODER,))
    return Objective(
        family.init, (Loss(trained, family.loss),), predict, inputs=read, cached=cached
    )


def latents(vae, size) -> spaces.Space:
    """The latents that an autoencoder's module, which is the net "vae", makes of images of a height
    and width; scaled as denoisers learn them, z = (latent − shift)·scale (arXiv:2112.10752,
    appendix G).
    """

    def encode(nets, batch, keys_B):
        if "mean" in batch:  # from a cache, as float16
            kept = lambda name: batch[name].astype(jnp.float32) if name in batch else None
            mean_BhwC, logvar_BhwC = kept("mean"), kept("logvar")
        else:
            mean_BhwC, logvar_BhwC = vae.apply(nets[folders.AUTOENCODER], batch["image"])
        if logvar_BhwC is not None:
            noise = randomness.normal_each(keys_B, mean_BhwC.shape[1:])
            mean_BhwC += jnp.exp(0.5 * logvar_BhwC) * noise
        return (mean_BhwC - vae.shift_factor) * vae.scaling_factor

    def decode(nets, z_BhwC):
        latent_BhwC = z_BhwC / vae.scaling_factor + vae.shift_factor
        return vae.apply(nets[folders.AUTOENCODER], latent_BhwC, method="decode")

    def init(key, batch):
        return vae.init(key, jnp.zeros((1, *size, 3)))

    shape = (*(side // vae.factor for side in size), vae.latent_channels)
    return spaces.Space(shape, encode, decode, {folders.AUTOENCODER: init})


class Latent:
    """The parts of the objective, and what is made of them."""

    def __init__(self, config):
        self.options = fields.build(Options, config.loss, where="config.loss")
        plugins.check_nets(config.model, NETS)
        source = config.load.get("model") or ""
        if "#" not in source:
            raise errors.ConfigError(
                f"config.load.model is {source!r}, no part of a pipeline",
                where="config.load.model",
                fix="name the denoiser in a diffusers folder: DIR#unet or DIR#transformer",
            )
        self.folder = folders.open(source.rpartition("#")[0])
        self.recipe, self.pixels = self.folder.recipe, objective.size(config)
        denoiser, vae = (
            opener.open(self.folder.part(name))
            for name in (self.recipe.denoiser, folders.AUTOENCODER)
        )
        sizes = lambda name: dict(config.model.get(name, {}))
        self.model = denoiser.module(Output, **sizes("model"))
        self.vae = vae.module(Moments, **sizes(folders.AUTOENCODER))
        self.unit = self.vae.factor * self.model.unit  # of the sides of pictures
        self.size(*self.pixels, where="config.size" if config.size else "config.res")
        self.space = latents(self.vae, self.pixels)
        self.captions = folders.Captions(
            self.folder,
            width=denoiser.config.get("joint_attention_dim", 0),
            dtype=config.text.get("dtype", "float32"),
            length=config.text_length,
        )
        self.scheduler = scheduler.from_config(self.folder.scheduler)
        self.path = self.scheduler.path
        # FLUX.1-dev learned what guidance gives, and reads its scale; schnell needs none.
        self.distilled = bool(denoiser.config.get("guidance_embeds"))

    def size(self, height: int, width: int, where: str = "--") -> tuple[int, int]:
        """Height and width of a picture, for 0 those of the config.

        Raises:
          ConfigError: a side that the networks do not divide.
        """
        sides = {"height": height or self.pixels[0], "width": width or self.pixels[1]}
        for name, side in sides.items():
            if side % self.unit:
                near = max(side // self.unit, 1) * self.unit
                raise errors.ConfigError(
                    f"a picture's {name} is {side}, no multiple of {self.unit}",
                    where=where if where != "--" else f"--set {name}",
                    fix=f"use {near} or {near + self.unit}",
                )
        return tuple(sides.values())

    def init(self, key, batch):
        key_model, key_text, key_vae = jax.random.split(key, 3)
        text = self.captions.init(key_text, batch["text"])
        cond = self.cond({"text": text}, batch["text"], self.pixels)
        t_B = jnp.zeros(len(batch["index"]))
        z = jnp.zeros((len(t_B), *self.space.shape[:2], self.model.channels))
        nets = {"model": self.model.init(key_model, z, t_B, cond), "text": text}
        return nets | {name: init(key_vae, batch) for name, init in self.space.init.items()}

    def cond(self, nets, tokens, size, guidance=1.0, origin_B4=None):
        """The condition of captions for pictures of a size, in pixels.

        origin_B4: what `inputs.origin` says of them; by default they are no part of larger ones.
        """
        cond = self.captions(nets["text"], tokens)
        return self.numbered(cond, size, guidance, origin_B4)

    def numbered(self, cond, size, guidance, origin_B4=None):
        """The condition with the numbers that the denoiser reads beside captions, as of `cond`."""
        known = {}
        if origin_B4 is not None:
            known = {"original": origin_B4.T[:2], "corner": origin_B4.T[2:]}
        numbers = folders.numbers(self.recipe, size, guidance=guidance, **known)
        if numbers is None or (self.recipe.numbers == "guidance" and not self.distilled):
            return cond
        each = [jnp.broadcast_to(jnp.float32(n), len(cond.mask_BL)) for n in numbers]
        return cond._replace(numbers_BK=jnp.stack(each, axis=1))

    def encode(self, nets, batch, key):
        """The condition of captions, for pictures of the config's size."""
        return self.cond(nets, batch["text"], self.pixels)

    def null(self, nets, batch, cond, size):
        """What pictures are guided away from: the batch's negative prompts, else the empty text;
        zeros where the pipeline says so.
        """
        if "negative_text" in batch:
            null = self.cond(nets, batch["negative_text"], size)
            if not self.folder.empty_is_zeros:
                return null
            # An example without a negative prompt, beside others that have one.
            given_B = next(iter(batch["negative_text"].values())).mask_BL.any(1)
            return null._replace(
                seq_BLD=jnp.where(given_B[:, None, None], null.seq_BLD, 0),
                pooled_BD=jnp.where(given_B[:, None], null.pooled_BD, 0),
            )
        if self.folder.empty_is_zeros:
            zeros = cond._replace(seq_BLD=jnp.zeros_like(cond.seq_BLD))
            return zeros._replace(pooled_BD=jnp.zeros_like(cond.pooled_BD))
        one = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), batch["text"])
        null = self.cond(nets, one, size)
        return jax.tree.map(lambda x: jnp.repeat(x, len(batch["index"]), 0), null)

    # ---- What config.cache keeps ----

    def states(self, nets, batch, key):
        """The states of captions.   -> cond_seq BLD, cond_mask BL, cond_pooled BD"""
        cond = self.captions(nets["text"], batch["text"])
        return dict(cond_seq=cond.seq_BLD, cond_mask=cond.mask_BL, cond_pooled=cond.pooled_BD)

    def moments(self, nets, batch, key):
        """What the autoencoder makes of pictures, and what else is said of them.

        -> mean and logvar BhwC, the latter where latents are drawn; "origin" of `inputs.origin`.
        """
        mean_BhwC, logvar_BhwC = self.vae.apply(nets[folders.AUTOENCODER], batch["image"])
        found = dict(mean=mean_BhwC, logvar=logvar_BhwC, origin=batch.get("origin"))
        return {name: x for name, x in found.items() if x is not None}

    def read(self, nets, batch, dropped_B):
        """The states of a batch's captions, dropped ones being empty: encoded, or from a cache."""
        drop = lambda x, none: jnp.where(jnp.expand_dims(dropped_B, range(1, x.ndim)), none, x)
        if "cond_seq" not in batch:
            # The cast makes a mask of bools again, of which `where` with 0 makes integers.
            tokens = jax.tree.map(lambda x: drop(x, 0).astype(x.dtype), batch["text"])
            return self.captions(nets["text"], tokens)
        # No module reads them, which would open the boxes of split arrays (`Layout.gather`).
        empty = meta.unbox(nets["text"]["empty"])
        seq_BLD, pooled_BD, mask_BL = (
            drop(batch[name], empty[name]) for name in ("cond_seq", "cond_pooled", "cond_mask")
        )
        return Cond(seq_BLD.astype(jnp.float32), mask_BL, pooled_BD.astype(jnp.float32))

    # ---- Training ----

    def loss_at(self, nets, z0, cond, noise, t_B):
        """The path's loss of each example at its time.   -> B"""
        z, kind = self.path.mix(z0, noise, t_B), self.scheduler.kind
        out = self.model.apply(nets["model"], z, self.scheduler.time(t_B), cond)
        value_B = self.path.error(kind, out, z, z0, noise, t_B)
        if self.options.snr_gamma:
            value_B *= scheduler.min_snr(self.path, kind, t_B, self.options.snr_gamma)
        return value_B

    def loss(self, nets, batch, key, step):
        keys_B = randomness.per_example(key, batch["index"])
        keys = randomness.split_each(keys_B, 5)
        z0 = self.space.encode(nets, batch, keys[0])
        noise = randomness.normal_each(keys[1], z0.shape[1:])
        if self.options.offset:
            shared = randomness.normal_each(keys[2], (1, 1, z0.shape[-1]))
            noise += self.options.offset * shared
        t_B = self.path.draw(randomness.normal_each(keys[3], ()))
        draw_B = jax.vmap(jax.random.uniform)(keys[4])
        cond = self.read(nets, batch, draw_B < self.options.text_dropout)
        cond = self.numbered(cond, self.pixels, self.options.guidance, batch.get("origin"))
        value_B = self.loss_at(nets, z0, cond, noise, t_B)
        return losses.weighted_mean(value_B, batch["weight"]), Aux()

    def loss_at_times(self, nets, batch, key):
        """The training loss of a batch at eight fixed times, without dropout.   -> (8,)"""
        keys = randomness.split_each(randomness.per_example(key, batch["index"]), 2)
        z0 = self.space.encode(nets, batch, keys[0])
        noise = randomness.normal_each(keys[1], z0.shape[1:])
        size, guidance = batch["image"].shape[1:3], self.options.guidance
        cond = self.cond(nets, batch["text"], size, guidance, batch.get("origin"))

        def at(t):
            value_B = self.loss_at(nets, z0, cond, noise, jnp.full(len(noise), t))
            return losses.weighted_mean(value_B, batch["weight"])

        # One time after another: all at once would need the memory of eight batches.
        return jax.lax.map(at, jnp.array(HELD_OUT_TIMES))

    # ---- Drawing ----

    def sample(
        self,
        nets,
        batch,
        key,
        *,
        guidance: Guidance = 5.0,
        steps: Steps = 28,
        sampler: Solver = "",
        width: Side = 0,
        height: Side = 0,
        tile: Side = 0,
    ) -> Pictures:
        """Images for captions.   -> image_BHWC in [-1, 1]

        Args:
          guidance: scale of classifier-free guidance, 1 is none.
          steps: solver steps.
          sampler: one of `solvers.SOLVERS`; by default what the folder's scheduler says.
          width, height: in pixels; 0: those that the model was trained for.
          tile: side in pixels of the overlapping tiles that large images are decoded in, one after
            another; 0: all at once.
        """
        size = self.size(height, width)
        keys_B = randomness.per_example(key, batch["index"])
        noise = self.noise(batch, keys_B, size)
        grid = self.grid(size, steps, sampler)
        z = self.solved(nets, batch, keys_B, grid.start * noise, grid, sampler, size, guidance)
        return self.image(nets, z, tile)

    def img2img(
        self,
        nets,
        batch,
        key,
        *,
        # Static: it decides how many steps are done, which is a shape.
        strength: Annotated[float, fields.between(0, 1), fields.STATIC] = 0.8,
        guidance: Guidance = 5.0,
        steps: Steps = 28,
        sampler: Solver = "",
    ) -> Pictures:
        """Images for captions that begin as given ones (SDEdit, arXiv:2108.01073).

        Args:
          strength: share of the steps that are done, from 0, which leaves the images, to 1.
          guidance, steps, sampler: as of `sample`.
        """
        size = batch["image"].shape[1:3]
        keys_B = randomness.per_example(key, batch["index"])
        noise = self.noise(batch, keys_B, size)
        grid = self.grid(size, steps, sampler, strength)
        z0 = self.space.encode(nets, batch, randomness.fold_each(keys_B, 0))
        z = grid.alpha_S[0] * z0 + grid.sigma_S[0] * noise if len(grid.time_S) else z0
        z = self.solved(nets, batch, keys_B, z, grid, sampler, size, guidance)
        return self.image(nets, z)

    def image(self, nets, z, tile: int = 0):
        """The images of latents, decoded in tiles of so many pixels a side.   -> image_BHWC"""
        decode, side = (lambda z: self.space.decode(nets, z)), tile // self.vae.factor
        if tile:
            image = tiles.tiled(decode, z, tile=max(side, 2), factor=self.vae.factor)
        else:
            image = decode(z)
        return jnp.clip(image, -1, 1)

    def parts(self, nets, batch, key, *, width: Side = 0, height: Side = 0):
        """What each network makes of captions and noise, to be compared with other programs.

        -> name -> array: "text" and "pooled" of the encoders, "denoiser" of the noise at the first
        of 20 steps, without guidance, "autoencoder" of the noise as latents.
        """
        size = self.size(height, width)
        noise = self.noise(batch, randomness.per_example(key, batch["index"]), size)
        cond = self.cond(nets, batch["text"], size)
        grid = self.grid(size, 20, "")
        time_B = jnp.full(len(noise), grid.time_S[0])
        out = self.model.apply(nets["model"], grid.start * noise, time_B, cond)
        image = self.space.decode(nets, noise)
        return dict(text=cond.seq_BLD, pooled=cond.pooled_BD, denoiser=out, autoencoder=image)

    def noise(self, batch, keys_B, size):
        """The noise of pictures of a size in pixels: the batch's, else that of the keys."""
        height, width = (side // self.vae.factor for side in size)
        shape = (height, width, self.space.shape[-1])
        return randomness.given_or_normal(batch, keys_B, shape)

    def grid(self, size, steps: int, sampler: str, strength: float = 1.0):
        """The solver's numbers for pictures of a size in pixels; see `Scheduler.grid`."""
        return self.scheduler.grid(
            steps,
            tokens=math.prod(side // self.unit for side in size),
            solver=sampler,
            even=self.recipe.evenly,
            strength=strength,
        )

    def solved(self, nets, batch, keys_B, z, grid, sampler, size, guidance):
        """The latents that guided steps lead to from z at the grid's first time."""
        cond = self.cond(nets, batch["text"], size, guidance)

        def under(cond):
            # As in `flow`: what follows from the caption alone is computed once for all steps.
            prepared = self.model.apply(nets["model"], cond, method="prepare")
            return lambda z, t_B: self.model.apply(nets["model"], z, t_B, cond, prepared)

        alone = under(cond)
        if self.distilled and "negative_text" in batch:
            raise errors.ConfigError(
                "this model was trained to be guided by itself, and reads no negative prompt",
                where="negative_prompt",
                fix="leave it out",
            )
        if self.distilled:  # it reads the scale, and one pass is enough
            output = lambda z, t: alone(z, jnp.full(len(z), t))
        else:
            null = self.null(nets, batch, cond, size)
            pair = under(jax.tree.map(guide.interleave, cond, null))
            output = guide.cfg(pair, alone, guidance, guide.ALWAYS)
        # Number 0 is that of the encoded image's noise.
        step_keys = lambda n: randomness.fold_each(keys_B, n + 1)
        normal = lambda n: randomness.normal_each(step_keys(n), z.shape[1:])
        solve = solvers.SOLVERS[sampler or self.scheduler.name]
        return solve(output, z, grid, normal)
