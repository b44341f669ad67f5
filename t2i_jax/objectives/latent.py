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

from t2i_jax import errors, fields, losses, objective, plugins, randomness, weights
from t2i_jax.data import inputs
from t2i_jax.models.types import Cond, Moments, Output
from t2i_jax.objective import Aux, Cached, Loss, Objective, OfBatch, Pictures, Stage, through
from t2i_jax.objectives.parts import autoencoders
from t2i_jax.pretrained import folder as folders
from t2i_jax.pretrained import opener
from t2i_jax.sampling import guidance as guide
from t2i_jax.sampling import scheduler, solvers, tiles

NETS = ("model", folders.AUTOENCODER)  # that config.model describes
HELD_OUT_TIMES = tuple((i + 0.5) / 8 for i in range(8))

# Below 1 a caption would count less than without guidance. diffusers takes such numbers for 1.
Guidance = Annotated[float, fields.at_least(1), fields.compiled_apart(guide.NONE)]
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
    more = dict(inputs=read, cached=cached, stages=family.stages)
    return Objective(family.init, (Loss(trained, family.loss),), predict, **more)


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
        denoiser = opener.open(self.folder.part(self.recipe.denoiser))
        vae = opener.open(self._autoencoder(config))
        sizes = lambda name: dict(config.model.get(name, {}))
        self.model = denoiser.module(Output, **sizes("model"))
        self.vae = vae.module(Moments, **sizes(folders.AUTOENCODER))
        self.unit = self.vae.factor * self.model.unit  # of the sides of pictures
        self.size(*self.pixels, where="config.size" if config.size else "config.res")
        if self.vae.latent_channels != self.model.channels:
            raise errors.ConfigError(
                f"the autoencoder's latents have {self.vae.latent_channels} channels, the "
                f"denoiser's {self.model.channels}",
                where="config.load.vae",
                fix="load one that the denoiser was trained with",
            )
        self.space = autoencoders.latents(self.vae, self.pixels, folders.AUTOENCODER)
        for option in config.text:
            errors.check_known("option", option, ("dtype",), where="config.text")
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
        drawing = (
            Stage(("text",), self.read),
            Stage(("model",), self.begin),
            Stage(("model",), self.step, self.count),
            Stage((folders.AUTOENCODER,), self.show),
        )
        seen = Stage((folders.AUTOENCODER,), self.see)
        self.stages = {"sample": drawing, "img2img": (seen, *drawing)}

    def _autoencoder(self, config) -> str:
        """The source of the autoencoder: the scale of its latents is its own, not the folder's."""
        source = config.load.get(folders.AUTOENCODER)
        # Of a run, which holds none, `weights` tells.
        if not isinstance(source, str) or not source or weights.is_ours(source):
            return self.folder.part(folders.AUTOENCODER)
        return source

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
        found = autoencoders.moments(self.vae, nets, batch, folders.AUTOENCODER)
        return found | {key: batch[key] for key in ("origin",) if key in batch}

    def of_captions(self, nets, batch, dropped_B):
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
        # One image after another: all at once, they would need more memory than learning adapters.
        z0 = self.space.encode(nets, batch, keys[0], tiles.sliced)
        noise = randomness.normal_each(keys[1], z0.shape[1:])
        if self.options.offset:
            shared = randomness.normal_each(keys[2], (1, 1, z0.shape[-1]))
            noise += self.options.offset * shared
        t_B = self.path.draw(randomness.normal_each(keys[3], ()))
        draw_B = jax.vmap(jax.random.uniform)(keys[4])
        cond = self.of_captions(nets, batch, draw_B < self.options.text_dropout)
        cond = self.numbered(cond, self.pixels, self.options.guidance, batch.get("origin"))
        value_B = self.loss_at(nets, z0, cond, noise, t_B)
        return losses.weighted_mean(value_B, batch["weight"]), Aux()

    def loss_at_times(self, nets, batch, key) -> OfBatch:
        """The training loss of a batch at eight fixed times, without dropout.   -> (8,)"""
        keys = randomness.split_each(randomness.per_example(key, batch["index"]), 2)
        z0 = self.space.encode(nets, batch, keys[0], tiles.sliced)
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
        sliced: bool = False,
    ) -> Pictures:
        """Images for captions.   -> image_BHWC in [-1, 1]

        Args:
          guidance: scale of classifier-free guidance, 1 is none.
          steps: solver steps.
          sampler: one of `solvers.SOLVERS`; by default what the folder's scheduler says.
          width, height: in pixels; 0: those that the model was trained for.
          tile: side in pixels of the overlapping tiles that large images are decoded in, one after
            another; 0: all at once.
          sliced: the images are decoded one after another, on each device.
        """
        options = dict(steps=steps, sampler=sampler, tile=tile, sliced=sliced)
        options |= dict(guidance=guidance, width=width, height=height)
        return through(self.stages["sample"], nets, batch, key, **options)

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
        tile: Side = 0,
        sliced: bool = False,
    ) -> Pictures:
        """Images for captions that begin as given ones (SDEdit, arXiv:2108.01073).

        Args:
          strength: share of the steps that are done, from 0, which leaves the images, to 1.
          guidance, steps, sampler: as of `sample`.
          tile, sliced: as of `sample`, and images are encoded so, too.
        """
        options = dict(steps=steps, sampler=sampler, tile=tile, sliced=sliced)
        options |= dict(guidance=guidance, strength=strength)
        return through(self.stages["img2img"], nets, batch, key, **options)

    def see(self, nets, batch, key, *, tile, sliced, **options):
        """The stage that makes latents of images."""
        keys_B = randomness.per_example(key, batch["index"])
        by = self.by_parts(tile, sliced, factor=1, unit=self.vae.factor)
        z0 = self.space.of_images(nets, batch, keys_B, by)
        return {name: x for name, x in batch.items() if name != "image"} | {"latents": z0}

    def read(self, nets, batch, key, *, guidance, **options):
        """The stage that encodes captions, and what to be guided away from, beside each other."""
        if self.distilled and "negative_text" in batch:
            raise errors.ConfigError(
                "this model was trained to be guided by itself, and reads no negative prompt",
                where="negative_prompt",
                fix="leave it out",
            )
        size = self.size_of(batch, **options)
        cond = self.cond(nets, batch["text"], size, guidance)
        # A distilled model reads the scale, and one pass is enough.
        if not self.distilled and not guide.is_none(guidance):
            cond = jax.tree.map(guide.interleave, cond, self.null(nets, batch, cond, size))
        rest = {k: x for k, x in batch.items() if k in ("index", "noise", "latents")}
        return rest | {"cond": cond}

    def begin(self, nets, batch, key, *, strength=1.0, steps, sampler, **options):
        """The stage before the first step."""
        size = self.size_of(batch, **options)
        grid = self.grid(size, steps, sampler, strength)
        noise = self.noise(batch, randomness.per_example(key, batch["index"]), size)
        if "latents" not in batch:
            z = grid.start * noise
        elif len(grid.time_S):
            z = grid.alpha_S[0] * batch["latents"] + grid.sigma_S[0] * noise
        else:
            z = batch["latents"]
        # As in `flow`: what follows from the caption alone is computed once for all steps.
        prepared = self.model.apply(nets["model"], batch["cond"], method="prepare")
        state = solvers.SOLVERS[sampler or self.scheduler.name].start(z, grid)
        return {"index": batch["index"], "cond": batch["cond"], "text": prepared, "state": state}

    def count(self, batch, *, strength=1.0, steps, sampler, **options) -> int:
        """How often `step` runs."""
        return len(self.grid(self.size_of(batch), steps, sampler, strength).time_S)

    def step(self, nets, batch, key, *, n, strength=1.0, steps, sampler, guidance, **options):
        """The stage that takes noise off latents, once."""
        grid = self.grid(self.size_of(batch), steps, sampler, strength)
        keys_B = randomness.per_example(key, batch["index"])
        shape = batch["state"][0].shape

        def output(z, t_B):
            return self.model.apply(nets["model"], z, t_B, batch["cond"], batch["text"])

        if len(batch["cond"].seq_BLD) == shape[0]:  # nothing stands beside the captions
            guided = lambda z, t: output(z, jnp.full(len(z), t))
        else:
            guided = guide.cfg(output, None, guidance, guide.ALWAYS)
        # Number 0 is that of the encoded image's noise.
        step_keys = lambda n: randomness.fold_each(keys_B, n + 1)
        normal = lambda n: randomness.normal_each(step_keys(n), shape[1:])
        solver = solvers.SOLVERS[sampler or self.scheduler.name]
        state, x = solver.step(guided, batch["state"], n, grid.at(n), grid, normal)
        return {"state": state, "preview": x}

    def show(self, nets, batch, key, *, tile, sliced, **options):
        """The stage that makes images of latents."""
        by = self.by_parts(tile, sliced, factor=self.vae.factor)
        return jnp.clip(self.space.decode(nets, batch["state"][0], by), -1, 1)

    def size_of(self, batch, *, height: int = 0, width: int = 0, **options):
        """Height and width in pixels of a batch: of its latents, if it has any, or as asked."""
        z = batch["state"][0] if "state" in batch else batch.get("latents")
        if z is None:
            return self.size(height, width)
        return tuple(side * self.vae.factor for side in z.shape[1:3])

    def by_parts(self, tile: int, sliced: bool, **sides):
        """How the autoencoder is applied to images, or to latents.   -> (net, x_BHWC) -> BHWC

        sides: of `tiles.tiled`, but for the tile's.
        """
        places, rest = divmod(tile, self.vae.factor)
        if rest or places == 1:
            near = max(places, 2) * self.vae.factor
            raise errors.ConfigError(
                f"tile is {tile}, no multiple of {self.vae.factor} from {2 * self.vae.factor} on",
                where="--set tile",
                fix=f"use {near} or {near + self.vae.factor}, or 0 for none",
            )

        def apply(net, x_BHWC):
            one = (lambda x: tiles.tiled(net, x, tile=places, **sides)) if tile else net
            return tiles.sliced(one, x_BHWC) if sliced else one(x_BHWC)

        return apply

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
