"""Compiles many Triton kernels at once: a launch inside the context compiles its kernel and does not run it.

A model needs some twenty kernels before its first token, most of a second each from a cold cache; side by side they
take as long as the slowest few. Kernels that are compiled already cost a look-up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import KernelInterface

MAX_THREADS = 16


def _compile_instead(kernel: Any, grid: Any) -> Callable[..., Any]:
    return lambda *arguments, **options: kernel.run(*arguments, grid=grid, warmup=True, **options)


@contextmanager
def compile_in_parallel() -> Iterator[None]:
    """Main thread only; torch's own operations inside run as always.

    Triton compiles in threads where a kernel is only warmed up, and `kernel[grid]` always launches: the context stands
    in for that one operator, so that the code which launches need not be written twice.
    """
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    launch = KernelInterface.__getitem__
    with ThreadPoolExecutor(num_threads, thread_name_prefix="compile") as threads, triton.AsyncCompileMode(threads):
        KernelInterface.__getitem__ = _compile_instead
        try:
            yield
        finally:
            KernelInterface.__getitem__ = launch
