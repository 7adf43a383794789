"""The probe protocol: activations -> one real score per item; higher = more strongly positive.

A *probe* is a recipe (a small frozen dataclass of hyperparameters) with ``fit``; a :class:`FittedProbe` is the frozen
result. The score is one pure function on array-API operations: parameters are numpy and cross once into the namespace
of the activations, which themselves never leave it, so one definition is differentiable in torch and in jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from elk_stress.core import registry
from elk_stress.core.arrays import backend_of, like, namespace, to_numpy
from elk_stress.core.inputs import check_activations as check_activations
from elk_stress.core.inputs import check_training_data as check_training_data
from elk_stress.core.printable import check_name
from elk_stress.core.settings import shown

if TYPE_CHECKING:
    from elk_stress.threats.priors import EllipticalPrior

__all__ = [
    "FittedProbe",
    "Probe",
    "Traits",
    "as_fitted",
    "check_activations",
    "check_recipe",
    "check_training_data",
    "direction",
]

Array = Any


@dataclass(frozen=True)
class Traits:
    """What a probe is, so that the suites know what to demand and the engine what to give it.

    Attributes:
        learns: it must separate planted classes after ``fit`` (the rock and a random direction do not).
        linear: its score is ``activations @ weight + bias`` with parameters of these names (with ``tokens``: the mean
            of that over the tokens).
        needs_pairs: ``fit`` wants ``pairs``.
        needs_prior: ``fit`` wants ``prior``, how differently the model could have thought (a defence may know it).
        needs_behaviour: ``fit`` wants ``behaviour``, what the model's output depends on at the site.
        tokens: activations carry a token axis, ``(*batch, tokens, d)``, and ``fit`` and ``score`` take a ``mask``. A
            token is any one of several reads of an item: tokens of a text, neutral contexts, sites of equal width.
        negatives_only: it learns from negatives alone; positives change nothing.
        differentiable: scores carry gradients (almost everywhere).
        rotation_equivariant: fitting commutes with rotations of the activations.
        flips: fitted on swapped labels it gives the negated score.
        streams: ``fitter()`` fits it batch by batch (:mod:`elk_stress.probing.fit.streaming`).
    """

    learns: bool = True
    linear: bool = False
    needs_pairs: bool = False
    needs_prior: bool = False
    needs_behaviour: bool = False
    tokens: bool = False
    negatives_only: bool = False
    differentiable: bool = True
    rotation_equivariant: bool = False
    flips: bool = False
    streams: bool = False


@runtime_checkable
class Probe(Protocol):
    """A recipe for a probe. Implementations are frozen dataclasses whose fields are hyperparameters."""

    @property
    def name(self) -> str:
        """Registered name."""
        ...

    @property
    def traits(self) -> Traits:
        """What the probe is."""
        ...

    def fit(
        self,
        activations: np.ndarray,
        labels: np.ndarray,
        *,
        pairs: np.ndarray | None = None,
        seed: int = 0,
    ) -> FittedProbe:
        """Fit on ``activations (n, d)`` and ``labels (n,)`` in {0, 1}, 1 = positive.

        What a probe declares that it needs comes as a further keyword argument, and only then: ``prior`` (an
        :class:`~elk_stress.threats.priors.EllipticalPrior`), ``behaviour (m, rank, d)`` (Fisher factors F of m training
        items: a move shifts the output by about ``0.5 ||F move||^2`` nats), ``mask (n, tokens)`` (true = a token is
        there; ``None`` = all are).

        Args:
            activations: one row per (item, context); with the ``tokens`` trait ``(n, tokens, d)``.
            labels: 1 = positive.
            pairs: ``(n_pairs, 2)`` row indices of contrast pairs (row 0: the affirmed form, row 1: its negation),
                for probes with the ``needs_pairs`` trait.
            seed: all randomness.
        """
        ...

    def score(self, xp: Any, parameters: Mapping[str, Array], activations: Array) -> Array:
        """Pure scores ``(*batch, d) -> (*batch,)`` with array-API operations of ``xp``.

        With the ``tokens`` trait ``score(xp, parameters, activations, mask)``: ``(*batch, tokens, d)`` and a mask
        ``(*batch, tokens)`` or ``None`` -> ``(*batch,)``.

        A probe that knows how steep its score is may have a method ``lipschitz(parameters, factor) -> float``: a bound
        on ``|score(x + factor u) - score(x + factor v)| / ||u - v||`` for ``factor (d, k)``, or ``None``. It gets
        certified bits.
        """
        ...


@dataclass(frozen=True)
class FittedProbe:
    """A frozen probe: its recipe and its numpy parameters.

    Attributes:
        probe: the recipe, which holds the pure score function.
        parameters: numpy arrays by name, kept in C order: libraries multiply a transposed array by another routine, so
            that scores would depend on how a fit happened to lay its arrays out, and change in the last digits when
            saved and loaded. Linear probes have ``weight (d,)`` and ``bias ()``.
        site: where its activations were read, for error messages.
        notes: what ``fit`` wants the reader to know (convergence, how a sign was chosen, ...).
        dim: width of the activations that it was fitted on; by default that of the parameter ``weight``, if any.
    """

    probe: Probe
    parameters: Mapping[str, np.ndarray]
    site: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    dim: int | None = None

    def __post_init__(self) -> None:
        check_name(self.probe.name, "the name of a probe")
        if not isinstance(self.site, str) or self.site:
            check_name(self.site, f"the site of probe {self.probe.name!r}")
        laid = {n: np.asarray(v, order="C") if isinstance(v, np.ndarray) else v for n, v in self.parameters.items()}
        object.__setattr__(self, "parameters", laid)
        if self.dim is None and "weight" in self.parameters:
            object.__setattr__(self, "dim", int(self.parameters["weight"].shape[0]))

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.probe.name

    @property
    def traits(self) -> Traits:
        """The recipe's traits."""
        return self.probe.traits

    def score(self, activations: Array, mask: Array | None = None) -> Array:
        """Scores ``(*batch, d) -> (*batch,)`` in the namespace, dtype and device of ``activations``; differentiable.

        Half precision is scored in single and rounded at the end: a bias that it cannot hold must not become infinite.
        Integers and booleans are scored as real numbers.

        Args:
            activations: ``(*batch, tokens, d)`` for a probe with the ``tokens`` trait.
            mask: ``(*batch, tokens)`` bool, true = a token is there; only for such a probe. By default all are.

        Raises:
            TypeError: no array.
            ValueError: another width than the probe was fitted on; complex numbers or masked ones; a mask of another
                shape than the tokens have, or for a probe that reads none.
        """
        xp, rows = _readable(activations)
        if self.dim is not None and rows.shape[-1:] != (self.dim,):
            where = f" (site {self.site})" if self.site else ""
            width = f"{rows.shape[-1]} features" if rows.shape else "no axis of features"
            raise ValueError(
                f"activations have {width} but the probe {self.name!r} was fitted on "
                f"{self.dim}{where}; read them at that site, or refit"
            )
        parameters = {name: like(value, rows) for name, value in self.parameters.items()}
        if self.traits.tokens:
            if mask is not None and tuple(mask.shape) != tuple(rows.shape[:-1]):
                raise ValueError(
                    f"a mask for activations of shape {tuple(rows.shape)} has shape "
                    f"{tuple(rows.shape[:-1])}, one truth value per token; got {tuple(mask.shape)}"
                )
            score = self.probe.score(xp, parameters, rows, mask)  # type: ignore[call-arg]
        elif mask is not None:
            raise ValueError(f"the probe {self.name!r} reads one activation per item; a mask is for probes of tokens")
        else:
            score = self.probe.score(xp, parameters, rows)
        half = rows is not activations and xp.isdtype(activations.dtype, "real floating")
        return xp.astype(score, activations.dtype) if half else score

    def lipschitz(self, factor: np.ndarray) -> float | None:
        """A bound on how steep the score is in u, for moves ``factor @ u`` with ``factor (d, k)``; ``None`` if unknown.

        Exact for linear probes: ``||factor^T weight||``.
        """
        if self.traits.linear and not self.traits.tokens:
            return float(np.linalg.norm(np.asarray(factor, dtype=float).T @ np.asarray(self.parameters["weight"])))
        known = getattr(self.probe, "lipschitz", None)
        bound = None if known is None else known(self.parameters, np.asarray(factor, dtype=float))
        return None if bound is None else float(bound)

    def save(self, path: str | Path) -> Path:
        """Write one file if ``path`` ends in ``.safetensors``, else a folder; never pickle. Returns where.

        Raises:
            ValueError: a recipe that no file can hold; see :func:`elk_stress.probing.saving.save_probe`.
        """
        from elk_stress.probing.saving import save_probe

        return save_probe(self, path)

    @classmethod
    def load(cls, path: str | Path) -> FittedProbe:
        """Read a probe back; its recipe is found in the registry by name. Scores are identical to those saved.

        Raises:
            FileNotFoundError: not a saved probe.
            ValueError: a pickle, or no record of a probe; see :func:`elk_stress.probing.saving.load_probe`.
            UnknownName: the package that registers the probe is not installed.
        """
        from elk_stress.probing.saving import load_probe

        return load_probe(path)

    def push(self, repo_id: str, **options: Any) -> str:
        """Upload to the Hugging Face hub, with a model card; see :func:`elk_stress.probing.saving.push_probe`."""
        from elk_stress.probing.saving import push_probe

        return push_probe(self, repo_id, **options)

    @classmethod
    def pull(cls, repo_id: str, **options: Any) -> FittedProbe:
        """Read from the Hugging Face hub; see :func:`elk_stress.probing.saving.pull_probe`."""
        from elk_stress.probing.saving import pull_probe

        return pull_probe(repo_id, **options)


def _readable(activations: Array) -> tuple[Any, Array]:
    """Their namespace, and the activations in single precision or better."""
    try:
        xp = namespace(activations)
    except TypeError:
        raise TypeError(
            f"activations are a numpy, torch or jax array (*batch, d), got {type(activations).__name__}; pass "
            "numpy.asarray(activations)"
        ) from None
    if np.ma.is_masked(activations):
        raise ValueError("activations have masked values, which have no score; leave out these rows, or fill them in")
    dtype = activations.dtype
    if xp.isdtype(dtype, "real floating"):
        return xp, xp.astype(activations, xp.float32) if xp.finfo(dtype).bits < 32 else activations
    if xp.isdtype(dtype, ("integral", "bool")):
        return xp, xp.astype(activations, xp.float64 if backend_of(activations) == "numpy" else xp.float32)
    raise ValueError(f"activations are real numbers, got {dtype}; pass the real part, or both parts as features")


@dataclass(frozen=True)
class _Direction:
    """A given direction as a probe: nothing to fit; files say ``direction``, whatever it is called."""

    called: str = "direction"
    traits: ClassVar[Traits] = Traits(learns=False, linear=True)

    @property
    def name(self) -> str:
        return self.called

    def fit(
        self, activations: np.ndarray, labels: np.ndarray, *, pairs: np.ndarray | None = None, seed: int = 0
    ) -> FittedProbe:
        raise TypeError("a bare direction is already fitted; pass it where a fitted probe is expected")

    def score(self, xp: Any, parameters: Mapping[str, Array], activations: Array) -> Array:
        return xp.matmul(activations, parameters["weight"]) + parameters["bias"]


def direction(
    weight: Any,
    bias: Any = 0.0,
    *,
    name: str = "direction",
    site: str = "",
    notes: Mapping[str, Any] | None = None,
) -> FittedProbe:
    """A fitted linear probe from a bare direction: ``score = activations @ weight + bias``.

    Args:
        weight: ``(d,)`` real numbers of any library: integers become float64, half precision float32.
        bias: one real number, kept in float64.
        name: for reports.
        site: where its activations were read.
        notes: for the reader.

    Raises:
        ValueError: not a finite vector and one finite number: complex or masked values, NaN, inf, other shapes.
        TypeError: no numbers.
    """
    if notes is not None and not isinstance(notes, Mapping):
        raise TypeError(f"notes are a mapping, name -> what the reader should know; got {shown(notes)}")
    vector, offset = _real(weight, "weight"), _real(bias, "bias")
    # activations are scored in single precision, where larger numbers are infinite
    strange = int((~(np.abs(vector) <= np.finfo(np.float32).max)).sum())
    if vector.ndim != 1 or not len(vector) or strange:
        also = f" with {strange} entries that are NaN, inf or beyond single precision" if strange else ""
        raise ValueError(f"a direction is a finite vector of shape (d,), got shape {vector.shape}{also}")
    if offset.size != 1 or not np.abs(offset).max() <= np.finfo(np.float32).max:
        raise ValueError(
            f"the bias of a direction is one finite number within single precision, got {offset.tolist()!r:.99}"
        )
    parameters = {"weight": vector, "bias": offset.astype(float).reshape(())}
    return FittedProbe(_Direction(name), parameters, site, notes or {})


def _real(values: Any, what: str) -> np.ndarray:
    """Numbers of any library as numpy's, in single precision or better."""
    if backend_of(values) == "torch":
        # numpy knows no bfloat16
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() and values.element_size() < 4 else values
    if np.ma.is_masked(values):
        raise ValueError(f"the {what} of a direction has masked values, which have no number; fill them in")
    try:
        array = np.asarray(to_numpy(values))
        if array.dtype == object:
            array = array.astype(float)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"the {what} of a direction must be numbers, got {type(values).__name__} ({error})") from None
    if np.iscomplexobj(array):
        raise ValueError(f"the {what} of a direction must be real, got {array.dtype}; pass its real part")
    if array.dtype.kind in "biu":
        return array.astype(float)
    if array.dtype.kind not in "fV":
        raise TypeError(f"the {what} of a direction must be numbers, got {array.dtype}")
    return array.astype(float) if array.dtype.itemsize > 8 else array.astype(np.result_type(array.dtype, np.float32))


def check_recipe(probe: Any) -> None:
    """Refuse what is no recipe.

    Raises:
        TypeError: it has no ``name``, ``traits``, ``fit`` and ``score``; says what makes a probe of it.
    """
    if not isinstance(probe, Probe) or isinstance(probe, type):
        got = f"the class {probe.__name__}" if isinstance(probe, type) else type(probe).__name__
        raise TypeError(
            f"expected a fitted probe, a probe recipe, a registered name or a direction (numpy vector), "
            f"got {got}; elk_stress.wrap makes a probe of what scikit-learn, torch or jax gave you"
        )


def as_fitted(
    probe: FittedProbe | Probe | str | np.ndarray,
    activations: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    *,
    pairs: np.ndarray | None = None,
    prior: EllipticalPrior | None = None,
    behaviour: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    seed: int = 0,
    site: str = "",
) -> FittedProbe:
    """A fitted probe from a fitted probe, a bare direction, a recipe or a registered name (fitted here if needed).

    A recipe gets what it needs of ``prior``, ``behaviour`` and ``mask`` (:meth:`Probe.fit`), and nothing else of them.

    Raises:
        TypeError: none of these, or a recipe without data to fit it on.
        ValueError: bad data, or without what the recipe needs.
    """
    if isinstance(probe, FittedProbe):
        return probe
    if isinstance(probe, np.ndarray):
        return direction(probe, site=site)
    recipe = registry.load("probes", probe) if isinstance(probe, str) else probe
    check_recipe(recipe)
    if activations is None or labels is None:
        raise TypeError(f"probe {recipe.name!r} is not fitted; pass training activations and labels, or a fitted probe")
    traits = recipe.traits
    check_training_data(activations, labels, tokens=traits.tokens)
    needed: dict[str, Any] = {"prior": prior} if traits.needs_prior else {}
    needed |= {"behaviour": behaviour} if traits.needs_behaviour else {}
    for name, value in needed.items():
        if value is None:
            raise ValueError(
                f"probe {recipe.name!r} needs {name} to be fitted: {_NEEDS[name]}; pass {name}=, or stress the recipe "
                "on a testbed, which knows it"
            )
    if traits.tokens and mask is not None and mask.shape != activations.shape[:2]:
        raise ValueError(f"the mask must have one truth value per token, {activations.shape[:2]}; got {mask.shape}")
    needed |= {"mask": mask} if traits.tokens else {}
    fitted = recipe.fit(activations, labels, pairs=pairs, seed=seed, **needed)
    return replace(fitted, site=fitted.site or site, dim=activations.shape[-1])


_NEEDS = {
    "prior": "how differently the model could have thought (elk_stress.threats.priors.natural of items under contexts)",
    "behaviour": "Fisher factors (m, rank, d) of the model's output at the site (testbed.shift_factor)",
}
