"""Any causal language model that `transformers` has code for and this package has no file for.

Its forward pass is transformers' own; only attention is replaced, by the paged backend, through transformers'
attention interface (architectures that do not use it: `attention_adapters.py`). A step's tokens go in as one sequence
with their own positions: everything outside attention treats tokens one by one, and a model that does not is refused.
What attention looks like (heads, sizes, windows, scales) is asked of the model itself, in a forward pass without
memory (device meta), since configs name these things differently.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import structlog
import torch

from gpu_worker.attention.api import AttentionBackend
from gpu_worker.layers.decoder import HiddenStates
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.weighted import Weighted
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.model_spec import LayerSpec, ModelConfigError, ModelSpec
from gpu_worker.models.attention_adapters import adapt, is_adapted, placeholder_mask
from gpu_worker.models.family import LoadsItself, ModelFamily, NameRules
from gpu_worker.models.hf_config import FULL, SLIDING, HfConfig
from gpu_worker.quant.api import RandomValues
from gpu_worker.quant.none import Unquantized

log = structlog.get_logger(__name__)

INTERFACE = "stepwire"
HOLD_A_MODEL = (
    "Gemma3nForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration",
)
"""Without images and sound they compute as the language model within them, which is what runs."""
_SLOT = "stepwire_slot"
_PROBE_TOKENS = 3
# What attention functions are given beside q, k and v, as far as the paged backend has it or need not know it.
_CARRIED = {"scaling", "sliding_window", "softcap", "s_aux", "is_causal", "alibi_slopes"}
# Positions in two digits, each of which any dtype holds exactly.
_POSITION_DIGIT = 256
_INDIFFERENT = {
    "dropout",
    "position_ids",
    "position_embeddings",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "layer_idx",
    "deterministic",
    "target_dtype",
    "logits_to_keep",
}
LANGUAGE_MODEL = r"^(thinker\.)?(model\.language_model|model\.text_model|language_model\.model)\."
LANGUAGE_HEAD = r"^(thinker\.|language_model\.|model\.)lm_head\."
"""How the tensors of a language model are called in a checkpoint that holds other models too."""
_OTHER_PARTS = re.compile(r"vision|visual|image|audio|projector|connector|talker|token2wav|code2wav")
# Rope whose frequencies hang on the longest sequence of the step: a row would depend on its neighbours.
_STEP_DEPENDENT_ROPES = ("dynamic", "longrope")
_PER_TOKEN_LAYERS = {FULL, SLIDING}


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


def is_known(architecture: str) -> bool:
    """Whether transformers itself has this causal language model; False without transformers."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        return False
    return architecture in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *HOLD_A_MODEL)


def is_known_part(kind: Any) -> bool:
    """Whether transformers has text parts of this `model_type` as causal language models."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        return False
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@dataclass(frozen=True, slots=True)
class _Served:
    """What transformers builds."""

    config: Any
    architecture: str
    is_part: bool
    """A language model within a checkpoint that holds others as well."""

    @classmethod
    def of(cls, directory: Path, architecture: str) -> _Served:
        """
        Raises:
            ModelConfigError: it holds no language model that transformers has by itself.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        config = _open_config(directory)
        text = config.get_text_config()
        is_whole = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) == architecture
        if text is config or (is_whole and architecture not in HOLD_A_MODEL):
            return cls(config, architecture, is_part=False)
        causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)
        if causal is None:
            raise refused(
                architecture, f"transformers has no language model of its text part {text.model_type!r} alone"
            )
        if getattr(config, "tie_word_embeddings", None) is not None:
            text.tie_word_embeddings = config.tie_word_embeddings
        return cls(text, causal, is_part=True)


class TransformersModel(ModelFamily, LoadsItself):
    """See the module. Not registered: the registry takes it for architectures that nothing else serves."""

    name_rules: ClassVar[NameRules] = {}
    host_plans_attention = True

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        nested = config.fields.get("text_config")
        text = HfConfig({**config.fields, **nested} if isinstance(nested, dict) else config.fields, config.file)
        if text.is_quantized():
            raise config.error(
                "quantization_config",
                f"is set, and {architecture} runs through transformers' own code, which takes plain weights only; "
                "use the release of the model that is not quantized",
            )
        served = _Served.of(Path(config.file).parent, architecture)
        calls = probe_attention(served.config, served.architecture)
        first = calls[0]
        text_config = served.config.get_text_config()
        return ModelSpec(
            architecture=architecture,
            vocab_size=text_config.vocab_size,
            hidden_size=text_config.hidden_size,
            intermediate_size=_widest(text_config),
            num_heads=first.num_heads,
            num_kv_heads=max(call.num_kv_heads for call in calls),
            head_dim=max(call.head_dim for call in calls),
            max_position_embeddings=_context(text_config),
            norm_eps=1e-5,
            layers=tuple(LayerSpec(rope=None, sliding_window=call.window) for call in calls),
            dtype=text.dtype(),
            tie_word_embeddings=bool(getattr(served.config, "tie_word_embeddings", False)),
            softmax_scale=first.scale,
            attention_softcap=first.softcap,
            attention_sinks=any(call.has_sinks for call in calls),
            eos_token_ids=config.eos_token_ids() or text.eos_token_ids(),
        )

    def __init__(self, spec: ModelSpec, max_position: int, build: BuildContext) -> None:
        if build.parallel.size > 1:
            raise ModelConfigError(
                f"{spec.architecture} runs through transformers' own code, which is not split over devices: "
                "set --tensor-parallel-size 1"
            )
        if not isinstance(build.quant, Unquantized):
            raise ModelConfigError(
                f"{spec.architecture} runs through transformers' own code, which takes plain weights only: "
                "leave --quantization out"
            )
        self.spec, self.dtype, self.device = spec, build.dtype, build.device
        self._model: Any = None
        self._given: torch.Tensor | None = None
        self._attention: AttentionBackend[Any] | None = None

    # ---- weights ----

    def check_checkpoint(self, path: Path) -> None:
        """The files are whole; whether they are this model's shows when transformers reads them."""
        SafetensorsReader(path).close()

    def load_checkpoint(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        SafetensorsReader(path).close()
        served = _Served.of(path, self.spec.architecture)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                config=served.config,
                dtype=self.dtype,
                attn_implementation=_implementation(served.architecture),
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                key_mapping={LANGUAGE_MODEL: "model.", LANGUAGE_HEAD: "lm_head."} if served.is_part else None,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(path, f"transformers cannot load it ({_first_line(error)})") from error
        if served.is_part:
            report["unexpected_keys"] = [name for name in report["unexpected_keys"] if not _OTHER_PARTS.search(name)]
        _check_report(path, report)
        self._adopt(model.to(self.device))

    def fill_random_weights(self, source: RandomValues, directory: Path) -> None:
        """load_format dummy."""
        from transformers import AutoModelForCausalLM

        served = _Served.of(directory, self.spec.architecture)
        model = AutoModelForCausalLM.from_config(
            served.config,
            dtype=self.dtype,
            attn_implementation=_implementation(served.architecture),
            trust_remote_code=False,
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                source.fill(parameter.data, std=parameter.shape[-1] ** -0.5)
        self._adopt(model.to(self.device))

    def _adopt(self, model: Any) -> None:
        log.warning(
            "no native code for this architecture: transformers' own runs, with paged attention",
            architecture=self.spec.architecture,
            layers=self.spec.num_layers,
        )
        self._model = model.eval()
        adapt(model, _paged_attention)
        calls = probe_attention(model.config, type(model).__name__)
        modules = dict(model.named_modules())
        for layer, call in enumerate(calls):
            modules[call.module].__dict__[_SLOT] = _LayerSlot(self, layer, call)
        # The head's own road (scaling, soft caps) is taken for the rows that are sampled only: it is handed the states
        # that the trunk gave before.
        trunk = model.get_decoder()
        self._takes_positions, self._mask = _takes_positions(trunk), placeholder_mask(model, self.device)
        self._run_trunk, trunk.forward = trunk.forward, self._states_for_head

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        return iter(())

    def finish(self) -> None:
        return

    def num_bytes(self) -> int:
        tensors = {tensor.data_ptr(): tensor for tensor in (*self._model.parameters(), *self._model.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    # ---- the forward pass ----

    def hidden_states(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionBackend[Any],
        received: torch.Tensor | None = None,
    ) -> HiddenStates:
        self._attention, self._positions = attention, positions
        places = {"position_ids": positions.unsqueeze(0)} if self._takes_positions else {}
        output = self._run_trunk(input_ids=token_ids.unsqueeze(0), attention_mask=self._mask, use_cache=False, **places)
        self._output_type = type(output)
        states = output.last_hidden_state[0]  # [num_tokens, hidden]
        # The final norm is done.
        return HiddenStates(states, states)

    def normed(self, hidden: HiddenStates) -> torch.Tensor:
        return hidden.output

    def logits(self, hidden: HiddenStates, *, deals: bool = False) -> torch.Tensor:
        self._given = hidden.output.unsqueeze(0)
        return self._model(inputs_embeds=self._given, use_cache=False).logits[0]

    def _states_for_head(self, *args: Any, **kwargs: Any) -> Any:
        return self._output_type(last_hidden_state=self._given)

    def attend(
        self,
        layer: int,
        call: AttentionCall,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """query [1, num_heads, num_tokens, key_dim] -> [1, num_tokens, num_heads, value_dim]; keys and values alike."""
        if self._attention is None:
            raise RuntimeError("attention is asked for outside of a step")
        if call.alibi_slopes is not None:
            query, key = _with_positions(query, key, self._positions, call.alibi_slopes, call.scale)
        if call.scale != self.spec.attention_scale:
            query = query * (call.scale / self.spec.attention_scale)
        # Layers with fewer KV heads than others have each of them several times in the cache.
        copies = self.spec.num_kv_heads // call.num_kv_heads
        if copies > 1:
            key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
        q, k, v = (_by_token(tensor, self.spec.head_dim) for tensor in (query, key, value))
        attended = self._attention.run(q, k, v, layer, sinks=None if sinks is None else sinks.float())
        return attended.view(1, q.shape[0], call.num_heads, self.spec.head_dim)[..., : call.value_dim]


def _with_positions(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, slopes: tuple[float, ...], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two more dimensions, whose products are slope * position / scale."""
    digits = torch.stack((positions // _POSITION_DIGIT, positions % _POSITION_DIGIT), dim=-1).to(key.dtype)
    key = torch.cat((key, digits.expand(*key.shape[:-1], 2)), dim=-1)
    factors = torch.tensor(slopes, device=query.device) / scale  # [num_heads]
    both = torch.stack((factors * _POSITION_DIGIT, factors), dim=-1).to(query.dtype)  # [num_heads, 2]
    return torch.cat((query, both[None, :, None].expand(*query.shape[:-1], 2)), dim=-1), key


def _takes_positions(trunk: torch.nn.Module) -> bool:
    return "position_ids" in inspect.signature(trunk.forward).parameters


def _by_token(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[1, heads, num_tokens, dim] -> [num_tokens, heads, head_dim], padded with zeros."""
    padding = head_dim - heads.shape[-1]
    tokens = heads[0].transpose(0, 1)
    return torch.nn.functional.pad(tokens, (0, padding)) if padding else tokens.contiguous()


@dataclass(frozen=True, slots=True)
class _LayerSlot:
    """What an attention module is told of the step: who runs it, and which layer's cache is its own."""

    model: TransformersModel
    layer: int
    call: AttentionCall


class _Probe:
    """Takes down every call of the attention interface."""

    def __init__(self, architecture: str, names: dict[torch.nn.Module, str]) -> None:
        self.calls: list[AttentionCall] = []
        self._architecture, self._names = architecture, names

    def note(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        asked = {name for name, option in options.items() if option is not None} - _CARRIED - _INDIFFERENT
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


def _paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; see its documentation for the shapes."""
    slot = module.__dict__.get(_SLOT)
    if isinstance(slot, _LayerSlot):
        return slot.model.attend(slot.layer, slot.call, query, key, value, options.get("s_aux")), None
    if isinstance(slot, _Probe):
        return slot.note(module, query, key, value, attention_mask, options), None
    raise RuntimeError(f"{type(module).__name__} asks for paged attention, and no step runs it")


def refused(architecture: str, reason: str) -> ModelConfigError:
    return ModelConfigError(
        f"{architecture} has no native code here, and cannot run through transformers' with paged attention: {reason}"
    )


def probe_attention(hf_config: Any, architecture: str) -> list[AttentionCall]:
    """One entry a layer, from a forward pass on device meta.

    Raises:
        ModelConfigError: the attention interface does not carry this architecture; the message says why.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(INTERFACE, _paged_attention)
    _check_independent_tokens(hf_config, architecture)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                hf_config,
                attn_implementation=_implementation(architecture),
                # The one whose sizes do not depend on what the router chooses, in any type.
                experts_implementation="batched_mm",
                trust_remote_code=False,
            )
    except KeyError as error:
        reason = "its attention does not go through the attention interface"
        raise refused(architecture, reason if error.args == (INTERFACE,) else f"transformers lacks {error}") from error
    except (ValueError, ImportError) as error:
        raise refused(architecture, f"transformers cannot build it ({_first_line(error)})") from error
    _check_class(model, architecture)
    adapt(model, _paged_attention)
    trunk = model.get_decoder()
    places = {"position_ids": torch.arange(_PROBE_TOKENS, device="meta").unsqueeze(0)}
    mask = placeholder_mask(model, "meta")
    probe = _Probe(architecture, {module: name for name, module in model.named_modules()})
    for module in model.modules():
        module.__dict__[_SLOT] = probe
    try:
        with torch.inference_mode():
            ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device="meta")
            given_places = places if _takes_positions(trunk) else {}
            output = trunk(input_ids=ids, attention_mask=mask, use_cache=False, **given_places)
            takers: list[None] = []

            def given(*args: Any, **kwargs: Any) -> Any:
                takers.append(None)
                return output

            trunk.forward = given
            model(inputs_embeds=output.last_hidden_state, use_cache=False)
    except ModelConfigError:
        raise
    except Exception as error:  # whatever code of others does with a tensor that has no values
        raise refused(architecture, f"its forward pass cannot be tried out ({_first_line(error)})") from error
    if not takers:
        raise refused(architecture, "its head does not read what its decoder gives")
    config = hf_config.get_text_config()
    _check_calls(probe.calls, config.num_hidden_layers, architecture)
    _check_windows(probe.calls, config, trunk, architecture)
    return probe.calls


def _check_independent_tokens(hf_config: Any, architecture: str) -> None:
    config = hf_config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _PER_TOKEN_LAYERS
    if others:
        raise refused(architecture, f"it has layers of the kinds {', '.join(sorted(others))}")
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    # Hunyuan's "dynamic" has a fixed factor.
    kinds = {str(part.get("rope_type")) for part in nested if not part.get("alpha")} & set(_STEP_DEPENDENT_ROPES)
    if kinds:
        raise refused(architecture, f"its rope ({', '.join(kinds)}) depends on what else is in a step")


def _check_class(model: Any, architecture: str) -> None:
    if type(model).__name__ != architecture:
        raise refused(architecture, f"its model_type stands for {type(model).__name__}")
    if getattr(model, "_is_stateful", False):
        raise refused(architecture, "it keeps a state for every sequence, which is no KV cache")
    adapted = is_adapted(architecture)
    if not adapted and not getattr(model, "_supports_flash_attn", False):
        raise refused(architecture, "its attention needs a mask, which the interface does not carry")
    if not adapted and not _takes_positions(model.get_decoder()):
        raise refused(architecture, "it counts positions by itself, and takes no position_ids")
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        raise refused(architecture, "it counts positions from its padding token on, and not from 0")
    mixing = [name for name, module in model.named_modules() if isinstance(module, torch.nn.modules.conv._ConvNd)]
    if mixing:
        raise refused(architecture, f"its {mixing[0]} mixes neighbouring tokens")


def _check_calls(calls: Sequence[AttentionCall], num_layers: int, architecture: str) -> None:
    if not calls:
        raise refused(architecture, "its attention does not go through the attention interface")
    if len(calls) != num_layers or len({call.module for call in calls}) != num_layers:
        raise refused(architecture, f"it attends {len(calls)} times in {num_layers} layers")
    most = max(call.num_kv_heads for call in calls)
    if any(most % call.num_kv_heads or call.num_heads % most for call in calls):
        raise refused(architecture, "numbers of KV heads differ between its layers, and are no multiples")
    for field in ("num_heads", "softcap"):
        values = {getattr(call, field) for call in calls}
        if len(values) > 1:
            raise refused(architecture, f"{field} differs between its layers ({', '.join(map(str, sorted(values)))})")


def _check_windows(calls: Sequence[AttentionCall], config: Any, trunk: Any, architecture: str) -> None:
    """Some models have their windows in the mask alone, of which the attention interface is told nothing here."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        makes_window_masks = hasattr(sys.modules[type(trunk).__module__], "create_sliding_window_causal_mask")
        has_window = isinstance(window, int) and window < _context(config)
        is_hidden = has_window and makes_window_masks and all(call.window is None for call in calls)
    else:
        is_hidden = any(kind == SLIDING and call.window is None for kind, call in zip(kinds, calls, strict=True))
    if is_hidden:
        raise refused(architecture, f"its windows of {window} tokens are in its attention mask alone")


def _open_config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ModelConfigError(
            f"{directory / 'config.json'}: transformers cannot read it ({_first_line(error)})"
        ) from error
    # Only to be warned of padding, which a step has none of; looking for it reads token ids back from the device.
    # Some classes insist on a number.
    with contextlib.suppress(Exception):
        config.get_text_config().pad_token_id = None
    return config


def _context(config: Any) -> int:
    """Positions that the model was made for."""
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


def _implementation(architecture: str) -> str:
    return "eager" if is_adapted(architecture) else INTERFACE


def _widest(config: Any) -> int:
    """The MLP's inner size, for the memory plan; four times the hidden size where the config has no such field."""
    for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 4 * int(config.hidden_size)


def _check_report(path: Path, report: dict[str, Any]) -> None:
    """transformers fills what is missing with random values and goes on; here it is an error."""
    for field, problem in (
        ("missing_keys", "lacks tensors that the model needs"),
        ("unexpected_keys", "has tensors that the model has no place for"),
        ("mismatched_keys", "has tensors of another shape than the model's"),
    ):
        names = sorted(str(name) for name in report.get(field) or ())
        if names:
            raise CheckpointError(
                path,
                f"{problem}: {', '.join(names[:5])}",
                tensor=names[0],
                advice="config.json and the weights are not of the same model",
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
