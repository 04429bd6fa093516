from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.frontend.stop import StopMatch, StopMatcher, StopStrings

# Few letters, so that matches, overlaps and near misses are common.
letters = st.text("abé", max_size=30)
stop_lists = st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=4)


def plain_twin(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character over the whole text: the first end of any stop string, the longest that ends there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[list[str], str | None]:
    matcher = StopMatcher(StopStrings(stops), include_stop_string=include)
    deltas = []
    for piece in pieces:
        found = matcher.push(piece)
        if isinstance(found, StopMatch):
            return [*deltas, found.text], found.stop_string
        deltas.append(found)
    return [*deltas, matcher.finish()], None


def split(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


@settings(deadline=None, max_examples=300)
@given(letters, stop_lists, st.lists(st.integers(0, 1000), max_size=12), st.booleans())
def test_any_split_gives_what_the_whole_text_gives(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    deltas, stop = run(split(text, cuts), stops, include)
    assert ("".join(deltas), stop) == plain_twin(text, stops, include)


@settings(deadline=None, max_examples=300)
@given(letters, stop_lists, st.lists(st.integers(0, 1000), max_size=12))
def test_no_part_of_the_stop_string_leaves(text: str, stops: list[str], cuts: list[int]) -> None:
    """At no time has more been let out than what stands before the match."""
    before, stop = plain_twin(text, stops, include=False)
    shown = ""
    for delta in run(split(text, cuts), stops, include=False)[0]:
        shown += delta
        if stop is not None:
            assert before.startswith(shown)


@settings(deadline=None, max_examples=300)
@given(letters, stop_lists, st.lists(st.integers(0, 1000), max_size=12))
def test_only_what_may_become_a_stop_is_held_back(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    arrived = shown = ""
    for piece in split(text, cuts):
        found = matcher.push(piece)
        if isinstance(found, StopMatch):
            return
        arrived += piece
        shown += found
        held = arrived[len(shown) :]
        longest = max(
            (
                n
                for n in range(len(arrived) + 1)
                if any(s != arrived[-n:] and s.startswith(arrived[-n:]) for s in stops) and n
            ),
            default=0,
        )
        assert len(held) == longest


def test_straddles_deltas() -> None:
    assert run(["Hello W", "or", "ld!", " more"], ["World!"], include=False) == (["Hello ", "", ""], "World!")
    assert run(["Hello W", "or", "k"], ["World!"], include=False) == (["Hello ", "", "Work", ""], None)
    assert run(["a\n", "\nb"], ["\n\n"], include=True) == (["a", "\n\n"], "\n\n")


def test_the_match_that_ends_first_wins_and_then_the_longest() -> None:
    assert run(["abcd"], ["abcd", "c"], include=False) == (["ab"], "c")
    assert run(["xabc"], ["bc", "abc"], include=False) == (["x"], "abc")


def test_held_back_text_comes_at_the_end() -> None:
    assert run(["ab"], ["abc"], include=False) == (["", "ab"], None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
