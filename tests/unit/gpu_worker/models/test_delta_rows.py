"""Models of the gated delta rule in the runner: rows that come and go, and what their states take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_worker.assembly import held_kv_scales
from gpu_worker.config import WorkerSettings
from gpu_worker.kv_cache import KVCacheShape, MemoryBudgetError
from gpu_worker.loading.kv_scales import KVScales
from gpu_worker.model_spec import ModelConfigError
from gpu_worker.parallel.shares import ParallelContext
from gpu_worker.runner import TorchRunner
from gpu_worker.state_pool import StateShape
from load_tests.cpu_worker.step_driver import StepDriver, greedy
from tests.unit.gpu_worker.models.test_families import PagedModel
from tests.unit.gpu_worker.models.test_row_states import check_rows_come_and_go
from tests.unit.gpu_worker.models.tiny_checkpoints import save_tiny


def load(directory: Path, **changes: Any) -> TorchRunner:
    fields: dict[str, Any] = {"dtype": "float32", "cpu_kv_cache_gib": 0.01, "num_threads": 1, "max_num_seqs": 4}
    return TorchRunner.load(WorkerSettings(model=directory, device="cpu", **(fields | changes)))


@pytest.mark.parametrize("name", ["qwen3-next", "qwen3.5"])
def test_rows_keep_their_states_whoever_had_their_place_before(name: str, tmp_path: Path) -> None:
    """One is thrown out in the middle of its answer, another sequence takes its row, and it is computed anew."""
    reference = save_tiny(name, tmp_path)
    runner = load(tmp_path)
    assert runner.describe().keeps_row_states
    check_rows_come_and_go(reference, runner)


def test_a_new_session_begins_with_nothing(tmp_path: Path) -> None:
    save_tiny("qwen3.5", tmp_path)
    runner, drawn = load(tmp_path), []
    for _ in range(2):
        driver = StepDriver(runner)
        driver.add(1, list(range(5, 40)), greedy())
        for _ in range(6):
            driver.step()
        drawn.append(driver.rows[1].tokens)
        runner.reset()
    assert drawn[0] == drawn[1]


def test_what_another_row_has_computed_is_not_gone_on_from(tmp_path: Path) -> None:
    save_tiny("qwen3.5", tmp_path)
    driver = StepDriver(load(tmp_path, block_size=16))
    driver.add(0, list(range(5, 30)), greedy())
    driver.step()
    driver.add(1, list(range(5, 30)), greedy(), prefix_of=0, num_shared_tokens=16)
    result = driver.step()
    assert result.rows.tolist() == [0]
    assert [(fault.row, "begins at token 16" in fault.message) for fault in result.faults] == [(1, True)]


@pytest.mark.parametrize("name", ["qwen3-next", "qwen3.5-moe"])
def test_bfloat16_is_close(name: str, tmp_path: Path) -> None:
    """Of a prompt in pieces and decodes, whose states are float32 whatever the model's type is."""
    reference: Any = save_tiny(name, tmp_path)
    token_ids = torch.randint(0, 301, (90,), generator=torch.Generator().manual_seed(7)).tolist()
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]
    model = PagedModel(tmp_path, torch.bfloat16)
    steps = [(0, 70), (70, 84), *((start, start + 1) for start in range(84, 90))]
    got = torch.cat([model.logits(token_ids[start:stop], start) for start, stop in steps]).float()
    cosine = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
    # A token near a tie of its experts may go to others: few of them do.
    assert cosine.median() > 0.995 and (cosine > 0.98).float().mean() > 0.9


def test_states_are_planned_as_they_are_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("qwen3-next", tmp_path)
    runner = load(tmp_path, max_num_seqs=9)
    states = runner.model.states
    assert states is not None
    layers = [states.layer(number) for number in range(states.shape.num_layers)]
    held = sum(part.numel() * part.element_size() for layer in layers for part in (layer.conv, layer.matrices))
    assert len(layers) == 2 and held == 9 * states.shape.row_bytes
    # Of three layers one caches keys and values: of two heads of 16 numbers.
    assert runner.describe().block_bytes == 2 * 2 * 16 * 4 * runner.describe().block_size
    monkeypatch.setattr("gpu_worker.assembly.available_host_bytes", lambda: 480 << 20)
    with pytest.raises(
        MemoryBudgetError, match=r"states of 4000 rows take .* set --max-num-seqs (\d+) or less"
    ) as told:
        load(tmp_path, max_num_seqs=4000)
    fitting = int(str(told.value).split("--max-num-seqs ")[1].split()[0])
    assert load(tmp_path, max_num_seqs=fitting).describe().max_num_seqs == fitting > 64


@pytest.mark.parametrize("name", ["qwen3.5", "llama"])
def test_a_stage_has_the_scales_of_the_layers_that_it_caches(name: str, tmp_path: Path) -> None:
    """Of a layer that caches nothing there is none; its stage counts blocks all the same."""
    save_tiny(name, tmp_path)
    model = load(tmp_path).model
    assert held_kv_scales(model.spec, model.kv_scales, ParallelContext()) is None
    model.kv_scales = tuple(KVScales(key=1.0 + layer) for layer in range(3))
    whole = held_kv_scales(model.spec, model.kv_scales, ParallelContext())
    assert whole == ([model.kv_scales[1]] if name == "qwen3.5" else list(model.kv_scales))
    for stage in range(3):
        parallel = ParallelContext(stage=stage, stage_layers=(1, 1, 1))
        assert held_kv_scales(model.spec, model.kv_scales, parallel) == [model.kv_scales[stage]]
        shape = KVCacheShape.of(model.spec, parallel, 16, torch.float32)
        states = StateShape.of(model.spec, parallel, torch.float32)
        assert shape.num_layers == 1
        assert (0 if states is None else states.num_layers) == (name == "qwen3.5" and stage != 1)


def test_deterministic_mode_refuses_them_by_name(tmp_path: Path) -> None:
    save_tiny("qwen3.5", tmp_path)
    with pytest.raises(ModelConfigError, match="--deterministic does not cover the gated delta rule yet"):
        load(tmp_path, deterministic=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"linear_num_value_heads": 3}, "linear_num_value_heads 3 is not a multiple of linear_num_key_heads 2"),
        ({"layer_types": ["linear_attention", "sliding_attention", "full_attention"]}, "has .'sliding_attention'."),
        ({"layer_types": ["linear_attention"]}, "one entry for each of num_hidden_layers 3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported before a gated delta rule"),
    ],
)
def test_configs_that_ask_for_more_are_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_tiny("qwen3.5", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ModelConfigError, match=words):
        load(tmp_path)


@pytest.mark.slow
def test_compiled_kernels_of_a_cpu_compute_what_torch_does(tmp_path: Path) -> None:
    """Attention and norms are theirs, the rule is torch's."""
    save_tiny("qwen3.5", tmp_path, hidden_size=64, num_attention_heads=4)
    drawn = []
    for kernels in ("on", "off"):
        driver = StepDriver(load(tmp_path, dtype="bfloat16", cpu_kernels=kernels))
        driver.add(0, list(range(5, 90)), greedy(num_logprobs=0))
        logprobs = [driver.step({0: count}).logprobs for count in (50, 35)]
        drawn.append((driver.rows[0].tokens, logprobs[-1]))
    assert drawn[0][0] == drawn[1][0]
    assert abs(drawn[0][1] - drawn[1][1]).max() < 0.05
