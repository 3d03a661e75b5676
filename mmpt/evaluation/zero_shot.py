"""Zero-shot classification: the class whose text embedding is nearest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor
from torch.nn import functional as F

from mmpt.errors import DataError
from mmpt.evaluation.checks import Array, embeddings_of, labels_of, same_width
from mmpt.evaluation.retrieval import retrieval


@dataclass(frozen=True, eq=False)
class ZeroShotResult:
    """How well the nearest class embedding names an example.

    Attributes:
        accuracy: share of right predictions.
        macro_recall: mean of `per_class` over the classes that have examples.
        top5: share of examples whose class is among the five nearest (ties count by half, as in retrieval).
        per_class: float (c,), recall of each class; NaN where it has no example.
        confusion: long (c, c); row is the true class, column the predicted one.
        predictions: long (n,).
        in_top5: float (n,), what each example adds to `top5`.
        majority: accuracy of always answering the most frequent class.
        chance: accuracy of a uniform guess, 1 / c.
    """

    accuracy: float
    macro_recall: float
    top5: float
    per_class: Tensor
    confusion: Tensor
    predictions: Tensor
    majority: float
    chance: float
    in_top5: Tensor

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat names for a run's metrics with their baselines.

        Args:
            prefix: what the names begin with, e.g. `zero_shot`.
        """
        return {
            f"{prefix}/accuracy": self.accuracy,
            f"{prefix}/accuracy_chance": self.chance,
            f"{prefix}/accuracy_majority": self.majority,
            f"{prefix}/macro_recall": self.macro_recall,
            f"{prefix}/macro_recall_chance": self.chance,
            f"{prefix}/top5": self.top5,
            f"{prefix}/top5_chance": min(1.0, 5 * self.chance),
        }


def ensemble(prompts: Iterable[Array]) -> Tensor:
    """One embedding per class from several prompts: the mean of their normalised embeddings, normalised again.

    CLIP (Radford et al. 2021, section 3.1.4) averages in embedding space too; a long vector must not outvote the
    others, hence the first normalisation.

    Args:
        prompts: for each class (number of its prompts, d); a (c, prompts, d) tensor will do.

    Returns:
        float32 (c, d), unit length.
    """
    means = [F.normalize(embeddings_of(p, f"prompts of class {i}"), dim=1).mean(0) for i, p in enumerate(prompts)]
    return F.normalize(torch.stack(means), dim=1)


def relative(similarities: Tensor, reference: Tensor) -> Tensor:
    """Each class's similarities relative to those of samples at large, as z-scores are.

    A class that everything resembles, because training saw much that resembles it, then no longer wins by that alone.

    Args:
        similarities: (n, classes).
        reference: (others, classes), of the samples at large.

    Returns:
        (n, classes): values less the reference's mean, in its standard deviations.

    Raises:
        DataError: fewer than two samples at large.
    """
    if len(reference) < 2:
        raise DataError(f"{len(reference)} samples at large have no spread; give two or more")
    return (similarities - reference.mean(0)) / reference.std(0).clamp(min=1e-9)


def zero_shot(embeddings: Array, class_embeddings: Array, labels: Array, chunk: int = 1024) -> ZeroShotResult:
    """Classify by cosine similarity to the class embeddings.

    Args:
        embeddings: (n, d).
        class_embeddings: (c, d), from one prompt per class or from `ensemble`.
        labels: integers (n,) in [0, c).
        chunk: examples scored at once.

    Raises:
        DataError: shapes that do not fit, values that are not finite, or labels outside the classes.
    """
    example_nd, class_cd = embeddings_of(embeddings, "embeddings"), embeddings_of(class_embeddings, "class embeddings")
    same_width(example_nd, class_cd, "embeddings and class embeddings")
    n, c = len(example_nd), len(class_cd)
    label_n = labels_of(labels, "labels", n, classes=c).cpu()

    in_top5 = (retrieval(example_nd, class_cd, label_n, ks=(5,), chunk=chunk).ranks <= 5).float()
    # The length of an example scales all its scores alike, so only the classes need normalising here.
    class_cd = F.normalize(class_cd, dim=1).to(example_nd.device)
    prediction_n = torch.cat([(rows @ class_cd.T).argmax(1) for rows in example_nd.split(chunk)]).cpu()

    confusion = confusion_matrix(label_n.numpy(), prediction_n.numpy(), labels=np.arange(c))
    support = confusion.sum(1)
    per_class = np.divide(confusion.diagonal(), support, out=np.full(c, np.nan), where=support > 0)
    return ZeroShotResult(
        accuracy=float(confusion.diagonal().sum() / n),
        macro_recall=float(np.nanmean(per_class)),
        top5=float(in_top5.mean()),
        per_class=torch.from_numpy(per_class).float(),
        confusion=torch.from_numpy(confusion).long(),
        predictions=prediction_n,
        majority=float(support.max() / n),
        chance=1.0 / c,
        in_top5=in_top5,
    )
