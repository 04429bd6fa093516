"""Whole answers are what the official client's types read, strictly."""

from __future__ import annotations

import json
from typing import Any

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from stepwire.v1 import inference_pb2

from gateway import answers
from gateway.mailbox import PromptOutput, SequenceUpdate, TokenLogprob, TopLogprob, UsageTotals
from gateway.sse import StreamShape

USAGE = UsageTotals(num_prompt_tokens=5, num_completion_tokens=3, num_cached_tokens=2)
PROMPTS = [PromptOutput("P", [1], []), PromptOutput("Q", [2], [])]
ENTRY = TokenLogprob("é".encode(), -0.5, (TopLogprob(b"b", -0.25),))


def shape(**fields: Any) -> StreamShape:
    return StreamShape(**{"id": "x-1", "created": 123, "model": "m", **fields})


def test_chat() -> None:
    updates = [
        SequenceUpdate(0, ["a", "é"], finish_reason="stop", stop_reason="END"),
        SequenceUpdate(1, ["b"], finish_reason="length"),
    ]
    answer = json.loads(answers.chat_completion(shape(), updates, USAGE))
    ChatCompletion.model_validate(answer, strict=True)
    assert answer == {
        "id": "x-1",
        "object": "chat.completion",
        "created": 123,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "aé", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": "END",
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "b", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            },
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def test_chat_with_logprobs_and_ids() -> None:
    updates = [SequenceUpdate(0, ["é"], finish_reason="stop", logprobs=[ENTRY], token_ids=[4])]
    answer = json.loads(
        answers.chat_completion(
            shape(num_top_logprobs=1, return_token_ids=True), updates, USAGE, [PromptOutput("", [1, 2], [])]
        )
    )
    ChatCompletion.model_validate(answer, strict=True)
    (choice,) = answer["choices"]
    assert choice["logprobs"]["content"][0]["bytes"] == list("é".encode())
    assert choice["token_ids"] == [4]
    assert answer["prompt_token_ids"] == [1, 2]


def test_completions_of_a_batch() -> None:
    updates = [
        SequenceUpdate(index, [text], finish_reason="stop", logprobs=[ENTRY, ENTRY], token_ids=[index])
        for index, text in enumerate(["a", "b", "c", "d"])
    ]
    answer = json.loads(
        answers.completion(shape(num_top_logprobs=0, return_token_ids=True, echo=True), 2, updates, USAGE, PROMPTS)
    )
    Completion.model_validate(answer, strict=True)
    assert [choice["text"] for choice in answer["choices"]] == ["Pa", "Pb", "Qc", "Qd"]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[1], [1], [2], [2]]
    # Every choice counts its own characters, after the prompt's.
    assert all(choice["logprobs"]["text_offset"] == [1, 2] for choice in answer["choices"])


def test_a_plain_completion_has_no_extra_fields() -> None:
    answer = json.loads(answers.completion(shape(), 1, [SequenceUpdate(0, ["a"], finish_reason="stop")], USAGE))
    assert set(answer["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert answer["object"] == "text_completion"


def test_models() -> None:
    model = inference_pb2.Model(id="org/m", created=7, max_model_len=4096)
    listed = json.loads(answers.model_list([model]).model_dump_json())
    assert listed["object"] == "list"
    assert listed["data"] == [
        {
            "id": "org/m",
            "object": "model",
            "created": 7,
            "owned_by": "stepwire",
            "root": "org/m",
            "parent": None,
            "max_model_len": 4096,
        }
    ]
    Model.model_validate(listed["data"][0], strict=True)
