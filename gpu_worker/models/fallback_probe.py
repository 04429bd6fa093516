"""What a model of transformers asks of the paged attention, found out by running it on device meta, without memory.

Configs name heads, sizes, windows and scales differently, so the model is asked itself: its attention modules call the
attention interface (those that do not are made to, `attention_adapters.py`), and the calls are taken down. Layers that
keep a state of another kind are found on the way (`row_states.py`). Of models that attend in ways of their own it is
measured what a row keeps (`row_caches.py`). What cannot be served is refused with the reason.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.attention_adapters import adapt, is_adapted, placeholder_mask
from gpu_worker.models.hf_config import FULL, SLIDING
from gpu_worker.models.refusals import NotPaged, first_line, refused, unserved
from gpu_worker.models.row_caches import RowCacheSize, measure
from gpu_worker.models.row_states import INDIFFERENT, PLACES, StateProbe
from gpu_worker.models.served_config import auto_class
from gpu_worker.models.settled_rope import settle_rope
from gpu_worker.models.state_adapters import adapt_states

INTERFACE = "stepwire"
SLOT = "stepwire_slot"
# Not the number of heads of any model: what a layer gives for every token is told by it.
_PROBE_TOKENS = 13
# What attention functions are given beside q, k and v, as far as the paged backend has it or need not know it.
_CARRIED = {"scaling", "sliding_window", "softcap", "s_aux", "is_causal", "alibi_slopes"}
_ATTENTION_KINDS = {FULL, SLIDING}
# Kinds of layers that keep a state for a row, attend beside that, or do neither.
_HYBRID, _HYBRID_SLIDING = "hybrid", "hybrid_sliding"
_STATE_KINDS = {"linear_attention", "conv", _HYBRID, _HYBRID_SLIDING, "moe", "mlp"}
_WINDOWED_KINDS = {SLIDING, _HYBRID_SLIDING}


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer's attention asks for, shapes apart from the number of tokens."""

    module: str
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None
    softcap: float | None
    has_sinks: bool
    alibi_slopes: tuple[float, ...] | None = None
    """What a head's scores grow by with every position of the key. Keys then carry their position in two more
    dimensions, and queries what it is multiplied by: for the attention below it is a product like any other."""

    @property
    def head_dim(self) -> int:
        """Keys and values lie in one cache: the narrower of them is padded with zeros."""
        return max(self.key_dim + (2 if self.alibi_slopes else 0), self.value_dim)


@dataclass(frozen=True, slots=True)
class ModelLayers:
    """What the probe has found."""

    calls: tuple[AttentionCall, ...]
    """One a layer that attends."""
    states: Mapping[str, int]
    """Modules that keep a state for every row, and its bytes."""
    row_cache: RowCacheSize | None = None
    """It attends in a way of its own: rows run in caches of this size."""

    @property
    def row_state_bytes(self) -> int:
        """Of one row, whatever its length."""
        return sum(self.states.values()) if self.row_cache is None else self.row_cache.state_bytes

    @property
    def row_cache_dim(self) -> int:
        """Numbers that a row holds of each of its tokens in its own caches."""
        return 0 if self.row_cache is None else self.row_cache.numbers_per_token


@runtime_checkable
class Attends(Protocol):
    """What an attention module finds in its slot: who runs it, or who asks what it would do."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """query [1, num_heads, num_tokens, key_dim] -> [1, num_tokens, num_heads, value_dim]; keys and values alike."""
        ...


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; see its documentation for the shapes."""
    slot = module.__dict__.get(SLOT)
    if not isinstance(slot, Attends):
        raise RuntimeError(f"{type(module).__name__} asks for paged attention, and no step runs it")
    return slot.attend(module, query, key, value, attention_mask, options), None


class _Probe:
    """Takes down every call of the attention interface."""

    def __init__(self, architecture: str, names: dict[torch.nn.Module, str]) -> None:
        self.calls: list[AttentionCall] = []
        self._architecture, self._names = architecture, names

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        asked = {name for name, option in options.items() if option is not None} - _CARRIED - INDIFFERENT - PLACES
        if mask is not None:
            raise refused(self._architecture, "it makes an attention mask of its own")
        if asked:
            raise refused(self._architecture, f"its attention asks for {', '.join(sorted(asked))}")
        if options.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise refused(self._architecture, "its attention looks ahead, so it is no decoder")
        scale = options.get("scaling")
        self.calls.append(
            AttentionCall(
                module=self._names[module],
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                key_dim=query.shape[-1],
                value_dim=value.shape[-1],
                scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
                window=options.get("sliding_window"),
                softcap=options.get("softcap"),
                has_sinks=options.get("s_aux") is not None,
                alibi_slopes=None if options.get("alibi_slopes") is None else tuple(options["alibi_slopes"]),
            )
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])


def probe_layers(hf_config: Any, architecture: str, dtype: torch.dtype) -> ModelLayers:
    """Run the model on device meta, in `dtype`. What was found is remembered: of a large config that took seconds.

    Raises:
        ModelConfigError: neither the attention interface nor caches of its own carry this architecture; the message
            says why.
    """
    key = architecture, dtype, json.dumps(hf_config.to_dict(), sort_keys=True, default=str)
    if key not in _found:
        try:
            _found[key] = _run_on_meta(hf_config, architecture, dtype)
        except NotPaged as refusal:
            _found[key] = ModelLayers((), {}, _measure_rows(hf_config, architecture, dtype, refusal))
    return _found[key]


_found: dict[tuple[str, torch.dtype, str], ModelLayers] = {}


def _measure_rows(hf_config: Any, architecture: str, dtype: torch.dtype, refusal: ModelConfigError) -> RowCacheSize:
    model = _build(hf_config, architecture, dtype, attends_itself=True)
    _check_names(model, architecture)
    _leave_experts_out(model)
    trunk = trunk_of(model)
    try:
        with torch.inference_mode():
            size = measure(trunk, dtype)
    except Exception as error:  # code that looks at numbers, which there are none of here
        config = model.config.get_text_config()
        sizes = [getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size")]
        if not all(isinstance(size, int) for size in sizes):
            raise refusal from error
        return RowCacheSize(2 * config.num_hidden_layers * config.hidden_size, 0)
    if size is None:
        raise refusal
    return size


def _run_on_meta(hf_config: Any, architecture: str, dtype: torch.dtype) -> ModelLayers:
    model = _build(hf_config, architecture, dtype)
    _check_names(model, architecture)
    _check_class(model, architecture)
    adapt(model, paged_attention)
    adapt_states(model)
    _leave_experts_out(model)
    trunk = trunk_of(model)
    names = {module: name for name, module in model.named_modules()}
    probe = _Probe(architecture, names)
    for module in names:
        module.__dict__[SLOT] = probe
    try:
        with torch.inference_mode():
            output = _run_trunk(model, trunk)
            calls = tuple(probe.calls)
            attending = {call.module for call in calls}
            states = StateProbe(model, [module for module, name in names.items() if name in attending])
            if states.asked:
                _run_trunk(model, trunk)
            _check_layers(calls, list(states.kept), model, architecture)
            takers: list[None] = []

            def given(*args: Any, **kwargs: Any) -> Any:
                takers.append(None)
                return output

            trunk.forward = given
            model(inputs_embeds=output.last_hidden_state, use_cache=False)
    except ModelConfigError:
        raise
    except Exception as error:  # whatever code of others does with a tensor that has no values
        raise refused(architecture, f"its forward pass cannot be tried out ({first_line(error)})") from error
    if not takers:
        raise refused(architecture, "its head does not read what its decoder gives")
    return ModelLayers(calls, states.kept)


def _build(hf_config: Any, architecture: str, dtype: torch.dtype, *, attends_itself: bool = False) -> Any:
    from transformers import AttentionInterface

    AttentionInterface.register(INTERFACE, paged_attention)
    try:
        with torch.device("meta"):
            model = auto_class(architecture).from_config(
                hf_config,
                dtype=dtype,
                attn_implementation=None if attends_itself else attention_implementation(architecture),
                # The one whose sizes do not depend on what the router chooses, in any type.
                experts_implementation="batched_mm",
                trust_remote_code=False,
            )
    except KeyError as error:
        reason = "its attention does not go through the attention interface"
        raise refused(architecture, reason if error.args == (INTERFACE,) else f"transformers lacks {error}") from error
    except Exception as error:  # whatever a class says to a config that it does not like
        raise unserved(architecture, f"transformers cannot build it ({first_line(error)})") from error
    settle_rope(model, 0)
    return model


def _leave_experts_out(model: Any) -> None:
    """They neither attend nor keep a state, and some count on device meta how many tokens each of them gets."""
    for module in model.modules():
        if (
            type(module).__name__.endswith("Experts")
            and "hidden_states" in inspect.signature(module.forward).parameters
        ):
            module.forward = lambda hidden_states, *args, **kwargs: hidden_states


def _run_trunk(model: Any, trunk: Any) -> Any:
    places = {"position_ids": torch.arange(_PROBE_TOKENS, device="meta").unsqueeze(0)} if takes_positions(trunk) else {}
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device="meta")
    return trunk(input_ids=ids, attention_mask=placeholder_mask(model, "meta"), use_cache=False, **places)


def _check_names(model: Any, architecture: str) -> None:
    if type(model).__name__ != architecture:
        raise unserved(architecture, f"its model_type stands for {type(model).__name__}")
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        raise unserved(architecture, "it counts positions from its padding token on, and not from 0")


def _check_class(model: Any, architecture: str) -> None:
    # None of the layers may attend then, which is seen when they run.
    needs_no_attention = is_adapted(architecture) or _is_recurrent(model)
    if not needs_no_attention and not getattr(model, "_supports_flash_attn", False):
        raise refused(architecture, "its attention needs a mask, which the interface does not carry")
    if not needs_no_attention and not takes_positions(trunk_of(model)):
        raise refused(architecture, "it counts positions by itself, and takes no position_ids")


def _is_recurrent(model: Any) -> bool:
    """Whether its class keeps states and has no attention that could be another than its own."""
    return getattr(model, "_is_stateful", False) and not getattr(model, "_supports_flash_attn", False)


def _check_layers(calls: Sequence[AttentionCall], mixers: Sequence[str], model: Any, architecture: str) -> None:
    config = model.config.get_text_config()
    if _is_recurrent(model) and (calls or len(mixers) != config.num_hidden_layers):
        raise refused(architecture, "not all of its layers keep a state, and attention in others is its own")
    kinds = getattr(config, "layer_types", None)
    others = set(kinds or ()) - _ATTENTION_KINDS - (_STATE_KINDS if mixers else set())
    if others:
        raise refused(architecture, f"it has layers of the kinds {', '.join(sorted(others))}")
    if not mixers and getattr(model, "_is_stateful", False):
        raise refused(architecture, "it keeps a state for every sequence, which is no KV cache")
    within = set(trunk_of(model).modules())
    for name, module in model.named_modules():
        is_convolution = isinstance(module, torch.nn.modules.conv._ConvNd) and module in within
        if is_convolution and not any(name.startswith(f"{mixer}.") for mixer in mixers):
            raise refused(architecture, f"its {name} mixes neighbouring tokens")
    if _is_recurrent(model):
        return
    _check_calls(calls, None if mixers else config.num_hidden_layers, architecture)
    _check_windows(calls, config, kinds, trunk_of(model), architecture)


def _check_calls(calls: Sequence[AttentionCall], num_layers: int | None, architecture: str) -> None:
    """`num_layers`: how many are to attend; None: any number of them."""
    if not calls:
        raise refused(architecture, "its attention does not go through the attention interface")
    num_layers = num_layers or len(calls)
    if len(calls) != num_layers or len({call.module for call in calls}) != num_layers:
        raise refused(
            architecture,
            f"its {num_layers} layers attend {len(calls)} times, in {len({call.module for call in calls})} modules",
        )
    most = max(call.num_kv_heads for call in calls)
    if any(most % call.num_kv_heads or call.num_heads % most for call in calls):
        raise refused(architecture, "numbers of KV heads differ between its layers, and are no multiples")
    for field in ("num_heads", "softcap"):
        values = {getattr(call, field) for call in calls}
        if len(values) > 1:
            raise refused(architecture, f"{field} differs between its layers ({', '.join(map(str, sorted(values)))})")


def _check_windows(
    calls: Sequence[AttentionCall], config: Any, kinds: Sequence[str] | None, trunk: Any, architecture: str
) -> None:
    """Some models have their windows in the mask alone, of which the attention interface is told nothing here."""
    window = getattr(config, "sliding_window", None)
    if kinds is None or not _WINDOWED_KINDS & set(kinds):
        makes_window_masks = hasattr(sys.modules[type(trunk).__module__], "create_sliding_window_causal_mask")
        has_window = kinds is None and isinstance(window, int) and window < context_of(config)
        is_hidden = has_window and makes_window_masks and all(call.window is None for call in calls)
    else:
        attending = [kind for kind in kinds if kind in _ATTENTION_KINDS | {_HYBRID, _HYBRID_SLIDING}]
        is_hidden = any(
            kind in _WINDOWED_KINDS and call.window is None for kind, call in zip(attending, calls, strict=True)
        )
    if is_hidden:
        raise refused(architecture, f"its windows of {window} tokens are in its attention mask alone")


def trunk_of(model: Any) -> Any:
    """What makes hidden states of token ids; in some models `decoder` is a part of the head, or has one itself."""
    decoder = model.get_decoder()
    while hasattr(decoder, "lm_head"):
        decoder = decoder.get_decoder()
    is_trunk = "input_ids" in inspect.signature(decoder.forward).parameters
    return decoder if is_trunk else getattr(model, model.base_model_prefix)


def takes_positions(trunk: torch.nn.Module) -> bool:
    return "position_ids" in inspect.signature(trunk.forward).parameters


def context_of(config: Any, unnamed: int = 2048) -> int:
    """Positions that the model was made for; `unnamed`: where its config says nothing."""
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return unnamed


def attention_implementation(architecture: str) -> str:
    """What transformers is to build its attention with."""
    return "eager" if is_adapted(architecture) else INTERFACE
