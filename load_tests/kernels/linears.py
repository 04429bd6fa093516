"""The linears of models whose launch shapes are measured: name -> (outputs, inputs) of one layer, and of the head.

From each model's config.json: heads, hidden and intermediate sizes, vocabulary.
"""

from __future__ import annotations

Linears = dict[str, tuple[int, int]]


def layer(hidden: int, heads: int, kv_heads: int, head_dim: int, inner: int, vocabulary: int) -> Linears:
    return {
        "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
        "o": (hidden, heads * head_dim),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "lm_head": (vocabulary, hidden),
    }


def share(linears: Linears, num_ranks: int) -> Linears:
    """What each of so many tensor-parallel ranks multiplies."""
    by_inputs = ("o", "down")
    return {name: (n, k // num_ranks) if name in by_inputs else (n // num_ranks, k) for name, (n, k) in linears.items()}


MODELS: dict[str, Linears] = {
    "qwen3-0.6b": layer(1024, 16, 8, 128, 3072, 151936),
    "llama-3.2-1b": layer(2048, 32, 8, 64, 8192, 128256),
    "llama-3.1-8b": layer(4096, 32, 8, 128, 14336, 128256),
    # Its experts are not linears of this kind.
    "qwen3-30b-a3b": {"qkv": (5120, 2048), "o": (2048, 4096), "router": (128, 2048), "lm_head": (151936, 2048)},
    "llama-3.2-3b": layer(3072, 24, 8, 128, 8192, 128256),
    "qwen3-4b": layer(2560, 32, 8, 128, 9728, 151936),
    "qwen2.5-7b": layer(3584, 28, 4, 128, 18944, 152064),
    "gemma-3-4b": layer(2560, 8, 4, 256, 10240, 262208),
}
MODELS |= {"llama-3.1-8b, 2 ranks": share(MODELS["llama-3.1-8b"], 2)}
LLAMA_8B_LAYER: Linears = {name: shape for name, shape in MODELS["llama-3.1-8b"].items() if name != "lm_head"}
# Measured to see how the choices of others serve them.
UNMEASURED: dict[str, Linears] = {
    "qwen3-8b": layer(4096, 32, 8, 128, 12288, 151936),
    "mistral-nemo-12b": layer(5120, 32, 8, 128, 14336, 131072),
    "gemma-2-9b": layer(3584, 16, 8, 256, 14336, 256000),
    "phi-4-mini": layer(3072, 24, 8, 128, 8192, 200064),
    "qwen2.5-1.5b": layer(1536, 12, 2, 128, 8960, 151936),
    "llama-3.1-8b, 4 ranks": share(MODELS["llama-3.1-8b"], 4),
    "llama-3.3-70b, 4 ranks": share(layer(8192, 64, 8, 128, 28672, 128256), 4),
}
