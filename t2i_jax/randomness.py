"""Noise that depends on the example alone, not on the device or the batch that it is in."""

import jax

from t2i_jax import errors

APART = 0x5EED  # any large number: splits are into few parts


def per_example(key, index_B):
    """One key per example: fold_in(key, index), on any mesh and at any batch size.   -> B

    key: one for all, or an array of one for each example.
    """
    return jax.vmap(jax.random.fold_in, (0 if key.ndim else None, 0))(key, index_B)


def split_each(keys_B, n: int):
    """n independent keys per example.   -> tuple of n key arrays B"""
    keys_BN = jax.vmap(lambda key: jax.random.split(key, n))(keys_B)
    return tuple(keys_BN[:, i] for i in range(n))


def fold_each(keys_B, n: int):
    """One more key per example for each number, independent of the keys and their splits.   -> B"""
    # A key's n-th fold may be the n-th part of its split. So a number of our own comes between.
    apart_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, APART)
    return jax.vmap(jax.random.fold_in, (0, None))(apart_B, n)


def normal_each(keys_B, shape):
    """Standard normal noise, one draw per example.   -> B + shape"""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)


def given_or_normal(batch, keys_B, shape):
    """The batch's own "noise", such as another program's start, else `normal_each`.   -> B + shape

    Raises:
      ConfigError: noise of another shape.
    """
    if "noise" not in batch:
        return normal_each(keys_B, shape)
    if batch["noise"].shape[1:] != tuple(shape):
        raise errors.ConfigError(
            f"the noise of a picture has the shape {batch['noise'].shape[1:]}",
            where="noise",
            fix=f"give {tuple(shape)}: height, width, channels",
        )
    return batch["noise"]
