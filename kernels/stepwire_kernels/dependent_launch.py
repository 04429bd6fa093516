"""Programmatic dependent launch: a kernel may start while the one before it in the stream still drains.

The rule every kernel here keeps when it is launched with ``pdl=True``: constants (weights, norm vectors, tables) may be
read at once, anything that an earlier kernel wrote only after `wait_upstream`, and each such kernel does wait, so that
"my predecessor has finished" implies "everything before it has finished". Needs compute capability 9.0.

A kernel may let the next one in as soon as it begins, or only after its own wait. In the latter case the next one finds
what all kernels before this one wrote, in level 2 (read it with `.cg`), before its own wait: `expert_gemv.py` does so.

What a step's plan writes (work lists, positions, slots) its layers may read at once as well: the embedding, or what a
stage receives, lies between and is launched without, as is a step's first kernel. So may KV of earlier steps' tokens.

Source: PTX ISA, ``griddepcontrol``; CUDA programming guide, "Programmatic Dependent Launch".
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def wait_upstream(USE_PDL: tl.constexpr):
    """Block until the kernels before this one have finished and their writes are visible."""
    if USE_PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_downstream(USE_PDL: tl.constexpr):
    """Allow the next kernel to be scheduled as soon as multiprocessors fall free."""
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_lines(addresses):
    """Begin to fetch the lines that some addresses lie in into the level-2 cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


def launch_options(pdl: bool) -> dict[str, Any]:
    """Keyword arguments for a Triton launch; empty without PDL, because older devices refuse the attribute."""
    return {"launch_pdl": True} if pdl else {}
