"""What the kernels call the activations that configs name (`hidden_act`)."""

from __future__ import annotations

from stepwire_kernels.activation import Activation

KERNEL_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "swiglu_oai": "swiglu_oai",
}
