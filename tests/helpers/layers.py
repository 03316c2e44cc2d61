"""Quantized layers, and the dense ones that they stand for."""

import torch
from torch import nn

from quantize import QuantizedLinear, dequantize, group_for, quantize_layer


def make_layer(mode: str, n: int, k: int, group: int = 128, bias: bool = True) -> tuple[QuantizedLinear, nn.Linear]:
    """A quantized layer, and one with the weights that it stands for."""
    generator = torch.Generator().manual_seed(n + k)
    w = torch.randn(n, k, generator=generator) * k**-0.5
    with torch.device("meta"):
        layer = QuantizedLinear(nn.Linear(k, n, bias=bias), mode, k // group_for(k, group))
    parts, *_ = quantize_layer(w, mode, group_for(k, group))
    state = dict(zip(("weight", "scale", "zero"), parts))
    if bias:
        state["bias"] = torch.randn(n, generator=generator)
    layer.load_state_dict(state, assign=True)
    reference = nn.Linear(k, n, bias=bias)
    reference.load_state_dict({"weight": dequantize(*parts)} | ({"bias": state["bias"]} if bias else {}))
    return layer, reference.requires_grad_(False)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
