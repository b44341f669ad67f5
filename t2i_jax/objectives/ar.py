"""Autoregression: a picture is written code by code, row by row, as a language model writes.

The codes are a frozen autoencoder's (VQGAN, arXiv:2012.09841). A caption is attended to across, as
in DALL-E mini; or caption and codes are one row of tokens of one language model (DALL-E,
arXiv:2102.12092). Captions are dropped for guidance, which mixes logits.

B batch · R rows of a network, 1 or 2 of each example · h w codes of a picture · N = h·w of them
L caption tokens · K kinds of codes · V kinds of words
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from t2i_jax import errors, fields, losses, plugins, randomness
from t2i_jax.models import blocks
from t2i_jax.models import codes as networks
from t2i_jax.models.types import Tokens
from t2i_jax.objective import Aux, Loss, Objective, OfBatch, Pictures
from t2i_jax.objectives.parts import codes
from t2i_jax.pretrained import gpt2, text_encoder
from t2i_jax.sampling import guidance as guide
from t2i_jax.sampling import tokens
from t2i_jax.text import condition, conditioner

NETS = ("model", codes.NET)  # that config.model describes
JOINT_NETS = ("model", "text", codes.NET)
PAIR = fields.Rule(lambda v: len(v) in (0, 2), ", none or two", whole=True)


class Options(NamedTuple):
    """config.loss.

    text_dropout: share of captions replaced by the null condition.
    joint: w_text and w_image of L = w_text·CE_text + w_image·CE_image, such as (0.5, 0.5). Caption
      and codes are then one row of tokens of a language model, net "text", which learns to write
      both. Empty: captions are attended to across, and the loss is CE_image.
    """

    text_dropout: fields.Share = 0.1
    joint: Annotated[tuple[float, ...], fields.at_least(0), PAIR] = ()


def make(config) -> Objective:
    """Nets "model", "text" and the frozen "autoencoder"; predictions sample, complete, codes,
    loss_by_row, and without `joint` encode.

    `config.model.autoencoder` describes the tokenizer as `parts.autoencoders` says.
    `config.model.model`: sizes of `models.codes.Network`. With `joint` it has none, and
    `config.model.text` holds those of `pretrained.gpt2.Gpt2`, unless config.load.text names a GPT-2
    checkpoint, with which its layers begin.
    """
    family = Autoregressive(config)
    form = family.form
    predict = {"sample": family.sample, "complete": family.complete, "codes": family.codes}
    predict |= {"loss_by_row": family.loss_by_row, **form.predict}
    cached = {name: kept for name, kept in codes.CACHED.items() if name in predict}
    return Objective(family.init, (Loss(form.trained, family.loss),), predict, cached=cached)


class Across:
    """Codes that attend to the states of a caption, which net "text" makes, frozen.

    weights: of the parts of the loss, by name.
    """

    trained, weights = ("model",), {"image": 1.0}

    def __init__(self, config, options: Options, num_codes: int, sides):
        plugins.check_nets(config.model, NETS)
        self.net = codes.network(config, num_codes, sides, causal=True)
        self.text = conditioner.Conditioner(config, text_dropout=options.text_dropout)
        self.predict = {"encode": self.text.encode}

    def init(self, keys, batch, read_BN):
        text_variables, cond = self.text.init(keys[1], batch)
        return {"model": self.net.init(keys[0], read_BN, cond), "text": text_variables}

    def logits(self, nets, batch, read_BN, keys_B=None):
        """Logits of all codes, and further parts of the loss.   -> BNK, name -> B

        Args:
          read_BN: the code before each.
          keys_B: by which captions are dropped; None drops none.
        """
        cond = self.text.encode(nets, batch)
        cond = cond if keys_B is None else self.text.drop(cond, batch, keys_B)
        return self.net.apply(nets["model"], read_BN, cond), {}

    def begin(self, nets, batch, guided: bool):
        """What there is before the first code.   -> cache, extend

        extend: (code_RT, place, cache) -> logits_RTK of the codes from `place` on, and the cache.
        """
        cond = self.text.encode(nets, batch)
        if guided:
            null = self.text.negative(nets, batch)
            if null is None:
                # Training drops captions to the same null condition.
                null = condition.drop(cond, jnp.ones(len(cond.mask_BL), bool))
            cond = jax.tree.map(guide.interleave, cond, null)
        prepared = self.net.apply(nets["model"], cond, method="prepare")

        def extend(code_RT, place, cache):
            return self.net.apply(nets["model"], code_RT, place, prepared, cache, method="extend")

        return blocks.empty_cache(self.net, len(cond.mask_BL), 0), extend


class Joint:
    """Captions and codes as one row of tokens of a language model, net "text".

    Its words' embeddings are its own. Those of codes are net "model", as are their logits.
    """

    trained, predict = ("model", "text"), {}

    def __init__(self, config, options: Options, num_codes: int, sides):
        plugins.check_nets(config.model, JOINT_NETS)
        self.weights = dict(zip(("text", "image"), options.joint, strict=True))
        self.dropout = options.text_dropout
        self.speaker = speaker(config)
        given = num_codes, sides, self.speaker.width, self.speaker.dtype
        if config.model.get("model"):
            raise errors.ConfigError(
                "codes have the width of the language model",
                where="config.model.model",
                fix="describe that in config.model.text, or load one",
            )
        self.net = networks.Codes(*given)

    def init(self, keys, batch, read_BN):
        text = self.speaker.init(keys[1], *batch["text"])
        return {"model": self.net.init(keys[0], read_BN), "text": text}

    def logits(self, nets, batch, read_BN, keys_B=None):
        """As of `Across`, with the mean cross-entropy of a caption's words as "text"."""
        text = batch["text"]
        if keys_B is not None:
            kept_B = jax.vmap(jax.random.uniform)(keys_B) >= self.dropout
            text = text._replace(mask_BL=text.mask_BL & kept_B[:, None])
        said_BLD = self._embed(nets, text)
        drawn_BND = self.net.apply(nets["model"], read_BN, method="embed")
        row_BSD = jnp.concatenate([said_BLD, drawn_BND], 1)
        mask_BS = jnp.pad(text.mask_BL, ((0, 0), (0, read_BN.shape[1])), constant_values=True)
        h_BSD, _ = self.speaker.apply(nets["text"], row_BSD, mask_BS, method="through")
        h_BLD, h_BND = jnp.split(h_BSD, [said_BLD.shape[1]], 1)
        logits_BNK = self.net.apply(nets["model"], h_BND, method="logits")
        return logits_BNK, {"text": self._said(nets, h_BLD, text)}

    def begin(self, nets, batch, guided: bool):
        """As of `Across`. The caption is read here, so that all codes have the same places."""
        text = batch["text"]
        if guided:
            null = batch.get("negative_text", Tokens(text.ids_BL, jnp.zeros_like(text.mask_BL)))
            text = jax.tree.map(guide.interleave, text, null)
        rows, length = text.ids_BL.shape

        def through(x_RTD, place, cache):
            mask_RS = blocks.all_places(cache).at[:, :length].set(text.mask_BL)
            given = x_RTD, mask_RS, cache, place
            return self.speaker.apply(nets["text"], *given, method="through")

        def extend(code_RT, place, cache):
            x_RTD = self.net.apply(nets["model"], code_RT, place, method="embed")
            h_RTD, cache = through(x_RTD, length + place, cache)
            return self.net.apply(nets["model"], h_RTD, method="logits"), cache

        empty = blocks.empty_cache(self.speaker, rows, length)
        return through(self._embed(nets, text), 0, empty)[1], extend

    def _embed(self, nets, text):
        place_L = blocks.positions(text.ids_BL, self.speaker.max_length)
        return self.speaker.apply(nets["text"], text.ids_BL, place_L, method="embed")

    def _said(self, nets, h_BLD, text):
        """The mean cross-entropy of each word after another.   -> B, 0 where there is none"""
        logits_BLV = self.speaker.apply(nets["text"], h_BLD[:, :-1], method="speak")
        value_BL = losses.cross_entropy(logits_BLV, text.ids_BL[:, 1:])
        counted_BL = text.mask_BL[:, 1:]
        return (value_BL * counted_BL).sum(1) / jnp.maximum(counted_BL.sum(1), 1)


def speaker(config) -> gpt2.Gpt2:
    """The language model that reads captions: of a checkpoint, or as config.model.text describes.

    Raises:
      ConfigError: config.load.text is no GPT-2 with a head, or both describe one.
    """
    source, sizes = config.load.get("text"), dict(config.model.get("text", {}))
    if not source:
        vocab = text_encoder.tokenizer(None, config.text_length).vocab_size
        known = dict(vocab=vocab, max_length=config.text_length, **config.text)
        known["mlp_width"] = 4 * sizes.get("width", gpt2.Gpt2.width)
        return plugins.network(gpt2.Gpt2, where="config.model.text", options=known | sizes)
    net = text_encoder.make(source, **config.text)
    if sizes or not isinstance(net, gpt2.Gpt2) or net.logits == "none":
        raise errors.ConfigError(
            "the row of caption and codes needs one language model",
            where="config.load.text",
            fix="name a GPT-2 that writes words, and no sizes in config.model.text; or leave it "
            "empty, and give sizes",
        )
    return net


class Autoregressive:
    """The parts of the objective, and what is made of them.

    form: how captions are read, `Across` or `Joint`.
    """

    def __init__(self, config):
        options = fields.build(Options, config.loss, where="config.loss")
        net, self.space = codes.tokenizer(config)
        self.start = net.num_codes  # stands before the first code
        kind = Joint if options.joint else Across
        self.form = kind(config, options, net.num_codes, self.space.shape)

    def init(self, key, batch):
        keys = jax.random.split(key, 3)
        read_BN = jnp.zeros((len(batch["index"]), self.space.shape[0] * self.space.shape[1]), int)
        nets = self.form.init(keys, batch, read_BN)
        return nets | {name: init(keys[2], batch) for name, init in self.space.init.items()}

    def codes(self, nets, batch, key):
        """The codes of images.   -> int32 Bhw"""
        return {"codes": self.space.encode(nets, batch)}

    def parts(self, nets, batch, keys_B=None):
        """The cross-entropy of every code, and further parts of the loss.   -> Bhw, name -> B"""
        code_Bhw = self.space.encode(nets, batch)
        row_BN = self._row(code_Bhw)
        logits_BNK, more = self.form.logits(nets, batch, row_BN[:, :-1], keys_B)
        return losses.cross_entropy(logits_BNK, row_BN[:, 1:]).reshape(code_Bhw.shape), more

    def loss(self, nets, batch, key, step):
        keys_B = randomness.per_example(key, batch["index"])
        value_Bhw, parts = self.parts(nets, batch, keys_B)
        parts = {"image": value_Bhw.mean((1, 2)), **parts}
        means = {name: losses.weighted_mean(x, batch["weight"]) for name, x in parts.items()}
        value = sum(weight * means[name] for name, weight in self.form.weights.items())
        return value, Aux(means)

    def loss_by_row(self, nets, batch, key) -> OfBatch:
        """The mean cross-entropy of each row of codes, in nats a code, without dropout.   -> h"""
        value_Bhw, _ = self.parts(nets, batch)
        mean = lambda value_B: losses.weighted_mean(value_B, batch["weight"])
        return jax.vmap(mean, in_axes=1)(value_Bhw.mean(2))

    def sample(
        self,
        nets,
        batch,
        key,
        *,
        guidance: tokens.Guidance = 3.0,
        temperature: tokens.Temperature = 1.0,
        top_k: tokens.TopK = 0,
        top_p: tokens.TopP = 1.0,
    ) -> Pictures:
        """Images for captions.   -> image_BHWC in [-1, 1]

        Args:
          guidance: scale of classifier-free guidance of logits, 1 is none.
          temperature: of the softmax; 0 takes the likeliest code.
          top_k: only the k likeliest codes are drawn; 0: all.
          top_p: only the likeliest that together reach this probability.
        """
        row_BN = self._row(jnp.zeros((len(batch["index"]), 0), jnp.int32))
        how = dict(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
        return self.space.decode(nets, self.written(nets, batch, key, row_BN, **how))

    def complete(
        self,
        nets,
        batch,
        key,
        *,
        rows: Annotated[int, fields.at_least(0)] = 1,
        guidance: tokens.Guidance = 3.0,
        temperature: tokens.Temperature = 1.0,
        top_k: tokens.TopK = 0,
        top_p: tokens.TopP = 1.0,
    ) -> Pictures:
        """Images for captions that begin as given ones.   -> image_BHWC in [-1, 1]

        Args:
          rows: of codes that are the given image's, from the top.
          guidance, temperature, top_k, top_p: as of `sample`.
        """
        if rows > self.space.shape[0]:
            raise errors.ConfigError(
                f"rows is {rows}, and a picture has {self.space.shape[0]}",
                where="--set rows",
                fix="give fewer",
            )
        row_BN = self._row(self.space.encode(nets, batch)[:, :rows])
        how = dict(guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
        return self.space.decode(nets, self.written(nets, batch, key, row_BN, **how))

    def written(self, nets, batch, key, row_BN, *, guidance, temperature, top_k, top_p):
        """The codes of pictures, of which some are given.   -> int32 Bhw

        row_BN: the start and the given codes.
        """
        keys_B = randomness.per_example(key, batch["index"])
        guided = not guide.is_none(guidance)
        rows_of = lambda x_BN: guide.interleave(x_BN, x_BN) if guided else x_BN
        cache, extend = self.form.begin(nets, batch, guided)

        def following(code_B, i, cache):
            # The token at i − 1 of the row is the one that place i − 1 of the picture reads.
            logits_R1K, cache = extend(rows_of(code_B)[:, None], i - 1, cache)
            logits_RK = logits_R1K[:, 0]
            return (guide.mixed(logits_RK, guidance) if guided else logits_RK), cache

        def choose(logits_BK, i):
            own_B = randomness.fold_each(keys_B, i)
            return tokens.draw(logits_BK, own_B, temperature, top_k, top_p)

        n, count = row_BN.shape[1], self.space.shape[0] * self.space.shape[1]
        cache = tokens.longer(cache, n - 1)
        if n > 1:
            _, cache = extend(rows_of(row_BN[:, :-1]), 0, cache)
        row_BN = jnp.pad(row_BN, ((0, 0), (0, 1 + count - n)))
        row_BN = tokens.go_on(following, choose, row_BN, cache, n)
        return row_BN[:, 1:].reshape(-1, *self.space.shape)

    def _row(self, code_Bhw):
        """Codes one after another behind the start.   -> B(1 + N)"""
        code_BN = code_Bhw.reshape(len(code_Bhw), -1)
        return jnp.pad(code_BN, ((0, 0), (1, 0)), constant_values=self.start)
