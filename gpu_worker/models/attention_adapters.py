"""Attention modules of transformers that do not go through its attention interface: here they do.

GPT, GPT-J, CodeGen and GPT-Neo have one method that attends; XGLM, Falcon, Bloom and MPT do it within their forward
pass, the last three with a bias that grows with the key's position (ALiBi, https://arxiv.org/abs/2108.12409). The
projections and rotations are the modules' own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

Attend = Callable[..., tuple[torch.Tensor, None]]
"""transformers' attention interface: (module, query, key, value, mask, **options) -> [1, num_tokens, heads, dim]."""


def adapt(model: Any, attend: Attend) -> None:
    """Make the attention modules of `model` call `attend`, those that are known here."""
    for module in model.modules():
        kind = type(module)
        adapter = _ADAPTERS.get(kind.__name__) or _ADAPTERS.get(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")
        if adapter is not None:
            adapter(module, attend, model.config)


def is_adapted(architecture: str) -> bool:
    """Whether models of this class are adapted; they are built with their eager attention."""
    return _name(architecture) in _MODELS


def _name(architecture: str) -> str:
    return architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")


def placeholder_mask(model: Any, device: torch.device | str) -> torch.Tensor | None:
    """A mask that is taken as it is, so that none is made of a step's tokens; None where ALiBi is made of it."""
    kind = _name(type(model).__name__)
    if kind in ("GPTJ", "CodeGen", "GPTNeo", "XGLM") or (kind == "Falcon" and not model.config.alibi):
        return torch.zeros(1, 1, 1, 1, device=device)
    return None


def _own(module: torch.nn.Module, name: str) -> Any:
    """A function of the file that a module's class is written in."""
    return getattr(sys.modules[type(module).__module__], name)


def _adapt_method(module: Any, attend: Attend, config: Any) -> None:
    """`_attn(query, key, value, ...)` of [1, heads, num_tokens, dim]."""
    is_neo = type(module).__name__ == "GPTNeoSelfAttention"
    scale = 1.0 if is_neo else module.head_dim**-0.5
    window = config.window_size if is_neo and config.attention_layers[module.layer_id] == "local" else None

    def attn(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        out, _ = attend(module, query, key, value, None, scaling=scale, sliding_window=window)
        return out.transpose(1, 2), None

    module._attn = attn


def _adapt_gpt(module: Any, attend: Attend, config: Any) -> None:
    """`_attn(query, key, value, ...)` of [1, heads, num_tokens, dim], but for the key: [1, heads, dim, num_tokens]."""
    scale = (module.split_size // module.n_head) ** -0.5 if module.scale else 1.0

    def attn(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        out, _ = attend(module, query, key.transpose(2, 3), value, None, scaling=scale)
        return [out.transpose(1, 2)]

    module._attn = attn


def _adapt_xglm(module: Any, attend: Attend, config: Any) -> None:
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        projections = (module.q_proj, module.k_proj, module.v_proj)
        heads = [project(hidden_states).unflatten(2, (module.num_heads, -1)).transpose(1, 2) for project in projections]
        out, _ = attend(module, *heads, None, scaling=module.scaling)
        return module.out_proj(out.flatten(2)), None

    module.forward = forward


def _adapt_falcon(module: Any, attend: Attend, config: Any) -> None:
    slopes = None
    if config.alibi:
        # Of two positions; transformers scales the bias like the scores.
        ones = torch.ones(1, 2, device="cpu")
        bias = _own(module, "build_alibi_tensor")(ones, module.num_heads, torch.float32)  # [heads, 1, 2]
        slopes = (bias[:, 0, 1] * module.inv_norm_factor).tolist()
    group = module.num_heads // module.num_kv_heads if module.new_decoder_architecture else 1

    def forward(hidden_states: torch.Tensor, alibi: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        split = module._split_heads(module.query_key_value(hidden_states))
        query, key, value = (part.transpose(1, 2) for part in split)  # [1, heads, num_tokens, head_dim]
        if slopes is None:
            query, key = _own(module, "apply_rotary_pos_emb")(query, key, *kwargs["position_embeddings"])
        # The newer models' keys come once for every query head of their group.
        key, value = key[:, ::group], value[:, ::group]
        out, _ = attend(module, query, key, value, None, scaling=module.inv_norm_factor, alibi_slopes=slopes)
        return module.dense(out.flatten(2)), None

    module.forward = forward


def _adapt_bloom(module: Any, attend: Attend, config: Any) -> None:
    slopes = _own(module, "_get_alibi_slopes")(module.num_heads, torch.device("cpu")).tolist()

    def forward(
        hidden_states: torch.Tensor, residual: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        out, _ = attend(module, query, key, value, None, scaling=module.inv_norm_factor, alibi_slopes=slopes)
        return module.dense(out.flatten(2)) + residual, None

    module.forward = forward


def _adapt_mpt(module: Any, attend: Attend, config: Any) -> None:
    bias = _own(module, "build_mpt_alibi_tensor")(
        module.n_heads, 2, config.attn_config.alibi_bias_max, device="cpu"
    )  # [heads, 1, 2]
    slopes = (-bias[:, 0, 0]).tolist()

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        mixed = module.Wqkv(hidden_states)
        if module.clip_qkv:
            mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        heads = [part.unflatten(2, (module.n_heads, -1)).transpose(1, 2) for part in mixed.chunk(3, dim=2)]
        out, _ = attend(module, *heads, None, scaling=module.softmax_scale, alibi_slopes=slopes)
        return module.out_proj(out.flatten(2)), None

    module.forward = forward


_ADAPTERS: dict[str, Callable[[Any, Attend, Any], None]] = {
    "GPTJAttention": _adapt_method,
    "CodeGenAttention": _adapt_method,
    "GPTNeoSelfAttention": _adapt_method,
    "modeling_openai.Attention": _adapt_gpt,
    "XGLMAttention": _adapt_xglm,
    "FalconAttention": _adapt_falcon,
    "BloomAttention": _adapt_bloom,
    "MptAttention": _adapt_mpt,
}
_MODELS = ("OpenAIGPT", "GPTJ", "CodeGen", "GPTNeo", "XGLM", "Falcon", "Bloom", "Mpt")
