from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from control_plane.core.kv_blocks import BlockPool
from control_plane.core.prefix_cache import PrefixCache, extend_chain, root_hash


class PoolMachine(RuleBasedStateMachine):
    """A pool beside the plainest possible books."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[int] = []
        self.pool = BlockPool(2, 12, self.evicted.append)
        self.holders: dict[int, int] = {}
        self.cached_free: list[int] = []  # least recently freed first
        self.cached: set[int] = set()

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            with pytest.raises(ValueError):
                self.pool.allocate(count)
            return
        plain = self.pool.num_free - len(self.cached_free)
        self.evicted.clear()
        block_ids = self.pool.allocate(count)
        expected, self.cached_free = (
            self.cached_free[: max(0, count - plain)],
            self.cached_free[max(0, count - plain) :],
        )
        assert self.evicted == expected
        self.cached -= set(expected)
        for block_id in block_ids:
            assert 2 <= block_id < 12 and not self.holders.get(block_id)
            self.holders[block_id] = 1

    @precondition(lambda self: any(self.holders.values()) or self.cached_free)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        candidates = sorted({b for b, count in self.holders.items() if count} | set(self.cached_free))
        block_id = data.draw(st.sampled_from(candidates))
        self.pool.retain([block_id])
        self.holders[block_id] = self.holders.get(block_id, 0) + 1
        if block_id in self.cached_free:
            self.cached_free.remove(block_id)

    @precondition(lambda self: any(self.holders.values()))
    @rule(data=st.data(), cache=st.booleans())
    def release(self, data: st.DataObject, cache: bool) -> None:
        block_id = data.draw(st.sampled_from(sorted(b for b, count in self.holders.items() if count)))
        if cache:
            self.pool.mark_cached(block_id)
            self.cached.add(block_id)
        self.pool.release([block_id])
        self.holders[block_id] -= 1
        if not self.holders[block_id] and block_id in self.cached:
            self.cached_free.append(block_id)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity(self.holders)
        assert self.pool.num_held == sum(1 for count in self.holders.values() if count)


TestPool = PoolMachine.TestCase


def test_releasing_what_nobody_holds_is_an_error() -> None:
    pool = BlockPool(0, 4, lambda block_id: None)
    with pytest.raises(ValueError, match="nobody holds"):
        pool.release([1])


def test_integrity_check_sees_a_leak() -> None:
    pool = BlockPool(0, 4, lambda block_id: None)
    pool.allocate(1)
    with pytest.raises(RuntimeError, match="holders"):
        pool.check_integrity({})


@given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    other=st.lists(st.integers(0, 3), max_size=40),
    cut=st.integers(0, 40),
    block_size=st.integers(1, 8),
)
def test_equal_hashes_mean_equal_prefixes(tokens: list[int], other: list[int], cut: int, block_size: int) -> None:
    other = tokens[:cut] + other
    root = root_hash("t", "s")

    def chain(ids: list[int], steps: int = 1) -> list[bytes]:
        hashes: list[bytes] = []
        for step in range(1, steps + 1):
            known = ids[len(hashes) * block_size : len(ids) * step // steps]
            extend_chain(hashes, root, array("I", known), block_size)
        return hashes

    first, second = chain(tokens), chain(other)
    assert first == chain(tokens, steps=3), "growing a chain gives the same chain"
    assert len(first) == len(tokens) // block_size
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        end = (index + 1) * block_size
        assert (a == b) == (tokens[:end] == other[:end])


def test_roots_differ_by_tenant_and_salt_and_cannot_be_confused() -> None:
    roots = {root_hash(tenant, salt) for tenant, salt in [("", ""), ("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc")]}
    assert len(roots) == 5


def test_cache_matches_the_longest_prefix_and_forgets() -> None:
    cache = PrefixCache()
    assert cache.insert(b"a", 1) and cache.insert(b"b", 2) and cache.insert(b"d", 4)
    assert not cache.insert(b"a", 9), "the first block with a content stays"
    assert cache.match([b"a", b"b", b"c", b"d"]) == [1, 2]
    cache.forget(2)
    assert cache.match([b"a", b"b"]) == [1]
    cache.check_integrity()
