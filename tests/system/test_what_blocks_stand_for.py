"""`stepwire serve` with models whose blocks hold more than keys and values, or are only counted: many streams at once,
in a pool that they do not fit into, give the tokens that each gives alone.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.gpu_worker.models.test_row_caches import ITSELF
from tests.unit.gpu_worker.models.tiny_checkpoints import save_model, save_tiny

from .launched import Launched
from .test_parallel_serving import FLAGS, NUM_TOKENS, pool, sixteen_streams, tokens_alone

SPLIT = ("--tensor-parallel-size=2", "--pipeline-parallel-size=2")


@pytest.mark.parametrize("parallel", [(), pytest.param(SPLIT, marks=pytest.mark.slow)], ids=["one", "two by two"])
def test_keys_of_an_indexer_lie_in_the_blocks(parallel: tuple[str, ...], tmp_path: Path) -> None:
    """Prefixes are shared and rows thrown out; every stage has layers that choose and layers that take over."""
    save_tiny("glm5-shared-choices", tmp_path / "sparse", pad_token_id=None)
    expected = tokens_alone(tmp_path / "sparse")
    with Launched(tmp_path / "sparse", *FLAGS, *parallel, pool(40, 16 * 4 * (4 * 32 + 2 * 18))) as launched:
        assert asyncio.run(sixteen_streams(launched, NUM_TOKENS)) == expected
        assert launched.metric("stepwire_preemptions_total") > 0
        assert launched.metric("stepwire_prefix_cache_hits_total") > 0
        assert launched.metric("stepwire_kv_blocks_in_use") == 0


# In every run without services: tests/unit/gpu_worker/models/test_row_caches.py.
@pytest.mark.slow
def test_rows_with_caches_of_their_own_are_counted_in_blocks(tmp_path: Path) -> None:
    """Rows are thrown out like others, and no prefix is taken over."""
    save_model(ITSELF["diffllama"], tmp_path / "itself")
    expected = tokens_alone(tmp_path / "itself")
    with Launched(tmp_path / "itself", *FLAGS, pool(40, 16 * 4 * 122)) as launched:
        assert asyncio.run(sixteen_streams(launched, NUM_TOKENS)) == expected
        assert launched.metric("stepwire_preemptions_total") > 0
        assert launched.metric("stepwire_prefix_cache_hits_total") == 0
        assert launched.metric("stepwire_kv_blocks_in_use") == 0
