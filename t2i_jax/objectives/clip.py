"""A dual encoder: pictures and captions that belong together lie near each other.

Symmetric cross-entropy over the global batch (CLIP, arXiv:2103.00020, figure 3), or one decision
for each pair (SigLIP, arXiv:2303.15343, algorithm 1). A family that draws nothing.

B batch · H W pixels · C channels · P embedding
"""

import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from t2i_jax import errors, fields, losses, plugins
from t2i_jax.models import clip, pyramid
from t2i_jax.models.types import Features
from t2i_jax.objective import Aux, Loss, Objective, together
from t2i_jax.pretrained import clip as pretrained_clip
from t2i_jax.pretrained import opener
from t2i_jax.text import conditioner

NETS = ("image", "caption")  # that config.model describes
LOSSES = ("contrastive", "sigmoid")
TOWERS = {"convolutional": clip.Convolutional, "vit": pretrained_clip.ClipImage}


class Options(NamedTuple):
    """config.loss.

    kind: "contrastive" or "sigmoid".
    train_text: the text encoder learns, too, from its own entry of config.optim.
    """

    kind: Annotated[str, fields.one_of(LOSSES)] = "contrastive"
    train_text: bool = False


def make(config) -> Objective:
    """Nets "image", "caption" and "text"; predictions image_emb, text_emb, encode, logits.

    `config.model`: `image` of the image tower: tower "convolutional" or "vit" and its sizes;
    `caption` of what reads the text encoder's states, False: its pooled vectors are the embeddings,
    as in Hugging Face's CLIP checkpoints, which config.load.image and .text read.
    """
    options = fields.build(Options, config.loss, where="config.loss")
    sigmoid, source = options.kind == "sigmoid", config.load.get("image")
    image, caption = towers(config.model, res=config.res, source=source, sigmoid=sigmoid)
    text = conditioner.Conditioner(config, train_text=options.train_text)

    def init(key, batch):
        key_image, key_caption, key_text = jax.random.split(key, 3)
        text_variables, cond = text.init(key_text, batch)
        image_BHWC = jnp.zeros(batch["image"].shape)
        nets = {"image": image.init(key_image, image_BHWC), "text": text_variables}
        if caption:
            nets["caption"] = caption.init(key_caption, cond)
        else:
            check_width(image, cond)
        return nets

    def image_emb(nets, batch, key):
        """Of pictures, of length 1.   -> BP"""
        return losses.unit(image.apply(nets["image"], batch["image"]).pooled_BD)

    def text_emb(nets, batch, key):
        """Of captions, of length 1.   -> BP"""
        cond = text.encode(nets, batch)
        found_BP = caption.apply(nets["caption"], cond) if caption else cond.pooled_BD
        return losses.unit(found_BP)

    @together
    def logits(nets, batch, key):
        """Of each picture with each caption.   -> BB"""
        scale, bias = image.apply(nets["image"], method="temper")
        return scale * image_emb(nets, batch, key) @ text_emb(nets, batch, key).T + bias

    def loss(nets, batch, key, step):
        scores_BB = logits(nets, batch, key)
        different_BB = losses.different_captions(batch["text"])
        fn = losses.info_nce if options.kind == "contrastive" else losses.pairwise
        scale, _ = image.apply(nets["image"], method="temper")
        return fn(scores_BB, different_BB, batch["weight"]), Aux({"scale": scale})

    trained = ("image", *(["caption"] if caption else []), *["text"] * options.train_text)
    predict = {"image_emb": image_emb, "text_emb": text_emb, "logits": logits}
    return Objective(init, (Loss(trained, loss, compares=True),), predict | {"encode": text.encode})


def towers(model, *, res: int, source=None, where="config.model", sigmoid: bool = False):
    """The image tower, and what reads the text encoder's states, or None.

    Args:
      model: `image` and `caption`, see `make`; without sizes the image tower is that of `source`, a
        pretrained checkpoint.
    """
    sizes = {"image": {}, "caption": {}, **model}
    plugins.check_nets(sizes, NETS, where=where)
    # SigLIP's start (arXiv:2303.15343): with so few positives, most pairs begin as negatives.
    learned = dict(scale=math.log(10), offset=-10.0) if sigmoid else {}
    if source and not sizes["image"]:
        net = opener.open(source).module(Features)
    else:
        net = tower(sizes["image"], res=res, where=f"{where}.image")
    if not getattr(net, "projected", 0):
        raise errors.ConfigError(
            "the image tower has no projection to where captions are",
            where="config.load.image",
            fix="load the image tower of a dual encoder, or describe one in config.model.image",
        )
    if net.res != res:
        raise errors.ConfigError(
            f"the image tower reads {net.res} pixels a side",
            where="config.res",
            fix=f"set it to {net.res}",
        )
    caption = None
    if sizes["caption"] is not False:
        own = {"projected": net.projected, **sizes["caption"]}
        caption = plugins.network(clip.Caption, where=f"{where}.caption", options=own)
        if caption.projected != net.projected:
            raise errors.ConfigError(
                f"captions become vectors of {caption.projected} numbers, pictures of "
                f"{net.projected}",
                where=f"{where}.caption.projected",
                fix=f"set it to {net.projected}, or leave it out",
            )
    return clip.Image(net, **learned), caption


def check_width(image, cond) -> None:
    """Without a caption tower the text encoder's pooled states are the embeddings."""
    texts, pictures = cond.pooled_BD.shape[-1], image.tower.projected
    if texts != pictures:
        raise errors.ConfigError(
            f"the text encoder's vectors have {texts} numbers, the pictures' {pictures}",
            where="config.load.text",
            fix="load the text tower of the same dual encoder, or describe a caption tower",
        )


def tower(sizes, *, res: int, where: str):
    """An image tower by its name, `tower`, and sizes."""
    own = {"res": res, **sizes}
    kind = own.pop("tower", "convolutional")
    errors.check_known("tower", kind, TOWERS, where=where)
    if kind == "convolutional":
        pyramid.check(res)
    return plugins.network(TOWERS[kind], where=where, options=own)
