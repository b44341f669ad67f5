"""Pictures of one subject beside pictures of its class, so that a model does not forget the class:
prior preservation (DreamBooth, arXiv:2208.12242).
"""

import hashlib

from t2i_jax import fields
from t2i_jax.data import folder


class Source:
    """The examples of two sources by turns, the shorter one again and again; those of the second
    have a "weight".
    """

    def __init__(self, subject, prior, weight: float):
        self._both, self._weight = (subject, prior), weight
        both = f"{subject.fingerprint} {prior.fingerprint}"
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest()

    def __len__(self) -> int:
        return 2 * max(map(len, self._both))

    def _place(self, index: int):
        source = self._both[index % 2]
        return source, index // 2 % len(source)

    def _weighted(self, example: dict, index: int) -> dict:
        return {**example, "weight": self._weight} if index % 2 else example

    def __getitem__(self, index: int) -> dict:
        source, place = self._place(index)
        return self._weighted(source[place], index)

    def caption(self, index: int) -> dict:
        """An example without its image, which is not opened."""
        source, place = self._place(index)
        return self._weighted(source.caption(place), index)

    def where(self, index: int) -> str:
        """The file of an example."""
        source, place = self._place(index)
        return source.where(place)

    def captions(self):
        """Yields all captions in order. No image is opened."""
        each = [source.captions() for source in self._both]
        for index in range(len(self)):
            own = each[index % 2]
            yield own[index // 2 % len(own)]


def make(
    path,
    *,
    prior,
    prior_weight: fields.Weight = 1.0,
    split: str = "train",
    res: int | tuple[int, int] = 32,
    holdout: float = 0.0,
    pad: bool = False,
):
    """The pictures of `folder.make` at `path`, each followed by one of the folder `prior`.

    Half of the examples are of the class, and count `prior_weight` in the loss, which is on average
    half of equation 2: this is its λ. The split "test" is of the subject alone.

    Args:
      prior: a folder of the class's pictures, as a rule drawn by the model before.
      split, res, holdout, pad: as of `folder.make`; nothing of the class is held out.
    Raises: as `folder.make`, of either folder.
    """
    subject = folder.make(path, split=split, res=res, holdout=holdout, pad=pad)
    if split == "test":
        return subject
    return Source(subject, folder.make(prior, res=res, pad=pad), prior_weight)
