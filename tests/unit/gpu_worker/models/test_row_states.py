"""Models whose layers keep a state for every row, through transformers' code: recurrences and short convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gpu_worker.config import WorkerSettings
from gpu_worker.models.fallback_probe import probe_layers
from gpu_worker.models.loader import read_spec
from gpu_worker.models.row_caches import tensors_within
from gpu_worker.models.row_states import StateProbe
from gpu_worker.models.transformers_fallback import TransformersModel
from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.models.test_families import PagedModel, check_logits
from tests.unit.gpu_worker.models.tiny_checkpoints import Tiny, save_model

STATE, FULL = "linear_attention", "full_attention"
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 30, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LATENT = {
    "layer_types": [STATE, FULL, STATE],
    "kv_lora_rank": 20,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "num_key_value_heads": 6,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONVOLUTIONS = {"layer_types": ["conv", FULL, "conv"]}


def tiny(model_type: str, **fields: Any) -> Tiny:
    return Tiny(CONFIG_MAPPING[model_type], fields)


HYBRIDS = {
    "lfm2": tiny("lfm2", **CONVOLUTIONS, block_auto_adjust_ff_dim=False),
    "granite4-h": tiny(
        "granitemoehybrid",
        **MAMBA2,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=90,
    ),
    # Both in every layer.
    "falcon-h1": tiny("falcon_h1", **(MAMBA2 | {"mamba_d_head": 15}), mamba_d_ssm=60),
    # Linear attention, with a cache of its class's own and outputs beside hidden states.
    "minimax": tiny("minimax", layer_types=[STATE, FULL, STATE], num_local_experts=5, head_dim=16, block_size=8),
    # Its recurrent blocks keep their states in themselves.
    "recurrent-gemma": tiny(
        "recurrent_gemma",
        num_hidden_layers=4,
        lru_width=60,
        block_types=["recurrent", "recurrent", "attention"],
        attention_window_size=11,
        head_dim=10,
    ),
    # What keeps a state makes queries, keys and values.
    "zaya": tiny(
        "zaya",
        layer_types=["hybrid", "hybrid_sliding", "hybrid"],
        sliding_window=11,
        head_dim=16,
        num_experts=5,
        num_experts_per_tok=1,
        moe_intermediate_size=40,
        router_hidden_size=12,
    ),
    # Its layers forget what was before where they are given several tokens: they get one at a time.
    "jamba": tiny(
        "jamba",
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
}
# Every layer keeps a state, and none attends.
RECURRENT = {
    "mamba2": tiny("mamba2", num_heads=4, head_dim=30, state_size=16, n_groups=1, chunk_size=16),
    "mamba": tiny("mamba", state_size=8),
    "falcon-mamba": tiny("falcon_mamba", state_size=8),
}
OTHER_HYBRIDS = {
    "lfm2-moe": tiny("lfm2_moe", **CONVOLUTIONS, **EXPERTS, num_dense_layers=1),
    "bamba": tiny("bamba", **MAMBA2, attn_layer_indices=[1]),
    "lfm3": tiny("lfm3"),
    # Keys and values of their other layers are compressed.
    "kimi-linear": tiny("kimi_linear", **LATENT),
    "bailing-hybrid": tiny("bailing_hybrid", **LATENT, num_experts=6, n_group=1, topk_group=1),
    # One attention that several layers share. Steps of one token round more in transformers than prompts do.
    "zamba2": tiny(
        "zamba2",
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        n_mamba_heads=4,
        mamba_d_state=16,
        chunk_size=16,
        initializer_range=0.1,
        use_mamba_kernels=False,
    ),
    "olmo-hybrid": tiny("olmo_hybrid", layer_types=[STATE, FULL, STATE]),
    # Layers that do neither.
    "nemotron-h": tiny(
        "nemotron_h",
        layers_block_type=[STATE, "moe", FULL, "mlp"],
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        moe_shared_expert_intermediate_size=40,
        mamba_num_heads=4,
        mamba_head_dim=30,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=16,
        head_dim=16,
        num_nextn_predict_layers=0,
    ),
}


@pytest.mark.parametrize("name", [*HYBRIDS, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_HYBRIDS)])
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Of a prompt in pieces, and of decodes beside other rows with states of their own."""
    reference = save_model((HYBRIDS | OTHER_HYBRIDS)[name], tmp_path)
    spec, family = read_spec(tmp_path)
    assert family is TransformersModel and spec.row_state_bytes > 0
    check_logits(reference, tmp_path)


@pytest.mark.parametrize(
    "name", ["mamba2", *(pytest.param(name, marks=pytest.mark.slow) for name in list(RECURRENT)[1:])]
)
def test_models_without_any_attention(name: str, tmp_path: Path) -> None:
    reference = save_model(RECURRENT[name], tmp_path)
    check_logits(reference, tmp_path)
    settings = WorkerSettings(model=tmp_path, device="cpu", dtype="float32", num_threads=1, max_num_seqs=4)
    runner = TorchRunner.load(settings)
    facts = runner.describe()
    assert facts.keeps_row_states and facts.max_model_len > 100_000
    # Blocks are counted, and are of next to nothing.
    assert (
        facts.num_blocks * facts.block_size > 4 * facts.max_model_len and facts.num_blocks * facts.block_bytes < 1 << 23
    )
    driver = StepDriver(runner)
    for row, length in enumerate((3, 21)):
        driver.add(row, list(range(5, 5 + length)), greedy())
    for _ in range(9):
        driver.step()
    for row, length in enumerate((3, 21)):
        tokens = driver.rows[row].tokens
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0]
        assert len(tokens) == length + 9
        assert logits[length - 1 : -1].argmax(-1).tolist() == tokens[length:]


def check_rows_come_and_go(reference: Any, runner: TorchRunner) -> None:
    """A row is thrown out, another one takes its place, and it is computed anew in a third."""
    driver = StepDriver(runner)
    prompts = {0: list(range(5, 26)), 1: [7, 9, 11]}
    for row, prompt in prompts.items():
        driver.add(row, prompt, greedy())
    for runs in ({0: 13, 1: 3}, {0: 8, 1: 1}, None, None):
        driver.step(runs)
    tokens = driver.drop(0)
    prompts |= {0: [20, 30, 40, 50], 3: tokens[:21]}
    driver.add(0, prompts[0], greedy())
    driver.step()
    driver.add(3, tokens, greedy(), num_prompt_tokens=21)
    for _ in range(8):
        driver.step()
    for row, driven in driver.rows.items():
        with torch.inference_mode():
            logits = reference(torch.tensor([driven.tokens])).logits[0]
        drawn = len(driven.tokens) - len(prompts[row])
        assert drawn >= 9
        assert logits[-drawn - 1 : -1].argmax(-1).tolist() == driven.tokens[-drawn:]


def test_rows_keep_their_states_whoever_had_their_place_before(tmp_path: Path) -> None:
    reference = save_model(HYBRIDS["granite4-h"], tmp_path)
    settings = WorkerSettings(model=tmp_path, device="cpu", dtype="float32", cpu_kv_cache_gib=0.01, num_threads=1)
    runner = TorchRunner.load(settings)
    assert runner.describe().keeps_row_states
    check_rows_come_and_go(reference, runner)


def test_a_row_that_would_take_over_another_ones_beginning_is_refused_alone(tmp_path: Path) -> None:
    save_model(HYBRIDS["lfm2"], tmp_path)
    settings = WorkerSettings(
        model=tmp_path, device="cpu", dtype="float32", cpu_kv_cache_gib=0.01, num_threads=1, block_size=16
    )
    driver = StepDriver(TorchRunner.load(settings))
    driver.add(0, list(range(5, 30)), greedy())
    driver.step()
    driver.add(1, list(range(5, 30)), greedy(), prefix_of=0, num_shared_tokens=16)
    result = driver.step()
    assert result.rows.tolist() == [0]
    assert [(fault.row, "begins at token 16" in fault.message) for fault in result.faults] == [(1, True)]


def test_what_no_row_has_computed_is_not_gone_on_from(tmp_path: Path) -> None:
    save_model(HYBRIDS["lfm2"], tmp_path)
    with pytest.raises(RuntimeError, match="row 0 begins at token 5, and has no state from before"):
        PagedModel(tmp_path).logits([5, 6, 7], 5)


class Gated(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, cache_params: Any = None, gate: Any = None, **kwargs: Any) -> torch.Tensor:
        cache_params.update_conv_state(hidden.transpose(1, 2), 0, conv_kernel_size=3)
        return hidden if gate is None else hidden * gate


def configured(model: torch.nn.Module) -> torch.nn.Module:
    model.config = CONFIG_MAPPING["lfm2"](num_hidden_layers=1, layer_types=["conv"])
    return model


class Telling(torch.nn.Module):
    """Of two layers, the second of which may read what the first gives beside hidden states."""

    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.inner, self._reads = Shared(), reads

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        states, kept = self.inner(hidden)
        return states + kept.sum() if self._reads else states


class Shared(Gated):
    def forward(self, hidden: torch.Tensor, cache_params: Any = None) -> Any:
        return super().forward(hidden, cache_params), hidden.transpose(1, 2)


@pytest.mark.parametrize("reads", [False, True])
def test_what_a_layer_gives_beside_hidden_states_is_read_by_nobody(reads: bool) -> None:
    model = configured(Telling(reads=reads))
    StateProbe(model, [])
    if reads:
        with pytest.raises(TypeError, match="beside numbers for every token is read"):
            model(torch.ones(1, 5, 4))
    else:
        assert torch.equal(model(torch.ones(1, 5, 4)), torch.ones(1, 5, 4))


@pytest.mark.parametrize(
    ("more", "words"), [({"gate": 2.0}, "given gate"), ({"segments": [0]}, "given segments"), ({"position_ids": 1}, "")]
)
def test_what_a_layer_is_given_is_not_dropped_in_silence(more: dict[str, Any], words: str) -> None:
    model = configured(torch.nn.Sequential(Gated()))
    states = StateProbe(model, [])
    hidden = torch.ones(1, 5, 4)
    if words:
        with pytest.raises(TypeError, match=words):
            model[0](hidden, **more)
        return
    assert torch.equal(model[0](hidden, **more), hidden)
    assert states.kept == {"0": 3 * 4 * 4}


def test_only_layers_that_keep_a_state_run_row_by_row(tmp_path: Path) -> None:
    """Blocks of Nemotron H take the cache, whatever is in them."""
    save_model(OTHER_HYBRIDS["nemotron-h"], tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    found = probe_layers(config, "NemotronHForCausalLM", torch.float32)
    assert list(found.states) == ["model.layers.0.mixer"]
    assert [call.module for call in found.calls] == ["model.layers.2.mixer"]


@pytest.mark.parametrize("run", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["lfm2", "falcon-h1", "granite4-h", "mamba2"])
def test_states_are_counted_in_the_type_that_the_model_runs_in(name: str, run: str, tmp_path: Path) -> None:
    """And not in its checkpoint's, which is the other one."""
    stored = torch.bfloat16 if run == "float32" else torch.float32
    save_model((HYBRIDS | RECURRENT)[name], tmp_path, dtype=stored)
    settings = WorkerSettings(model=tmp_path, device="cpu", dtype=run, num_threads=1, cpu_kv_cache_gib=0.01)
    runner = TorchRunner.load(settings)
    assert read_spec(tmp_path)[0].dtype == stored
    driver = StepDriver(runner)
    driver.add(0, list(range(5, 30)), greedy())
    driver.step()
    driver.step()
    assert runner.model.row_states is not None
    [held] = [list(tensors_within(cache)) for cache in runner.model.row_states._caches.values()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == runner.model.spec.row_state_bytes > 0
