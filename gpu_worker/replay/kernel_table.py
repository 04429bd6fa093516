"""Which part of a step an operation belongs to, by its name: the one table of the profile.

On a GPU names are those of kernels and copies; on a CPU those of the ranges that `annotations` puts around layers.
"""

from __future__ import annotations

import re

INPUT, ATTENTION, LINEARS, SAMPLER, RANKS, OTHER = "input", "attention", "linears", "sampler", "ranks", "other"
PARTS = (INPUT, ATTENTION, LINEARS, SAMPLER, RANKS, OTHER)

# The first that matches. Kernels of stepwire_kernels first, then those of the libraries that torch calls.
_TABLE = tuple(
    (part, re.compile(pattern))
    for part, pattern in (
        # What ranks exchange, with the time that one waits for another.
        (
            RANKS,
            r"_all_reduce_kernel|_add_sent_|_send_rows_|_receive_rows_|_parts_kernel|_put_together_|nccl|memcpy ptop",
        ),
        (INPUT, r"_apply_delta_|_build_input_|_list_kernel|memcpy|memset|^input\b"),
        (
            SAMPLER,
            r"_score_kernel|_candidates_|_finish_kernel|_top_logprobs_|_recount_|_write_back_|_pack_result_|_message_",
        ),
        (SAMPLER, r"^sampler$"),
        (
            ATTENTION,
            r"_causal_conv_|_delta_|_gated_norm_|_gate_heads_|_without_gates_|_decode_kernel|_from_qkv_|_prefill_kernel|_combine_kernel|_rope_kv_|_latent_|^attention\.run$|flash",
        ),
        (
            LINEARS,
            r"_gemv_|_skinny_|_fused_linear_|_invariant_|_stream_kernel|_tile_kernel|_tile_linear_|_wgmma_kernel|_dense_kernel"
            r"|_in_flight_kernel|_ring_kernel|_scaled_kernel|_quantize_",
        ),
        # Experts: products that are grouped, and their sum.
        (LINEARS, r"_gate_up_kernel|_down_kernel|_sum_kernel|_scaled_expert_"),
        (LINEARS, r"gemm|gemv|cutlass|cublas|nvjet|splitk|xmma"),
        (LINEARS, r"^layer (.*\.)?(qkv|output|gate_up|up|down|head|inputs|pairs)$"),
    )
)


def part_of(name: str) -> str:
    """One of `PARTS`."""
    lowered = name.lower()
    for part, pattern in _TABLE:
        if pattern.search(lowered):
            return part
    return OTHER
