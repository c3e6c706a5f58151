"""Linear probe: a linear classifier on frozen features, compared with baselines without features."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics import Floats, Ints, Metric

BETWEEN_FINDINGS = "|"
NO_FINDING = "No Finding"


def linear_probe(
    train: Floats, train_labels: Ints, test: Floats, test_labels: Ints, names: tuple[str, ...]
) -> list[Metric]:
    """Fit a logistic regression to standardised features (L2, C = 1) and score it on the test part.

    The metrics and their baselines:

    - ``probe_accuracy``: always predict the largest class of the training part.
    - ``probe_micro_auc``: class frequencies of the training part as constant scores. With many classes this
      baseline alone is near 1.
    - ``probe_macro_auc``: chance. The mean is over single findings if labels are combinations joined by
      ``|``, else over classes.

    Args:
        train: (N, D).
        train_labels: (N,) class numbers; tiles with -1 are left out.
        test: (M, D).
        test_labels: (M,).
        names: class names.

    Returns:
        The three metrics; [] if the training part has fewer than two classes or the test part no label.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    known, asked = train_labels >= 0, test_labels >= 0
    x, y = train[known], train_labels[known]
    if len(np.unique(y)) < 2 or not asked.any():
        return []
    scaler = StandardScaler().fit(x)
    fitted = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(x), y)
    given = np.zeros((int(asked.sum()), len(names)))
    given[:, fitted.classes_] = fitted.predict_proba(scaler.transform(test[asked]))
    truth = test_labels[asked]
    share = np.bincount(y, minlength=len(names)) / len(y)
    constant = np.tile(share, (len(truth), 1))
    right = float(np.mean(given.argmax(1) == truth))
    majority = float(np.mean(truth == share.argmax()))
    onehot = np.eye(len(names), dtype=np.int64)[truth]
    macro = _macro_auc(given, truth, names)
    return [
        Metric("probe_accuracy", right, majority, "always the largest class"),
        Metric(
            "probe_micro_auc", _auc(onehot.ravel(), given.ravel()),
            _auc(onehot.ravel(), constant.ravel()), "class shares as constant scores",
        ),
        Metric("probe_macro_auc", macro, 0.5, "chance"),
    ]  # fmt: skip


def _auc(truth: NDArray[Any], scores: NDArray[Any]) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, scores))


def _macro_auc(given: NDArray[np.float64], truth: Ints, names: tuple[str, ...]) -> float:
    """Return the mean AUC over findings; a finding's score is the sum over all classes that contain it."""
    parts = [name.split(BETWEEN_FINDINGS) for name in names]
    findings = sorted({finding for part in parts for finding in part} - {NO_FINDING})
    found = []
    for finding in findings:
        holds = np.array([finding in part for part in parts])
        positive = holds[truth]
        if 0 < positive.sum() < len(positive):
            found.append(_auc(positive, given[:, holds].sum(1)))
    return float(np.mean(found)) if found else float("nan")
