"""Fit and score time of every registered probe at 100,000 x 576, beside scikit-learn where it has the same kind.

    python tests/benchmarks/bench_probes.py [--rows 100000] [--dim 576] [--probes lda,logistic] [--limit 120]

Times are CPU seconds (all threads; a busy machine distorts wall time), of one fit and of scoring all rows in float32.
Data: two Gaussian classes of float32 rows under a dense covariance, whose optimal AUROC is 0.90. Pairs, prior and
behaviour come along for probes that need them; probes of tokens get the same reads four to an item. AUROC on 5,000 rows
that neither saw says that nobody buys time with quality. Each entry is a process of its own and is ended at the limit
of wall time (``> limit``). The ratio is the rival's time over ours: above 1, ours is faster. Asserts nothing.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

TOKENS = 4
Outcome = tuple[float, float, float] | str


class Data:
    """Rows, labels and what probes may need besides."""

    def __init__(self, rows: int, dim: int) -> None:
        rng = np.random.default_rng(np.random.SeedSequence(7))
        mix = (np.eye(dim) + rng.standard_normal((dim, dim)) / np.sqrt(dim)).astype(np.float32)
        way = rng.standard_normal(dim)
        # optimal AUROC = Phi(gap / sqrt 2)
        way *= 1.81 / np.linalg.norm(way)
        total = rows + 5_000
        # neighbours are a pair of opposite labels, and of one topic
        labels = np.arange(total) % 2
        self.x = np.empty((total, dim), dtype=np.float32)
        for start in range(0, total, 20_000):
            part = slice(start, min(start + 20_000, total))
            noise = rng.standard_normal((part.stop - start, dim), dtype=np.float32)
            self.x[part] = (noise + np.outer(labels[part] - 0.5, way).astype(np.float32)) @ mix
        self.y, self.rows, self.dim = labels, rows, dim
        # half of the pairs hold the affirmed form first
        self.pairs = np.arange(rows // 2 * 2).reshape(-1, 2)
        self.pairs[::2] = self.pairs[::2, ::-1]
        self.factor = (mix.T * 0.3).astype(float)
        self.behaviour = rng.standard_normal((64, 4, dim)) / np.sqrt(dim)

    @property
    def train(self) -> tuple[np.ndarray, np.ndarray]:
        return self.x[: self.rows], self.y[: self.rows]

    @property
    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        return self.x[self.rows :], self.y[self.rows :]


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import rankdata

    ranks, positives = rankdata(scores), int(labels.sum())
    return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / positives / (len(labels) - positives))


def timed(fit: Callable[[], Any], score: Callable[[Any, np.ndarray], np.ndarray], data: Data, reads: Any) -> Outcome:
    """CPU seconds of fit and of scoring the training rows, and AUROC."""
    begun = time.process_time()
    fitted = fit()
    fitting = time.process_time() - begun
    # what is loaded on the first call is no part of scoring
    score(fitted, reads(data.x[:16], data.y[:16])[0])
    begun = time.process_time()
    score(fitted, reads(*data.train)[0])
    scoring = time.process_time() - begun
    x, y = reads(*data.held_out)
    return fitting, scoring, auroc(score(fitted, x), y)


def ours(name: str, data: Data) -> Outcome:
    from elk_stress.core import registry
    from elk_stress.probing.probe import as_fitted
    from elk_stress.threats.priors import EllipticalPrior

    recipe = registry.load("probes", name)

    def reads(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not recipe.traits.tokens:
            return x, y
        # the reads of an item are of one label
        order = np.argsort(y, kind="stable")
        items = len(x) // TOKENS // 2 * 2
        x, y = x[order][: items * TOKENS], y[order][: items * TOKENS]
        return x.reshape(items, TOKENS, -1), y[::TOKENS]

    def fit() -> Any:
        return as_fitted(
            recipe, *reads(*data.train), pairs=data.pairs, prior=EllipticalPrior(data.factor), behaviour=data.behaviour
        )

    return timed(fit, lambda fitted, x: np.asarray(fitted.score(x)), data, reads)


def rival(make: Callable[[int], Any], data: Data, *, negatives: bool = False) -> Outcome:
    x, y = data.train

    def fit() -> Any:
        return make(len(x)).fit(x[y == 0]) if negatives else make(len(x)).fit(x, y)

    def score(model: Any, rows: np.ndarray) -> np.ndarray:
        for method in ("decision_function", "mahalanobis", "kneighbors", "predict_proba", "score_samples"):
            if hasattr(model, method):
                out = getattr(model, method)(rows)
                if method == "kneighbors":
                    return np.asarray(out[0][:, -1])
                return np.asarray(-out if method == "score_samples" else out[:, 1] if out.ndim == 2 else out)
        raise TypeError(type(model).__name__)

    return timed(fit, score, data, lambda *rows: rows)


def rivals() -> dict[str, tuple[str, Callable[[int], Any], bool]]:
    """Probe -> name of the rival, how to make it for n rows, and whether it sees negatives only."""
    from sklearn.covariance import OAS, EllipticEnvelope
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import BaggingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.mixture import GaussianMixture
    from sklearn.neighbors import NearestCentroid, NearestNeighbors
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def scaled(last: Any) -> Any:
        return make_pipeline(StandardScaler(), last)

    def logistic(n: int) -> Any:
        return LogisticRegression(C=1 / (0.01 * n), class_weight="balanced", max_iter=2000, tol=1e-6)

    mlp = functools.partial(MLPClassifier, (64,), batch_size=1024, early_stopping=True, random_state=0)
    return {
        "rock": ("DummyClassifier", lambda n: DummyClassifier(), False),
        "mass_mean": ("NearestCentroid", lambda n: NearestCentroid(), False),
        "lda": (
            "LDA (lsqr, Ledoit-Wolf)",
            lambda n: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
            False,
        ),
        "logistic": ("LogisticRegression", lambda n: scaled(logistic(n)), False),
        "mlp": ("MLPClassifier (64)", lambda n: scaled(mlp()), False),
        "quadratic": ("QDA", lambda n: QuadraticDiscriminantAnalysis(reg_param=0.1), False),
        "mahalanobis": ("OAS", lambda n: OAS(), True),
        "logistic_tails": ("EllipticEnvelope", lambda n: EllipticEnvelope(random_state=0), True),
        "nearest_neighbours": (
            "NearestNeighbors (5)",
            lambda n: NearestNeighbors(n_neighbors=5, algorithm="brute"),
            True,
        ),
        "flow": (
            "GaussianMixture (4, diag)",
            lambda n: GaussianMixture(4, covariance_type="diag", random_state=0),
            True,
        ),
        "ensemble": ("BaggingClassifier (8 logistic)", lambda n: scaled(BaggingClassifier(logistic(n), 8)), False),
        "crc": ("PCA (1)", lambda n: PCA(1), False),
    }


def within(limit: float, work: Callable[[], Outcome]) -> Outcome:
    """The outcome of ``work`` in a forked process, or why there is none."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        warnings.simplefilter("ignore")
        try:
            sender.send(work())
        except Exception as error:
            sender.send(f"{type(error).__name__}: {error}"[:60])

    process = context.Process(target=run)
    process.start()
    out: Outcome = receiver.recv() if receiver.poll(limit) else f"> {limit:.0f} s"
    process.kill()
    process.join()
    return out


def shown(outcome: Outcome | None) -> str:
    if outcome is None:
        return f"{'-':>9s} {'-':>9s} {'-':>6s}"
    if isinstance(outcome, str):
        return f"{outcome:>26s}"
    return f"{outcome[0]:9.2f} {outcome[1]:9.3f} {outcome[2]:6.3f}"


def main() -> None:
    from elk_stress.core import registry

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--probes", default=",".join(registry.names("probes")))
    parser.add_argument("--limit", type=float, default=120.0, help="wall seconds for one entry")
    given = parser.parse_args()
    data, known = Data(given.rows, given.dim), rivals()
    print(f"{given.rows:,} x {given.dim} float32; CPU seconds")
    print(
        f"{'probe':22s} {'fit':>9s} {'score':>9s} {'AUROC':>6s}   {'rival':30s} {'fit':>9s} {'score':>9s} {'AUROC':>6s}"
        f"   ratios of fit and score"
    )
    for name in given.probes.split(","):
        mine = within(given.limit, functools.partial(ours, name, data))
        called, make, negatives = known.get(name, ("", None, False))
        other = None if make is None else within(given.limit, functools.partial(rival, make, data, negatives=negatives))
        ratios = ""
        if isinstance(mine, tuple) and isinstance(other, tuple):
            ratios = f"{other[0] / max(mine[0], 1e-3):8.2f} {other[1] / max(mine[1], 1e-3):8.2f}"
        print(f"{name:22s} {shown(mine)}   {called:30s} {shown(other)}   {ratios}", flush=True)


if __name__ == "__main__":
    main()
