"""The decoder that model families are composed from: block, trunk, logits. Flags are fields of `ModelSpec`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from gpu_worker.attention.api import ModelAttention, backends_of
from gpu_worker.kv_places import check_kv_sources
from gpu_worker.layers.attention import Attention, ForwardContext
from gpu_worker.layers.embedding import Embedding, OutputHead, VocabTable
from gpu_worker.layers.gated_delta import GatedDelta
from gpu_worker.layers.indexer import Indexer, check_stage
from gpu_worker.layers.latent_attention import LatentAttention
from gpu_worker.layers.layer_inputs import LayerInputMixing, LayerInputs, LayerScale, check_layer_inputs
from gpu_worker.layers.linear import BuildContext, RowParallelLinear
from gpu_worker.layers.mlp import FeedForward, GatedMLP, PlainMLP
from gpu_worker.layers.mlp_beside_experts import MLPBesideExperts
from gpu_worker.layers.moe import MixtureOfExperts
from gpu_worker.layers.norm import Norm, hidden_norm
from gpu_worker.layers.rope import RotaryTables
from gpu_worker.layers.sublayer_input import SublayerInput
from gpu_worker.layers.weighted import Elsewhere, Weighted
from gpu_worker.loading.kv_scales import KVScales
from gpu_worker.model_spec import ModelSpec, RopeSpec
from gpu_worker.parallel.shares import ParallelContext, Share
from gpu_worker.state_pool import StatePool, StateShape


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The blocks' output, `residual + output`: not added up yet, because the final norm does that on the way."""

    output: torch.Tensor  # [num_tokens, hidden]
    residual: torch.Tensor  # [num_tokens, hidden]
    sums: ParallelContext | None = None
    """The ranks whose outputs are summands of `output`; None: it is the sum."""

    def select(self, tokens: torch.Tensor) -> HiddenStates:
        """Only these tokens' states, copied."""
        return self.of(self.output.index_select(0, tokens), self.residual.index_select(0, tokens))

    def of(self, output: torch.Tensor, residual: torch.Tensor) -> HiddenStates:
        """Some of these tokens' states."""
        return HiddenStates(output, residual, self.sums)

    def added(self) -> torch.Tensor:
        """What the next stage goes on with: [num_tokens, hidden]; `residual` is overwritten."""
        return self.residual.add_(self.output if self.sums is None else self.sums.all_reduce(self.output))


class DecoderBlock:
    """x += attention(norm(x)); x += mlp(norm(x)), or x += attention(norm(x)) + mlp(norm(x)) for a parallel block."""

    def __init__(self, spec: ModelSpec, layer: int, ropes: Sequence[RopeSpec | None], build: BuildContext) -> None:
        """`ropes`: the kinds of rope that the model has, in the order of a step's positions."""
        path, own = f"layers.{layer}", spec.layers[layer]
        rope = ropes.index(own.rope)
        self._layer = layer
        self._ops, self._is_parallel, self._residual_scale = build.ops, spec.parallel_block, spec.residual_scale
        # Where a sublayer's output goes into the next norm and nowhere else, ranks' outputs are summed there.
        leaves_sums = spec.pre_norms and not (spec.post_norms or spec.parallel_block) and spec.residual_scale == 1.0
        self.sums = build.parallel if leaves_sums and build.parallel.size > 1 else None
        leaves = self.sums is not None
        build = replace(build, leaves_sums=leaves, begins_sums=leaves)
        self.attention: Attention | LatentAttention | GatedDelta
        # Of this stage's layers, which are those of its KV cache and its state pool.
        before = spec.layers[build.parallel.layers(spec.num_layers).start : layer]
        if own.keeps_state and spec.gated_delta is not None:
            kept = sum(other.keeps_state for other in before)
            self.attention = GatedDelta(spec, spec.gated_delta, kept, f"{path}.delta", build)
        elif spec.latent is None:
            self.attention = Attention(spec, layer, rope, f"{path}.attention", build)
        else:
            indexer, cached = None, len(before)
            if spec.indexer is not None and own.has_indexer:
                index_rope = ropes.index(spec.indexer.rope)
                indexer = Indexer(spec, spec.indexer, cached, index_rope, f"{path}.attention.indexer", build)
            self.attention = LatentAttention(spec, spec.latent, cached, rope, f"{path}.attention", build, indexer)
        self.mlp: FeedForward
        # Of what the last block gives, only the rows that are sampled may be summed.
        is_last = layer == build.parallel.layers(spec.num_layers)[-1]
        build = replace(build, begins_sums=leaves and not is_last)
        sized = spec if own.intermediate_size is None else replace(spec, intermediate_size=own.intermediate_size)
        if own.is_moe and spec.moe is not None:
            self.mlp = (MLPBesideExperts if spec.moe.beside_mlp else MixtureOfExperts)(
                sized, spec.moe, f"{path}.mlp", build
            )
        else:
            self.mlp = (GatedMLP if spec.gated_mlp else PlainMLP)(sized, f"{path}.mlp", build)
        has_mlp_norm = spec.pre_norms and not spec.parallel_block
        self.norms: dict[str, Norm | None] = {
            "attention_norm": hidden_norm(spec, build) if spec.pre_norms else None,
            "attention_post_norm": hidden_norm(spec, build) if spec.post_norms else None,
            "mlp_norm": hidden_norm(spec, build) if has_mlp_norm else None,
            "mlp_post_norm": hidden_norm(spec, build) if spec.post_norms else None,
        }
        self.mixing: LayerInputMixing | None = None
        if spec.layer_inputs is not None:
            self.mixing = LayerInputMixing(spec, spec.layer_inputs, f"{path}.mixing", build)
        self.scale = LayerScale(build) if spec.layer_scales else None

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        for name, norm in self.norms.items():
            if norm is not None:
                yield name, norm
        kind = "delta" if isinstance(self.attention, GatedDelta) else "attention"
        for name, part in self.attention.weighted():
            yield f"{kind}.{name}", part
        for name, part in self.mlp.weighted():
            yield f"mlp.{name}", part
        if self.mixing is not None:
            for name, part in self.mixing.weighted():
                yield f"mixing.{name}", part
        if self.scale is not None:
            yield "scale", self.scale

    def apply(
        self, output: torch.Tensor | None, residual: torch.Tensor, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output of the block before (None: there is none) and the residual, both [num_tokens, hidden].

        Returns this block's output, and the residual that lacks only that; what it was given may be overwritten.
        """
        entered = self._enter(output, residual, "attention_norm")
        if self._is_parallel:
            entered.rows()  # two sublayers read them
            both = self.attention.apply(entered, context).add_(self.mlp.apply(entered))
            return self._leave(both, "mlp_post_norm"), entered.residual
        attended = self._leave(self.attention.apply(entered, context), "attention_post_norm")
        entered = self._enter(attended, entered.residual, "mlp_norm")
        output, residual = self._leave(self.mlp.apply(entered), "mlp_post_norm"), entered.residual
        if self.mixing is not None and context.layer_inputs is not None:
            entered = SublayerInput(self._ops, output, residual, None)
            output = self.mixing.apply(entered, context.layer_inputs[:, self._layer])
            residual = entered.residual
        if self.scale is not None:
            output, residual = output.mul_(self.scale.scale), residual.mul_(self.scale.scale)
        return output, residual

    def _enter(self, output: torch.Tensor | None, residual: torch.Tensor, name: str) -> SublayerInput:
        """What a sublayer reads, once the output of the one before has joined the residual."""
        return SublayerInput(self._ops, output, residual, self.norms[name], self.sums)

    def _leave(self, output: torch.Tensor, name: str) -> torch.Tensor:
        """What a sublayer gives to the residual."""
        norm = self.norms[name]
        if norm is not None:
            output = self._ops.add_norm(None, output, norm)
        return output if self._residual_scale == 1.0 else output.mul_(self._residual_scale)


class Decoder:
    """Embedding, blocks, final norm, output head; a pipeline stage holds some of the blocks and an end, or neither."""

    kv_scales: tuple[KVScales, ...] | None = None
    """The checkpoint's scales for a float8 KV cache, one entry for each layer of the whole model; None: it has none."""
    states: StatePool | None = None
    """What its layers keep of each row beside the KV cache; None: nothing."""

    def __init__(self, spec: ModelSpec, max_position: int, build: BuildContext) -> None:
        self.spec = spec
        self.dtype = build.dtype
        self.device = build.device
        self._ops = build.ops
        ropes = list(dict.fromkeys(layer.rope for layer in spec.layers))
        if spec.indexer is not None and spec.indexer.rope not in ropes:
            ropes.append(spec.indexer.rope)
        self.tables = [RotaryTables.build(rope, max_position, build.device) for rope in ropes]
        self._stage = build.parallel
        self.held = build.parallel.layers(spec.num_layers)
        check_stage(spec, self.held.start)
        # First: no other stages would do.
        check_layer_inputs(spec, build.parallel)
        check_kv_sources(spec, build.parallel)
        elsewhere = build.elsewhere()
        self._holds_embedding = self._stage.is_first_stage or (self._stage.is_last_stage and spec.tie_word_embeddings)
        self.embedding = Embedding(
            spec.vocab_size,
            spec.hidden_size,
            build if self._holds_embedding else elsewhere,
            num_unused=spec.num_unused_embeddings,
        )
        self._all_blocks = [
            DecoderBlock(spec, number, ropes, build if number in self.held else elsewhere)
            for number in range(spec.num_layers)
        ]
        self.blocks = self._all_blocks[self.held.start : self.held.stop]
        self.layer_inputs = None if spec.layer_inputs is None else LayerInputs(spec, spec.layer_inputs, build)
        end = build if self._stage.is_last_stage else elsewhere
        self.final_norm = hidden_norm(spec, end)
        # As a value of the model's dtype, which is what it was trained with.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=build.dtype).item()
        self.head: OutputHead | None = None
        if spec.has_output_head:
            table: VocabTable = self.embedding
            if not spec.tie_word_embeddings:
                table = VocabTable(spec.vocab_size, spec.hidden_size, end)
            self.head = OutputHead(table, end)
        self.score_head: RowParallelLinear | None = None
        if spec.num_labels:
            whole = Share(0, spec.hidden_size, spec.hidden_size)
            self.score_head = RowParallelLinear(whole, spec.num_labels, bias=False, path="score", build=build)

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        """Every layer of the model that holds checkpoint tensors, by its path; some may be elsewhere."""
        is_last = self._stage.is_last_stage
        if self.layer_inputs is not None:
            for name, part in self.layer_inputs.weighted():
                yield f"layer_inputs.{name}", part
        yield "embedding", self.embedding if self._holds_embedding else Elsewhere(self.embedding)
        for index, block in enumerate(self._all_blocks):
            for name, part in block.weighted():
                yield f"layers.{index}.{name}", part if index in self.held else Elsewhere(part)
        yield "final_norm", self.final_norm if is_last else Elsewhere(self.final_norm)
        if self.head is not None and self.head.table is not self.embedding:
            yield "head", self.head.table if is_last else Elsewhere(self.head.table)
        if self.score_head is not None:
            yield "score", self.score_head

    def finish(self) -> None:
        """Every weight is loaded and finished."""
        if self.head is not None and self._stage.is_last_stage:
            self.head.finish()

    def allocate_states(self, num_rows: int) -> None:
        """Room for what layers keep of so many rows; nothing where they keep nothing."""
        shape = None if self.spec.gated_delta is None else StateShape.of(self.spec, self._stage, self.dtype)
        if shape is not None:
            self.states = StatePool(shape, num_rows, self.device)

    def num_bytes(self) -> int:
        """Memory of this rank's weights."""
        weights = sum(part.num_bytes() for _, part in self.weighted())
        return weights + (0 if self.head is None else self.head.num_bytes())

    def hidden_states(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: ModelAttention,
        received: torch.Tensor | None = None,
    ) -> HiddenStates:
        """token_ids, positions [num_tokens] -> what comes out of the blocks, before the final norm.

        `received`: what the stage before this one gave, [num_tokens, hidden]; it is overwritten.
        """
        prepared = tuple(self._ops.prepare_positions(tables, positions, self.dtype) for tables in self.tables)
        residual = self._embedded(token_ids) if received is None else received
        given = None if self.layer_inputs is None else self.layer_inputs.apply(token_ids, residual)
        factors = self._query_factors(positions)
        context = ForwardContext(backends_of(attention), prepared, factors, self.states, given)
        output: torch.Tensor | None = None
        for block in self.blocks:
            output, residual = block.apply(output, residual, context)
        if output is None:
            raise ValueError("a decoder needs at least one block: the config's num_hidden_layers is 0")
        return HiddenStates(output, residual, self.blocks[-1].sums)

    def _query_factors(self, positions: torch.Tensor) -> torch.Tensor | None:
        scaling = self.spec.query_scaling
        if scaling is None:
            return None
        periods = ((positions + scaling.first) // scaling.period).float()  # [num_tokens]
        return (1 + scaling.weight * torch.log1p(periods)).to(self.dtype).unsqueeze(1)

    def _embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        residual = self.embedding.lookup(token_ids)  # [num_tokens, hidden]
        return residual if self._embedding_scale == 1.0 else residual.mul_(self._embedding_scale)

    def normed(self, hidden: HiddenStates) -> torch.Tensor:
        """The model's last hidden states [num_tokens, hidden]; the residual of `hidden` is overwritten."""
        return self._ops.add_norm(hidden.output, hidden.residual, self.final_norm, hidden.sums)

    def logits(self, hidden: HiddenStates, *, deals: bool = False) -> torch.Tensor:
        """Of the rows to be sampled -> [num_rows, vocab_size]; their residual is overwritten.

        `deals`: this rank's rows alone (`ParallelContext.own_rows`).
        """
        if self.head is None:
            raise ValueError("this model was built without an output head")
        logits = self.head.logits(self.normed(hidden), deals=deals)
        if self.spec.logit_scale != 1.0:
            logits = logits.mul_(self.spec.logit_scale)
        if self.spec.logit_softcap is not None:
            logits = logits.div_(self.spec.logit_softcap).tanh_().mul_(self.spec.logit_softcap)
        return logits

    def scores(self, pooled: torch.Tensor) -> torch.Tensor:
        """Of a classification head: pooled [num_rows, hidden] -> [num_rows, num_labels]."""
        if self.score_head is None:
            raise ValueError("this model has no classification head")
        return self.score_head.apply(pooled.to(self.dtype))
