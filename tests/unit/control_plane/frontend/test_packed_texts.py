"""What goes packed says what it would say unpacked: the same text, ids, tokens, usage and observations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import FinishReason, RequestFault, SequenceOutput
from control_plane.frontend.metrics import FrontendMetrics
from control_plane.frontend.output_stream import RequestOutput
from control_plane.frontend.packed_texts import PackedTexts
from control_plane.frontend.request_intake import RequestIntake
from control_plane.frontend.served_model import ServedModel
from control_plane.frontend.tokenizer import TextTokenizer
from tests.unit.control_plane.frontend import tokenizers_for_tests as kinds
from tests.unit.control_plane.frontend.scripted_engine import ScriptedEngine

TAGS = (11, 12, 13)
# Its token ids are wanted as well.
TAG_OF_IDS = 13
TOKENIZER = TextTokenizer(kinds.byte_level())


@dataclass
class Client:
    """Requests of one session at a scripted engine, and what their messages said, message by message."""

    packs: bool
    with_tokenizer: bool = True
    messages: list[pb.SessionResponse] = field(default_factory=list)
    now_s: float = 1e6

    async def open(self) -> None:
        self.engine = ScriptedEngine()
        self.metrics = FrontendMetrics(CollectorRegistry())
        self.packed = PackedTexts(self.metrics, lambda: None)
        self.packed.texts.is_wanted = self.packed.token_ids.is_wanted = self.packs
        tokenizer = TOKENIZER if self.with_tokenizer else None
        model = ServedModel(names=("tiny",), tokenizer=tokenizer, eos_token_ids=frozenset({2}))
        self.ready: list[RequestOutput] = []
        self.outputs: dict[int, RequestOutput] = {}
        for tag in TAGS:
            wanted = pb.OutputOptions(token_ids=tag == TAG_OF_IDS)
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]), output=wanted)
            intake = RequestIntake(self.engine, model, self.metrics)
            self.outputs[tag] = await intake.submit(request, self.ready.append, tag=tag, packed=self.packed)

    def write(self) -> pb.SessionResponse:
        """As a Session does."""
        self.now_s += 0.125
        message = pb.SessionResponse()
        self.packed.take(message, self.now_s)
        ready = list(self.ready)
        self.ready.clear()
        for output in ready:
            if not output.is_closed:
                output.take(message.responses.add(tag=output.tag).response, self.now_s)
        packed_tags = [*message.texts.tags, *message.token_ids.tags]
        tags = [*packed_tags, *(tagged.tag for tagged in message.responses)]
        assert len(tags) == len(set(tags)), "a tag stands once in a message"
        assert all(message.texts.texts) and all(message.texts.num_tokens) and all(message.token_ids.num_tokens)
        assert len(message.token_ids.token_ids) == sum(message.token_ids.num_tokens)
        self.messages.append(message)
        return message

    def said(self) -> list[dict[int, tuple[str, tuple[int, ...], int, int, bool, int]]]:
        """Of each message, by tag: text, ids, tokens, finish reason, whether it failed, tokens of its usage."""
        said = []
        for message in self.messages:
            texts = zip(message.texts.tags, message.texts.texts, message.texts.num_tokens, strict=True)
            entry: dict[int, Any] = {tag: (text, (), count, 0, False, 0) for tag, text, count in texts}
            packed, token_ids = message.token_ids, list(message.token_ids.token_ids)
            for tag, text, count in zip(packed.tags, packed.texts, packed.num_tokens, strict=True):
                entry[tag] = (text, tuple(token_ids[:count]), count, 0, False, 0)
                del token_ids[:count]
            for tagged in message.responses:
                response = tagged.response
                delta = response.deltas[0] if response.deltas else pb.SequenceDelta()
                failed, used = response.HasField("error"), response.usage.num_completion_tokens
                ids = tuple(delta.token_ids)
                entry[tagged.tag] = (delta.text, ids, delta.num_tokens, delta.finish_reason, failed, used)
            said.append(entry)
        return said

    def observed(self) -> list[list[int]]:
        return [
            histogram.counts() for histogram in (self.metrics.inter_token_latency, self.metrics.time_to_first_token)
        ]


# "stop": a stop token that does not stop yet.
ACTIONS = ("token", "token", "token", "write", "stop", "finish", "fail", "cancel")


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(ACTIONS), st.sampled_from(TAGS), st.integers(3, kinds.byte_level().get_vocab_size() - 1)
        ),
        max_size=40,
    ),
    st.booleans(),
)
async def test_packed_and_unpacked_say_the_same(script: list[tuple[str, int, int]], with_tokenizer: bool) -> None:
    clients = Client(True, with_tokenizer), Client(False, with_tokenizer)
    for client in clients:
        await client.open()
        gone: set[int] = set()
        for action, tag, token_id in script:
            request_id = client.outputs[tag].request_id
            if action == "write":
                client.write()
            elif tag in gone:
                continue
            elif action == "token":
                client.engine.output([token_id], request_id=request_id)
            elif action == "stop":
                client.engine.sinks[request_id].on_output(SequenceOutput(0, [token_id], 1))
            elif action == "finish":
                client.engine.output([token_id], request_id=request_id, finish=FinishReason.LENGTH)
                client.engine.end(request_id=request_id)
            elif action == "fail":
                client.engine.end(request_id=request_id, fault=RequestFault("INTERNAL", "x", retryable=False))
            else:
                client.outputs[tag].cancel()
            if action in ("finish", "fail", "cancel"):
                gone.add(tag)
        client.write()
    # A delta without text, of half a character, is a message of its own where nothing is packed.
    packed, plain = ([{tag: what for tag, what in each.items() if any(what)} for each in c.said()] for c in clients)
    assert packed == plain
    assert clients[0].observed() == clients[1].observed()


async def test_text_is_packed_once_its_request_is_known_to_the_client() -> None:
    client = Client(packs=True)
    await client.open()
    request_ids = {tag: client.outputs[tag].request_id for tag in TAGS}
    (token_id,) = kinds.byte_level().encode("a").ids
    client.engine.output([token_id], request_id=request_ids[11])
    first = client.write()
    assert not first.texts.tags and [len(tagged.response.deltas) for tagged in first.responses] == [1, 0, 0]
    for _ in range(2):
        for tag in (12, 11):
            client.engine.output([token_id], request_id=request_ids[tag])
    second = client.write().texts
    assert (list(second.tags), list(second.texts), list(second.num_tokens)) == ([12, 11], ["aa", "aa"], [2, 2])
    samples = client.metrics.inter_token_latency.collect().samples
    values = {sample.name.rpartition("_")[2]: sample.value for sample in samples if not sample.labels}
    assert values["count"] == 2 and values["sum"] == pytest.approx(0.125)
    assert sum(client.metrics.time_to_first_token.counts()) == 2


async def test_a_text_that_waits_long_is_not_copied_with_every_token() -> None:
    """Parts of a bounded length are kept, and made one where the message is made, or the text is withdrawn."""
    packed = PackedTexts(FrontendMetrics(CollectorRegistry()), lambda: None)
    texts = packed.texts
    places = [texts.add(tag, "a", 1, 1.0, 5) for tag in (1, 2)]
    for _ in range(9_999):
        for place in places:
            texts.columns.grow(place, "b", 1, 6)
        assert max(map(len, texts.columns.texts)) < 3000
    assert texts.withdraw(places[0]) == ("a" + "b" * 9_999, [], 10_000, 1.0)
    message = pb.SessionResponse()
    packed.take(message, 2.0)
    assert list(message.texts.tags) == [2]
    assert list(message.texts.texts) == ["a" + "b" * 9_999]
    assert list(message.texts.num_tokens) == [10_000]


async def test_ids_are_packed_with_their_text() -> None:
    client = Client(packs=True)
    await client.open()
    request_ids = {tag: client.outputs[tag].request_id for tag in TAGS}
    client.write()
    token_ids = kinds.byte_level().encode("hello \U0001f680").ids
    for token_id in token_ids:
        for tag in (11, TAG_OF_IDS):
            client.engine.output([token_id], request_id=request_ids[tag])
    message = client.write()
    assert not message.responses
    assert (list(message.texts.tags), list(message.texts.texts)) == ([11], ["hello \U0001f680"])
    packed = message.token_ids
    assert (list(packed.tags), list(packed.texts)) == ([TAG_OF_IDS], ["hello \U0001f680"])
    assert (list(packed.num_tokens), list(packed.token_ids)) == ([len(token_ids)], token_ids)
    # Half a character is no text yet, but an id.
    begun = kinds.byte_level().encode("\U0001f680").ids[:1]
    client.engine.output(begun, request_id=request_ids[TAG_OF_IDS])
    packed = client.write().token_ids
    assert (list(packed.texts), list(packed.token_ids)) == ([""], begun)
