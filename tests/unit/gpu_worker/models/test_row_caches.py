"""Models that attend in ways of their own, through transformers' code: a row after the other, each in its own cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gpu_worker.attention.api import StepMetadata
from gpu_worker.config import WorkerSettings
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.models.loader import read_spec
from gpu_worker.models.row_caches import RowCaches, tensors_within
from gpu_worker.models.transformers_fallback import TransformersModel
from gpu_worker.runner import TorchRunner
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.models.test_families import PagedModel, check_logits
from tests.unit.gpu_worker.models.test_row_states import check_rows_come_and_go
from tests.unit.gpu_worker.models.tiny_checkpoints import INDEXER, MLA, Tiny, save_model


def tiny(model_type: str, **fields: Any) -> Tiny:
    return Tiny(CONFIG_MAPPING[model_type], fields)


LATENT = {name: value for name, value in MLA.items() if name != "first_k_dense_replace"}
SPARSE, HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
ITSELF = {
    # Keys of several tokens compressed into one, an indexer over these, hyper-connections.
    "deepseek-v4": tiny(
        "deepseek_v4",
        q_lora_rank=32,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        head_dim=16,
        num_key_value_heads=1,
        o_groups=2,
        o_lora_rank=16,
        num_hidden_layers=4,
        layer_types=["sliding_attention", SPARSE, HEAVY, SPARSE],
        compress_rates={SPARSE: 2, HEAVY: 8},
        index_topk=4,
        index_n_heads=24,
        index_head_dim=18,
        sliding_window=11,
    ),
    # Indexers, whose choices later layers take over.
    "hy-v4": tiny("hy_v4", **LATENT, **INDEXER),
    "axk2": tiny("axk2", **LATENT, **INDEXER),
    "minimax-m3": tiny(
        "minimax_m3_vl_text",
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        head_dim=16,
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=3,
    ),
    # Two attentions, one of which is taken from the other.
    "diffllama": tiny("diffllama"),
    "doge": tiny("doge", keep_window_size=16),
    # No attention, and a state that is no cache of transformers.
    "rwkv": tiny("rwkv", attention_hidden_size=60),
    "xlstm": tiny("xlstm", hidden_size=128, num_heads=4, autocast_kernel_dtype="float32"),
    # Windows that are in the mask alone.
    "phimoe-window": tiny("phimoe", sliding_window=11, num_local_experts=4),
    # Positions that a model counts itself.
    "bart": tiny("bart", decoder_ffn_dim=90, decoder_layers=2, decoder_attention_heads=6, is_decoder=True),
    "roformer": tiny("roformer", is_decoder=True, embedding_size=60),
    "jetmoe": tiny("jetmoe", num_key_value_heads=3, kv_channels=12, num_local_experts=4, num_experts_per_tok=2),
    "qwen4-exp": tiny(
        "qwen4_exp_text",
        layer_types=["linear_attention", "indexed_attention", "linear_attention"],
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=40,
        hc_lowrank=16,
        indexer_n_heads=24,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
    ),
    "dots3-note": tiny("dots3_note_text", **LATENT, **INDEXER),
}


QUICK = ("deepseek-v4", "hy-v4", "diffllama")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ITSELF]
)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Of a prompt in pieces, and of decodes beside other rows."""
    reference = save_model(ITSELF[name], tmp_path)
    spec, family = read_spec(tmp_path)
    assert family is TransformersModel and spec.row_cache_dim + spec.row_state_bytes > 0
    check_logits(reference, tmp_path)


def load(directory: Path, **changes: Any) -> TorchRunner:
    values: dict[str, Any] = {"cpu_kv_cache_gib": 0.01, "num_threads": 1, "block_size": 16}
    return TorchRunner.load(WorkerSettings(model=directory, device="cpu", dtype="float32", **(values | changes)))


def test_rows_come_and_go(tmp_path: Path) -> None:
    reference = save_model(ITSELF["hy-v4"], tmp_path, pad_token_id=None)
    check_rows_come_and_go(reference, load(tmp_path))


def test_what_rows_hold_is_counted_in_blocks_and_freed_with_them(tmp_path: Path) -> None:
    save_model(ITSELF["diffllama"], tmp_path)
    runner = load(tmp_path)
    # Keys and values of 2 heads of 10 in 3 layers.
    assert runner.model.spec.row_cache_dim == 2 * 2 * 10 * 3
    facts = runner.describe()
    assert facts.keeps_row_states and 16 * 4 * 120 <= facts.block_bytes <= 16 * 4 * 124
    held = sum(layer.numel() for layer in runner._kv_cache.layers)
    assert held * 4 < facts.num_blocks * facts.block_bytes / 50
    driver = StepDriver(runner)
    for row in (0, 1):
        driver.add(row, list(range(5, 30)), greedy())
    driver.step()
    rows = runner.model.row_states
    assert isinstance(rows, RowCaches)
    caches = dict(rows._caches)
    num_numbers = {row: sum(tensor.numel() for tensor in tensors_within(cache)) for row, cache in caches.items()}
    assert num_numbers == {0: 25 * 120, 1: 25 * 120}
    driver.drop(0)
    driver.step()
    assert list(rows._caches) == [1]


def test_what_rows_hold_is_counted_alike_whatever_type_the_checkpoint_has(tmp_path: Path) -> None:
    save_model(ITSELF["diffllama"], tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    assert fields["dtype"] == "float32"
    file.write_text(json.dumps(fields | {"dtype": "bfloat16"}))
    spec, _ = read_spec(tmp_path)
    assert spec.dtype == torch.bfloat16 and spec.row_cache_dim == 2 * 2 * 10 * 3


def test_another_type_of_cache_is_refused(tmp_path: Path) -> None:
    save_model(ITSELF["diffllama"], tmp_path)
    with pytest.raises(ModelConfigError, match=r"own caches.*--kv-cache-dtype auto"):
        load(tmp_path, kv_cache_dtype="bfloat16")


def test_no_beginning_is_taken_over(tmp_path: Path) -> None:
    save_model(ITSELF["diffllama"], tmp_path)
    driver = StepDriver(load(tmp_path))
    driver.add(0, list(range(5, 30)), greedy())
    driver.step()
    driver.add(1, list(range(5, 30)), greedy(), prefix_of=0, num_shared_tokens=16)
    result = driver.step()
    assert [(fault.row, "begins at token 16" in fault.message) for fault in result.faults] == [(1, True)]


def test_it_says_so(tmp_path: Path) -> None:
    save_model(ITSELF["diffllama"], tmp_path)
    with capture_logs() as logs:
        PagedModel(tmp_path)
    lines = [line for line in logs if "in its own way" in line["event"]]
    assert [line["architecture"] for line in lines] == ["DiffLlamaForCausalLM"]


class Trunk:
    """Sums up what it has seen, in a cache that it may do without, or forget where it gets several tokens."""

    def __init__(self, *, keeps: bool = True, forgets: bool = False, looks_ahead: bool = False) -> None:
        self._keeps, self._forgets, self._looks_ahead = keeps, forgets, looks_ahead
        self.most = 0

    def __call__(self, input_ids: torch.Tensor, use_cache: bool, state: torch.Tensor | None = None) -> Any:
        self.most = max(self.most, input_ids.shape[1])
        values = input_ids.float().unsqueeze(-1).expand(1, -1, 4)
        sums = values.cumsum(1)
        if state is not None and not (self._forgets and input_ids.shape[1] > 1):
            sums = sums + state
        if self._looks_ahead:
            sums = sums + values.sum(1, keepdim=True)
        return Given(sums, sums[:, -1:] if self._keeps else None)


class Given:
    def __init__(self, last_hidden_state: torch.Tensor, state: torch.Tensor | None = None) -> None:
        self.last_hidden_state, self.state = last_hidden_state, state


def test_what_does_not_go_on_is_refused() -> None:
    cpu = torch.device("cpu")
    assert RowCaches(Trunk(keeps=False)).try_out(100, cpu) == "it keeps no cache of what it has seen"
    assert "in parts it does not compute" in str(RowCaches(Trunk(looks_ahead=True)).try_out(100, cpu))


@pytest.mark.parametrize("forgets", [False, True])
def test_who_forgets_gets_one_token_at_a_time(forgets: bool) -> None:
    trunk = Trunk(forgets=forgets)
    rows = RowCaches(trunk)
    assert isinstance(rows.try_out(100, torch.device("cpu")), Given)
    ids = torch.arange(8).unsqueeze(0)
    states = []
    for start, stop in ((0, 3), (3, 8)):
        counts = np.array([stop - start])
        rows.plan(StepMetadata(0, counts, np.array([stop]), np.zeros((1, 1)), np.arange(start, stop), np.array([2])))
        trunk.most = 0
        states.append(rows.run(ids[:, start:stop]).last_hidden_state)
    assert trunk.most == (1 if forgets else 5)
    assert torch.cat(states, 1)[0, :, 0].tolist() == [0, 1, 3, 6, 10, 15, 21, 28]
