r"""Bring your own probe: :func:`wrap` makes a fitted probe of what was trained elsewhere.

====================================  =====================================================================
object                                becomes
====================================  =====================================================================
fitted scikit-learn linear model,     ``direction``: one weight and bias; the scaler, PCA or selection before
also behind affine transforms         it is multiplied in
scikit-learn ``MLP*``, likewise       ``layers``; the score is the logit, not the probability
any other scikit-learn estimator      opaque, no gradient: ``decision_function``, else the logit of
                                      ``predict_proba`` (clipped to [1e-6, 1 - 1e-6]: scores within +-13.8),
                                      else ``score_samples`` or ``predict``
``torch.nn.Sequential`` (nested) of   ``layers``, or ``direction`` if all of it is affine; a sigmoid,
known layers                          softmax or log-softmax at the end is left off
any other ``torch.nn.Module``         opaque with gradient: a copy in eval mode, parameters frozen
jax function ``(n, d) -> (n,)``       opaque with gradient
numpy function ``(n, d) -> (n,)``     opaque, no gradient
``weight (d,)`` or ``(weight, bias)`` ``direction``
probelab's probes of one vector       as the torch modules that they are, their scaler included
====================================  =====================================================================

Signs: higher is more strongly positive. The positive of a classifier is ``classes_[1]``; detectors of outliers and
densities, whose scores are high for the normal, are negated. What is converted was compared with the object on 64
random rows at three scales before it is returned: it agrees within 1e-6 of the scores' size (double precision modules
and scikit-learn: 1e-8), or it is kept opaque.

Converted probes are copies in numpy: they save, and do not follow later training. Opaque ones call the object.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from elk_stress.arrays import to_numpy
from elk_stress.layers import stacked
from elk_stress.opaque import Opaque
from elk_stress.probe import FittedProbe, direction

__all__ = ["wrap"]

_CLIP = 1e-6
# transforms that are affine whatever they were fitted to; what else they do (clipping) shows on the compared rows
_AFFINE = (
    "StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler", "PCA", "IncrementalPCA", "TruncatedSVD",
    "FactorAnalysis", "FastICA", "GaussianRandomProjection", "SparseRandomProjection", "LinearDiscriminantAnalysis",
)  # fmt: skip
_TORCH_ACTIVATIONS = {"ReLU": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid", "SiLU": "silu"}
_IGNORED = ("Identity", "Dropout", "Dropout1d", "AlphaDropout", "FeatureAlphaDropout", "Flatten")
_LAST = ("Sigmoid", "LogSigmoid", "Softmax", "LogSoftmax")
_KINDS = (
    "a fitted scikit-learn estimator or pipeline, a torch.nn.Module, a jax or numpy function (n, d) -> (n,), a numpy "
    "direction (d,) or a pair (direction, bias)"
)

Stack = list[tuple[str, Sequence[np.ndarray]]]


def wrap(obj: Any, *, name: str | None = None, dim: int | None = None, site: str = "") -> FittedProbe:
    """A fitted probe from a probe of your own; see the module for what becomes of what.

    Args:
        obj: a fitted probe (returned as it is), a fitted scikit-learn estimator or pipeline, a ``torch.nn.Module``, a
            jax or numpy function ``(n, d) -> (n,)``, a direction ``(d,)`` or ``(direction, bias)``. Two outputs are
            logits: the score is the second minus the first.
        name: for reports, where the probe is opaque or a direction.
        dim: width of the activations; needed for functions, and for modules that do not tell.
        site: where its activations were read.

    Returns:
        A fitted probe; ``notes["from"]`` and ``notes["as"]`` say what it was and what it became.

    Raises:
        TypeError: none of these, a class in place of an object, or no ``dim`` where it is needed.
        ValueError: not fitted, more than two classes, another number of outputs, or another width than ``dim``.
    """
    if isinstance(obj, FittedProbe):
        return obj
    if isinstance(obj, type):
        raise TypeError(f"got the class {obj.__name__}; pass a fitted object of it")
    if _is_torch_module(obj):
        probe = _from_torch(obj, name, dim, site)
    elif hasattr(obj, "get_params") and (hasattr(obj, "predict") or hasattr(obj, "score_samples")):
        probe = _from_sklearn(obj, name, dim, site)
    elif callable(obj):
        probe = _from_function(obj, name, dim, site)
    else:
        probe = _from_direction(obj, name, site)
    if dim is not None and probe.dim != dim:
        raise ValueError(
            f"{type(obj).__name__} reads {probe.dim} features, but dim={dim} was given; leave dim out, or read the "
            "activations that it was trained on"
        )
    return probe


# -- directions ---------------------------------------------------------------------------------------------------


def _from_direction(obj: Any, name: str | None, site: str) -> FittedProbe:
    pair = isinstance(obj, (tuple, list)) and len(obj) == 2 and np.ndim(obj[0]) > 0
    try:
        weight, bias = (np.asarray(to_numpy(x), dtype=float) for x in (obj if pair else (obj, 0.0)))
    except (TypeError, ValueError):
        raise TypeError(f"cannot wrap {type(obj).__name__}; expected {_KINDS}") from None
    if weight.ndim == 2 and 1 in weight.shape:
        weight = weight.ravel()
    if weight.ndim != 1 or bias.size != 1:
        raise ValueError(
            f"expected a direction (d,) and one bias, got shapes {weight.shape} and {bias.shape}; for several outputs "
            "pass the one direction that is the score"
        )
    notes = {"from": "direction", "as": "direction"}
    return direction(weight, float(bias.ravel()[0]), name=name or "direction", site=site, notes=notes)


# -- scikit-learn -------------------------------------------------------------------------------------------------


def _from_sklearn(obj: Any, name: str | None, dim: int | None, site: str) -> FittedProbe:
    from sklearn.base import is_clusterer
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    kind = type(obj).__name__
    steps = _steps(obj)
    try:
        for step in steps:
            check_is_fitted(step)
    except NotFittedError:
        raise ValueError(f"{kind} is not fitted; call its fit(activations, labels) first, then wrap it") from None
    last = steps[-1]
    if is_clusterer(last):
        raise TypeError(f"{kind} finds clusters and scores nothing; wrap a classifier, a regressor or a detector")
    classes = getattr(obj, "classes_", None)
    if classes is not None and (isinstance(classes, list) or len(classes) != 2):
        found = "several outputs" if isinstance(classes, list) else f"{len(classes)} classes {np.asarray(classes)!r}"
        raise ValueError(
            f"{kind} has {found}; a probe answers one question: fit it on two classes, of which the second "
            "(classes_[1]) is the positive"
        )
    width = next((int(s.n_features_in_) for s in steps if hasattr(s, "n_features_in_")), dim)
    if width is None:
        raise TypeError(f"{kind} does not tell how many features it reads; pass dim=")
    score, how = _sklearn_score(obj, last)
    notes = {"from": kind, "score": how}
    if classes is not None:
        notes["positive"] = str(np.asarray(classes)[1])
    stack = _sklearn_layers(steps, width)
    if stack is not None:
        made = _named(stacked(stack, dim=width, site=site), name or kind, notes)
        # probabilities resolve logits up to the clip
        limit = math.log(1 / _CLIP - 1) if how.startswith("logit") else math.inf
        if _agrees(made, score, 1e-8, limit):
            return made
    recipe = Opaque(name or kind, score, "numpy", False)
    checked = np.asarray(score(np.zeros((3, width))))
    if checked.shape != (3,):
        raise ValueError(f"{kind} gives {checked.shape[1:]} outputs a row; a probe has one score: fit it on one target")
    return FittedProbe(recipe, {}, site, {**notes, "as": "opaque, without a gradient"}, width)


def _steps(obj: Any) -> list[Any]:
    """Transforms and the estimator at their end, searches and nested pipelines opened; ``passthrough`` left out."""
    if hasattr(obj, "best_estimator_"):
        return _steps(obj.best_estimator_)
    if hasattr(obj, "steps") and hasattr(obj, "named_steps"):
        kept = [step for _, step in obj.steps if step is not None and not isinstance(step, str)]
        return [part for step in kept for part in _steps(step)]
    return [obj]


def _sklearn_score(obj: Any, last: Any) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """The score of numpy rows, higher = more strongly positive, and how it is read."""
    from sklearn.base import is_outlier_detector

    # densities know only what is normal; mixtures would offer the components' responsibilities as probabilities
    density = not hasattr(obj, "classes_") and hasattr(obj, "score_samples")
    sign = -1.0 if is_outlier_detector(last) or density else 1.0
    prefix = "-" if sign < 0 else ""

    def reading(method: str, after: Callable[[Any], Any] = lambda y: y) -> Callable[[np.ndarray], np.ndarray]:
        read = getattr(obj, method)
        # some estimators look for float64, rows in order, writable
        return lambda x: sign * np.asarray(after(read(np.array(x, dtype=float, order="C"))), dtype=float)

    if hasattr(obj, "decision_function"):
        return reading("decision_function"), f"{prefix}decision_function"
    if hasattr(obj, "predict_proba") and not density:

        def logit(p: np.ndarray) -> np.ndarray:
            share = np.clip(np.asarray(p)[:, 1], _CLIP, 1 - _CLIP)
            return np.asarray(np.log(share) - np.log1p(-share))

        return reading("predict_proba", logit), f"logit of predict_proba, clipped to [{_CLIP:g}, 1 - {_CLIP:g}]"
    if density:
        return reading("score_samples"), f"{prefix}score_samples"
    if hasattr(obj, "classes_"):
        positive = obj.classes_[1]
        return reading("predict", lambda y: np.where(np.asarray(y) == positive, 1.0, -1.0)), "predict, as +1 and -1"
    if sign < 0:
        return reading("predict"), "-predict"

    def column(y: np.ndarray) -> np.ndarray:
        y = np.asarray(y)
        return np.asarray(y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y)

    return reading("predict", column), "predict"


def _sklearn_layers(steps: Sequence[Any], width: int) -> Stack | None:
    """The estimator behind its transforms as layers, or ``None`` where a part is not affine or unknown."""
    from sklearn.feature_selection import SelectorMixin

    found: Stack = []
    for step in steps[:-1]:
        if type(step).__name__ not in _AFFINE and not isinstance(step, SelectorMixin):
            return None
        # an affine map is what it does to the origin and to the axes
        rows = np.asarray(_dense(step.transform(np.concatenate([np.zeros((1, width)), np.eye(width)]))), dtype=float)
        found.append(("affine", (rows[1:] - rows[0], rows[0])))
        width = rows.shape[1]
    last = steps[-1]
    if hasattr(last, "coefs_") and hasattr(last, "intercepts_"):
        hidden = {"identity": None, "relu": "relu", "tanh": "tanh", "logistic": "sigmoid"}
        if last.activation not in hidden or last.out_activation_ not in ("identity", "logistic"):
            return None
        for k, (weight, bias) in enumerate(zip(last.coefs_, last.intercepts_, strict=True)):
            name = hidden[last.activation]
            if k and name is not None:
                found.append((name, ()))
            found.append(("affine", (weight, bias)))
        return found if last.coefs_[-1].shape[1] == 1 else None
    weight, bias = getattr(last, "coef_", None), getattr(last, "intercept_", 0.0)
    if weight is None or np.size(bias) != 1 or _dense(weight).size != width:
        return None
    found.append(("affine", (np.reshape(_dense(weight), (width, 1)), np.reshape(bias, 1))))
    return found


def _dense(array: Any) -> np.ndarray:
    return np.asarray(array.toarray() if hasattr(array, "toarray") else array)


# -- torch --------------------------------------------------------------------------------------------------------


def _is_torch_module(obj: Any) -> bool:
    return "torch" in sys.modules and isinstance(obj, sys.modules["torch"].nn.Module)


def _from_torch(module: Any, name: str | None, dim: int | None, site: str) -> FittedProbe:
    import copy

    import torch

    kind = type(module).__name__
    if getattr(module, "initialized", True) is False:
        raise ValueError(f"{kind} is not fitted; call its fit first, then wrap it")
    # a copy: neither the caller's training nor ours reaches over
    frozen = copy.deepcopy(module).eval().requires_grad_(False)
    held = [t for t in [*frozen.parameters(), *frozen.buffers()] if t.is_floating_point() and t.numel()]
    dtype, device = (held[0].dtype, held[0].device) if held else (torch.float32, torch.device("cpu"))
    layers = _torch_layers(frozen)
    width = dim or _torch_width(frozen)
    if width is None:
        raise TypeError(f"{kind} does not tell how many features it reads; pass dim=")

    def outputs(x: Any) -> Any:
        return _one_score(frozen(x), x.shape[0], kind)

    try:
        with torch.no_grad():
            outputs(torch.zeros((3, width), dtype=dtype, device=device))
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{kind} does not score rows of {width} features, shape (n, {width}): {type(error).__name__}: {error}; "
            "pass dim=, or wrap a function that calls it as it wants to be called"
        ) from error
    opaque = Opaque(name or kind, outputs, "torch", True, str(dtype).removeprefix("torch."), str(device))
    notes, ending = {"from": kind, "score": "output"}, ""
    if layers is not None:
        layers, ending = _without_ending(layers)
    if layers is not None and not any(layer.startswith("end:") for layer, _ in layers):
        made = _named(stacked(layers, dim=width, site=site), name or kind, {**notes, "score": f"output{ending}"})
        # with an ending left off it is what comes before the ending that must agree
        reference = opaque._values if not ending else _before(frozen, opaque)
        if _agrees(made, reference, 1e-8 if dtype is torch.float64 else 1e-6):
            return made
    return FittedProbe(opaque, {}, site, {**notes, "as": "opaque, with a gradient by torch"}, width)


def _before(frozen: Any, opaque: Opaque) -> Callable[[np.ndarray], np.ndarray]:
    """The module without its last layer (a nested one's, if need be), scored."""
    import torch

    flat = _flat(frozen)
    while type(flat[-1]).__name__ in (*_IGNORED, *_LAST):
        ended = type(flat[-1]).__name__ in _LAST
        flat = flat[:-1]
        if ended:
            break
    inner = torch.nn.Sequential(*flat)
    short = Opaque("inner", lambda x: _one_score(inner(x), len(x), "inner"), "torch", True, opaque.dtype, opaque.device)
    return short._values


def _one_score(y: Any, n: int, kind: str) -> Any:
    """``(n,)`` of a module's or function's output: one column as it is, of two the second minus the first."""
    shape = tuple(getattr(y, "shape", ()))
    if shape == (n,):
        return y
    if shape == () and n == 1:
        return y.reshape(1)
    if shape == (n, 1):
        return y[:, 0]
    if shape == (n, 2):
        return y[:, 1] - y[:, 0]
    got = shape if hasattr(y, "shape") else type(y).__name__
    raise ValueError(
        f"{kind} gives {got} for {n} rows; a probe gives ({n},) or ({n}, 1), or two logits ({n}, 2), of which the "
        "score is the second minus the first; wrap a function that picks the one score"
    )


def _flat(module: Any) -> list[Any]:
    import torch

    if type(module) is torch.nn.Sequential:
        return [part for child in module for part in _flat(child)]
    return [module]


def _torch_layers(module: Any) -> Stack | None:
    """Layers of a (nested) ``Sequential`` or a known probe of another library; ``None`` where one is unknown."""
    known = _probelab_layers(module)
    if known is not None:
        return known
    found: Stack = []
    for part in _flat(module):
        layer = _torch_layer(part)
        if layer is None:
            return None
        found += layer
    return found


def _torch_layer(part: Any) -> Stack | None:
    # exactly these classes: a subclass may compute something else
    if not type(part).__module__.startswith("torch.nn.") or part._forward_hooks or part._forward_pre_hooks:
        return None
    kind = type(part).__name__
    if kind in _IGNORED:
        return []
    if kind in _TORCH_ACTIVATIONS:
        return [(_TORCH_ACTIVATIONS[kind], ())]
    if kind in _LAST:
        return [(f"end:{kind}", ())]
    if kind == "GELU":
        return [("gelu" if part.approximate == "none" else "gelu_tanh", ())]
    if kind == "LeakyReLU":
        return [(f"leaky_relu:{part.negative_slope!r}", ())]
    if kind == "Linear":
        weight = _numbers(part.weight)
        bias = np.zeros(len(weight)) if part.bias is None else _numbers(part.bias)
        return [("affine", (weight.T, bias))]
    if kind == "LayerNorm" and len(part.normalized_shape) == 1:
        d = part.normalized_shape[0]
        weight = np.ones(d) if part.weight is None else _numbers(part.weight)
        bias = np.zeros(d) if part.bias is None else _numbers(part.bias)
        return [(f"layer_norm:{part.eps!r}", (weight, bias))]
    if kind == "BatchNorm1d" and part.running_var is not None:
        scale = 1 / np.sqrt(_numbers(part.running_var) + part.eps)
        shift = -_numbers(part.running_mean) * scale
        if part.weight is not None:
            weight = _numbers(part.weight)
            scale, shift = scale * weight, shift * weight + _numbers(part.bias)
        return [("scale", (scale, shift))]
    return None


def _without_ending(layers: Stack) -> tuple[Stack, str]:
    """The layers up to a sigmoid or softmax at their end: what they squash is the logit."""
    if layers and layers[-1][0] in ("sigmoid", "end:Sigmoid", "end:LogSigmoid", "end:Softmax", "end:LogSoftmax"):
        return layers[:-1], " before the last squashing"
    return layers, ""


def _numbers(tensor: Any) -> np.ndarray:
    return np.asarray(to_numpy(tensor.detach().cpu().double()), dtype=float)


def _torch_width(module: Any) -> int | None:
    """How many features the first layer that tells reads."""
    for part in module.modules():
        for name in ("in_features", "num_features"):
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
        shape = getattr(part, "normalized_shape", None)
        if shape is not None:
            return int(shape[-1])
    for name in ("direction", "scaler_mean", "weight"):
        held = getattr(module, name, None)
        if held is not None and getattr(held, "ndim", 0) == 1:
            return int(held.shape[0])
    return None


def _probelab_layers(module: Any) -> Stack | None:
    """probelab's ``Logistic``, ``MassMean`` and ``MLP`` by their parts; its others are kept opaque."""
    if not type(module).__module__.startswith("probelab."):
        return None
    kind = type(module).__name__
    if kind == "Logistic":
        std = _numbers(module.scaler_std)
        linear = _torch_layer(module.linear)
        return None if linear is None else [("scale", (1 / std, -_numbers(module.scaler_mean) / std)), *linear]
    if kind == "MassMean":
        weight = _numbers(module.direction)
        bias = _numbers(module.bias).reshape(1) - _numbers(module.global_mean) @ weight
        return [("affine", (weight[:, None], bias))]
    if kind == "MLP":
        parts = [_torch_layer(p) for p in (module.fc1, module.activation_layer, module.fc2)]
        return [layer for part in parts if part is not None for layer in part]
    return None


# -- functions ----------------------------------------------------------------------------------------------------


def _from_function(function: Callable[[Any], Any], name: str | None, dim: int | None, site: str) -> FittedProbe:
    called = name or str(getattr(function, "__name__", type(function).__name__))
    if called == "<lambda>":
        called = "function"
    if dim is None:
        raise TypeError(f"a function does not tell how many features it reads; pass wrap({called}, dim=...)")
    x = np.random.default_rng(np.random.SeedSequence([0x3A9])).standard_normal((3, dim))

    def score(rows: Any) -> Any:
        return _one_score(function(rows), rows.shape[0], called)

    failed: dict[str, Exception] = {}
    for library, attempt in (("jax", _trace_jax), ("numpy", _call_numpy), ("torch", _call_torch)):
        try:
            attempt(score, x)
        except ImportError:
            continue
        except Exception as error:  # whatever somebody's function raises at arrays that it was not written for
            failed[library] = error
            continue
        gradient = library != "numpy"
        notes = {"from": f"{library} function", "score": "output"}
        how = f"opaque, with a gradient by {library}" if gradient else "opaque, without a gradient"
        recipe = Opaque(called, score, library, gradient, "float32")  # type: ignore[arg-type]
        return FittedProbe(recipe, {}, site, {**notes, "as": how}, dim)
    told = "; ".join(f"{library}: {type(error).__name__}: {str(error)[:200]}" for library, error in failed.items())
    raise ValueError(
        f"{called} does not map rows (3, {dim}) to scores (3,) in any library ({told}); pass a function of the whole "
        "batch, and its width as dim="
    )


def _trace_jax(score: Callable[[Any], Any], x: np.ndarray) -> None:
    import jax

    rows = jax.ShapeDtypeStruct(x.shape, np.float32)  # type: ignore[no-untyped-call]
    out = jax.eval_shape(score, rows)
    if not np.issubdtype(out.dtype, np.floating):
        raise TypeError(f"scores are {out.dtype}, which has no gradient")


def _call_numpy(score: Callable[[Any], Any], x: np.ndarray) -> None:
    out = score(x)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"scores are {type(out).__name__}")


def _call_torch(score: Callable[[Any], Any], x: np.ndarray) -> None:
    if "torch" not in sys.modules:
        raise ImportError("torch")
    import torch

    rows = torch.as_tensor(x, dtype=torch.float32).requires_grad_(True)
    torch.autograd.grad(score(rows).sum(), rows)


# -- both ---------------------------------------------------------------------------------------------------------


def _named(probe: FittedProbe, name: str, notes: dict[str, Any]) -> FittedProbe:
    """A converted probe with its notes; a direction also takes the name."""
    notes = {**notes, "as": probe.name}
    if probe.traits.linear:
        weight, bias = probe.parameters["weight"], float(probe.parameters["bias"])
        return direction(weight, bias, name=name, site=probe.site, notes=notes)
    return FittedProbe(probe.probe, probe.parameters, probe.site, notes, probe.dim)


def _agrees(
    made: FittedProbe, score: Callable[[np.ndarray], np.ndarray], tolerance: float, limit: float = math.inf
) -> bool:
    """Whether the converted probe scores as the object does, near the origin and far from it."""
    assert made.dim is not None
    rng = np.random.default_rng(np.random.SeedSequence([0xA6E]))
    for scale in (0.1, 1.0, 10.0):
        x = scale * rng.standard_normal((64, made.dim))
        expected, got = (
            np.asarray(score(x), dtype=float),
            np.clip(np.asarray(made.score(x), dtype=float), -limit, limit),
        )
        if expected.shape != got.shape or not np.isfinite(got).all():
            return False
        size = 1.0 + float(np.abs(expected).max())
        if float(np.abs(expected - got).max()) > tolerance * size:
            return False
    return True
