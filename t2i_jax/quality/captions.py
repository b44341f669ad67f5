"""How well images fit captions, from embeddings of both in one space, such as CLIP's.

N images and M captions, one for each row · D features
"""

import numpy as np

from t2i_jax import errors
from t2i_jax.quality import features


def clip_score(image_ND, text_ND) -> float:
    """CLIP score: the mean of 100 · max(cos, 0) over images with their own captions, 0 … 100.

    CLIPScore (Hessel et al. 2021, eq. 1, arXiv:2104.08718) has the factor 2.5 in place of 100, and
    puts "A photo depicts " before each caption. With that prefix, theirs is a fortieth of this.
    torchmetrics has the factor 100, too, but cuts off the mean at 0 and not each cosine. Name the
    CLIP model with the figure.

    Args:
      image_ND, text_ND: embeddings of any length above 0. Row i of both is one pair.
    Raises:
      DataError: bad features, unequal numbers of rows, or embeddings of length 0.
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
    """The cosine of every image and every caption, for `retrieval`.   -> float64 NM

    Raises:
      DataError: bad features, or embeddings of length 0.
    """
    where = "quality.captions.cosines"
    features.check(where, image=image_ND, text=text_MD)
    return _unit(image_ND, where, "image") @ _unit(text_MD, where, "text").T


def _unit(x_ND, where: str, name: str) -> np.ndarray:
    # The length of half-precision embeddings would overflow or lose digits in their own type.
    x_ND = np.asarray(x_ND, np.float64)
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    if not length_N1.all():
        raise errors.DataError(
            f"{name} features have length 0, first in row {length_N1[:, 0].argmin()}",
            where=where,
            fix="leave empty captions out",
        )
    return x_ND / length_N1
