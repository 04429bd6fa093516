from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stepwire.v1 import inference_pb2 as pb
from tokenizers import Tokenizer, processors

from control_plane.core.request import ModelFacts
from control_plane.frontend.errors import RequestRefused
from control_plane.frontend.request_builder import BuiltRequest, RequestBuilder
from control_plane.frontend.served_model import ServedModel, load_served_model
from tests.unit.control_plane.frontend.scripted_engine import FACTS

Change = Callable[[pb.GenerateRequest], object]


def a_request(*changes: Change) -> pb.GenerateRequest:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]))
    for change in changes:
        change(request)
    return request


async def build(model: ServedModel, *changes: Change, facts: ModelFacts = FACTS) -> BuiltRequest:
    return await RequestBuilder(model, max_n=8).build(a_request(*changes), facts)


async def refusal(model: ServedModel, *changes: Change, facts: ModelFacts = FACTS) -> RequestRefused:
    with pytest.raises(RequestRefused) as refused:
        await build(model, *changes, facts=facts)
    return refused.value


@pytest.fixture
def bare() -> ServedModel:
    return ServedModel(names=("tiny",), eos_token_ids=frozenset({2, 5000}))


def set_sampling(**values: object) -> Change:
    return lambda request: request.sampling.MergeFrom(pb.SamplingParams(**values))  # type: ignore[arg-type]


def set_stop(**values: object) -> Change:
    return lambda request: request.stop.MergeFrom(pb.StopConditions(**values))  # type: ignore[arg-type]


def set_field(**values: object) -> Change:
    return lambda request: request.MergeFrom(pb.GenerateRequest(**values))  # type: ignore[arg-type]


REFUSED: list[tuple[Change, str, str]] = [
    (set_sampling(temperature=-0.1), "sampling.temperature", "from 0 to 2"),
    (set_sampling(temperature=2.1), "sampling.temperature", "2.1"),
    (set_sampling(temperature=math.nan), "sampling.temperature", "nan"),
    (set_sampling(temperature=math.inf), "sampling.temperature", "inf"),
    (set_sampling(top_p=0), "sampling.top_p", "above 0"),
    (set_sampling(top_p=1.5), "sampling.top_p", "1.5"),
    (set_sampling(top_p=math.nan), "sampling.top_p", "nan"),
    (set_sampling(min_p=-1), "sampling.min_p", "from 0 to 1"),
    (set_sampling(min_p=1.1), "sampling.min_p", "1.1"),
    (set_sampling(repetition_penalty=0), "sampling.repetition_penalty", "above 0"),
    (set_sampling(repetition_penalty=math.inf), "sampling.repetition_penalty", "finite"),
    (set_sampling(presence_penalty=2.5), "sampling.presence_penalty", "from -2 to 2"),
    (set_sampling(frequency_penalty=-2.5), "sampling.frequency_penalty", "from -2 to 2"),
    (
        set_sampling(logit_bias={1000: 1.0}),
        "sampling.logit_bias[1000]",
        "token id 1000 is out of vocabulary: ids are below 1000",
    ),
    (set_sampling(logit_bias={5: 101.0}), "sampling.logit_bias[5]", "from -100 to 100"),
    (set_sampling(logit_bias={5: math.nan}), "sampling.logit_bias[5]", "nan"),
    (set_sampling(logit_bias=dict.fromkeys(range(1025), 0.0)), "sampling.logit_bias", "1025 entries"),
    (set_sampling(allowed_token_ids=[3, 1001]), "sampling.allowed_token_ids[1]", "1001"),
    (set_stop(max_tokens=0), "stop.max_tokens", "at least 1"),
    (set_stop(max_tokens=3, min_tokens=4), "stop.min_tokens", "is 4, more than stop.max_tokens, which is 3"),
    (set_stop(stop=["a", ""]), "stop.stop[1]", "empty"),
    (set_stop(stop=["x" * 1025]), "stop.stop[0]", "1025"),
    (set_stop(stop=[str(number) for number in range(17)]), "stop.stop", "at most 16"),
    (set_stop(stop_token_ids=[1, 1000]), "stop.stop_token_ids[1]", "token id 1000"),
    (set_stop(stop_token_ids=[1] * 1025), "stop.stop_token_ids", "at most 1024"),
    (set_field(n=0), "n", "from 1 to 8"),
    (set_field(n=9), "n", "not 9"),
    (set_field(output=pb.OutputOptions(logprobs=21)), "output.logprobs", "from 0 to 20"),
    (set_field(cache_salt="x" * 257), "cache_salt", "257"),
    (set_field(token_ids=pb.TokenIds(ids=[1000])), "token_ids.ids[3]", "token id 1000 is out of vocabulary"),
    (lambda request: request.ClearField("input"), "input", "missing"),
    (lambda request: request.token_ids.Clear(), "token_ids.ids", "empty"),
    (set_field(text=""), "text", "empty"),
    (set_field(chat=pb.ChatInput()), "chat.messages", "at least one"),
    (set_field(chat=pb.ChatInput(messages=[pb.ChatMessage()])), "chat.messages[0].role", "missing"),
    (
        set_field(chat=pb.ChatInput(messages=[pb.ChatMessage(role="user", content=[pb.ContentPart()])])),
        "chat.messages[0].content[0]",
        "empty",
    ),
]


@pytest.mark.parametrize(("change", "field", "said"), REFUSED, ids=[f"{field}-{said}" for _, field, said in REFUSED])
async def test_wrong_fields_are_named(model: ServedModel, change: Change, field: str, said: str) -> None:
    error = await refusal(model, change)
    assert error.code == "INVALID_ARGUMENT"
    assert [violation.field for violation in error.violations] == [field]
    assert said in error.violations[0].description
    assert error.message.startswith(f"{field}: ")


async def test_all_wrong_fields_are_named_at_once(model: ServedModel) -> None:
    error = await refusal(model, set_sampling(top_p=2, temperature=3), set_stop(stop=[""]), set_field(n=0))
    assert {violation.field for violation in error.violations} == {
        "sampling.top_p",
        "sampling.temperature",
        "stop.stop[0]",
        "n",
    }


DEEP = '{"properties": {"a": ' + '{"items": ' * 70 + "{}" + "}" * 70 + "}}"


@pytest.mark.parametrize(
    ("parser", "schema"), [("qwen3_coder", '{"minProperties": 1}'), ("gemma4", '{"anyOf": []}'), ("hermes", DEEP)]
)
async def test_arguments_that_rules_cannot_hold_are_left_to_a_model_that_need_not_call(
    model_dir: Path, parser: str, schema: str
) -> None:
    model = load_served_model(model_dir, names=("tiny",), tool_call_parser=parser)
    facts = replace(FACTS, max_model_len=4000, can_mask_tokens=True)

    def asking(mode: pb.ToolChoiceMode, strict: bool | None) -> Change:
        message = pb.ChatMessage(role="user", content=[pb.ContentPart(text="hi")])
        tool = pb.Tool(function=pb.FunctionTool(name="f", parameters=schema, strict=strict))
        return set_field(chat=pb.ChatInput(messages=[message], tools=[tool], tool_choice=pb.ToolChoice(mode=mode)))

    free = await build(model, asking(pb.TOOL_CHOICE_MODE_AUTO, None), facts=facts)
    assert free.core.grammar is None
    for change in (asking(pb.TOOL_CHOICE_MODE_REQUIRED, None), asking(pb.TOOL_CHOICE_MODE_AUTO, True)):
        error = await refusal(model, change, facts=facts)
        assert [violation.field for violation in error.violations] == ["chat.tools[0].function.parameters"]


def with_a_tool_and_a_format(schema: str) -> Change:
    message = pb.ChatMessage(role="user", content=[pb.ContentPart(text="hi")])
    tool = pb.Tool(function=pb.FunctionTool(name="f", parameters=schema))
    return set_field(
        chat=pb.ChatInput(messages=[message], tools=[tool]),
        structured_output=pb.StructuredOutput(json_schema='{"properties": {"name": {"type": "string"}}}'),
    )


async def test_a_tool_may_be_called_instead_of_the_answer_that_is_held_to_a_format(model_dir: Path) -> None:
    facts = replace(FACTS, max_model_len=4000, can_mask_tokens=True)
    model = load_served_model(model_dir, names=("tiny",), tool_call_parser="hermes")
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    async def lets_through(schema: str, text: str) -> bool:
        built = await build(model, with_a_tool_and_a_format(schema), facts=facts)
        assert built.core.grammar is not None
        matcher = built.core.grammar.start()
        matcher.accept(tokenizer.encode(text).ids)
        return not matcher.error

    call, answer = '<tool_call>\n{"name": "f", "arguments": {', '{"name": "Ada"}'
    free = '{"type": "object"}'
    assert await lets_through(free, call) and await lets_through(free, answer) and not await lets_through(free, "Sure")
    # A tool whose arguments cannot be held is no reason to refuse the format.
    assert await lets_through('{"not": {}}', answer) and await lets_through(DEEP, answer)


async def test_an_answer_that_is_held_to_a_format_is_no_call_where_it_looks_like_one(model_dir: Path) -> None:
    model = load_served_model(model_dir, names=("tiny",), tool_call_parser="llama3_json")
    facts = replace(FACTS, max_model_len=4000, can_mask_tokens=True)
    built = await build(model, with_a_tool_and_a_format('{"type": "object"}'), facts=facts)
    assert built.output.start_parser is None


async def test_a_prompt_that_has_its_special_tokens_gets_no_more(model_dir: Path) -> None:
    file = model_dir / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save(str(file))
    begins = load_served_model(model_dir, names=("tiny",))
    usual = await build(begins, set_field(text="hello"))
    begun = await build(begins, set_field(text="<|im_start|>hello", no_special_tokens=True))
    assert usual.core.prompt_ids[0] == 1 and begun.core.prompt_ids.tolist() == usual.core.prompt_ids.tolist()
    bare = await build(begins, set_field(text="hello", no_special_tokens=True))
    assert bare.core.prompt_ids.tolist() == usual.core.prompt_ids[1:].tolist()


@pytest.mark.parametrize(
    "change",
    [
        set_sampling(temperature=0, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, seed=-(2**63)),
        set_sampling(temperature=2, top_p=1e-6, repetition_penalty=0.5, logit_bias={0: -100.0, 999: 100.0}),
        set_stop(max_tokens=97, min_tokens=97, stop=["x"] * 16),
        set_field(n=8, output=pb.OutputOptions(logprobs=20)),
    ],
)
async def test_limits_themselves_are_allowed(model: ServedModel, change: Change) -> None:
    await build(model, change)


async def test_unknown_model(model: ServedModel) -> None:
    error = await refusal(model, set_field(model="gpt-5"))
    assert (error.code, error.reason) == ("NOT_FOUND", "model_not_found")
    assert "'gpt-5' does not exist" in error.message and "'tiny', 'alias/tiny'" in error.message
    assert (await build(model, set_field(model="alias/tiny"))).model == "tiny"


async def test_without_names_the_workers_own_name_is_served() -> None:
    built = await build(ServedModel(), set_field(model="tiny"))
    assert built.model == "tiny", "the last part of /models/tiny: no paths in answers"


async def test_defaults_of_the_model_then_neutral_ones(model: ServedModel, bare: ServedModel) -> None:
    ours = (await build(model)).core.sampling
    assert (ours.temperature, ours.top_k, ours.top_p) == (0.6, 20, 1.0)
    asked = (await build(model, set_sampling(temperature=0, top_k=0))).core.sampling
    assert (asked.temperature, asked.top_k) == (0.0, 0)
    neutral = (await build(bare)).core.sampling
    assert (neutral.temperature, neutral.top_p, neutral.top_k, neutral.min_p) == (1.0, 1.0, 0, 0.0)
    assert (neutral.repetition_penalty, neutral.presence_penalty, neutral.frequency_penalty) == (1.0, 0.0, 0.0)
    assert neutral.num_logprobs is None


async def test_seeds(bare: ServedModel) -> None:
    assert (await build(bare, set_sampling(seed=-1))).core.sampling.seed == 2**64 - 1
    assert (await build(bare, set_sampling(seed=7))).core.sampling.seed == 7
    seeds = {(await build(bare)).core.sampling.seed for _ in range(20)}
    assert len(seeds) == 20 and max(seeds) > 2**32


async def test_top_k_of_the_whole_vocabulary_is_none(bare: ServedModel) -> None:
    assert (await build(bare, set_sampling(top_k=4_000_000_000))).core.sampling.top_k == 0


async def test_max_tokens_is_what_the_context_leaves(bare: ServedModel) -> None:
    assert (await build(bare)).core.max_tokens == 97
    assert (await build(bare, set_stop(max_tokens=97))).core.max_tokens == 97


@pytest.mark.parametrize(
    ("num_prompt_tokens", "stop", "field", "numbers"),
    [
        (3, {"max_tokens": 98}, "stop.max_tokens", ("3 prompt tokens", "98 tokens", "101", "100")),
        (3, {"min_tokens": 98}, "stop.min_tokens", ("3 prompt tokens", "98 tokens", "100")),
        (100, {}, "token_ids.ids", ("100 tokens", "holds 100")),
        (130, {"max_tokens": 5}, "token_ids.ids", ("130 tokens", "holds 100")),
    ],
)
async def test_too_long_for_the_context(
    bare: ServedModel, num_prompt_tokens: int, stop: dict[str, int], field: str, numbers: tuple[str, ...]
) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * num_prompt_tokens), stop=pb.StopConditions(**stop))
    with pytest.raises(RequestRefused) as refused:
        await RequestBuilder(bare).build(request, FACTS)
    error = refused.value
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "context_length_exceeded")
    assert error.violations[0].field == field
    assert all(number in error.message for number in numbers)


async def test_endless_text_is_refused_unread(model: ServedModel) -> None:
    error = await refusal(model, set_field(text="x" * 70_000))
    assert error.reason == "context_length_exceeded"
    assert "70000 characters" in error.message


async def test_stop_tokens(bare: ServedModel) -> None:
    """5000 is an end-of-sequence id that the worker's vocabulary of 1000 does not have."""
    built = await build(bare, set_stop(stop_token_ids=[9]))
    assert built.core.stop_token_ids == {2, 9}
    assert built.output.extra_stop_token_ids == {9}
    ignoring = await build(bare, set_stop(stop_token_ids=[9], ignore_eos=True))
    assert ignoring.core.stop_token_ids == {9}


async def test_inputs_become_ids(model: ServedModel) -> None:
    ids = (await build(model)).core.prompt_ids
    assert ids.dtype == np.uint32 and ids.tolist() == [5, 6, 7]
    assert model.tokenizer is not None
    text = (await build(model, set_field(text="hello"))).core.prompt_ids
    assert text.tolist() == (await model.tokenizer.encode_text("hello", add_special_tokens=True)).tolist()
    parts = [pb.ContentPart(text="one"), pb.ContentPart(text="two")]
    chat = await build(model, set_field(chat=pb.ChatInput(messages=[pb.ChatMessage(role="user", content=parts)])))
    expected = "<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert await model.tokenizer.decode(chat.core.prompt_ids.tolist()) == expected


async def test_continue_final_message(model: ServedModel) -> None:
    messages = [
        pb.ChatMessage(role="user", content=[pb.ContentPart(text="2+2")]),
        pb.ChatMessage(role="assistant", content=[pb.ContentPart(text="It is ")]),
    ]
    chat = pb.ChatInput(messages=messages, continue_final_message=True)
    built = await build(model, set_field(chat=chat))
    assert model.tokenizer is not None
    text = await model.tokenizer.decode(built.core.prompt_ids.tolist())
    assert text == "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\nIt is "


async def test_without_a_chat_template_either_roads_way_out_is_named(model: ServedModel) -> None:
    message = pb.ChatMessage(role="user", content=[pb.ContentPart(text="hi")])
    error = await refusal(replace(model, chat_template=None), set_field(chat=pb.ChatInput(messages=[message])))
    [violation] = error.violations
    assert violation.field == "chat"
    assert all(name in violation.description for name in ("`text`", "/v1/completions", "--chat-template"))


async def test_without_a_tokenizer_only_ids(bare: ServedModel) -> None:
    built = await build(bare)
    assert built.output.sends_token_ids and not built.output.sends_text
    for change, field in (
        (set_field(text="x"), "text"),
        (set_field(chat=pb.ChatInput(messages=[pb.ChatMessage(role="user")])), "chat"),
        (set_stop(stop=["x"]), "stop.stop"),
    ):
        error = await refusal(bare, change)
        assert error.violations[0].field == field
        assert "tokenizer" in error.message or "template" in error.message


async def test_a_worker_with_a_smaller_vocabulary_than_the_tokenizer(model: ServedModel) -> None:
    facts = ModelFacts(model="m", max_model_len=100, vocab_size=3, max_num_logprobs=5, can_mask_tokens=False)
    error = await refusal(model, set_field(text="hello"), facts=facts)
    assert "different models" in error.message


async def test_prompt_logprobs_need_a_worker_that_has_them_and_one_message_of_room(bare: ServedModel) -> None:
    def wanted(count: int, num_tokens: int = 3) -> Change:
        ids = pb.TokenIds(ids=[1] * num_tokens)
        return set_field(token_ids=ids, output=pb.OutputOptions(prompt_logprobs=count))

    able = replace(FACTS, can_prompt_logprobs=True, max_model_len=2**20)
    built = await build(bare, wanted(4), facts=able)
    assert built.core.sampling.num_prompt_logprobs == 4
    assert built.core.sampling.num_logprobs is None
    for facts, change, words in (
        (FACTS, wanted(0), "not supported by this server's worker"),
        (able, wanted(21), "from 0 to 20, not 21"),
        (able, wanted(20, 50_000), "50003 prompt tokens with 21 logprobs each"),
    ):
        error = await refusal(bare, change, facts=facts)
        assert error.violations[0].field == "output.prompt_logprobs"
        assert words in error.violations[0].description
