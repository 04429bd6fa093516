"""The router: what is cached draws requests to a group, and never into a group that has more to do than it saves."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.core.router import TOKENS_PER_SEQUENCE, GroupLoad, RequestNeeds, choose_group

BLOCK = 16
IDLE = GroupLoad(
    num_cached_tokens=0,
    num_queued_tokens=0,
    num_sequences=0,
    max_num_seqs=64,
    num_free_blocks=4096,
    num_blank_blocks=4096,
    block_size=BLOCK,
)
NEEDS = RequestNeeds(num_tokens=1024)

needs = st.builds(
    RequestNeeds, num_tokens=st.integers(1, 8192), num_sequences=st.integers(1, 8), is_suspect=st.booleans()
)


@st.composite
def loads(draw: st.DrawFn) -> GroupLoad:
    num_free = draw(st.integers(0, 4096))
    return GroupLoad(
        num_cached_tokens=draw(st.integers(0, 512)) * BLOCK,
        num_queued_tokens=draw(st.integers(0, 20_000)),
        num_sequences=draw(st.integers(0, 128)),
        max_num_seqs=draw(st.integers(1, 128)),
        num_free_blocks=num_free,
        num_blank_blocks=draw(st.integers(0, num_free)),
        block_size=BLOCK,
        num_suspects=draw(st.sampled_from([0, 0, 0, 1, 3])),
    )


def test_a_cached_prefix_draws_its_request() -> None:
    holder = replace(IDLE, num_cached_tokens=512, num_sequences=4)
    assert choose_group(NEEDS, [IDLE, holder]) == 1
    assert choose_group(NEEDS, [holder, IDLE]) == 0


def test_a_prefix_is_worth_what_it_saves_and_not_more() -> None:
    worth = 512 // TOKENS_PER_SEQUENCE
    holder = replace(IDLE, num_cached_tokens=512)
    assert choose_group(NEEDS, [IDLE, replace(holder, num_sequences=worth - 1)]) == 1
    assert choose_group(NEEDS, [IDLE, replace(holder, num_sequences=worth + 1)]) == 0
    assert choose_group(NEEDS, [IDLE, replace(holder, num_queued_tokens=513)]) == 0


def test_who_can_start_at_once_goes_before_who_must_wait() -> None:
    no_row = replace(IDLE, num_cached_tokens=1008, num_sequences=64)
    no_blocks = replace(IDLE, num_cached_tokens=512, num_free_blocks=20, num_blank_blocks=0)
    busy = replace(IDLE, num_sequences=60, num_queued_tokens=4000)
    assert choose_group(NEEDS, [no_row, no_blocks, busy]) == 2


def test_equals_share_the_caches() -> None:
    assert choose_group(NEEDS, [replace(IDLE, num_blank_blocks=100), IDLE]) == 1
    assert choose_group(NEEDS, [IDLE, IDLE]) == 0


def test_suspects_gather_and_others_keep_away() -> None:
    quarantine = replace(IDLE, num_suspects=1, num_sequences=30)
    assert choose_group(replace(NEEDS, is_suspect=True), [IDLE, quarantine]) == 1
    assert choose_group(NEEDS, [quarantine, replace(IDLE, num_queued_tokens=10_000)]) == 1
    assert choose_group(NEEDS, [quarantine]) == 0


@given(needs=needs, groups=st.lists(loads(), min_size=1, max_size=8))
def test_affinity_never_overloads_a_group(needs: RequestNeeds, groups: list[GroupLoad]) -> None:
    chosen = groups[choose_group(needs, groups)]
    for other in groups:
        if (other.num_suspects == 0) == needs.is_suspect or other.must_wait(needs):
            continue
        assert not chosen.must_wait(needs)
        assert chosen.load(needs) - other.load(needs) <= chosen.num_cached_tokens - other.num_cached_tokens


@given(needs=needs, groups=st.lists(loads(), min_size=1, max_size=8), data=st.data())
def test_the_choice_does_not_hang_on_the_order(
    needs: RequestNeeds, groups: list[GroupLoad], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(groups))))
    shuffled = [groups[index] for index in order]
    chosen, again = groups[choose_group(needs, groups)], shuffled[choose_group(needs, shuffled)]
    assert (chosen.must_wait(needs), chosen.cost(needs)) == (again.must_wait(needs), again.cost(needs))


@given(needs=needs, group=loads(), more=st.integers(1, 64))
def test_more_work_never_makes_a_group_cheaper(needs: RequestNeeds, group: GroupLoad, more: int) -> None:
    assert replace(group, num_sequences=group.num_sequences + more).cost(needs) > group.cost(needs)
    assert replace(group, num_queued_tokens=group.num_queued_tokens + more).cost(needs) > group.cost(needs)
    assert replace(group, num_free_blocks=max(0, group.num_free_blocks - more)).cost(needs) >= group.cost(needs)


@settings(max_examples=50)
@given(prefix=st.integers(1, 64), num_groups=st.integers(2, 8), num_requests=st.integers(1, 200))
def test_one_shared_prefix_spreads_over_the_groups(prefix: int, num_groups: int, num_requests: int) -> None:
    """Requests that all begin alike, one after another, none of which ends: the worst that affinity can be fed."""
    shared = prefix * BLOCK
    request = RequestNeeds(num_tokens=shared + BLOCK)
    groups = [replace(IDLE, max_num_seqs=1000)] * num_groups
    for _ in range(num_requests):
        index = choose_group(request, groups)
        group = groups[index]
        groups[index] = replace(group, num_sequences=group.num_sequences + 1, num_cached_tokens=shared)
        counts = [group.num_sequences for group in groups]
        assert max(counts) - min(counts) <= shared // TOKENS_PER_SEQUENCE + 1
