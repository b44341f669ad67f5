"""Low-rank adapters for any net of any family (LoRA, Hu et al. 2021, arXiv:2106.09685).

A dense layer or convolution of an adapted net gives W·x + (alpha/rank)·B·(A·x) in place of W·x
(equation 3). W stays as it is, and no product of its size is ever made but for export. A and B are
the parameters of a net of their own, called `<net>_lora`. Kernels are (in, out). Stacked kernels of
scanned layers (depth, in, out) have an A and a B for each layer. Of a convolution (height, width,
in, out) all axes but the last count as "in".
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from t2i_jax import errors, fields

SUFFIX = "_lora"
COLLECTION = "lora"  # of an adapted net's variables: A and B where its kernels are
LAYERS = (nn.Dense, nn.Conv)


class Options(NamedTuple):
    """config.lora.<net>.

    rank: the rank of A·B.
    alpha: the product is scaled by alpha/rank. 0 means a scale of 1.
    match: a regular expression; kernels of dense layers and convolutions whose path contains a
      match are adapted.
    """

    rank: fields.Size = 8
    alpha: fields.Weight = 0.0
    match: Annotated[str, fields.pattern()] = ""


def wrap(family, spec):
    """The objective with adapters. The nets in `spec` are frozen, and their adapters are trained.

    The losses that train a net train its adapter instead. The adapter of a frozen net is trained by
    the last loss, which in a GAN is the generator's.

    Args:
      spec: config.lora, net -> `Options`.
    Raises:
      ConfigError: an unknown net or option, or a net without a kernel to adapt.
    """
    options = _options(spec)
    adapter = lambda name: name + SUFFIX

    def init(key, batch):
        key_family, key_adapters = jax.random.split(key)
        # Parameters alone do not tell a layer that can be adapted from another, but its call does.
        seen = set()
        with nn.intercept_methods(functools.partial(_noted, seen)):
            nets = dict(family.init(key_family, batch))
        for i, (name, option) in enumerate(options.items()):
            errors.check_known("net", name, nets, where="config.lora")
            if more := sorted(set(nets[name]) - {"params"}):
                raise errors.ConfigError(
                    f"net {name!r} has {more} beside its parameters",
                    where=f"config.lora.{name}",
                    fix="adapt a net without such collections",
                )
            key_net = jax.random.fold_in(key_adapters, i)
            params = _init(key_net, nets[name]["params"], option, name, seen)
            nets[adapter(name)] = {"params": params}
        return nets

    losses = [_adapted(loss, spec) for loss in family.losses]
    frozen = tuple(adapter(name) for name in options if name not in family.trained)
    losses[-1] = losses[-1]._replace(nets=(*losses[-1].nets, *frozen))
    predict = {name: _with(fn, spec) for name, fn in family.predict.items()}
    stages = {
        name: tuple(stage._replace(fn=_with(stage.fn, spec)) for stage in each)
        for name, each in family.stages.items()
    }
    unread = tuple(name for name in family.training_only if name not in options)
    changed = dict(losses=tuple(losses), predict=predict, training_only=unread, stages=stages)
    return family._replace(init=init, **changed)


def merge_run(nets, config):
    """A run's nets with merged adapters, and its config without config.lora."""
    options = _options(config.lora)
    whole = {name: net for name, net in nets.items() if name.removesuffix(SUFFIX) not in options}
    for name, option in options.items():
        # Of kernels in eight bits that is what the adapters learned beside.
        params = merge(meta.unbox(nets[name]["params"]), nets[name + SUFFIX]["params"], option)
        whole[name] = {**nets[name], "params": params}
    plain = config.copy_and_resolve_references()
    plain.lora = {}
    return whole, plain


def merge(params, adapter, option: Options):
    """A net's parameters with its adapter's products added."""
    flat = traverse_util.flatten_dict(params, sep="/")
    pairs = traverse_util.flatten_dict(adapter, sep="/")
    for path in sorted({path.rpartition("/")[0] for path in pairs}):
        change = scale(option) * jnp.matmul(pairs[f"{path}/a"], pairs[f"{path}/b"])
        # In float32: what is less than half a step of bfloat16 would be lost in a frozen kernel.
        kernel = jnp.asarray(flat[path], jnp.float32)
        flat[path] = kernel + change.reshape(kernel.shape)
    return traverse_util.unflatten_dict(flat, sep="/")


def scale(option: Options) -> float:
    """What the product of A and B is multiplied by."""
    return (option.alpha or option.rank) / option.rank


def scaled(adapters, spec):
    """Adapters by the net that they adapt, each B times its scale: what A·B adds as it is."""

    def one(adapter, scale):
        # A split parameter lies in a box, whose field stands behind the last key.
        is_b = lambda path: [k.key for k in path if hasattr(k, "key")][-1] == "b"
        by_scale = lambda path, x: x * scale if is_b(path) else x
        return jax.tree_util.tree_map_with_path(by_scale, adapter)

    options = _options(spec)
    return {n: one(adapters[n], scale(options[n])) for n in options if n in adapters}


def beside(nets, spec):
    """The nets of the family, adapted ones with A and scaled B in a collection of their own.

    An adapted net is left out where its adapter is missing, never used without it.
    """
    whole = {name: net for name, net in nets.items() if name.removesuffix(SUFFIX) not in spec}
    own = {n: nets[n + SUFFIX]["params"] for n in spec if n + SUFFIX in nets}
    return whole | {n: {**nets[n], COLLECTION: pair} for n, pair in scaled(own, spec).items()}


def _adapts(layer, args, kwargs, context):
    """A layer's output with that of its adapter, if the net's variables have one for it."""
    out, module = layer(*args, **kwargs), context.module
    if not _is_layer(context) or not module.has_variable(COLLECTION, "kernel"):
        return out
    # `get_variable` does not open the boxes of split arrays, as Linen does for parameters.
    pair, (x,) = meta.unbox(module.get_variable(COLLECTION, "kernel")), args
    a, b = pair["a"], pair["b"]
    if isinstance(module, nn.Conv):  # A is a convolution to `rank` channels, B one of 1 × 1
        kernel = a.reshape(*module.kernel_size, -1, a.shape[-1])
        # The clone keeps strides, padding and type. Without parent it is no part of the net. It has
        # no adapter, so it passes through `_adapts` unchanged.
        side = module.clone(features=a.shape[-1], use_bias=False, parent=None, name=None)
        x = side.apply({"params": {"kernel": kernel}}, x)
    else:
        x = x.astype(out.dtype) @ a.astype(out.dtype)
    return out + x @ b.astype(out.dtype)


def _noted(seen: set, layer, args, kwargs, context):
    """Notes the paths of layers that can be adapted."""
    if _is_layer(context):
        seen.add("/".join(context.module.path))
    return layer(*args, **kwargs)


def _is_layer(context) -> bool:
    return isinstance(context.module, LAYERS) and context.method_name == "__call__"


def _init(key, params, option: Options, name: str, seen):
    """A normal with variance 1/in and B zero, so that the adapted net starts as the plain one.

    seen: the paths of layers that can be adapted.
    """
    factors = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        layer, _, kind = path.rpartition("/")
        # A pipeline applies each of its encoders alone, so that paths lack the encoder's number.
        layer = re.sub(r"^encoders_\d+/", "", layer) if layer not in seen else layer
        if kind != "kernel" or layer not in seen or not re.search(option.match, path):
            continue
        # Three axes are a stack of dense kernels, one for each layer of a scan.
        lead = leaf.shape[:1] if leaf.ndim == 3 else ()
        inputs, outputs = math.prod(leaf.shape[len(lead) : -1]), leaf.shape[-1]
        shape = (*lead, inputs, option.rank)
        # The number of factors grows with each layer, so no key comes twice.
        draw = jax.random.normal(jax.random.fold_in(key, len(factors)), shape)
        factors[f"{path}/a"] = draw / math.sqrt(inputs)
        factors[f"{path}/b"] = jnp.zeros((*lead, option.rank, outputs))
    if not factors:
        raise errors.ConfigError(
            f"no kernel of {name!r} matches {option.match!r}",
            where=f"config.lora.{name}.match",
            fix="leave it out to adapt all",
        )
    return traverse_util.unflatten_dict(factors, sep="/")


def _options(spec) -> dict[str, Options]:
    """config.lora, checked: net -> its options."""
    each = {name: fields.checked(Mapping, name, spec[name], where="config.lora") for name in spec}
    return {
        name: fields.build(Options, own, where=f"config.lora.{name}") for name, own in each.items()
    }


def _adapted(loss, options):
    nets = tuple(name + SUFFIX if name in options else name for name in loss.nets)
    return loss._replace(nets=nets, fn=_with(loss.fn, options))


def _with(fn, spec):
    """The loss or prediction `fn`, called with adapted nets."""

    @functools.wraps(fn)  # its signature names the options of a prediction
    def on_adapted(nets, *args, **options):
        with nn.intercept_methods(_adapts):
            return fn(beside(nets, spec), *args, **options)

    return on_adapted
