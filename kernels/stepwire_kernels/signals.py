"""Flags in memory that several devices map: a release makes what stands before it visible to whoever acquires it.

A flag holds the number of a round. Nobody waits for ever: every few thousand polls the host's `stop` word is read, and
once it is set waiting ends and what comes out is worthless.

Source: PTX ISA, "Memory consistency model": release and acquire at system scope.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How many polls pass between two looks at the host's word, which is across the bus.
POLLS_PER_LOOK = tl.constexpr(8192)


@triton.jit
def publish(flag_ptr, round_):
    """Everything that this program has stored so far is there for whoever sees `round_` in the flag."""
    # Every thread's stores must precede the one release that publishes them.
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, round_, sem="release", scope="sys")


@triton.jit
def _waits(flag_ptr, round_, EXACTLY: tl.constexpr):
    away = tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") - round_
    return away != 0 if EXACTLY else away < 0


@triton.jit
def await_round(flag_ptr, round_, stop_ptr, EXACTLY: tl.constexpr = False):
    """Block until the flag has reached `round_`; rounds wrap.

    EXACTLY: until it holds this very round: for flags that may be left alone for half of all rounds, after which one
    that is behind looks ahead.
    """
    polls = 0
    waits = _waits(flag_ptr, round_, EXACTLY)
    while waits:
        polls += 1
        stopped = tl.load(stop_ptr, mask=polls % POLLS_PER_LOOK == 0, other=0, volatile=True)
        waits = _waits(flag_ptr, round_, EXACTLY) & (stopped == 0)
    tl.debug_barrier()
