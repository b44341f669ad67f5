"""What captions are to a family: an encoder, states from the cache, captions that drop out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import errors
from t2i_jax.models.types import Cond, Tokens
from t2i_jax.pretrained import text_encoder
from t2i_jax.text import condition


class Conditioner:
    """The net "text" of a family that a config describes.

    Args:
      text_dropout: share of captions replaced by the null condition; of several encoders, a share
        for each makes them miss independently (SD3, arXiv:2403.03206).
      train_text: whether losses train it.
    Raises:
      ConfigError: shares that are none or do not fit the encoders, or cached states of an encoder
        that learns.
    """

    def __init__(self, config, *, text_dropout=0.0, train_text: bool = False):
        source = config.load.get("text")
        self.module: nn.Module = text_encoder.make(source, **config.text)
        encoders = len(getattr(self.module, "names", ("text",)))
        self._dropout = np.array(text_dropout, np.float32)
        if self._dropout.size == 1:  # a flag makes a tuple of one
            self._dropout = self._dropout.reshape(())
        if self._dropout.ndim and self._dropout.shape != (encoders,):
            raise errors.ConfigError(
                f"text_dropout has {self._dropout.size} shares for {encoders} encoders",
                where="config.loss.text_dropout",
                fix="give one number, or one for each of config.load.text",
            )
        if config.cache and (train_text or "text" in config.lora):
            raise errors.ConfigError(
                "cached caption states cannot change with an encoder that learns",
                where="config.cache",
                fix="set --config.cache= (nothing)",
            )

    def init(self, key, batch):
        """Variables, and the condition of a batch, by which other nets find their shapes."""
        variables = self.module.init(key, *_arguments(batch["text"]))
        return variables, self.module.apply(variables, *_arguments(batch["text"]))

    # It is also a prediction, which is called with a key.
    def encode(self, nets, batch, key=None) -> Cond:
        """Caption states: from the cache where the batch brings them, else from the encoder."""
        if "cond_seq" in batch:
            seq_BLD, pooled_BD = batch["cond_seq"], batch["cond_pooled"]
            mask_BL = jnp.concatenate([t.mask_BL for t in self._each(batch)], axis=1)
            # Stored states are float16 (ADR 4).
            return Cond(seq_BLD.astype(jnp.float32), mask_BL, pooled_BD.astype(jnp.float32))
        return self.module.apply(nets["text"], *_arguments(batch["text"]))

    def negative(self, nets, batch) -> Cond | None:
        """States of the captions to be guided away from, where the batch brings any."""
        if "negative_text" not in batch:
            return None
        return self.module.apply(nets["text"], *_arguments(batch["negative_text"]))

    def drop(self, cond: Cond, batch, keys_B) -> Cond:
        """The condition in training, each caption dropped or not by its own key."""
        draw_B = jax.vmap(lambda key: jax.random.uniform(key, self._dropout.shape))(keys_B)
        parts = None
        if self._dropout.ndim:
            lengths = (tokens.ids_BL.shape[1] for tokens in self._each(batch))
            parts = tuple(zip(lengths, self.module.pooled, strict=True))
        return condition.drop(cond, draw_B < self._dropout, parts)

    def _each(self, batch) -> list[Tokens]:
        """The tokens of each encoder, in the order in which their states stand."""
        tokens = batch["text"]
        return [tokens] if isinstance(tokens, Tokens) else [tokens[n] for n in self.module.names]


def _arguments(tokens):
    """What the module is called with: one encoder's numbers and mask, or several encoders' dict."""
    return tokens if isinstance(tokens, Tokens) else (tokens,)
