"""How well pictures fit captions, from embeddings of both in one space, such as CLIP's.

N pictures, M captions, one a row · D features
"""

import numpy as np

from t2i_jax import errors
from t2i_jax.quality import features


def clip_score(image_ND, text_ND) -> float:
    """CLIP score: 100 · max(cos, 0) of each picture and its own caption, their mean, 0 … 100.

    CLIPScore (Hessel et al. 2021, eq. 1, arXiv:2104.08718) has w = 2.5 in place of 100, and puts "A
    photo depicts " before each caption: with it, a fortieth of this is theirs. torchmetrics, whose
    100 this is, cuts off the mean at 0, not each. Say which CLIP it was.

    Args:
      image_ND, text_ND: embeddings of any length but 0; pictures belong to captions of their row.
    Raises:
      DataError: bad features, unequally many, or of length 0.
    """
    where = "quality.captions.clip_score"
    features.check(where, image=image_ND, text=text_ND)
    if len(image_ND) != len(text_ND):
        raise errors.DataError(
            f"{len(image_ND)} pictures and {len(text_ND)} captions",
            where=where,
            fix="give one caption a picture",
        )
    cosine_N = (_unit(image_ND, where, "image") * _unit(text_ND, where, "text")).sum(1)
    return float(100 * np.maximum(cosine_N, 0).mean())


def cosines(image_ND, text_MD) -> np.ndarray:
    """The cosine of every picture and every caption, float64, for `retrieval`.   -> NM

    Raises:
      DataError: bad features, or of length 0.
    """
    where = "quality.captions.cosines"
    features.check(where, image=image_ND, text=text_MD)
    return _unit(image_ND, where, "image") @ _unit(text_MD, where, "text").T


def _unit(x_ND, where: str, name: str) -> np.ndarray:
    x_ND = np.asarray(x_ND, np.float64)
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    if not length_N1.all():
        raise errors.DataError(
            f"{name} features have length 0, first in row {length_N1[:, 0].argmin()}",
            where=where,
            fix="leave empty captions out",
        )
    return x_ND / length_N1
