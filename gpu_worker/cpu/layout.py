"""Memory that Python fills and kernels read: the fields of a job, of a layer and of a step, each 8 bytes.

A field is an int64 (an address, a count) or a float64; its place is its number here.
"""

from __future__ import annotations

from typing import Final

# A linear's tile: rows and outputs.
TILE_ROWS: Final = 4
TILE_OUTPUTS: Final = 3
# Rows that meet an item's weights before the next rows do, and inputs whose weights are staged at a time: what they
# take stays in the second and the first cache.
BLOCK_ROWS: Final = 64
STAGED_INPUTS: Final = 768

# The product of small matrices: rows and columns at a time. And the rows and columns that are turned at a time.
PANEL_ROWS: Final = 6
PANEL_COLUMNS: Final = 16
TURNED: Final = 8
# Rows and inputs of a large linear that meet a panel of weights: it stays in the first cache, they in the second.
LARGE_ROWS: Final = 252
PANEL_INPUTS: Final = 384
LINEAR_BUFFER_BYTES: Final = 4 * max(
    TILE_OUTPUTS * (STAGED_INPUTS + BLOCK_ROWS), PANEL_COLUMNS * (PANEL_INPUTS + LARGE_ROWS)
)
# Keys that a tile of queries meets at a time.
PREFILL_KEYS: Final = 32
# Queries of a run that one item attends for.
PREFILL_QUERIES: Final = 32
# Keys of a row that one item attends to, about: whole blocks.
SPAN_KEYS: Final = 256


class LAYER:
    """One layer's attention."""

    NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 0, 1, 2
    QUERY_NORM, KEY_NORM = 3, 4  # addresses of bfloat16 weights; 0: no norm
    QUERY_EPS, KEY_EPS, NORM_OFFSET = 5, 6, 7  # floats
    NUM_PAIRS, INTERLEAVED = 8, 9
    COS, SIN = 10, 11  # float32 [max_position, num_pairs]
    SCALE, SOFTCAP = 12, 13  # floats; softcap 0: none
    WINDOW = 14  # tokens that a query sees
    SINKS = 15  # float32 [num_heads]; 0: none
    NUM_BLOCKS, BLOCK_SIZE = 16, 17
    CACHE = 18
    FIRST_VALUE = 19  # head of a token's projection that has the first value; 0: keys and values are cached already
    VALUE_NORM, VALUE_EPS = 20, 21  # as of queries and keys
    SIZE = 22


class STEP:
    """What a step's layers with one window share."""

    TABLES, TABLE_STRIDE = 0, 1  # int64 [num_rows, stride]
    POSITIONS, SLOTS = 2, 3  # int64 [num_tokens]
    NUM_SPANS, SPANS, SPAN_KEYS = 4, 5, 6  # int64 [num_spans, 4]: row, first key, stop, place among the parts or -1
    MERGES = 7  # int64 [1 + 3 * n]: n, then row, first part and number of parts of each
    NUM_TILES, TILES = 8, 9  # int64 [num_tiles, 4]: row, first token, number of queries, position of the first
    FIRST_PREFILL, NUM_PREFILL = 10, 11  # tokens of longer runs
    SIZE = 12


class KIND:
    """What a job's items are."""

    MULTIPLY, NORM, GATE, DECODE, STORE, PREFILL, MULTIPLY_LARGE, WIDEN = range(8)


class TEAM:
    """What threads wait on is in a cache line of its own."""

    TICKET = 0  # number of the job << 32 | items that nobody has taken
    NUM_DONE = 8
    ENDS = 16
    NUM_THREADS, BUFFERS, BUFFER_BYTES = 24, 25, 26  # BUFFERS: address of the first thread's
    KERNELS = 32  # address of the kernel of each kind
    JOB_KIND, JOB_NUM_ITEMS = 40, 41
    JOB = 48  # arguments, as the kernel of its kind has them
    IS_PARKED = 72  # one line a thread
    LINE = 8
