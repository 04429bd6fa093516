"""GenerateRequest to CoreRequest: every check, the model's defaults, and text to ids."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import AdmissionError, CoreRequest, Grammar, ModelFacts, TokenIdArray
from control_plane.frontend.bad_words import BadWords
from control_plane.frontend.conversation import read_conversation
from control_plane.frontend.errors import RequestRefused, Violation
from control_plane.frontend.grammar import GrammarCompiler, GrammarError
from control_plane.frontend.output_rules import OutputRules
from control_plane.frontend.parsers.registry import schemas_of
from control_plane.frontend.parsers.scanner import IncrementalParser
from control_plane.frontend.prompt_limits import (
    CONTEXT_LENGTH_EXCEEDED,
    check_num_prompt_logprobs,
    check_vocabulary,
    max_tokens_of,
    truncated,
)
from control_plane.frontend.request_fields import MAX_CACHE_SALT_CHARS, FieldChecks
from control_plane.frontend.served_model import ServedModel
from control_plane.frontend.stop import StopStrings
from control_plane.frontend.tokenizer import TextTokenizer

# Text is refused unread beyond this many characters a token of context: no prose has nearly as many.
MAX_CHARS_PER_TOKEN = 32
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
# Formats of an answer in whose place there may be calls.
_JSON_KINDS = ("json_object", "json_schema")
# (before, after, here it goes): Qwen 2.5 Coder; StarCoder, Granite Code; DeepSeek Coder; Code Llama.
_INFILL_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001 - the model's own spelling
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


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
    # Makes the parser of a sequence's text; None: text is text.
    start_parser: Callable[[], IncrementalParser] | None = None
    omits_reasoning: bool = False
    # Only the prompt is wanted: what the core generates is thrown away.
    generates_nothing: bool = False
    # What of the prompt is sent.
    prompt: pb.PromptOutput | None = None


@dataclass(frozen=True, slots=True)
class _Prompt:
    ids: TokenIdArray  # [num_prompt_tokens]
    # How a rendered conversation ends; empty for the other inputs.
    end: str = ""


@dataclass(frozen=True, slots=True)
class BuiltRequest:
    core: CoreRequest
    output: OutputPlan
    # The name under which the model answers.
    model: str
    # What the client calls it, in its own log.
    client_request_id: str


class RequestBuilder:
    def __init__(self, model: ServedModel, *, max_n: int = 128) -> None:
        self._model = model
        self._max_n = max_n
        self._grammars: GrammarCompiler | None = None
        self._rules = (
            None if model.tokenizer is None else OutputRules(model.tokenizer, model.output_format, model.eos_token_ids)
        )

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
        if facts.pooling is not None and facts.pooling.only:
            shown = request.model or self._model.name(facts.model)
            what = "rates pairs of texts" if facts.pooling.is_score else "computes embeddings"
            raise RequestRefused.invalid(
                Violation("model", f"{shown!r} {what}; it generates no text"), reason="model_cannot_generate"
            )
        checks = FieldChecks(facts.vocab_size, facts.max_num_logprobs)
        num_logprobs = request.output.logprobs if request.output.HasField("logprobs") else None
        num_prompt_logprobs = request.output.prompt_logprobs if request.output.HasField("prompt_logprobs") else None
        sampling = checks.sampling(request.sampling, self._model.sampling_defaults, num_logprobs, num_prompt_logprobs)
        has_tokenizer = self._model.tokenizer is not None
        _check_prompt_outputs(request, checks, facts)
        stop = checks.stop(
            request.stop,
            self._model.eos_token_ids,
            has_tokenizer=has_tokenizer,
            may_be_nothing=_wants_prompt(request.output),
            is_held=request.HasField("structured_output"),
        )
        num_sequences = request.n if request.HasField("n") else 1
        if not 1 <= num_sequences <= self._max_n:
            checks.add("n", f"must be from 1 to {self._max_n}, not {num_sequences}")
        if len(request.cache_salt) > MAX_CACHE_SALT_CHARS:
            checks.add(
                "cache_salt", f"has {len(request.cache_salt)} characters; at most {MAX_CACHE_SALT_CHARS} are taken"
            )
        checks.raise_if_any()

        prompt = await self._prompt(request, facts)
        prompt_ids = truncated(prompt.ids, request, facts.max_model_len)
        check_num_prompt_logprobs(len(prompt_ids), num_prompt_logprobs)
        core = CoreRequest(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=sampling,
            max_tokens=max(1, max_tokens_of(len(prompt_ids), stop, facts.max_model_len, _input_field(request))),
            min_tokens=stop.min_tokens,
            stop_token_ids=stop.token_ids,
            num_sequences=num_sequences,
            priority=request.priority,
            cache_salt=request.cache_salt,
            grammar=await self._grammar(request, prompt.end, facts),
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
            start_parser=self._parser(request, prompt.end),
            omits_reasoning=request.output.omit_reasoning,
            generates_nothing=stop.max_tokens == 0,
            prompt=await self._prompt_output(request, prompt_ids, is_whole=len(prompt_ids) == len(prompt.ids)),
        )
        return BuiltRequest(core, output, self._model.name(facts.model), request.request_id)

    async def tokenize(self, request: pb.TokenizeRequest, facts: ModelFacts) -> TokenIdArray:
        self.check_model(request.model, facts)
        match request.WhichOneof("input"):
            case "text":
                self.check_num_chars("text", len(request.text), facts)
                return await self._tokenizer("text").encode_text(
                    request.text, add_special_tokens=not request.no_special_tokens
                )
            case "chat":
                return (await self._chat_prompt(request.chat, facts)).ids
            case _:
                raise RequestRefused.invalid(Violation("input", "is missing: give text or chat"))

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """Each token's own bytes, which need not be whole characters."""
        detokenization = self._tokenizer("token_bytes").detokenization
        return [detokenization.token_bytes(token_id) for token_id in token_ids]

    async def detokenize(self, request: pb.DetokenizeRequest, facts: ModelFacts) -> str:
        self.check_model(request.model, facts)
        tokenizer = self._tokenizer("token_ids")
        check_vocabulary("token_ids", np.array(request.token_ids, dtype=np.uint32), facts.vocab_size)
        return await tokenizer.decode(request.token_ids)

    async def _grammar(self, request: pb.GenerateRequest, prompt_end: str, facts: ModelFacts) -> Grammar | None:
        """What the request's text is held to, compiled; None: anything goes."""
        sources, field, is_needed = self._grammar_sources(request, prompt_end, facts.vocab_size)
        grammar: Grammar | None = None
        for source in sources if facts.can_mask_tokens or is_needed else ():
            try:
                grammar = await self._compiler(field, facts).compile(source)
                break
            except GrammarError as error:
                if is_needed and source is sources[-1]:
                    raise RequestRefused.invalid(Violation(field, str(error))) from error
        if request.sampling.bad_words:
            words = await self._tokenizer("sampling.bad_words").spellings(request.sampling.bad_words)
            self._check_masks("sampling.bad_words", facts)
            grammar = BadWords(words, grammar)
        return grammar

    def _grammar_sources(
        self, request: pb.GenerateRequest, prompt_end: str, vocab_size: int
    ) -> tuple[list[str], str, bool]:
        """(sources, the first of which that compiles counts; the field that asks for them; whether one is needed)."""
        chat = request.chat
        is_chat = request.WhichOneof("input") == "chat"
        sources: list[str] = []
        if request.HasField("structured_output"):
            field = "structured_output"
            if is_chat and _forces_calls(chat):
                raise RequestRefused.invalid(
                    Violation(field, "cannot be combined with a tool_choice that forces a call")
                )
            output, kind = request.structured_output, request.structured_output.WhichOneof("format")
            field = f"{field}.{kind}"
            rules = self._output_rules(field)
            if is_chat and kind in _JSON_KINDS and _may_call(chat) and rules.tells_calls(prompt_end):
                with contextlib.suppress(RequestRefused):
                    sources.append(rules.structured(output, prompt_end, chat))
            sources.append(rules.structured(output, prompt_end if is_chat else None, vocab_size=vocab_size))
            return sources, field, True
        field = "chat.tools"
        if not is_chat or not _may_call(chat):
            return sources, field, False
        rules = self._output_rules(field)
        if _forces_calls(chat):
            return [rules.forced_calls(chat, prompt_end)], field, True
        is_needed = any(tool.function.strict for tool in chat.tools)
        if all(not tool.function.HasField("strict") or tool.function.strict for tool in chat.tools):
            try:
                sources += filter(None, [rules.optional_calls(chat, prompt_end)])
            except RequestRefused:
                # What rules cannot say is left to the model, like what does not compile.
                if is_needed:
                    raise
        return sources, field, is_needed

    def _output_rules(self, field: str) -> OutputRules:
        self._tokenizer(field)
        assert self._rules is not None
        return self._rules

    def _check_masks(self, field: str, facts: ModelFacts) -> None:
        if not facts.can_mask_tokens:
            raise RequestRefused.invalid(Violation(field, "this server's worker cannot restrict what is generated"))

    def _compiler(self, field: str, facts: ModelFacts) -> GrammarCompiler:
        self._check_masks(field, facts)
        if self._grammars is None or self._grammars.vocab_size != facts.vocab_size:
            tokenizer = self._tokenizer(field)
            self._grammars = GrammarCompiler(
                tokenizer.to_json(),
                facts.vocab_size,
                list(self._model.eos_token_ids),
                plain_json=tokenizer.to_plain_json(),
            )
        return self._grammars

    def _parser(self, request: pb.GenerateRequest, prompt_end: str) -> Callable[[], IncrementalParser] | None:
        if request.WhichOneof("input") != "chat" or self._model.tokenizer is None:
            return None
        chat = request.chat
        # An answer that is held to a format may look like a call where no mark tells them apart.
        is_told = not request.HasField("structured_output") or self._output_rules("chat").tells_calls(prompt_end)
        has_tools = _may_call(chat) and is_told
        tools = [(tool.function.name, tool.function.parameters) for tool in chat.tools]
        schemas = schemas_of(tools) if has_tools else None
        return self._model.output_format.start(schemas, prompt_end, calls_only=_forces_calls(chat))

    async def _prompt_output(
        self, request: pb.GenerateRequest, ids: TokenIdArray, *, is_whole: bool
    ) -> pb.PromptOutput | None:
        """`is_whole`: nothing was truncated."""
        wanted = request.output
        if not _wants_prompt(wanted):
            return None
        output = pb.PromptOutput()
        if wanted.prompt_text:
            as_sent = request.text if is_whole else ""
            output.text = as_sent or await self._tokenizer("output.prompt_text").decode(ids.tolist())
        if wanted.prompt_token_ids:
            output.token_ids.extend(ids.tolist())
        return output

    async def _prompt(self, request: pb.GenerateRequest, facts: ModelFacts) -> _Prompt:
        end = ""
        match request.WhichOneof("input"):
            case "token_ids":
                ids = np.array(request.token_ids.ids, dtype=np.uint32)  # [num_prompt_tokens]
                check_vocabulary("token_ids.ids", ids, facts.vocab_size)
            case "text":
                self.check_num_chars("text", len(request.text), facts)
                text = request.text
                if request.HasField("suffix"):
                    text = self._infill(text, request.suffix)
                ids = await self._tokenizer("text").encode_text(
                    text, add_special_tokens=not request.no_special_tokens, salt=request.cache_salt
                )
                check_vocabulary("text", ids, facts.vocab_size)
            case "chat":
                prompt = await self._chat_prompt(request.chat, facts, request.cache_salt)
                ids, end = prompt.ids, prompt.end
                check_vocabulary("chat.messages", ids, facts.vocab_size)
            case _:
                raise RequestRefused.invalid(Violation("input", "is missing: give text, token_ids or chat"))
        if not len(ids):
            raise RequestRefused.invalid(
                Violation(_input_field(request), "the prompt is empty: give at least one token")
            )
        if request.HasField("suffix") and request.WhichOneof("input") != "text":
            raise RequestRefused.invalid(Violation("suffix", "is only taken with a text prompt"))
        return _Prompt(ids, end)

    @property
    def can_infill(self) -> bool:
        return self._model.tokenizer is not None and _infill_marks(self._model.tokenizer) is not None

    def _infill(self, before: str, after: str) -> str:
        """The prompt from which a model writes what stands between two texts."""
        tokenizer = self._tokenizer("suffix")
        marks = _infill_marks(tokenizer)
        if marks is None:
            raise RequestRefused.invalid(Violation("suffix", "this model does not define how to fill in; leave it out"))
        prefix, suffix, middle = marks
        return f"{prefix}{before}{suffix}{after}{middle}"

    async def _chat_prompt(self, chat: pb.ChatInput, facts: ModelFacts, salt: str = "") -> _Prompt:
        tokenizer = self._tokenizer("chat")
        template = self._model.chat_template
        if template is None:
            raise RequestRefused.invalid(
                Violation(
                    "chat",
                    "this model has no chat template: send a prompt (over gRPC `text`, over REST /v1/completions), or "
                    "start the server with --chat-template",
                )
            )
        conversation = read_conversation(chat, template, self._model.output_format.syntax)
        self.check_num_chars("chat.messages", conversation.num_chars, facts)
        ids, end = await tokenizer.encode_chat(
            template,
            conversation.messages,
            max_chars=self._max_chars(facts),
            continue_final_message=chat.continue_final_message,
            add_generation_prompt=not chat.no_generation_prompt,
            tools=conversation.tools,
            arguments=conversation.arguments,
            salt=salt,
        )
        return _Prompt(ids, end)

    def _tokenizer(self, field: str) -> TextTokenizer:
        if self._model.tokenizer is None:
            raise RequestRefused.invalid(
                Violation(field, "this model is served without a tokenizer: it takes and gives token ids only")
            )
        return self._model.tokenizer

    def _max_chars(self, facts: ModelFacts) -> int:
        return max(1 << 16, MAX_CHARS_PER_TOKEN * facts.max_model_len)

    def check_num_chars(self, field: str, num_chars: int, facts: ModelFacts) -> None:
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


def _infill_marks(tokenizer: TextTokenizer) -> tuple[str, str, str] | None:
    known = (marks for marks in _INFILL_MARKS if all(tokenizer.token_id(mark) is not None for mark in marks))
    return next(known, None)


def _may_call(chat: pb.ChatInput) -> bool:
    return bool(chat.tools) and chat.tool_choice.mode != pb.TOOL_CHOICE_MODE_NONE


def _forces_calls(chat: pb.ChatInput) -> bool:
    choice = chat.tool_choice
    return choice.WhichOneof("choice") == "function_name" or choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED


def _wants_prompt(output: pb.OutputOptions) -> bool:
    return output.prompt_text or output.prompt_token_ids or output.HasField("prompt_logprobs")


def _check_prompt_outputs(request: pb.GenerateRequest, checks: FieldChecks, facts: ModelFacts) -> None:
    if request.output.HasField("prompt_logprobs") and not facts.can_prompt_logprobs:
        checks.add("output.prompt_logprobs", "is not supported by this server's worker; leave it out")
    if request.HasField("truncate_prompt_tokens") and not (
        request.truncate_prompt_tokens == -1 or request.truncate_prompt_tokens >= 1
    ):
        checks.add("truncate_prompt_tokens", f"must be at least 1, or -1, not {request.truncate_prompt_tokens}")
    if len(request.sampling.bad_words) > MAX_BAD_WORDS:
        checks.add(
            "sampling.bad_words", f"has {len(request.sampling.bad_words)} words; at most {MAX_BAD_WORDS} are taken"
        )
    for index, word in enumerate(request.sampling.bad_words):
        if not word or len(word) > MAX_BAD_WORD_CHARS:
            checks.add(f"sampling.bad_words[{index}]", f"must have 1 to {MAX_BAD_WORD_CHARS} characters")
