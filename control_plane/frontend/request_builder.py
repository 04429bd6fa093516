"""GenerateRequest to CoreRequest: every check, the model's defaults, and text to ids."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import AdmissionError, CoreRequest, ModelFacts, TokenIdArray
from control_plane.frontend.chat_template import Message
from control_plane.frontend.errors import RequestRefused, Violation
from control_plane.frontend.request_fields import MAX_CACHE_SALT_CHARS, FieldChecks, StopFields
from control_plane.frontend.served_model import ServedModel
from control_plane.frontend.stop import StopStrings
from control_plane.frontend.tokenizer import TextTokenizer

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
# Text is refused unread beyond this many characters a token of context: no prose has nearly as many.
MAX_CHARS_PER_TOKEN = 32


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """What a request wants to hear, as `RequestOutput` needs it."""

    sends_text: bool
    sends_token_ids: bool
    sends_logprobs: bool
    skip_special_tokens: bool
    stop_strings: StopStrings | None
    include_stop_string: bool
    # Stop strings are not looked for in the text of earlier tokens.
    min_tokens: int
    # Stop tokens that are named to the client.
    extra_stop_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class BuiltRequest:
    core: CoreRequest
    output: OutputPlan
    # The name under which the model answers.
    model: str


class RequestBuilder:
    def __init__(self, model: ServedModel, *, max_n: int = 128) -> None:
        self._model = model
        self._max_n = max_n

    def check_model(self, name: str, facts: ModelFacts) -> None:
        """Raise NOT_FOUND for a name under which nothing is served."""
        if self._model.is_served_as(name, facts.model):
            return
        served = self._model.names or (self._model.name(facts.model),)
        raise RequestRefused(
            "NOT_FOUND",
            "model_not_found",
            f"The model {name[:200]!r} does not exist; this server has {', '.join(map(repr, served))}.",
            (Violation("model", "no such model is served here"),),
        )

    async def build(self, request: pb.GenerateRequest, facts: ModelFacts) -> BuiltRequest:
        """Check and translate a request.

        Raises:
            RequestRefused: NOT_FOUND for the model, INVALID_ARGUMENT with every wrong field otherwise.
        """
        self.check_model(request.model, facts)
        checks = FieldChecks(facts.vocab_size, facts.max_num_logprobs)
        num_logprobs = request.output.logprobs if request.output.HasField("logprobs") else None
        sampling = checks.sampling(request.sampling, self._model.sampling_defaults, num_logprobs)
        has_tokenizer = self._model.tokenizer is not None
        stop = checks.stop(request.stop, self._model.eos_token_ids, has_tokenizer=has_tokenizer)
        num_sequences = request.n if request.HasField("n") else 1
        if not 1 <= num_sequences <= self._max_n:
            checks.add("n", f"must be from 1 to {self._max_n}, not {num_sequences}")
        if len(request.cache_salt) > MAX_CACHE_SALT_CHARS:
            checks.add(
                "cache_salt", f"has {len(request.cache_salt)} characters; at most {MAX_CACHE_SALT_CHARS} are taken"
            )
        checks.raise_if_any()

        prompt_ids = await self._prompt_ids(request, facts)
        core = CoreRequest(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=sampling,
            max_tokens=_max_tokens(len(prompt_ids), stop, facts.max_model_len, _input_field(request)),
            min_tokens=stop.min_tokens,
            stop_token_ids=stop.token_ids,
            num_sequences=num_sequences,
            priority=request.priority,
            cache_salt=request.cache_salt,
        )
        output = OutputPlan(
            sends_text=has_tokenizer,
            sends_token_ids=request.output.token_ids or not has_tokenizer,
            sends_logprobs=num_logprobs is not None,
            skip_special_tokens=not request.output.special_tokens,
            stop_strings=stop.strings,
            include_stop_string=stop.include_stop_string,
            min_tokens=stop.min_tokens,
            extra_stop_token_ids=stop.extra_token_ids,
        )
        return BuiltRequest(core, output, self._model.name(facts.model))

    async def tokenize(self, request: pb.TokenizeRequest, facts: ModelFacts) -> TokenIdArray:
        self.check_model(request.model, facts)
        match request.WhichOneof("input"):
            case "text":
                self._check_num_chars("text", len(request.text), facts)
                return await self._tokenizer("text").encode_text(
                    request.text, add_special_tokens=not request.no_special_tokens
                )
            case "chat":
                return await self._chat_ids(request.chat, facts)
            case _:
                raise RequestRefused.invalid(Violation("input", "is missing: give text or chat"))

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """Each token's own bytes, which need not be whole characters."""
        detokenization = self._tokenizer("token_bytes").detokenization
        return [detokenization.token_bytes(token_id) for token_id in token_ids]

    async def detokenize(self, request: pb.DetokenizeRequest, facts: ModelFacts) -> str:
        self.check_model(request.model, facts)
        tokenizer = self._tokenizer("token_ids")
        _check_vocabulary("token_ids", np.array(request.token_ids, dtype=np.uint32), facts.vocab_size)
        return await tokenizer.decode(request.token_ids)

    async def _prompt_ids(self, request: pb.GenerateRequest, facts: ModelFacts) -> TokenIdArray:
        match request.WhichOneof("input"):
            case "token_ids":
                ids = np.array(request.token_ids.ids, dtype=np.uint32)  # [num_prompt_tokens]
                _check_vocabulary("token_ids.ids", ids, facts.vocab_size)
            case "text":
                self._check_num_chars("text", len(request.text), facts)
                ids = await self._tokenizer("text").encode_text(request.text, add_special_tokens=True)
                _check_vocabulary("text", ids, facts.vocab_size)
            case "chat":
                ids = await self._chat_ids(request.chat, facts)
                _check_vocabulary("chat.messages", ids, facts.vocab_size)
            case _:
                raise RequestRefused.invalid(Violation("input", "is missing: give text, token_ids or chat"))
        if not len(ids):
            raise RequestRefused.invalid(
                Violation(_input_field(request), "the prompt is empty: give at least one token")
            )
        return ids

    async def _chat_ids(self, chat: pb.ChatInput, facts: ModelFacts) -> TokenIdArray:
        tokenizer = self._tokenizer("chat")
        template = self._model.chat_template
        if template is None:
            raise RequestRefused.invalid(
                Violation("chat", "this model has no chat template; use text, or start the server with --chat-template")
            )
        messages, num_chars = _messages(chat)
        self._check_num_chars("chat.messages", num_chars, facts)
        return await tokenizer.encode_chat(
            template,
            messages,
            max_chars=self._max_chars(facts),
            continue_final_message=chat.continue_final_message,
        )

    def _tokenizer(self, field: str) -> TextTokenizer:
        if self._model.tokenizer is None:
            raise RequestRefused.invalid(
                Violation(field, "this model is served without a tokenizer: it takes and gives token ids only")
            )
        return self._model.tokenizer

    def _max_chars(self, facts: ModelFacts) -> int:
        return max(1 << 16, MAX_CHARS_PER_TOKEN * facts.max_model_len)

    def _check_num_chars(self, field: str, num_chars: int, facts: ModelFacts) -> None:
        limit = self._max_chars(facts)
        if num_chars > limit:
            raise RequestRefused.invalid(
                Violation(
                    field,
                    f"has {num_chars} characters; at most {limit} are read where the context is "
                    f"{facts.max_model_len} tokens",
                ),
                reason=CONTEXT_LENGTH_EXCEEDED,
            )


def from_admission(error: AdmissionError, request: pb.GenerateRequest) -> RequestRefused:
    """The core knows the prompt as ids only; the client is told of the field that it sent."""
    if error.field == "input":
        error.field = _input_field(request)
    return RequestRefused.from_admission(error)


def _input_field(request: pb.GenerateRequest) -> str:
    match request.WhichOneof("input"):
        case "chat":
            return "chat.messages"
        case "token_ids":
            return "token_ids.ids"
        case _:
            return "text"


def _messages(chat: pb.ChatInput) -> tuple[list[Message], int]:
    """Messages as templates know them, and how many characters they have.

    Texts of one message that came in several parts are joined by line breaks.
    """
    if not chat.messages:
        raise RequestRefused.invalid(Violation("chat.messages", "is empty: give at least one message"))
    messages: list[Message] = []
    num_chars = 0
    violations: list[Violation] = []
    for index, message in enumerate(chat.messages):
        if not message.role:
            violations.append(Violation(f"chat.messages[{index}].role", "is missing"))
        for part_index, part in enumerate(message.content):
            if part.WhichOneof("part") is None:
                violations.append(
                    Violation(f"chat.messages[{index}].content[{part_index}]", "is empty or of a kind not known here")
                )
        rendered: Message = {"role": message.role, "content": "\n".join(part.text for part in message.content)}
        if message.name:
            rendered["name"] = message.name
        messages.append(rendered)
        num_chars += sum(map(len, rendered.values()))
    if violations:
        raise RequestRefused.invalid(*violations)
    return messages, num_chars


def _check_vocabulary(field: str, ids: TokenIdArray, vocab_size: int) -> None:
    """Name the first id that the model does not have."""
    if not len(ids) or int(ids.max()) < vocab_size:
        return
    index = int(np.argmax(ids >= vocab_size))
    raise RequestRefused.invalid(
        Violation(f"{field}[{index}]", f"token id {ids[index]} is out of vocabulary: ids are below {vocab_size}")
        if field.endswith("ids")
        else Violation(
            field,
            f"the tokenizer gives token id {ids[index]}, but the worker's model has ids below {vocab_size}: "
            "the control plane and the worker were started with different models",
        )
    )


def _max_tokens(num_prompt_tokens: int, stop: StopFields, max_model_len: int, input_field: str) -> int:
    """What the request asked for, or what the context leaves."""
    if num_prompt_tokens >= max_model_len:
        raise _too_long(
            input_field,
            f"the prompt has {num_prompt_tokens} tokens, but this model's context holds {max_model_len}, "
            "of which at least 1 must be left to generate",
        )
    left = max_model_len - num_prompt_tokens
    asked = max(stop.max_tokens or 0, stop.min_tokens)
    if asked > left:
        raise _too_long(
            "stop.min_tokens" if stop.max_tokens is None else "stop.max_tokens",
            f"{num_prompt_tokens} prompt tokens and {asked} tokens to generate make {num_prompt_tokens + asked}, "
            f"but this model's context holds {max_model_len}: shorten the prompt or ask for at most {left}",
        )
    return left if stop.max_tokens is None else stop.max_tokens


def _too_long(field: str, description: str) -> RequestRefused:
    return RequestRefused.invalid(Violation(field, description), reason=CONTEXT_LENGTH_EXCEEDED)
