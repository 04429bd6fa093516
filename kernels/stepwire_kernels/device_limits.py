"""What launch shapes depend on: how many multiprocessors a device has, and how much shared memory a program may have.

Shapes are measured on Hopper, whose programs may have 227 KiB. An A100's may have 163, those of compute capability 8.6,
8.9 and 12.0 no more than 99: a shape that asks for more does not run at all, so what is chosen is cut to fit.

Source: CUDA C++ programming guide, "Compute Capabilities".
"""

from __future__ import annotations

import functools

import torch

# What a kernel keeps beside its tiles, to sum and to turn them.
_BESIDE_TILES = 1024
# A bound for the interpreter, which has none.
_WITHOUT_A_GPU = 1 << 30
# Attention's shapes for Hopper fit into this, without descriptors.
_ROOMY = 160 * 1024


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 elsewhere, where the interpreter runs the programs one after another."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return _WITHOUT_A_GPU
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def is_roomy(device: torch.device) -> bool:
    """Whether a program may have as much as on an A100 or more, and not as little as on 8.6, 8.9 and 12.0."""
    return shared_memory(device) >= _ROOMY


def stages_that_fit(num_stages: int, stage_bytes: int, device: torch.device, *, by_descriptor: bool = False) -> int:
    """`num_stages` of a pipelined loop, or fewer.

    A loop of n stages holds the operands of n - 1 iterations, and those of n if they come by descriptor.
    """
    fitting = (shared_memory(device) - _BESIDE_TILES) // stage_bytes
    return min(num_stages, max(1, fitting if by_descriptor else 1 + fitting))


def has_tensor_memory(device: torch.device) -> bool:
    """Whether matrix units sum in a memory of their own, and take both operands of a product from shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
