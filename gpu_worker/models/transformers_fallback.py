"""Any causal language model that `transformers` has code for and this package has no file for.

Its forward pass is transformers' own; only attention is replaced, by the paged backend, through transformers'
attention interface (architectures that do not use it: `attention_adapters.py`). A step's tokens go in as one sequence
with their own positions: everything outside attention treats tokens one by one, but for layers that keep a state for
each row (`row_states.py`). A model that does otherwise (`fallback_probe.py` finds out) runs row after row in caches of
its own (`row_caches.py`), or is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import structlog
import torch

from gpu_worker.attention.api import AttentionBackend, ModelAttention, backends_of
from gpu_worker.layers.decoder import HiddenStates
from gpu_worker.layers.linear import BuildContext
from gpu_worker.layers.weighted import Weighted
from gpu_worker.loading.safetensors_reader import SafetensorsReader
from gpu_worker.loading.tensor_source import CheckpointError
from gpu_worker.model_spec import LayerSpec, ModelConfigError, ModelSpec
from gpu_worker.models.attention_adapters import adapt, placeholder_mask
from gpu_worker.models.fallback_probe import (
    SLOT,
    AttentionCall,
    ModelLayers,
    attention_implementation,
    context_of,
    paged_attention,
    probe_layers,
    takes_positions,
    trunk_of,
)
from gpu_worker.models.family import LoadsItself, ModelFamily, NameRules
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.plain_state import UnreadTensor, one_after_another, plain_state
from gpu_worker.models.refusals import first_line, unserved
from gpu_worker.models.row_caches import RowCaches
from gpu_worker.models.row_states import RowStates
from gpu_worker.models.served_config import (
    LANGUAGE_HEAD,
    LANGUAGE_MODEL,
    PREDICTS_AHEAD,
    ServedConfig,
    auto_class,
    model_class,
)
from gpu_worker.models.settled_rope import settle_rope
from gpu_worker.models.state_adapters import adapt_states
from gpu_worker.quant.api import RandomValues
from gpu_worker.quant.scheme import OnLoadScheme

log = structlog.get_logger(__name__)

# One expert after another, those that were chosen: of any size, and without a copy of its weights for every token.
EXPERTS = "eager"
# Where all layers keep states and none attends, blocks are counted all the same, of next to nothing.
# States hold any number of tokens, and most configs of such models name none.
_RECURRENT_CONTEXT = 1 << 17
_NO_ATTENTION = AttentionCall("", 1, 1, 1, 1, 1.0, window=None, softcap=None, has_sinks=False)
# Positions in two digits, each of which any dtype holds exactly.
_POSITION_DIGIT = 256
_OTHER_PARTS = r"vision|visual|image|audio|projector|connector|merger|talker|token2wav|code2wav"


class TransformersModel(ModelFamily, LoadsItself):
    """See the module. Not registered: the registry takes it for architectures that nothing else serves."""

    name_rules: ClassVar[NameRules] = {}
    host_plans_attention = True

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        nested = config.fields.get("text_config")
        text = HfConfig({**config.fields, **nested} if isinstance(nested, dict) else config.fields, config.file)
        served = ServedConfig.of(Path(config.file).parent, architecture)
        found = probe_layers(served.config, served.architecture, text.dtype())
        calls = found.calls or (_NO_ATTENTION,)
        text_config = served.config.get_text_config()
        return ModelSpec(
            architecture=architecture,
            vocab_size=text_config.vocab_size,
            hidden_size=text_config.hidden_size,
            intermediate_size=_widest(text_config),
            num_heads=calls[0].num_heads,
            num_kv_heads=max(call.num_kv_heads for call in calls),
            head_dim=max(call.head_dim for call in calls),
            max_position_embeddings=_context(found, text_config),
            norm_eps=1e-5,
            layers=tuple(LayerSpec(rope=None, sliding_window=call.window) for call in calls),
            dtype=text.dtype(),
            tie_word_embeddings=bool(getattr(served.config, "tie_word_embeddings", False)),
            softmax_scale=calls[0].scale,
            attention_softcap=calls[0].softcap,
            attention_sinks=any(call.has_sinks for call in calls),
            eos_token_ids=config.eos_token_ids() or text.eos_token_ids(),
            row_state_bytes=found.row_state_bytes,
            row_cache_dim=found.row_cache_dim,
        )

    @staticmethod
    def in_dtype(spec: ModelSpec, directory: Path, dtype: torch.dtype) -> ModelSpec:
        if dtype == spec.dtype or not (spec.row_state_bytes or spec.row_cache_dim):
            return spec
        served = ServedConfig.of(directory, spec.architecture)
        found = probe_layers(served.config, served.architecture, dtype)
        return replace(spec, row_state_bytes=found.row_state_bytes, row_cache_dim=found.row_cache_dim)

    def __init__(self, spec: ModelSpec, max_position: int, build: BuildContext) -> None:
        if build.parallel.size > 1:
            raise ModelConfigError(
                f"{spec.architecture} runs through transformers' own code, which is not split over devices: "
                "set --tensor-parallel-size 1"
            )
        if isinstance(build.quant, OnLoadScheme):
            raise ModelConfigError(
                f"{spec.architecture} runs through transformers' own code, which takes plain weights only: "
                "leave --quantization out"
            )
        self.spec, self.dtype, self.device = spec, build.dtype, build.device
        self._max_position = max_position
        self._model: Any = None
        self._given: torch.Tensor | None = None
        self._attention: AttentionBackend[Any] | None = None

    # ---- weights ----

    def check_checkpoint(self, path: Path) -> None:
        """The files are whole; whether they are this model's shows when transformers reads them."""
        SafetensorsReader(path).close()

    def load_checkpoint(self, path: Path) -> None:
        with plain_state(path, self.dtype) as state, one_after_another():
            if state is not None:
                log.warning(
                    "quantized weights are dequantized for transformers' own code: they take the memory of plain ones",
                    architecture=self.spec.architecture,
                )
            self._load(path, state)

    def _load(self, path: Path, state: dict[str, UnreadTensor] | None) -> None:
        """`state`: plain tensors in place of packed ones; None: the checkpoint's own."""
        served = ServedConfig.of(path, self.spec.architecture)
        found = probe_layers(served.config, served.architecture, self.spec.dtype)
        try:
            # Its own class, since of a dictionary the automatic ones do not know what it is of.
            loader = auto_class(served.architecture) if state is None else model_class(served.architecture)
            model, report = loader.from_pretrained(
                path if state is None else None,
                state_dict=state,
                config=served.config,
                dtype=self.dtype,
                # Tensor after tensor to where it stays, and not all of them to the host first.
                device_map={"": self.device} if find_spec("accelerate") else None,
                attn_implementation=_attention(found, served.architecture),
                experts_implementation=EXPERTS,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                key_mapping={LANGUAGE_MODEL: "model.", LANGUAGE_HEAD: "lm_head."} if served.is_part else None,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(path, f"transformers cannot load it ({first_line(error)})") from error
        left_out = [PREDICTS_AHEAD, _beyond(served.config), *([_OTHER_PARTS] if served.is_part else [])]
        report["unexpected_keys"] = [
            name for name in report["unexpected_keys"] if not any(re.search(pattern, name) for pattern in left_out)
        ]
        _check_report(path, report)
        self._adopt(model.to(self.device), found)

    def fill_random_weights(self, source: RandomValues, directory: Path) -> None:
        """load_format dummy."""
        served = ServedConfig.of(directory, self.spec.architecture)
        found = probe_layers(served.config, served.architecture, self.spec.dtype)
        model = auto_class(served.architecture).from_config(
            served.config,
            dtype=self.dtype,
            attn_implementation=_attention(found, served.architecture),
            experts_implementation=EXPERTS,
            trust_remote_code=False,
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                source.fill(parameter.data, std=parameter.shape[-1] ** -0.5)
        self._adopt(model.to(self.device), found)

    def _adopt(self, model: Any, found: ModelLayers) -> None:
        self._model = model.eval()
        settle_rope(model, self._max_position)
        trunk = trunk_of(model)
        self._takes_positions, self._mask = takes_positions(trunk), placeholder_mask(model, self.device)
        if found.row_cache is not None:
            self._keep_row_caches(trunk)
            return
        log.warning(
            "no native code for this architecture: transformers' own runs, with paged attention",
            architecture=self.spec.architecture,
            layers=self.spec.num_layers,
        )
        adapt(model, paged_attention)
        adapt_states(model)
        modules = dict(model.named_modules())
        for layer, call in enumerate(found.calls):
            modules[call.module].__dict__[SLOT] = _LayerSlot(self, layer, call)
        if found.states:
            self.row_states = RowStates(model, [modules[name] for name in found.states])
        # The head's own road (scaling, soft caps) is taken for the rows that are sampled only: it is handed the states
        # that the trunk gave before.
        self._run_trunk, trunk.forward = trunk.forward, self._states_for_head

    def _keep_row_caches(self, trunk: Any) -> None:
        log.warning(
            "no native code for this architecture, and it attends in its own way: transformers' own runs, row after "
            "row, without paged attention and prefix cache",
            architecture=self.spec.architecture,
        )
        caches = RowCaches(trunk.forward)
        try:
            with torch.inference_mode():
                tried = caches.try_out(self.spec.vocab_size, self.device)
                if not isinstance(tried, str):
                    trunk.forward = self._states_for_head
                    self._given, self._output_type = tried.last_hidden_state, type(tried)
                    self._model(inputs_embeds=self._given, use_cache=False)
        except Exception as error:  # whatever code of others does with what it is given
            tried = f"its forward pass cannot be tried out ({first_line(error)})"
        if isinstance(tried, str):
            raise unserved(self.spec.architecture, tried)
        if self._given is not None:
            raise unserved(self.spec.architecture, "its head does not read what its decoder gives")
        self.row_states, self._run_trunk = caches, caches.run

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
        attention: ModelAttention,
        received: torch.Tensor | None = None,
    ) -> HiddenStates:
        (self._attention,), self._positions = backends_of(attention), positions
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
        given, self._given = self._given, None
        return self._output_type(last_hidden_state=given)

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


@dataclass(frozen=True, slots=True)
class _LayerSlot:
    """Implements `Attends` in a step: which layer's cache is the module's own."""

    model: TransformersModel
    layer: int
    call: AttentionCall

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        return self.model.attend(self.layer, self.call, query, key, value, options.get("s_aux"))


def _by_token(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[1, heads, num_tokens, dim] -> [num_tokens, heads, head_dim], padded with zeros."""
    padding = head_dim - heads.shape[-1]
    tokens = heads[0].transpose(0, 1)
    return torch.nn.functional.pad(tokens, (0, padding)) if padding else tokens.contiguous()


def _context(found: ModelLayers, config: Any) -> int:
    """Tokens of the longest sequence."""
    if found.calls:
        return context_of(config)
    if found.row_cache is None:
        return _RECURRENT_CONTEXT
    return context_of(config) if found.row_cache.numbers_per_token else context_of(config, _RECURRENT_CONTEXT)


def _attention(found: ModelLayers, architecture: str) -> str | None:
    """What transformers is to build its attention with; None: what it takes by itself."""
    return attention_implementation(architecture) if found.row_cache is None else None


def _beyond(config: Any) -> str:
    """A pattern of the layers behind the last one, by which some releases predict a second token ahead."""
    text = config.get_text_config()
    ahead = getattr(text, "num_nextn_predict_layers", None) or 0
    numbers = "|".join(str(text.num_hidden_layers + number) for number in range(ahead))
    return rf"^model\.layers\.({numbers})\." if ahead else r"(?!)"


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
