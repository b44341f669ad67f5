"""Low-rank adapters for any net of any family (LoRA, Hu et al. 2021, arXiv:2106.09685).

The family reads W + (alpha/rank)·A·B in place of a kernel W of an adapted net (equation 3). W stays
as it is. A and B are the parameters of a net of their own, called `<net>_lora`. Kernels are (in,
out). Stacked kernels of scanned layers (depth, in, out) have an A and a B for each layer. Of a
convolution (height, width, in, out) all axes but the last count as "in".
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import meta

from t2i_jax import errors, fields, sharding

SUFFIX = "_lora"


class Options(NamedTuple):
    """config.lora.<net>.

    rank: the rank of A·B.
    alpha: the product is scaled by alpha/rank. 0 means a scale of 1.
    match: a regular expression; kernels whose path contains a match are adapted.
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
            nets[adapter(name)] = {"params": _init(key_net, nets[name]["params"], option, name)}
        return nets

    merged = functools.partial(merge_nets, options=options)
    losses = [_adapted(loss, merged, options) for loss in family.losses]
    frozen = tuple(adapter(name) for name in options if name not in family.trained)
    losses[-1] = losses[-1]._replace(nets=(*losses[-1].nets, *frozen))
    predict = {name: _with(fn, merged) for name, fn in family.predict.items()}
    unread = tuple(name for name in family.training_only if name not in options)
    return family._replace(init=init, losses=tuple(losses), predict=predict, training_only=unread)


def merge_nets(nets, options):
    """The nets of the family, with the adapters merged into theirs.

    An adapted net is left out where its adapter is missing, never used without it.
    """
    whole = {name: net for name, net in nets.items() if name.removesuffix(SUFFIX) not in options}
    for name, option in options.items():
        if name + SUFFIX in nets:
            params = merge(nets[name]["params"], nets[name + SUFFIX]["params"], option)
            whole[name] = {**nets[name], "params": params}
    return whole


def merge_run(nets, config):
    """A run's nets with merged adapters, and its config without config.lora."""
    plain = config.copy_and_resolve_references()
    plain.lora = {}
    return merge_nets(nets, _options(config.lora)), plain


def merge(params, adapter, option: Options):
    """A net's parameters with its adapter's products added.

    A kernel that is split over devices stays split until a module reads it.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    pairs = traverse_util.flatten_dict(meta.unbox(adapter), sep="/")
    scale = (option.alpha or option.rank) / option.rank
    for path in sorted({path.rpartition("/")[0] for path in pairs}):
        # One more product (in × rank × out) for each kernel and step, and no family has to know of
        # adapters (ADR 9).
        change = scale * jnp.matmul(pairs[f"{path}/a"], pairs[f"{path}/b"])
        flat[path] = sharding.add(flat[path], change)
    return traverse_util.unflatten_dict(flat, sep="/")


def _init(key, params, option: Options, name: str):
    """A normal with variance 1/in and B zero, so that the adapted net starts as the plain one."""
    factors = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        if not (path.endswith("kernel") and leaf.ndim >= 2 and re.search(option.match, path)):
            continue
        # Three axes are a stack of dense kernels, one for each layer of a scan.
        lead = leaf.shape[:1] if leaf.ndim == 3 else ()
        inputs, outputs = math.prod(leaf.shape[len(lead) : -1]), leaf.shape[-1]
        shape = (*lead, inputs, option.rank)
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


def _adapted(loss, merged, options):
    nets = tuple(name + SUFFIX if name in options else name for name in loss.nets)
    return loss._replace(nets=nets, fn=_with(loss.fn, merged))


def _with(fn, merged):
    """The loss or prediction `fn`, called with merged nets."""

    @functools.wraps(fn)  # its signature names the options of a prediction
    def on_merged(nets, *args, **options):
        return fn(merged(nets), *args, **options)

    return on_merged
