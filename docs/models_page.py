"""Writes docs/models.md from the registries: `make docs`, or `python docs/models_page.py`.

What an architecture can do is read off the checkpoints that the tests compare with transformers: a switch that no test
turns on is not on the page.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
for source_root in (ROOT, ROOT / "proto", ROOT / "kernels"):
    if str(source_root) not in sys.path:
        sys.path.append(str(source_root))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from gpu_worker.assembly import Sizes, without_idle_indexer  # noqa: E402
from gpu_worker.cuda import loading as cuda_loading  # noqa: E402
from gpu_worker.loading.gguf_blocks import GGML_TYPES  # noqa: E402
from gpu_worker.loading.gguf_names import ARCHITECTURES as GGUF_ARCHITECTURES  # noqa: E402
from gpu_worker.loading.gguf_names import VARIANTS as GGUF_VARIANTS  # noqa: E402
from gpu_worker.model_spec import ModelSpec  # noqa: E402
from gpu_worker.models.family import ModelFamily  # noqa: E402
from gpu_worker.models.hf_config import HfConfig  # noqa: E402
from gpu_worker.models.multimodal import Multimodal  # noqa: E402
from gpu_worker.models.registry import find_family, known_architectures  # noqa: E402
from gpu_worker.models.transformers_fallback import TransformersModel  # noqa: E402
from gpu_worker.parallel.shares import ParallelContext  # noqa: E402
from gpu_worker.quant.config import SUPPORTED  # noqa: E402
from gpu_worker.quant.scheme import ON_LOAD  # noqa: E402
from tests.unit.gpu_worker.models.test_multimodal import WHOLE  # noqa: E402
from tests.unit.gpu_worker.models.test_row_caches import ITSELF  # noqa: E402
from tests.unit.gpu_worker.models.test_row_states import HYBRIDS, OTHER_HYBRIDS, RECURRENT  # noqa: E402
from tests.unit.gpu_worker.models.test_transformers_fallback import CARRIED, REFUSED  # noqa: E402
from tests.unit.gpu_worker.models.tiny_checkpoints import TINY, Tiny  # noqa: E402
from tests.unit.gpu_worker.quant.test_published_checkpoints import CASES as CHECKPOINTS  # noqa: E402
from tests.unit.gpu_worker.quant.test_published_checkpoints import FLOAT8_CASES as FLOAT8_CHECKPOINTS  # noqa: E402
from tests.unit.gpu_worker.quant.test_published_configs import REFUSED as UNREADABLE  # noqa: E402
from tests.unit.gpu_worker.quant.test_published_configs import WHOLE_CONFIGS as CONFIGS  # noqa: E402

# Weights that tests run. Sizes of which only the shape was run, with random weights, are in load_tests/shapes.
REAL_WEIGHTS = {
    "LlamaForCausalLM": ["SmolLM2 135M"],
    "Gemma3ForCausalLM": ["Gemma 3 270M"],
    "BertModel": ["all-MiniLM-L6-v2"],
}
SHAPE = "shape of "
# Fields that the class leaves open, as the release has them.
_QWEN3_OMNI = {"text_config": {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}}
NO_DEFAULT: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6},
    # As every release says; the class divides hidden_size, which no release does.
    "Glm4MoeForCausalLM": {"head_dim": 128},
    "Glm4vMoeForConditionalGeneration": {"text_config": {"head_dim": 128}},
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["full_attention"] * 32,
        "num_local_experts": 0,
        "position_embedding_type": "rope",
    },
    "Qwen3OmniMoeForConditionalGeneration": {"thinker_config": _QWEN3_OMNI},
    "Qwen3OmniMoeThinkerForConditionalGeneration": _QWEN3_OMNI,
}
# Names in releases -> of the class in transformers.
CLASS_NAMES = {
    "KimiK25ForConditionalGeneration": "Kimi_K25ForConditionalGeneration",
    "Qwen2_5OmniModel": "Qwen2_5OmniForConditionalGeneration",
}


def fields_of(config: Any) -> HfConfig:
    return HfConfig(json.loads(json.dumps(config.to_dict(), default=str)))


def spec_of(config: Any, architecture: str) -> ModelSpec:
    fields = fields_of(config)
    return find_family([architecture])[1].for_config(fields).read_config(fields, architecture)


def tested_specs(architecture: str) -> list[ModelSpec]:
    """Of the checkpoints that the suites compare; of the class's own defaults where there are none."""
    tested = [TINY[name].config() for name, found in _architectures_of_tests().items() if found == architecture]
    return [spec_of(config, architecture) for config in tested] or [default_spec(architecture)]


@functools.cache
def _architectures_of_tests() -> dict[str, str | None]:
    return {name: _architecture_of(tiny, tiny.config()) for name, tiny in TINY.items()}


def _architecture_of(tiny: Tiny, config: Any) -> str | None:
    if tiny.model_class is not None:
        return str(tiny.model_class.__name__)
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)


def default_config(architecture: str) -> Any:
    """Of the sizes that transformers' class has by default, which are some release's."""
    config_class = getattr(transformers, CLASS_NAMES.get(architecture, architecture)).config_class
    fields = dict(NO_DEFAULT.get(architecture, {}))
    if architecture.endswith("Classification"):
        fields["num_labels"] = 1
    return config_class(**fields)


def default_spec(architecture: str) -> ModelSpec:
    return spec_of(default_config(architecture), architecture)


def is_run_by_transformers(architecture: str) -> bool:
    """Whether the text part, as the class has it by default, has no native code."""
    family = find_family([architecture])[1]
    return family is Multimodal and family.for_config(fields_of(default_config(architecture))) is TransformersModel


def features(specs: Iterable[ModelSpec]) -> list[str]:
    found: dict[str, None] = {}
    for spec in specs:
        for name, present in feature_table(spec).items():
            if present:
                found[name] = None
    return list(found)


def feature_table(spec: ModelSpec) -> dict[str, bool]:
    ropes = [layer.rope for layer in spec.layers if layer.rope is not None]
    windowed = [layer for layer in spec.layers if layer.sliding_window is not None]
    table = {
        "sliding window": bool(windowed),
        "window in some layers": 0 < len(windowed) < spec.num_layers,
        "attention in chunks": any(layer.attention_chunk is not None for layer in spec.layers),
        "queries scaled by position": spec.query_scaling is not None,
        "layers without rope": bool(ropes) and len(ropes) < spec.num_layers,
        "bias on q, k, v": spec.qkv_bias,
        "norms of queries and keys": spec.qk_norm is not None,
        "LayerNorm": spec.norm_kind == "layer",
        "norms after the sublayers": spec.post_norms,
        "parallel block": spec.parallel_block,
        "multipliers of residual and logits": spec.residual_scale != 1.0,
        "soft cap on scores": spec.attention_softcap is not None,
        "soft cap on logits": spec.logit_softcap is not None,
        "attention sinks": spec.attention_sinks,
        "latent attention (MLA)": spec.latent is not None,
        "attention to what an indexer chooses": spec.indexer is not None,
        "layers that take over a choice": spec.indexer is not None
        and not all(layer.has_indexer for layer in spec.layers),
        "experts": spec.moe is not None,
        "shared expert": spec.moe is not None and spec.moe.shared_intermediate_size > 0,
        "grouped routing": spec.moe is not None and spec.moe.num_groups > 1,
        "MLP without gate": not spec.gated_mlp,
        "tied embeddings": spec.tie_word_embeddings and spec.has_output_head,
        "classification head": spec.num_labels > 0,
    }
    for rope in ropes:
        table[f"rope {rope.kind}"] = rope.kind != "default"
        table["partly rotated heads"] = table.get("partly rotated heads", False) or rope.rotary_dim < spec.head_dim
    if spec.latent is not None:
        table["partly rotated heads"] = False
    return table


def runs_on(architecture: str, family: type[ModelFamily]) -> str:
    if family.is_encoder:
        return "CPU; GPU in plain torch"
    sizes = Sizes(block_size=64, max_model_len=8192, max_num_seqs=256, max_num_batched_tokens=8192)
    spec = default_spec(architecture)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_name", lambda device: "any"),
    ):
        device = torch.device("cuda", 0)
        reason = cuda_loading._unsupported(spec, ParallelContext(), sizes, device)
        if spec.indexer is not None:
            short = replace(sizes, max_model_len=spec.indexer.num_chosen)
            dense = without_idle_indexer(spec, short)
            if cuda_loading._unsupported(dense, ParallelContext(), short, device) is None:
                return f"CPU; GPU kernels with --max-model-len {short.max_model_len}, else GPU in plain torch"
    return "CPU; GPU kernels" if reason is None else "CPU; GPU in plain torch"


def sizes_seen() -> dict[str, list[str]]:
    seen = {architecture: list(names) for architecture, names in REAL_WEIGHTS.items()}
    for file in sorted((ROOT / "load_tests" / "shapes").glob("*/config.json")):
        [architecture] = json.loads(file.read_text())["architectures"]
        seen.setdefault(architecture, []).append(SHAPE + file.parent.name)
    return seen


def native_table() -> list[str]:
    gguf: dict[str, list[str]] = {}
    others = [(name, each) for name, variants in GGUF_VARIANTS.items() for each in variants]
    for name, each in [*GGUF_ARCHITECTURES.items(), *others]:
        gguf.setdefault(each.hf_class, []).append(f"`{name}`")
    seen = sizes_seen()
    lines = [
        "| `architectures` in config.json | file | runs on | GGUF | sizes seen | switches compared with transformers |",
        "|---|---|---|---|---|---|",
    ]
    for architecture in known_architectures():
        _, family = find_family([architecture])
        file = family.__module__.rpartition(".")[2]
        is_other = is_run_by_transformers(architecture)
        cells = [
            f"`{architecture}`",
            f"[{file}.py](../gpu_worker/models/{file}.py)",
            "CPU; GPU in plain torch" if is_other else runs_on(architecture, family),
            ", ".join(gguf.get(architecture, [])),
            ", ".join(seen.get(architecture, [])),
            "the text part by transformers' code" if is_other else ", ".join(features(tested_specs(architecture))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def fallback_lines() -> list[str]:
    carried = sorted({_architecture(tiny.config_class) for tiny in CARRIED.values()})
    refused = sorted({_architecture(tiny.config_class) for tiny, _ in REFUSED.values()} - set(carried))
    itself = sorted({_architecture(tiny.config_class) for tiny in ITSELF.values()} - set(carried))
    whole = sorted(str(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[kind]) for kind in WHOLE)
    hybrids = sorted({_architecture(tiny.config_class) for tiny in (HYBRIDS | OTHER_HYBRIDS | RECURRENT).values()})
    return [
        f"Tested: {_quoted(carried)}.",
        "",
        "Layers that keep a state for every sequence (recurrences, convolutions) run row after row, and no prompt's",
        f"beginning is taken over from another; tested: {_quoted(hybrids)}.",
        "",
        "What paged attention does not carry (masks of a model's own, indexers and compressed keys beyond those above,",
        "two attentions over one cache) runs row after row, all layers of it, in transformers' own caches: they are",
        "counted in blocks, and no prompt's beginning is taken over either. Whether such a model computes of a text in",
        f"parts what it computes of the whole is tried when it is loaded; tested: {_quoted(itself)}.",
        "",
        "Of models that see or hear, and that the table has not, text is served by the whole of them, other parts",
        f"loaded with it; tested: {_quoted(whole)}.",
        "",
        f"Refused, with the reason: {_quoted(refused)}; so is whatever else keeps nothing of what it has seen, or",
        "counts positions from its padding token on.",
    ]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _architecture(config_class: Any) -> str:
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type])


PROOFS = (
    ("awq, gptq, compressed-tensors, fp8", "files of GPTQModel, AutoAWQ and llm-compressor", "test_real_checkpoints"),
    ("gptq, each width", "AutoGPTQ's linear", "test_gptq"),
    ("compressed-tensors, each format and strategy", "its own decompression", "test_compressed_tensors"),
    (
        "compressed-tensors, schemes by name and rotated weights",
        "its own schemes and unpacking",
        "test_compressed_rotated",
    ),
    ("auto-round", "its own linears", "test_auto_round"),
    ("modelopt", "its own tensors", "test_modelopt"),
    ("quark", "its own unpacking", "test_quark"),
    ("mlx", "its own unpacking", "test_mlx"),
    ("mlx, modes of small floats", "its own unpacking", "test_mlx_floats"),
    ("torchao", "its own unpacking", "test_torchao"),
    ("hqq", "its own unpacking", "test_hqq"),
    ("bitsandbytes", "its own unpacking", "test_bitsandbytes"),
    ("fbgemm_fp8", "transformers' module of it (names, shapes, types)", "test_config"),
    ("mxfp4 experts", "transformers' unpacking", "test_loading"),
)
OTHER_PROOFS = (
    (
        "float8 experts in one tensor a layer",
        "transformers' modules of them",
        "tests/unit/gpu_worker/loading/test_stacked_experts.py",
    ),
    (
        "every family with quantized linears",
        "the same model with plain ones",
        "tests/unit/gpu_worker/models/test_quantized_families.py",
    ),
    ("GGUF blocks", "the `gguf` package", "tests/unit/gpu_worker/loading/test_gguf_blocks.py"),
)


def proof_table() -> list[str]:
    rows = [(what, against, f"tests/unit/gpu_worker/quant/{name}.py") for what, against, name in PROOFS]
    rows += OTHER_PROOFS
    lines = ["| format | held against | test |", "|---|---|---|"]
    for what, against, file in rows:
        lines.append(f"| {what} | {against} | [{Path(file).name}](../{file}) |")
    return lines


NATIVE = """\
# Models

<!-- Written by `make docs` from the registries; a test compares it with them. -->

## Native

One file a family. Sizes seen: weights that the tests run, and shapes that were run with random weights (`load_tests/`).
"GPU kernels": they take the sizes that transformers' class has by default. "GPU in plain torch": many times slower,
without CUDA graphs.
Everything is compared with transformers in float32 on the CPU, on small random checkpoints
([test_families.py](../tests/unit/gpu_worker/models/test_families.py),
[test_pooling.py](../tests/unit/gpu_worker/test_pooling.py)).
"""
OTHERS = """\
## Any other causal language model

What transformers has code for, and the table has not, runs through
[transformers_fallback.py](../gpu_worker/models/transformers_fallback.py): transformers' forward pass, the paged cache
by its attention interface, the same scheduler and sampling; the worker's log says so. One device, plain torch;
quantized weights are dequantized while they are loaded. A repository's own code is never run. Every causal class that
can be built small is tried: it computes like transformers, or it is refused
([test_every_causal_class.py](../tests/unit/gpu_worker/models/test_every_causal_class.py)).
"""
POOLING = """\
## Embeddings and scores

`--task auto` reads it off the checkpoint: `modules.json` of Sentence Transformers (Pooling by the last token, the first
or the mean, then Dense and Normalize), an encoder, a decoder saved without its head (`Qwen3Model`, `MistralModel`), or
a classifier with one label (`...ForSequenceClassification`, a cross encoder). `--task embed` makes vectors of any
decoder above; `--pooling` chooses the hidden states. `/v1/embeddings` takes texts and token ids. `/v1/rerank` and
`/v1/score` use a cross encoder's score, or the cosine of two embeddings. On a GPU decoders
run in its kernels and are pooled on the device; encoders (BERT), and layers split over stages, run in plain torch.
"""
WEIGHTS = """\
## Weights

safetensors as they are, or quantized: {supported}. `--quantization {on_load}` quantizes plain weights while they are
loaded. On a CPU packed weights are computed from dequantized ones; on a GPU they stay packed, but for bitsandbytes'
4-bit weights, which become bfloat16 everywhere, and for float8 ones whose inputs are not quantized (MXFP8, W8A16),
which do where the device multiplies. Inputs are quantized where a format says so; bitsandbytes' int8, NVFP4, MXFP4,
MXFP8 and 4-bit weights under 8-bit inputs (W4A8) read theirs as they are. Where `tie_word_embeddings` is true and the
checkpoint stores an output head with other values, or a packed one, the stored head is served, as transformers 5 does;
the worker's log says so.

{proofs}

Configurations as publishers write them, each with a test
([whole checkpoints]({published_tests}/test_published_checkpoints.py),
[configs]({published_tests}/test_published_configs.py)): {published}.

Refused by name, before anything is allocated, with the list of what works: {refused}. So are AutoRound's own float
formats, and ModelOpt with scales before the weights (AWQ, SVDQuant).

GGUF files: {gguf_types}, in one file or in several (`-00001-of-0000N.gguf`: give the first, or the directory).
`stepwire serve` converts them to bfloat16 once, or keeps them packed where the model runs on a GPU (`--gguf-weights`).
"""


def page() -> str:
    weights = WEIGHTS.format(
        proofs="\n".join(proof_table()),
        supported=SUPPORTED,
        on_load="` or `".join(ON_LOAD),
        published_tests="../tests/unit/gpu_worker/quant",
        published=", ".join(sorted({*CHECKPOINTS, *FLOAT8_CHECKPOINTS, *CONFIGS})),
        refused=", ".join(sorted({words for _, words in UNREADABLE.values()})),
        gguf_types=", ".join(sorted(kind.name for kind in GGML_TYPES.values())),
    )
    table, others = "\n".join(native_table()), "\n".join(fallback_lines())
    return "\n".join([NATIVE, f"{table}\n", OTHERS, f"{others}\n", POOLING, weights])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
