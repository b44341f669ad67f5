"""The networks of a GAN that `config.model` describes, by net: "gen", "disc" and "eye"."""

from typing import NamedTuple

import flax.linen as nn
import jax

from t2i_jax import errors, fields, plugins, weights
from t2i_jax.models import backbone, gan, mlp, pyramid
from t2i_jax.models import clip as clip_models
from t2i_jax.models.types import Features
from t2i_jax.objectives import clip
from t2i_jax.pretrained import opener
from t2i_jax.sampling import prediction

FEATURES = "eye"  # the net of features, as saved files and configs call it
NETWORKS = {"convolutional": gan, "mlp": mlp}


def generator(config) -> nn.Module:
    """The module of net "gen": one of NETWORKS, or a flow network in one step if it says its
    `backbone`, and what that puts out, its `prediction`.
    """
    sizes, where = dict(config.model.get("gen", {})), "config.model.gen"
    if "backbone" not in sizes:
        return _built(_network(sizes, where).Generator, sizes, config.res, where)
    _check_res(sizes, where)
    kind = sizes.pop("prediction", "v")
    fields.checked(prediction.Kind, "prediction", kind, where=where)
    shape_HWC = (config.res, config.res, 3)
    flow = backbone.build(sizes, shape_HWC=shape_HWC, where=where)
    return gan.OneStep(flow, config.res, kind)


def discriminator(config, features) -> nn.Module:
    """The module of net "disc": one of NETWORKS, or heads on a feature network's maps."""
    sizes, where = dict(config.model.get("disc", {})), "config.model.disc"
    kind = gan.Projected if features else _network(sizes, where).Discriminator
    return _built(kind, sizes, config.res, where)


class FeatureNetwork(NamedTuple):
    """A frozen image network whose feature maps are read; it takes `res` pixels a side."""

    net: nn.Module
    res: int

    def init(self, key, image_BHWC):
        return self.net.init(key, self._resized(image_BHWC))

    def maps(self, variables, image_BHWC):
        return self.net.apply(variables, self._resized(image_BHWC)).maps

    def _resized(self, image_BHWC):
        if image_BHWC.shape[1] == self.res:
            return image_BHWC
        return jax.image.resize(image_BHWC, (len(image_BHWC), self.res, self.res, 3), "bilinear")


def features(config) -> FeatureNetwork | None:
    """The feature network: the image tower that the config describes, or the pretrained network
    whose weights it loads; None where it does neither.
    """
    where = f"config.model.{FEATURES}"
    if sizes := config.model.get(FEATURES):
        tower = clip.tower(sizes, res=config.res, where=where)
        return FeatureNetwork(clip_models.Image(tower), tower.res)
    source = config.load.get(FEATURES)
    if not source:
        return None
    if weights.is_ours(source):
        raise errors.ConfigError(
            f"{source} does not say what net it is",
            where=f"config.load.{FEATURES}",
            fix=f"describe it in {where}, as configs/shapes_gan.py:projected does",
        )
    net = opener.open(source).module(Features)
    return FeatureNetwork(net, net.res)


def by_net(model, load) -> dict:
    """`config.model` keyed by net.

    Older versions wrote sizes beside the nets', too: "gen" and "disc" take those that they have.
    """
    nets = {name: value for name, value in model.items() if hasattr(value, "items")}
    shared = {name: value for name, value in model.items() if name not in nets}
    name = shared.get("network", "convolutional")
    if not shared or name not in NETWORKS:
        return dict(model)
    kinds = {"gen": NETWORKS[name].Generator, "disc": NETWORKS[name].Discriminator}
    if "backbone" in nets.get("gen", {}):  # a flow network has all its sizes with it
        del kinds["gen"]
    if nets.get(FEATURES) or load.get(FEATURES):
        kinds["disc"] = gan.Projected
    for net, kind in kinds.items():
        known = {*kind.__dataclass_fields__, *(() if kind is gan.Projected else ("network",))}
        nets[net] = {k: v for k, v in shared.items() if k in known} | dict(nets.get(net, {}))
    # What no net has stays where it is: `plugins.check_nets` then names it, as a misspelt size.
    used = {size for net in kinds for size in nets[net]} | {"network"}
    return nets | {size: value for size, value in shared.items() if size not in used}


def _network(sizes, where: str):
    """The module of NETWORKS that sizes name by `network`, which is taken out of them."""
    name = sizes.pop("network", "convolutional")
    errors.check_known("network", name, NETWORKS, where=where)
    return NETWORKS[name]


def _built(kind, sizes, res: int, where: str) -> nn.Module:
    _check_res(sizes, where)
    known = kind.__dataclass_fields__
    if "least" in known:
        pyramid.check(res)
    options = {"res": res, **sizes} if "res" in known else sizes
    return plugins.network(kind, where=where, options=options)


def _check_res(sizes, where: str) -> None:
    if "res" in sizes:
        raise errors.ConfigError(
            "the networks' side is the pictures'", where=f"{where}.res", fix="set config.res"
        )
