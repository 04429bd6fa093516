"""Text that goes packed says what it would say unpacked: the same text, tokens, usage and observations."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import FinishReason, RequestFault
from control_plane.frontend.metrics import FrontendMetrics
from control_plane.frontend.output_stream import RequestOutput
from control_plane.frontend.packed_texts import PackedTexts
from control_plane.frontend.request_intake import RequestIntake
from control_plane.frontend.served_model import ServedModel
from control_plane.frontend.tokenizer import TextTokenizer
from tests.unit.control_plane.frontend import tokenizers_for_tests as kinds
from tests.unit.control_plane.frontend.scripted_engine import ScriptedEngine

TAGS = (11, 12, 13)
TOKENIZER = TextTokenizer(kinds.byte_level())


@dataclass
class Client:
    """Requests of one session at a scripted engine, and what their messages said, message by message."""

    packs: bool
    messages: list[pb.SessionResponse] = field(default_factory=list)
    now_s: float = 1e6

    async def open(self) -> None:
        self.engine = ScriptedEngine()
        self.metrics = FrontendMetrics(CollectorRegistry())
        self.packed = PackedTexts(self.metrics, lambda: None)
        self.packed.is_wanted = self.packs
        model = ServedModel(names=("tiny",), tokenizer=TOKENIZER, eos_token_ids=frozenset({2}))
        self.ready: list[RequestOutput] = []
        self.outputs: dict[int, RequestOutput] = {}
        for tag in TAGS:
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]))
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
        tags = [*message.texts.tags, *(tagged.tag for tagged in message.responses)]
        assert len(tags) == len(set(tags)), "a tag stands once in a message"
        assert all(message.texts.texts) and all(message.texts.num_tokens)
        self.messages.append(message)
        return message

    def said(self) -> list[dict[int, tuple[str, int, int, bool, int]]]:
        """Of each message, by tag: text, tokens, finish reason, whether it failed, tokens of its usage."""
        said = []
        for message in self.messages:
            texts = zip(message.texts.tags, message.texts.texts, message.texts.num_tokens, strict=True)
            entry = {tag: (text, count, 0, False, 0) for tag, text, count in texts}
            for tagged in message.responses:
                response = tagged.response
                delta = response.deltas[0] if response.deltas else pb.SequenceDelta()
                failed, used = response.HasField("error"), response.usage.num_completion_tokens
                entry[tagged.tag] = (delta.text, delta.num_tokens, delta.finish_reason, failed, used)
            said.append(entry)
        return said

    def observed(self) -> list[list[int]]:
        return [
            histogram.counts() for histogram in (self.metrics.inter_token_latency, self.metrics.time_to_first_token)
        ]


ACTIONS = ("token", "token", "token", "write", "finish", "fail", "cancel")


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(ACTIONS), st.sampled_from(TAGS), st.integers(3, kinds.byte_level().get_vocab_size() - 1)
        ),
        max_size=40,
    )
)
async def test_packed_and_unpacked_say_the_same(script: list[tuple[str, int, int]]) -> None:
    clients = Client(packs=True), Client(packs=False)
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
