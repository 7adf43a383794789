r"""Bring your own probe: :func:`wrap` makes a fitted probe of what was trained elsewhere.

====================================  =====================================================================
object                                becomes
====================================  =====================================================================
fitted scikit-learn linear model,     ``direction``: one weight and bias; the scaler, PCA, imputer or selection
also behind affine transforms, under  before it is multiplied in. Also a transformer of one output, ``PCA(1)``
thresholds, searches, calibration     say, whose score is that output
scikit-learn ``MLP*``, likewise; a    ``layers``; the score is the logit, not the probability
linear one calibrated on some folds
any other scikit-learn estimator      opaque, no gradient: ``decision_function``, else the logit of
                                      ``predict_proba`` (clipped to [1e-6, 1 - 1e-6]: scores within +-13.8),
                                      else ``predict``
``torch.nn.Sequential`` (nested) of   ``layers``, or ``direction`` if all of it is affine; a sigmoid,
known layers                          softmax or log-softmax at the end is left off
any other ``torch.nn.Module``         opaque: a copy in eval mode, parameters frozen
jax or torch function ``(n, d) ->     opaque
(n,)``
numpy function ``(n, d) -> (n,)``     opaque, no gradient
``weight (d,)`` or ``(weight, bias)`` ``direction``
probelab's probes of one vector       as the torch modules that they are, their scaler included
====================================  =====================================================================

Signs: higher is more strongly positive. The positive of a classifier is ``classes_[1]``; what scikit-learn calls a
detector of outliers or a density, whose scores are high for the normal, is negated.

What is converted was compared with the object on 64
random rows at three scales before it is returned: it agrees within 1e-6 of the scores' size (double precision modules
and scikit-learn: 1e-8), or it is kept opaque.

What stays opaque is tried on random rows. It must score each row alone and twice the same, or it is refused with the
cause (:mod:`elk_stress.probing.rowwise`). It has a gradient only if torch's or jax's is the slope of its scores
(:mod:`.gradients`); ``notes["gradient"]`` says why not.

Converted probes are copies in numpy: they save, and do not follow later training. Opaque ones call the object.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from elk_stress.core.printable import check_name
from elk_stress.core.settings import setting
from elk_stress.probing.probe import FittedProbe, direction
from elk_stress.probing.wrapping.functions import from_function
from elk_stress.probing.wrapping.scikit_learn import from_sklearn, is_sklearn
from elk_stress.probing.wrapping.torch_modules import from_torch, is_torch_module

__all__ = ["wrap"]

_KINDS = (
    "a fitted scikit-learn estimator or pipeline, a torch.nn.Module, a jax or numpy function (n, d) -> (n,), a numpy "
    "direction (d,) or a pair (direction, bias)"
)


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
        ValueError: not fitted, more than two classes, another number of outputs, another width than ``dim``, or scores
            that are random or depend on the batch.
    """
    dim = setting("dim", dim, optional=True)
    if name is not None:
        check_name(name, "the name of a probe")
    if isinstance(obj, FittedProbe):
        return obj
    if isinstance(obj, type):
        raise TypeError(f"got the class {obj.__name__}; pass a fitted object of it")
    if is_torch_module(obj):
        probe = from_torch(obj, name, dim, site)
    elif is_sklearn(obj):
        probe = from_sklearn(obj, name, dim, site)
    elif callable(obj):
        probe = from_function(obj, name, dim, site)
    else:
        probe = _from_direction(obj, name, site)
    if dim is not None and probe.dim != dim:
        raise ValueError(
            f"{type(obj).__name__} reads {probe.dim} features, but dim={dim} was given; leave dim out, or read the "
            "activations that it was trained on"
        )
    return probe


def _from_direction(obj: Any, name: str | None, site: str) -> FittedProbe:
    pair = isinstance(obj, (tuple, list)) and len(obj) == 2 and np.ndim(obj[0]) > 0
    weight, bias = obj if pair else (obj, 0.0)
    if isinstance(obj, str) or not (hasattr(weight, "shape") or isinstance(weight, (tuple, list))):
        raise TypeError(f"cannot wrap {type(obj).__name__}; expected {_KINDS}")
    shape = tuple(np.shape(weight))
    if len(shape) == 2 and 1 in shape:
        weight = weight.reshape(-1) if hasattr(weight, "reshape") else np.ravel(weight)
    elif len(shape) != 1:
        raise ValueError(
            f"expected a direction (d,) and one bias, got shape {shape}; for several outputs pass the one direction "
            "that is the score"
        )
    notes = {"from": "direction", "as": "direction"}
    return direction(weight, bias, name=name or "direction", site=site, notes=notes)
