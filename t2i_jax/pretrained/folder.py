"""A folder of diffusers: which networks a pipeline has, and how it reads captions.

`model_index.json` names the pipeline's class and its parts; each part is a folder that `opener`
reads. Pipelines: Stable Diffusion (arXiv:2112.10752), SDXL (2307.01952), PixArt-α (2310.00426) and
-Σ (2403.04692), Stable Diffusion 3 (2403.03206), FLUX.1.

B batch · L text length · D width
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import errors, fields
from t2i_jax.models.types import Cond, Tokens
from t2i_jax.pretrained import hf, opener
from t2i_jax.text import tokenize

AUTOENCODER = "vae"
# A pipeline of random weights in 200 kB, for tests and :debug configs; tests/folders.py wrote it.
TINY = pathlib.Path(__file__).parent.parent / "builtin" / "tiny-pipeline"


class Encoder(NamedTuple):
    """One text encoder of a pipeline.

    part: its folder.
    length: tokens that it reads.
    options: of its `from_config`.
    masked: whether padding is hidden from it, and from the denoiser.
    optional: whether a pipeline may lack it.
    lowered: whether captions are read in lower case.
    """

    part: str
    length: int = 77
    options: Mapping = {}
    masked: bool = False
    optional: bool = False
    lowered: bool = False


class Recipe(NamedTuple):
    """How a class of pipelines draws.

    encoders: its text encoders.
    join: (the encoders' `Cond`s, None for a missing one; width of the denoiser's text) -> `Cond`.
    denoiser: the denoiser's folder.
    numbers: what further numbers the denoiser reads: "" for none, "sizes" of SDXL, "aspect" of
      PixArt-α, "guidance" of FLUX.1.
    guidance, steps: the pipeline's defaults.
    evenly: solver steps begin on an even grid, whatever the scheduler's own.
    """

    encoders: tuple[Encoder, ...]
    join: Callable
    denoiser: str = "transformer"
    numbers: str = ""
    guidance: float = 7.5
    steps: int = 50
    evenly: bool = False


def _only(conds, width) -> Cond:
    """The states of the one encoder."""
    return conds[0]


def _channels(conds, width) -> Cond:
    """SDXL (section 2.2): the states of both side by side, the second encoder's pooled vector."""
    seq_BLD = jnp.concatenate([c.seq_BLD for c in conds], axis=-1)
    return Cond(seq_BLD, conds[0].mask_BL, conds[1].pooled_BD)


def _three(conds, width) -> Cond:
    """SD 3 (section 4): two CLIP towers side by side, zeros up to the denoiser's width, then T5's
    tokens, which are zeros where the pipeline has no T5.
    """
    *towers, t5 = conds
    pair_BLD = jnp.concatenate([c.seq_BLD for c in towers], axis=-1)
    missing = width - pair_BLD.shape[-1]
    pair_BLD = jnp.pad(pair_BLD, ((0, 0), (0, 0), (0, missing)))
    if t5 is None:
        t5_BLD = jnp.zeros((len(pair_BLD), SD3_TOKENS, width), pair_BLD.dtype)
    else:
        t5_BLD = t5.seq_BLD.astype(pair_BLD.dtype)
    seq_BLD = jnp.concatenate([pair_BLD, t5_BLD], axis=1)
    pooled_BD = jnp.concatenate([c.pooled_BD for c in towers], axis=-1)
    # The denoiser learned with padding in sight.
    return Cond(seq_BLD, jnp.ones(seq_BLD.shape[:2], bool), pooled_BD)


def _last(conds, width) -> Cond:
    """FLUX.1: T5's tokens, and CLIP's pooled vector."""
    clip, t5 = conds
    return t5._replace(pooled_BD=clip.pooled_BD)


SD3_TOKENS = 256
FLUX_SIDE = 128  # of FLUX.1's latents, which its config does not say
_CLIP, _PENULTIMATE = Encoder("text_encoder"), {"skip": 1}
RECIPES = {  # `_class_name` of model_index.json -> how it draws
    "StableDiffusionPipeline": Recipe((_CLIP,), _only, "unet"),
    "StableDiffusionXLPipeline": Recipe(
        (
            _CLIP._replace(options=_PENULTIMATE),
            Encoder("text_encoder_2", options=_PENULTIMATE),
        ),
        _channels,
        "unet",
        numbers="sizes",
        guidance=5.0,
    ),
    "PixArtAlphaPipeline": Recipe(
        (Encoder("text_encoder", 120, masked=True, lowered=True),),
        _only,
        numbers="aspect",
        guidance=4.5,
        steps=20,
    ),
    "PixArtSigmaPipeline": Recipe(
        (Encoder("text_encoder", 300, masked=True, lowered=True),), _only, guidance=4.5, steps=20
    ),
    "StableDiffusion3Pipeline": Recipe(
        (
            _CLIP._replace(options=_PENULTIMATE),
            Encoder("text_encoder_2", options=_PENULTIMATE),
            Encoder("text_encoder_3", SD3_TOKENS, optional=True),
        ),
        _three,
        guidance=7.0,
        steps=28,
    ),
    "FluxPipeline": Recipe(
        (_CLIP, Encoder("text_encoder_2", 512)),
        _last,
        numbers="guidance",
        guidance=3.5,
        steps=28,
        evenly=True,
    ),
}


class Folder(NamedTuple):
    """An opened pipeline.

    source: its name, as `hf.locate` reads it.
    index: of its model_index.json.
    scheduler: of its scheduler_config.json.
    """

    source: str
    index: dict
    scheduler: dict

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.index["_class_name"]]

    def has(self, part: str) -> bool:
        """Whether the pipeline has a network in this folder."""
        # A part that a pipeline lacks is written as [null, null].
        kind = self.index.get(part)
        return isinstance(kind, list) and bool(kind) and all(kind)

    @property
    def empty_is_zeros(self) -> bool:
        """Whether an example without a negative prompt is guided away from zeros."""
        default = self.index["_class_name"] == "StableDiffusionXLPipeline"
        return bool(self.index.get("force_zeros_for_empty_prompt", default))

    def part(self, name: str) -> str:
        """The source of one of its networks."""
        return f"{self.source}#{name}"

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        """The text encoders that it has."""
        return tuple(e for e in self.recipe.encoders if self.has(e.part) or not e.optional)

    def sources(self) -> dict:
        """net -> where its weights lie, for `config.load`."""
        texts = tuple(self.part(encoder.part) for encoder in self.encoders)
        return {
            "model": self.part(self.recipe.denoiser),
            "text": texts[0] if len(texts) == 1 else texts,
            AUTOENCODER: self.part(AUTOENCODER),
        }

    def by_part(self, nets: Mapping) -> dict:
        """net "model" or "text" -> a tree of its parameters, as part -> the same."""
        trees, several = {}, len(self.encoders) > 1
        if "model" in nets:
            trees[self.recipe.denoiser] = nets["model"]
        for i, encoder in enumerate(self.encoders if "text" in nets else ()):
            own = nets["text"].get(f"encoders_{i}") if several else nets["text"]
            if own is not None:
                trees[encoder.part] = own
        return trees

    def by_net(self, trees: Mapping) -> dict:
        """The inverse of `by_part`."""
        nets = {"model": trees[self.recipe.denoiser]} if self.recipe.denoiser in trees else {}
        texts = {
            f"encoders_{i}": trees[e.part] for i, e in enumerate(self.encoders) if e.part in trees
        }
        if texts:
            nets["text"] = texts if len(self.encoders) > 1 else texts["encoders_0"]
        return nets


def is_pipeline(source) -> bool:
    """Whether a source is a folder with a model_index.json, or a repository of the hub."""
    if not isinstance(source, str):
        return False
    if source.startswith("hf:"):
        return "#" not in source
    return (pathlib.Path(source).expanduser() / hf.PIPELINE).is_file()


def open(source: str) -> Folder:
    """The pipeline at a local folder or `hf:org/name[@revision]`.

    Raises:
      ConfigError: a pipeline of a class that RECIPES lacks.
      DataError: files are missing or unreadable.
    """
    path = hf.locate_pipeline(source)
    index = hf.read_json(path / hf.PIPELINE)
    kind = str(index.get("_class_name"))  # JSON may have a list there
    errors.check_known("pipeline", kind, RECIPES, where=str(path / hf.PIPELINE))
    scheduler = path / hf.SCHEDULER / "scheduler_config.json"
    folder = Folder(source, index, hf.read_json(scheduler))
    wanted = [folder.recipe.denoiser, AUTOENCODER]
    wanted += [encoder.part for encoder in folder.recipe.encoders if not encoder.optional]
    for part in wanted:
        if not folder.has(part):
            raise errors.DataError(
                f"a {kind} needs a part {part!r}, and it has "
                f"{', '.join(name for name in index if folder.has(name))}",
                where=str(path / hf.PIPELINE),
                fix="copy the folder whole",
            )
    return folder


def described(source: str) -> dict:
    """The config of a model that is a pipeline, as plain values: those of an untrained run that
    loads all nets from there.

    Raises: as `open`.
    """
    folder = open(source)
    # Whether weights are there too, is told where they are read.
    with hf.configs_alone():
        denoiser = opener.open(folder.part(folder.recipe.denoiser)).config
        vae = opener.open(folder.part(AUTOENCODER)).config
    factor = 2 ** (len(vae.get("block_out_channels", ())) - 1)
    side = denoiser.get("sample_size") or FLUX_SIDE
    sides = {*side} if isinstance(side, list) else {side}
    if len(sides) > 1 or not all(type(one) is int and one > 0 for one in sides):
        raise errors.ConfigError(
            f"sample_size {side!r} of the denoiser is no side of a square",
            where=folder.part(folder.recipe.denoiser),
            fix="write one number into its config.json, and ask for other sizes when drawing",
        )
    (side,) = sides
    # FLUX.1-schnell needs four steps and no guidance.
    schnell = folder.recipe.numbers == "guidance" and not denoiser.get("guidance_embeds")
    return {
        **{"objective": "latent", "res": factor * side, "seed": 0, "batch_size": 4},
        "text_length": max(encoder.length for encoder in folder.recipe.encoders),
        **{"load": folder.sources(), "model": {}, "loss": {}, "optim": {}, "ema": {}},
        **{"evaluators": {}, "augment": (), "cache": "", "prompts": (), "allow_random": False},
        "sample": {
            "guidance": 1.0 if schnell else folder.recipe.guidance,
            "steps": 4 if schnell else folder.recipe.steps,
        },
    }


def unknown(source: str) -> dict:
    """What `described` would say of a pipeline that cannot be opened yet."""
    folder = Folder(source, {"_class_name": "StableDiffusionPipeline"}, {})
    return dict(objective="latent", text_length=77, res=512, load=folder.sources(), sample={})


class Captions:
    """The text encoders of a pipeline, as the net "text": captions' tokens -> `Cond`.

    Args:
      width: of the denoiser's text.
      dtype: what the encoders compute in.
      length: tokens at most that an encoder reads of a caption; 0: as many as the pipeline.
    """

    def __init__(self, folder: Folder, *, width: int = 0, dtype: str = "float32", length: int = 0):
        self.folder, self._width = folder, width
        checkpoints = [opener.open(folder.part(e.part)) for e in folder.encoders]
        fields.checked(fields.Dtype, "dtype", dtype, where="config.text")
        self.modules = [
            checkpoint.module(Cond, dtype=dtype, **e.options)
            for checkpoint, e in zip(checkpoints, folder.encoders, strict=True)
        ]
        lengths = [min(e.length, length) if length else e.length for e in folder.encoders]
        self.tokenizers = {}
        for e, c, n in zip(folder.encoders, checkpoints, lengths, strict=True):
            tokenizer = tokenize.open(str(c.folder), n)
            self.tokenizers[e.part] = tokenizer.lowered() if e.lowered else tokenizer

    def init(self, key, tokens):
        """Variables of all encoders. Several lie side by side, as `opener.load` makes them."""
        keys = jax.random.split(key, len(self.modules))
        made = [
            module.init(key, *self._read(tokens, encoder))
            for module, key, encoder in zip(self.modules, keys, self.folder.encoders, strict=True)
        ]
        if len(made) == 1:
            return made[0]
        return {"params": {f"encoders_{i}": v["params"] for i, v in enumerate(made)}}

    def __call__(self, variables, tokens) -> Cond:
        """The condition of captions, by `tokens`: part -> Tokens. An empty caption is encoded as
        such: what these pipelines are guided away from is no null token, but the empty text.
        """
        conds = {}
        for i, (module, encoder) in enumerate(zip(self.modules, self.folder.encoders, strict=True)):
            own = variables
            if len(self.modules) > 1:
                own = {kind: tree.get(f"encoders_{i}", {}) for kind, tree in variables.items()}
            conds[encoder.part] = module.apply(own, *self._read(tokens, encoder))
        return self.folder.recipe.join(
            [conds.get(e.part) for e in self.folder.recipe.encoders], self._width
        )

    def _read(self, tokens, encoder: Encoder) -> Tokens:
        """An encoder's tokens as its pipeline reads them."""
        (ids_BL, mask_BL), tokenizer = tokens[encoder.part], self.tokenizers[encoder.part]
        # Tokenizers here leave an empty caption without tokens. These encoders know it by its
        # special ones.
        special, none_B1 = tokenizer.special, ~mask_BL.any(1, keepdims=True)
        empty_L = np.full(ids_BL.shape[1], tokenizer.pad, np.int32)
        empty_L[: len(special)] = special
        ids_BL = jnp.where(none_B1, empty_L, ids_BL)
        real_BL = mask_BL | (none_B1 & (np.arange(len(empty_L)) < len(special)))
        return Tokens(ids_BL, real_BL if encoder.masked else jnp.ones_like(mask_BL))


def numbers(recipe: Recipe, size, *, guidance=None, original=None, corner=(0, 0)):
    """The further numbers of one example's condition, or None: K numbers, or arrays of them.

    Args:
      size: height and width of the picture in pixels.
      guidance: the scale that FLUX.1 reads.
      original: height and width before it was scaled and cropped, by default `size`.
      corner: top and left of the crop.
    """
    if recipe.numbers == "sizes":
        return (*(size if original is None else original), *corner, *size)
    if recipe.numbers == "aspect":
        return (*size, size[0] / size[1])
    return (guidance,) if recipe.numbers == "guidance" else None
