"""BERT and RoBERTa: encoders, which see all of a text at once and give vectors or scores, no tokens.

Devlin et al., 2018 (https://arxiv.org/abs/1810.04805); Liu et al., 2019 (https://arxiv.org/abs/1907.11692).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

import torch

from gpu_worker.attention.api import ModelAttention, backends_of
from gpu_worker.layers.attention import ForwardContext
from gpu_worker.layers.decoder import HiddenStates
from gpu_worker.layers.embedding import Embedding
from gpu_worker.layers.encoder import EncoderBlock
from gpu_worker.layers.linear import BuildContext, RowParallelLinear
from gpu_worker.layers.norm import LayerNorm
from gpu_worker.layers.rope import RotaryTables
from gpu_worker.layers.weighted import Weighted
from gpu_worker.model_spec import LayerSpec, ModelSpec
from gpu_worker.models.family import ModelFamily, NameRules, ReadsPairs
from gpu_worker.models.hf_config import HfConfig
from gpu_worker.models.registry import register
from gpu_worker.parallel.shares import Share

_LAYER = "encoder.layer.{i}"
_CLASSIFIERS = ("BertForSequenceClassification", "RobertaForSequenceClassification")
_XLM_CLASSIFIER = "XLMRobertaForSequenceClassification"


@register(
    "BertModel",
    "BertForMaskedLM",
    "RobertaModel",
    "RobertaForMaskedLM",
    "XLMRobertaModel",
    "XLMRobertaForMaskedLM",
    *_CLASSIFIERS,
    _XLM_CLASSIFIER,
)
class Bert(ReadsPairs, ModelFamily):
    name_rules: ClassVar[NameRules] = {
        "embedding": {"": "embeddings.word_embeddings"},
        "positions": {"": "embeddings.position_embeddings"},
        "segments": {"": "embeddings.token_type_embeddings"},
        "embedding_norm": {"": "embeddings.LayerNorm"},
        "layers.{i}.attention.qkv": {
            "q": f"{_LAYER}.attention.self.query",
            "k": f"{_LAYER}.attention.self.key",
            "v": f"{_LAYER}.attention.self.value",
        },
        "layers.{i}.attention.output": {"": f"{_LAYER}.attention.output.dense"},
        "layers.{i}.attention_norm": {"": f"{_LAYER}.attention.output.LayerNorm"},
        "layers.{i}.mlp.up": {"": f"{_LAYER}.intermediate.dense"},
        "layers.{i}.mlp.down": {"": f"{_LAYER}.output.dense"},
        "layers.{i}.mlp_norm": {"": f"{_LAYER}.output.LayerNorm"},
        "score.dense": {"": "score.dense"},
        "score.output": {"": "score.output"},
    }
    # The head that guesses masked words, and buffers.
    skipped_tensors = r"cls\.|lm_head\.|(\w+\.)?embeddings\.position_ids"
    is_encoder = True

    @classmethod
    def canonical_name(cls, name: str) -> str:
        # BERT puts a dense layer that pretraining knew before its classifier, RoBERTa one of the classifier's own.
        for stored, ours in (
            (r"(bert\.)?pooler\.dense\.", "score.dense."),
            (r"classifier\.dense\.", "score.dense."),
            (r"classifier\.out_proj\.", "score.output."),
            (r"classifier\.", "score.output."),
        ):
            if re.match(stored, name):
                return re.sub(f"^{stored}", ours, name)
        name = re.sub(r"^(bert|roberta)\.", "", name)
        # As TensorFlow's first release had it.
        return re.sub(
            r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{'weight' if m[1] == 'gamma' else 'bias'}", name
        )

    @classmethod
    def unused_tensors(cls, spec: ModelSpec) -> str:
        return "" if spec.num_labels else r"score\."

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        config.refuse("position_embedding_type", "absolute")
        config.refuse("is_decoder", False)
        config.refuse("add_cross_attention", False)
        is_bert = architecture.startswith("Bert")
        fields = {"hidden_act": "gelu", "type_vocab_size": 2} | config.fields
        # Fields of decoders that transformers saves along and the class does not read.
        config = HfConfig(fields | {"num_key_value_heads": None, "head_dim": None}, config.file)
        # RoBERTa counts positions from behind the padding's, whose row of the table is no position.
        offset = 0 if is_bert else config.integer("pad_token_id", 1) + 1
        num_positions = config.integer("max_position_embeddings", 512)
        return config.decoder(
            architecture,
            tuple(LayerSpec(rope=None) for _ in range(config.integer("num_hidden_layers"))),
            max_position_embeddings=num_positions - offset,
            norm_eps=config.number("layer_norm_eps", 1e-12),
            norm_kind="layer",
            norm_bias=True,
            gated_mlp=False,
            qkv_bias=True,
            attention_output_bias=True,
            mlp_bias=True,
            has_output_head=False,
            position_offset=offset,
            num_segments=config.integer("type_vocab_size"),
            num_labels=config.num_labels() if architecture in (*_CLASSIFIERS, _XLM_CLASSIFIER) else 0,
        )

    def __init__(self, spec: ModelSpec, max_position: int, build: BuildContext) -> None:
        self.spec, self.dtype, self.device, self._ops = spec, build.dtype, build.device, build.ops
        self.tables = [RotaryTables.build(None, max_position, build.device)]
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, build)
        num_positions = spec.max_position_embeddings + spec.position_offset
        self.positions = Embedding(num_positions, spec.hidden_size, build)
        self.segments = Embedding(spec.num_segments, spec.hidden_size, build)
        self.embedding_norm = LayerNorm(spec.hidden_size, spec.norm_eps, build, bias=True)
        self.encoder_blocks = [EncoderBlock(spec, layer, build) for layer in range(spec.num_layers)]
        self.classifier = None
        if spec.num_labels:
            whole = Share(0, spec.hidden_size, spec.hidden_size)
            self.classifier = tuple(
                RowParallelLinear(whole, outputs, bias=True, path=f"score.{name}", build=build)
                for name, outputs in (("dense", spec.hidden_size), ("output", spec.num_labels))
            )

    def weighted(self) -> Iterator[tuple[str, Weighted]]:
        yield "embedding", self.embedding
        yield "positions", self.positions
        yield "segments", self.segments
        yield "embedding_norm", self.embedding_norm
        for index, block in enumerate(self.encoder_blocks):
            for name, part in block.weighted():
                yield f"layers.{index}.{name}", part
        if self.classifier is not None:
            yield "score.dense", self.classifier[0]
            yield "score.output", self.classifier[1]

    def finish(self) -> None:
        return

    def num_bytes(self) -> int:
        return sum(part.num_bytes() for _, part in self.weighted())

    def hidden_states(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: ModelAttention,
        segments: torch.Tensor | None = None,
    ) -> HiddenStates:
        """As a decoder's; `segments` [num_tokens]: which text of a pair a token is of (None: all of the first)."""
        prepared = self._ops.prepare_positions(self.tables[0], positions, self.dtype)
        context = ForwardContext(backends_of(attention), (prepared,))
        if segments is None or self.spec.num_segments < 2:
            segments = torch.zeros_like(token_ids)
        states = self.embedding.lookup(token_ids)  # [num_tokens, hidden]
        states = states + self.positions.lookup(positions + self.spec.position_offset)
        states = self.embedding_norm.apply(states + self.segments.lookup(segments))
        for block in self.encoder_blocks:
            states = block.apply(states, context)
        return HiddenStates(states, states)

    def normed(self, hidden: HiddenStates) -> torch.Tensor:
        """The last block has normed already."""
        return hidden.output

    def logits(self, hidden: HiddenStates, *, deals: bool = False) -> torch.Tensor:
        raise ValueError(f"{self.spec.architecture} is an encoder: it draws no tokens")

    def scores(self, pooled: torch.Tensor) -> torch.Tensor:
        """pooled [num_rows, hidden], of the first token -> [num_rows, num_labels]."""
        if self.classifier is None:
            raise ValueError(f"{self.spec.architecture} has no classification head")
        dense, output = self.classifier
        return output.apply(torch.tanh(dense.apply(pooled.to(self.dtype))))
