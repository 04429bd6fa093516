"""Random formats within formats: whatever a model draws under their masks, it can come to an end, and the end is right.

What is right is told by `Reader`, which reads a text by the definition of each format and knows nothing of grammars.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from stepwire.v1 import inference_pb2 as pb

from control_plane.frontend.errors import RequestRefused
from control_plane.frontend.output_rules import OutputRules
from control_plane.frontend.parsers.registry import OutputFormat
from control_plane.frontend.tokenizer import TextTokenizer

EOS = 2
SPECIAL = (3, 4, 5, 6)
TEXTS = ("a", "b", "x", "ab", "!", "?")
VOCAB_SIZE = 49152
NUM_SPECIAL = 17

Fields = dict[str, Any]


def token(token_id: int) -> Fields:
    return {"id": token_id}


named = st.sampled_from(SPECIAL).map(token) | st.sampled_from([{"text": "x"}, {"text": "!"}])
excluded = st.lists(named | st.just(token(EOS)), max_size=2)
leaves: st.SearchStrategy[Fields] = (
    st.sampled_from(["a", "b", "ab"]).map(lambda text: {"const_string": text})
    | st.sampled_from([{"any_text": {}}, {"any_text": {"excluded": ["ab"]}}, {"regex": "a?b"}, {"regex": "x*"}])
    | named.map(lambda each: {"token": each})
    | excluded.map(lambda each: {"any_token": {"excluded": each}})
    | excluded.map(lambda each: {"any_tokens": {"excluded": each}})
    | st.builds(lambda each, most: {"any_tokens": {"excluded": each, "max_tokens": most}}, excluded, st.integers(0, 3))
)


def tags(content: st.SearchStrategy[Fields], begins: st.SearchStrategy[Fields]) -> st.SearchStrategy[Fields]:
    ends = st.sampled_from([{}, {"end": "!"}, {"end": "?"}, {"end": "a!"}]) | named.map(
        lambda each: {"end_token": each}
    )
    return st.builds(lambda begin, each, end: {**begin, "content": each, **end}, begins, content, ends)


def containers(inner: st.SearchStrategy[Fields]) -> st.SearchStrategy[Fields]:
    by_text = st.sampled_from([{"begin": "b"}, {"begin": "ab"}, {"begin": "x"}])
    by_token = named.map(lambda each: {"begin_token": each})
    flags = st.fixed_dictionaries({"at_least_one": st.booleans(), "stop_after_first": st.booleans()})
    several = st.lists(inner, min_size=1, max_size=3)
    return (
        several.map(lambda formats: {"sequence": {"formats": formats}})
        | several.map(lambda formats: {"any_of": {"formats": formats}})
        | tags(inner, by_text | by_token | st.just({})).map(lambda tag: {"tag": tag})
        | st.builds(
            lambda each, least, more: {"repeat": {"format": each, "min": least, "max": least + more}},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        )
        | st.builds(lambda each, least: {"repeat": {"format": each, "min": least}}, inner, st.integers(0, 2))
        | st.builds(
            lambda each, flag: {"triggered_tags": {"tags": each, **flag}},
            st.lists(tags(inner, by_text), min_size=1, max_size=2),
            flags,
        )
        | st.builds(
            lambda each, without, flag: {"token_triggered_tags": {"tags": each, "excluded": without, **flag}},
            st.lists(tags(inner, by_token), min_size=1, max_size=2),
            excluded,
            flags,
        )
        | st.builds(
            lambda each, separator, flag: {"separated_tags": {"tags": each, "separator": separator, **flag}},
            st.lists(tags(inner, by_text | by_token), min_size=1, max_size=2),
            st.sampled_from(["", "!"]),
            flags,
        )
    )


formats = st.recursive(leaves, containers, max_leaves=5)


class Reader:
    """Tokens as one text, in which special tokens are characters of their own. Places are offsets in it."""

    def __init__(self, token_ids: Sequence[int], texts: dict[int, str]) -> None:
        self._ids = token_ids
        pieces = [texts[each] for each in token_ids]
        self._text = "".join(pieces)
        starts = [0]
        for piece in pieces:
            starts.append(starts[-1] + len(piece))
        self._index = {start: index for index, start in enumerate(starts)}
        self._ids_of_texts = {text: each for each, text in texts.items() if text in TEXTS}

    def reads(self, layout: pb.TextFormat) -> bool:
        return len(self._text) in self.ends(layout, 0)

    def ends(self, layout: pb.TextFormat, start: int) -> set[int]:
        """Where the format may end that begins here."""
        match layout.WhichOneof("format"):
            case "const_string":
                return self._literal(layout.const_string, start)
            case "regex":
                choices = {"a?b": ["ab", "b"], "x*": ["x" * times for times in range(64)]}[layout.regex]
                return set().union(*(self._literal(each, start) for each in choices))
            case "any_text":
                return self._free_text(start, layout.any_text.excluded)
            case "token":
                return self._token(start, lambda token_id: token_id == self._id(layout.token))
            case "any_token":
                return self._but(start, layout.any_token.excluded)
            case "any_tokens":
                most = layout.any_tokens.max_tokens if layout.any_tokens.HasField("max_tokens") else None
                return self._times(lambda at: self._but(at, layout.any_tokens.excluded), start, 0, most)
            case "sequence":
                return self._chain(layout.sequence.formats, start)
            case "any_of":
                return set().union(*(self.ends(each, start) for each in layout.any_of.formats))
            case "tag":
                return self._tag(layout.tag, start)
            case "repeat":
                most = layout.repeat.max if layout.repeat.HasField("max") else None
                return self._times(lambda at: self.ends(layout.repeat.format, at), start, layout.repeat.min, most)
            case "triggered_tags":
                found = layout.triggered_tags
                return self._triggered(found, start, lambda at: self._free_text(at, found.excluded))
            case "token_triggered_tags":
                tokens = layout.token_triggered_tags
                without = [*tokens.excluded, *(tag.begin_token for tag in tokens.tags)]
                return self._triggered(
                    tokens, start, lambda at: self._times(lambda inner: self._but(inner, without), at, 0, None)
                )
            case _:
                return self._separated(layout.separated_tags, start)

    def _id(self, each: pb.NamedToken) -> int:
        return each.id if each.WhichOneof("token") == "id" else self._ids_of_texts[each.text]

    def _literal(self, text: str, start: int) -> set[int]:
        return {start + len(text)} if self._text.startswith(text, start) else set()

    def _token(self, start: int, is_right: Any) -> set[int]:
        index = self._index.get(start)
        if index is None or index == len(self._ids) or not is_right(self._ids[index]):
            return set()
        return {next(at for at, each in self._index.items() if each == index + 1)}

    def _but(self, start: int, without: Iterable[pb.NamedToken]) -> set[int]:
        ids = {EOS, *map(self._id, without)}
        return self._token(start, lambda token_id: token_id not in ids)

    def _free_text(self, start: int, without: Sequence[str]) -> set[int]:
        found = set()
        for end in range(start, len(self._text) + 1):
            text = self._text[start:end]
            if any(character >= "\ue000" for character in text) or any(each in text for each in without):
                break
            found.add(end)
        return found

    def _chain(self, layouts: Iterable[pb.TextFormat], start: int) -> set[int]:
        places = {start}
        for each in layouts:
            places = set().union(*(self.ends(each, place) for place in places))
        return places

    def _times(self, once: Any, start: int, least: int, most: int | None) -> set[int]:
        found = {start} if least == 0 else set()
        places = {start}
        # More often than the text is long, it can only have been empty.
        for time in range(1, min(len(self._text) + least + 1, most if most is not None else 10**9) + 1):
            places = set().union(*(once(place) for place in places))
            if time >= least:
                found |= places
        return found

    def _tag(self, tag: pb.FormatTag, start: int) -> set[int]:
        if tag.HasField("begin_token"):
            begun = self._token(start, lambda token_id: token_id == self._id(tag.begin_token))
        else:
            begun = self._literal(tag.begin, start)
        inner = set().union(*(self.ends(tag.content, place) for place in begun))
        if tag.HasField("end_token"):
            return set().union(
                *(self._token(place, lambda token_id: token_id == self._id(tag.end_token)) for place in inner)
            )
        return set().union(*(self._literal(end, place) for place in inner for end in (tag.end, *tag.other_ends)))

    def _any_tag(self, tags: Iterable[pb.FormatTag], start: int) -> set[int]:
        return set().union(*(self._tag(tag, start) for tag in tags))

    def _triggered(self, layout: Any, start: int, free: Any) -> set[int]:
        def tag(at: int) -> set[int]:
            return self._any_tag(layout.tags, at)

        def more(at: int) -> set[int]:
            return set().union(*(tag(place) for place in free(at)))

        if layout.stop_after_first:
            return tag(start) if layout.at_least_one else more(start) | free(start)
        begun = tag(start) if layout.at_least_one else {start}
        places = set().union(*(self._times(more, place, 0, None) for place in begun))
        return set().union(*(free(place) for place in places))

    def _separated(self, layout: pb.SeparatedTags, start: int) -> set[int]:
        def more(at: int) -> set[int]:
            return set().union(*(self._any_tag(layout.tags, place) for place in self._literal(layout.separator, at)))

        found = self._any_tag(layout.tags, start)
        if not layout.stop_after_first:
            found = set().union(*(self._times(more, place, 0, None) for place in found))
        return found if layout.at_least_one else found | {start}


class Texts(dict[int, str]):
    """Of tokens, by their ids; those of special tokens are one character each, which no text has."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str:
        is_special = token_id < NUM_SPECIAL
        data = self._tokenizer.detokenization.token_bytes(token_id)
        self[token_id] = chr(0xE000 + token_id) if is_special else data.decode("utf-8", "replace")
        return self[token_id]


class Walker:
    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.rules = OutputRules(tokenizer, OutputFormat("", ""), frozenset([EOS]))
        self.table = LLTokenizer(tokenizer.to_json(), n_vocab=VOCAB_SIZE, eos_token=[EOS])
        self.known = [EOS, *SPECIAL, *(token_id for text in TEXTS if (token_id := tokenizer.id_of_text(text)))]
        assert len(self.known) == 1 + len(SPECIAL) + len(TEXTS)
        self.texts = Texts(tokenizer)
        assert [self.texts[each] for each in self.known[-len(TEXTS) :]] == list(TEXTS)

    def choices(self, matcher: LLMatcher) -> list[int]:
        """Of what may be drawn, the few tokens that formats are made of here; where it has to be another, any."""
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")  # [vocab_size]
        assert not matcher.is_error(), matcher.get_error()
        assert mask.any(), "nothing may be drawn, and it is not over"
        return [each for each in self.known if mask[each]] or np.flatnonzero(mask).tolist()

    def walk(self, matcher: LLMatcher, draw: random.Random, most: int, *, to_end: bool) -> list[int] | None:
        """What was drawn, if it came to an end."""
        drawn: list[int] = []
        while not matcher.is_stopped() and len(drawn) < most:
            choices = self.choices(matcher)
            drawn.append(EOS if to_end and EOS in choices else draw.choice(choices))
            assert matcher.consume_token(drawn[-1]), matcher.get_error()
        return drawn if matcher.is_stopped() else None


@pytest.fixture(scope="module")
def walker(smollm2_dir: Path) -> Walker:
    return Walker(TextTokenizer.from_file(smollm2_dir / "tokenizer.json"))


@given(formats, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_walks_come_to_an_end_that_is_right(walker: Walker, fields: Fields, seed: int) -> None:
    layout = json_format.ParseDict(fields, pb.TextFormat())
    try:
        source = walker.rules.structured(pb.StructuredOutput(text_format=layout), None)
    except RequestRefused:
        return
    draw = random.Random(seed)
    first = LLMatcher(walker.table, source, log_level=0)
    assert not first.is_error(), first.get_error()
    for most in (0, 1, 3, 6):
        began = first.deep_copy()
        walked = []
        while not began.is_stopped() and len(walked) < most:
            choices = [each for each in walker.choices(began) if each != EOS]
            if not choices:
                break
            walked.append(draw.choice(choices))
            assert began.consume_token(walked[-1]), began.get_error()
        ended = [walker.walk(began.deep_copy(), draw, 40, to_end=True) for _ in range(40)]
        assert any(each is not None for each in ended), (walked, "never comes to an end")
        for each in ended:
            if each is not None:
                ids = [token_id for token_id in [*walked, *each] if token_id != EOS]
                assert Reader(ids, walker.texts).reads(layout), ids
