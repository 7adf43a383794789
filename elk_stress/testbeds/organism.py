r"""Model organisms: small networks, trained here, whose truth is known because their data were made.

An organism is a handful of pure jax functions of its weights,

    ``encode(weights, inputs) -> activations at the site``,  ``decode(weights, activations, rest) -> outputs``,

with ``loss`` (what it is trained on) and ``divergence`` (KL of its output distribution, nats). Everything that moves
weights needs only these; everything that moves activations (:class:`elk_stress.testbeds.protocol.Testbed`) is derived
from them here. Several models, one per seed, are trained together by ``vmap``; ``weights`` stacks them on a first axis.

A testbed is a file with one subclass that fills in the abstract methods and overrides nothing else.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from elk_stress.probing.probe import FittedProbe, direction
from elk_stress.testbeds.protocol import ContextSet, Items, SplitName

__all__ = ["Concept", "Inputs", "Organism", "TaskScore", "Trigger", "Weights"]

Weights = Any
"""A pytree of float32 arrays: one model's weights, or several models' stacked on a first axis."""
Inputs = Mapping[str, Any]
"""Arrays with one row per item; ``label`` (0 or 1) is among them, and ``group`` where entities recur."""
Trigger = Literal["none", "trained", "unrelated", "nonsense"]

_CONTEXT_SETS: tuple[ContextSet, ...] = ("fit", "prior", "observed")
_SPLITS: tuple[SplitName, ...] = ("train", "calibration", "test")
# draws of one context until it is another than all before: enough to find the last one of some dozens
_ATTEMPTS = 400


class Concept(NamedTuple):
    """Something else than the truth that a probe can be fitted to: its name and ``(n,)`` labels in {0, 1}."""

    name: str
    labels: Any


@dataclass(frozen=True)
class TaskScore:
    """How well the task was learned, per model, beside what no learning gives and what is demanded.

    Attributes:
        measure: what ``value`` is, e.g. ``accuracy of sensor 1``; higher is better.
        value: ``(models,)`` on fresh data.
        trivial: what a model that ignores its input scores.
        required: below this the organism is refused.
    """

    measure: str
    value: np.ndarray
    trivial: float
    required: float


@dataclass(frozen=True, kw_only=True)
class Organism(abc.ABC):
    """A network trained here on made data, as a testbed whose weights may also be moved.

    Attributes:
        n_models: models trained together, each from its own seed.
        model: the one that the testbed's activations, shifts and known probes are of.
        n_train, n_calibration, n_test: items for probes; classes are balanced.
        n_contexts: neutral contexts in each set.
        seed: all randomness.
        training_steps: Adam steps of ``batch_size`` fresh examples at ``learning_rate`` with cosine decay.
    """

    n_models: int = 8
    model: int = 0
    n_train: int = 512
    n_calibration: int = 256
    n_test: int = 512
    n_contexts: int = 12
    seed: int = 0
    training_steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 3e-3

    name: ClassVar[str]
    site: ClassVar[str]
    shift_cost: ClassVar[Literal["exact", "model", "none"]] = "model"

    def __post_init__(self) -> None:
        if self.n_models < 1 or not 0 <= self.model < self.n_models:
            raise ValueError(
                f"model is one of the n_models trained, 0 to {self.n_models - 1}; got model={self.model}, "
                f"n_models={self.n_models}"
            )
        for name in ("n_train", "n_calibration", "n_test", "n_contexts"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")

    # -- what a testbed file fills in: pure jax functions, one model, no model axis ----------------------------------

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Width of the activations at the site."""

    @abc.abstractmethod
    def initial(self, key: Any) -> Weights:
        """Untrained weights."""

    @abc.abstractmethod
    def batch(self, key: Any, n: int) -> Inputs:
        """``n`` fresh examples of what the model is trained on: no correlate of the truth beyond the task's own."""

    @abc.abstractmethod
    def examples(self, key: Any, n: int, split: SplitName) -> Inputs:
        """``n`` labelled items for probes, half of them positive; incidental correlates hold in ``train`` only.

        ``group`` names an item's entity; where it is missing every item is its own. No entity may cross splits.
        """

    @abc.abstractmethod
    def neutral(self, key: Any, inputs: Inputs) -> Inputs:
        """The same items in the neutral context that ``key`` draws (one context for all): what could as well have been
        the case without changing the truth."""

    @abc.abstractmethod
    def encode(self, weights: Weights, inputs: Inputs) -> tuple[Any, Any]:
        """``(activations (n, dim), rest)``; ``rest`` is whatever else ``decode`` reads, rows first."""

    @abc.abstractmethod
    def decode(self, weights: Weights, activations: Any, rest: Any) -> Any:
        """``(n, ...)`` outputs: parameters of a distribution."""

    @abc.abstractmethod
    def loss(self, outputs: Any, inputs: Inputs) -> Any:
        """``(n,)`` training loss."""

    @abc.abstractmethod
    def divergence(self, reference: Any, outputs: Any) -> Any:
        """``(n,)`` KL(reference, outputs) of the output distributions in nats."""

    @abc.abstractmethod
    def task_score(self, weights: Weights, key: Any) -> Any:
        """One model's score on fresh data: the number that :attr:`task` speaks of."""

    @property
    @abc.abstractmethod
    def task(self) -> tuple[str, float, float]:
        """``(measure, trivial, required)`` of :class:`TaskScore`."""

    @abc.abstractmethod
    def known_weights(self, weights: Weights) -> Mapping[str, tuple[np.ndarray, float]]:
        """``oracle`` and ``paper`` of one model as ``(weight (dim,), bias)``, numpy."""

    @abc.abstractmethod
    def concepts(self, inputs: Inputs) -> tuple[Concept, ...]:
        """What else can be probed for, the truth not among them; the order is fixed. May be empty."""

    @abc.abstractmethod
    def triggered(self, inputs: Inputs, trigger: Trigger) -> Inputs | None:
        """The inputs with a trigger (``none`` takes it off); ``None`` if this organism has no room for one."""

    # -- training ----------------------------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> Weights:
        """Trained weights of all models, numpy, stacked on a first axis. Trained on first use."""
        import jax
        import optax

        optimizer = optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.training_steps, 0.01))

        def mean_loss(weights: Weights, inputs: Inputs) -> Any:
            return self.loss(self.outputs(weights, inputs), inputs).mean()

        def one(key: Any) -> Weights:
            weights = self.initial(jax.random.fold_in(key, 0))

            def step(carry: Any, i: Any) -> Any:
                weights, state = carry
                inputs = self.batch(jax.random.fold_in(key, i + 1), self.batch_size)
                gradient = jax.grad(mean_loss)(weights, inputs)
                update, state = optimizer.update(gradient, state, weights)
                return (optax.apply_updates(weights, update), state), None

            steps = jax.numpy.arange(self.training_steps)
            (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), steps)
            return weights

        keys = jax.random.split(self.key("models"), self.n_models)
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(keys))

    @cached_property
    def learned(self) -> TaskScore:
        """How well each model learned its task, on fresh data."""
        import jax

        measure, trivial, required = self.task
        value = jax.jit(jax.vmap(self.task_score, in_axes=(0, None)))(self.weights, self.key("task score"))
        return TaskScore(measure, np.asarray(value, dtype=float), trivial, required)

    def prepare(self, progress: Any = None) -> None:
        """Train the models and make sure that they learned.

        Raises:
            RuntimeError: a model did not learn its task; says how far it came and the way out.
        """
        score = self.learned
        failed = np.flatnonzero(~(score.value >= score.required))
        if failed.size:
            raise RuntimeError(
                f"{failed.size} of {self.n_models} models of {self.name!r} did not learn: {score.measure} is "
                f"{np.array2string(score.value[failed], precision=3)} where {score.required:g} is required and no "
                f"learning gives {score.trivial:g}; raise training_steps (now {self.training_steps}) or change the seed"
            )

    def outputs(self, weights: Weights, inputs: Inputs) -> Any:
        """Outputs of one model: ``decode`` after ``encode``."""
        activations, rest = self.encode(weights, inputs)
        return self.decode(weights, activations, rest)

    def one_model(self, model: int) -> Weights:
        """One model's weights out of the stack."""
        import jax

        return jax.tree.map(lambda leaf: leaf[model], self.weights)

    def of_model(self, model: int) -> Organism:
        """The same organism as the testbed of another of its models; nothing is trained again."""
        other = replace(self, model=model)
        other.__dict__.update(
            {name: getattr(self, name) for name in ("weights", "learned", "splits", "_inputs", "_contexts")}
        )
        return other

    def known_probes_of(self, model: int) -> dict[str, FittedProbe]:
        """``oracle`` and ``paper`` of one model, each 0 halfway between the class means of calibration items."""
        import jax

        weights = self.one_model(model)
        activations = np.asarray(jax.jit(self.encode)(weights, self.probe_inputs("calibration"))[0], dtype=float)
        labels = self.splits["calibration"].labels
        found = {}
        for name, (weight, bias) in self.known_weights(weights).items():
            scores = activations @ np.asarray(weight, dtype=float) + bias
            middle = 0.5 * (scores[labels == 1].mean() + scores[labels == 0].mean())
            found[name] = direction(
                np.asarray(weight, dtype=np.float32), float(bias - middle), name=name, site=self.site
            )
        return found

    # -- the testbed protocol, for the chosen model -------------------------------------------------------------------

    @cached_property
    def splits(self) -> Mapping[SplitName, Items]:
        """Train, calibration and test items, classes balanced."""
        found: dict[SplitName, Items] = {}
        for split in _SPLITS:
            inputs = self.probe_inputs(split)
            labels = np.asarray(inputs["label"]).astype(int)
            n = len(labels)
            groups = np.asarray(inputs["group"]) if "group" in inputs else np.array([f"{split}/{i}" for i in range(n)])
            found[split] = Items(tuple(f"{split}/{i}" for i in range(n)), labels, groups)
        return found

    def probe_inputs(self, split: SplitName) -> Inputs:
        """The items of a split as inputs; the same every time."""
        if split not in self._inputs:
            size = {"train": self.n_train, "calibration": self.n_calibration, "test": self.n_test}[split]
            import jax

            # compiled as one: operation by operation jax would compile each of them
            made = jax.jit(lambda key: dict(self.examples(key, size, split)))(self.key("items", split))
            self._inputs[split] = jax.tree.map(np.asarray, made)
        return self._inputs[split]

    def activations(self, split: SplitName, contexts: ContextSet = "prior") -> np.ndarray:
        """``(n_items, n_contexts, dim)`` float32 of the chosen model."""
        return self._read[split, contexts]

    def shift(self, split: SplitName, items: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """KL in nats from the output at the origin to the output at origin + move, ``(p, n)``."""
        return np.asarray(self._shift(*self._origins(split, items), np.asarray(moves, np.float32)), dtype=float)

    def shift_factor(self, split: SplitName, items: np.ndarray) -> np.ndarray:
        """``(p, dim, dim)``: square roots of the Fisher matrices of the outputs with respect to the activations."""
        fisher = np.asarray(self._fisher(*self._origins(split, items)), dtype=float)
        values, vectors = np.linalg.eigh(0.5 * (fisher + fisher.swapaxes(1, 2)))
        return np.asarray(np.sqrt(np.maximum(values, 0.0))[:, :, None] * vectors.swapaxes(1, 2))

    def known_probes(self) -> Mapping[str, FittedProbe]:
        """``oracle`` and ``paper`` of the chosen model."""
        return self.known_probes_of(self.model)

    def describe(self) -> Mapping[str, Any]:
        """Options, sizes and how well the task was learned."""
        score = self.learned
        count = sum(int(np.prod(leaf.shape[1:])) for leaf in _leaves(self.weights))
        return {
            "testbed": self.name,
            "site": self.site,
            "splits": {split: len(items) for split, items in self.splits.items()},
            "n_weights": count,
            "task": {
                "measure": score.measure,
                "value": score.value.tolist(),
                "trivial": score.trivial,
                "required": score.required,
            },
            **asdict(self),
        }

    def fingerprint(self) -> str:
        """Identifies the data and the trained weights: the same options on the same machine give the same."""
        digest = hashlib.sha256(repr(sorted(asdict(self).items())).encode())
        for leaf in _leaves(self.weights):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()[:16]

    def key(self, *purpose: str) -> Any:
        """A jax key per purpose: drawing one thing never changes another."""
        import jax

        digest = hashlib.sha256("/".join((self.name, *purpose)).encode()).digest()
        return jax.random.fold_in(jax.random.key(self.seed), int.from_bytes(digest[:4], "big"))

    # -- private -----------------------------------------------------------------------------------------------------

    @cached_property
    def _inputs(self) -> dict[SplitName, Inputs]:
        return {}

    @cached_property
    def _read(self) -> _Reader:
        return _Reader(self)

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _contexts(self) -> dict[ContextSet, list[Any]]:
        """One key per context, shared by all splits: context c is the same circumstance for every item.

        Some organisms have few circumstances. A draw that gives a context which is there already, in whatever set, is
        made again: a prior from contexts that a probe was fitted on would credit it with bits that it does not have.
        """
        import jax

        inputs = dict(self.probe_inputs("calibration"))
        read = jax.jit(lambda key: dict(self.neutral(key, inputs)))
        seen: set[bytes] = set()
        found: dict[ContextSet, list[Any]] = {}
        for contexts in _CONTEXT_SETS:
            found[contexts] = []
            for c in range(self.n_contexts):
                for attempt in range(_ATTEMPTS):
                    again = (f"attempt {attempt}",) if attempt else ()
                    key = self.key("context", contexts, str(c), *again)
                    made = read(key)
                    content = b"".join(np.ascontiguousarray(made[name]).tobytes() for name in sorted(made))
                    if content not in seen:
                        break
                else:
                    raise ValueError(
                        f"{self.name} has fewer than {3 * self.n_contexts} different contexts, three sets of "
                        f"{self.n_contexts}; ask for a smaller n_contexts"
                    )
                seen.add(content)
                found[contexts].append(key)
        return found

    def _origins(self, split: SplitName, items: np.ndarray) -> tuple[Any, Any, Any]:
        """Weights, origins ``(p, dim)`` and the rest of the chosen items, bare."""
        import jax

        weights = self.one_model(self.model)
        chosen = np.asarray(items)
        origins = self.activations(split)[chosen].mean(axis=1)
        inputs = jax.tree.map(lambda leaf: leaf[chosen], dict(self.probe_inputs(split)))
        return weights, origins, jax.jit(self.encode)(weights, inputs)[1]

    def _shift(self, weights: Weights, origins: Any, rest: Any, moves: Any) -> Any:
        import jax

        if "shift" not in self._compiled:

            def one(weights: Weights, origin: Any, rest: Any, moves: Any) -> Any:
                row = jax.tree.map(lambda leaf: leaf[None], rest)
                many = jax.tree.map(lambda leaf: jax.numpy.repeat(leaf[None], moves.shape[0], axis=0), rest)
                reference = self.decode(weights, origin[None], row)
                moved = self.decode(weights, origin + moves, many)
                return self.divergence(jax.numpy.repeat(reference, moves.shape[0], axis=0), moved)

            self._compiled["shift"] = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0)))
        return self._compiled["shift"](weights, origins, rest, moves)

    def _fisher(self, weights: Weights, origins: Any, rest: Any) -> Any:
        """Fisher information of the outputs at the origins, ``(p, dim, dim)``: the Hessian of the divergence there."""
        import jax

        if "fisher" not in self._compiled:

            def one(weights: Weights, origin: Any, rest: Any) -> Any:
                row = jax.tree.map(lambda leaf: leaf[None], rest)

                def outputs(activation: Any) -> Any:
                    return self.decode(weights, activation[None], row)

                reference = outputs(origin)
                jacobian = jax.jacfwd(outputs)(origin).reshape(-1, origin.shape[0])

                def divergence(flat: Any) -> Any:
                    return self.divergence(reference, flat.reshape(reference.shape))[0]

                # Gauss-Newton: exact at the minimum, where the divergence has no slope
                return jacobian.T @ jax.hessian(divergence)(reference.reshape(-1)) @ jacobian

            self._compiled["fisher"] = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))
        return self._compiled["fisher"](weights, origins, rest)


class _Reader(dict[tuple[SplitName, ContextSet], np.ndarray]):
    """Activations of the chosen model by (split, context set), read once."""

    def __init__(self, organism: Organism) -> None:
        super().__init__()
        self._organism = organism

    def __missing__(self, asked: tuple[SplitName, ContextSet]) -> np.ndarray:
        import jax

        split, contexts = asked
        organism = self._organism
        if contexts not in (*_CONTEXT_SETS, "bare"):
            raise LookupError(f"{organism.name} has no context set {contexts!r}; it has fit, prior, observed and bare")
        inputs = dict(organism.probe_inputs(split))
        weights = organism.one_model(organism.model)
        encode = jax.jit(lambda weights, inputs: organism.encode(weights, inputs)[0])
        elsewhere = jax.jit(lambda weights, key, inputs: organism.encode(weights, organism.neutral(key, inputs))[0])
        if contexts == "bare":
            rows = [encode(weights, inputs)]
        else:
            rows = [elsewhere(weights, key, inputs) for key in organism._contexts[contexts]]
        made = np.stack([np.asarray(row, dtype=np.float32) for row in rows], axis=1)
        # one array serves every caller
        made.flags.writeable = False
        self[asked] = made
        return made


def _leaves(tree: Weights) -> list[np.ndarray]:
    import jax

    return list(jax.tree.leaves(tree))
