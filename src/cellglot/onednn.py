"""Linear layers on the CPU by oneDNN instead of MKL, for models as they are.

torch computes float32 linear layers with MKL, which leaves the AVX-512 units of AMD processors idle: on two Zen 5 cores
215 GFLOP/s against oneDNN's 485 (4,096 tokens, width 256; `benchmarks/perturbation.py` measures both).
"""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class OneDNNLinear(TorchFunctionMode):
    """Within this context, float32 linear layers on the CPU run as 1x1 convolutions, which torch gives to oneDNN.

    Values and gradients are the same up to the order of float32 sums. Other devices, precisions and kinds of weights
    (quantized ones), and builds of torch without oneDNN, are left as they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and not kwargs and _for_onednn(*args):
            return linear(*args)
        return func(*args, **(kwargs or {}))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias, as a convolution. x (..., in) contiguous; weight (out, in). Returns (..., out)."""
    # One image of 1 x tokens pixels: tokens end to end are its channels-last layout, so nothing is copied.
    image = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = nn.functional.conv2d(image, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _for_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (torch.Tensor, nn.Parameter)
        and x.numel() > 0
        and len(weight) > 0
        and torch.backends.mkldnn.is_available()
    )
