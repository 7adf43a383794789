"""Linear layers through oneDNN instead of MKL: on processors that are not Intel's, 2 to 4 times faster in float32.

torch sends float32 matrix products to MKL, whose kernels are slow on other vendors' processors; oneDNN, which torch
ships too, generates code for the processor at hand. The arithmetic is float32 in both, only the order of summation
differs. :func:`use_onednn` replaces the forward pass of every plain linear layer of a frozen CPU model, after checking
that the operator exists in this version of torch and gives the same numbers; where it does not, nothing changes.
Gradients reach the activations (the weights are frozen).
"""

from __future__ import annotations

from typing import Any

__all__ = ["product", "use_onednn"]


def use_onednn(model: Any) -> bool:
    """Route the linear layers of a frozen float32 CPU model through oneDNN; whether that was possible."""
    import torch

    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    if not layers or any(m.weight.dtype != torch.float32 or m.weight.device.type != "cpu" for m in layers):
        return False
    if any(parameter.requires_grad for layer in layers for parameter in layer.parameters()) or not _works(layers[0]):
        return False
    linear = _linear()
    for layer in layers:
        setattr(layer, "forward", _forward(linear, layer))  # noqa: B010  (mypy refuses to assign to a method)
    return True


def product(x: Any, weight: Any, onednn: bool) -> Any:
    """``x @ weight.T`` without gradients, by oneDNN if it was found to work."""
    import torch

    if onednn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.nn.functional.linear(x, weight)


def _works(layer: Any) -> bool:
    """Whether this torch has the operator (it is internal, so this may change) and it agrees with torch's own."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, layer.in_features, generator=generator)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    return bool(torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())))


def _forward(linear: Any, layer: Any) -> Any:
    def forward(x: Any) -> Any:
        return linear.apply(x, layer.weight, layer.bias)

    return forward


def _linear() -> Any:
    import torch

    operator = torch.ops.mkldnn._linear_pointwise

    class OneDnnLinear(torch.autograd.Function):
        """``x W^T + b``, differentiable in x."""

        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
            ctx.save_for_backward(weight)
            return operator(x, weight, bias, "none", [], "")

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            (weight,) = ctx.saved_tensors
            return operator(gradient.contiguous(), weight.t(), None, "none", [], ""), None, None

    return OneDnnLinear
