"""Formats that generated text is held to, compiled to grammars by llguidance.

Four methods are the seam: `GrammarCompiler.compile` makes a `Grammar` of a specification, off the event loop, within
limits and once per specification; `start`, `accept` and `fill_mask` are what the core sees of it. The tokenizer is read
from tokenizer.json; neither torch nor transformers is needed.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance import gbnf_to_lark

from control_plane.core.request import Grammar, TokenMatcher

# Of a specification, in characters.
MAX_GRAMMAR_CHARS = 256 * 1024
MAX_REGEX_CHARS = 16 * 1024
MAX_CHOICES = 4096
# Brackets within brackets: parsers recurse.
MAX_NESTING = 64
MAX_CACHED_GRAMMARS = 256
COMPILE_TIMEOUT_S = 5.0
MAX_LEFT_THREADS = 2
# Blanks between the parts of a JSON text: a model that is held to a schema may otherwise say nothing else for ever.
JSON_BLANKS = r"[\x20\x0A\x0D\x09]{1,16}"

# Text that a grammar leaves no choice about is written ahead by llguidance until there is a choice again. A grammar may
# force text without end (`x x` with x of /a+/, of which the first never is over): the mask that meets that never comes,
# and no limit counts. Masks say the same without it, but for how forced text is cut into tokens, which the model then
# has a choice about. Schemas, single expressions and our own grammars are left as they are: they end, or are refused.
_NOTHING_FORCED = '%llguidance {"no_forcing": true}'
# What llguidance says of a name that no special token has.
_NAMES_SPECIAL = "unknown special token"
_LIMITS = llguidance.LLParserLimits(
    max_grammar_size=200_000, max_lexer_states=50_000, step_lexer_fuel=100_000, verbose_errors=False
)


class GrammarError(Exception):
    """A specification that cannot be enforced, or is too large; the message is for the client."""


class GrammarCompiler:
    """For one tokenizer and the ids that one model's logits have.

    What a format leaves no choice about is tokenized by llguidance, which takes the text of a special token for the
    token and then refuses it, or ends there. So grammars are compiled with `plain_json`, the tokenizer to which that
    text is text like any other; those that name special tokens (`<|name|>` in Lark) with `tokenizer_json`.
    """

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int], *, plain_json: str | None = None
    ) -> None:
        self.vocab_size = vocab_size
        self._tokenizer_json = tokenizer_json
        self._plain_json = plain_json or tokenizer_json
        self._eos_token_ids = [token_id for token_id in sorted(eos_token_ids) if token_id < vocab_size]
        # By their JSON: made when first needed.
        self._tokenizers: dict[str, llguidance.LLTokenizer] = {}
        # Work on the tokenizer's table cannot be interrupted: one at a time keeps a core free for the steps.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        # Threads that still work on what was given up.
        self._num_left = 0
        self._cache: OrderedDict[str, Grammar] = OrderedDict()

    async def compile(self, source: str) -> Grammar:
        """`source` is what `lark_grammar` and its kin return. Raises `GrammarError`."""
        grammar = self._cache.get(source)
        if grammar is None:
            grammar = await self._compiled(source)
        self._cache[source] = grammar
        self._cache.move_to_end(source)
        if len(self._cache) > MAX_CACHED_GRAMMARS:
            self._cache.popitem(last=False)
        return grammar

    async def _compiled(self, source: str) -> Grammar:
        while True:
            thread = self._thread
            compiling = asyncio.get_running_loop().run_in_executor(thread, self._compile, source)
            try:
                return await asyncio.wait_for(asyncio.shield(compiling), COMPILE_TIMEOUT_S)
            except TimeoutError:
                self._leave(thread, compiling)
                raise GrammarError(f"took longer than {COMPILE_TIMEOUT_S:g} s to compile: make it simpler") from None
            except asyncio.CancelledError:
                # It waited behind one that took too long: its turn comes in the next thread.
                if not compiling.cancelled():
                    raise

    def _leave(self, thread: ThreadPoolExecutor, compiling: asyncio.Future[Grammar]) -> None:
        """Work that cannot be interrupted keeps its thread, and nobody else waits for it: others get a new one."""
        if thread is self._thread and self._num_left < MAX_LEFT_THREADS:
            self._num_left += 1
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
            thread.shutdown(wait=False, cancel_futures=True)
            compiling.add_done_callback(self._come_back)
        compiling.add_done_callback(lambda late: late.cancelled() or late.exception())

    def _come_back(self, _: asyncio.Future[Grammar]) -> None:
        self._num_left -= 1

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _tokenizer(self, tokenizer_json: str) -> llguidance.LLTokenizer:
        if tokenizer_json not in self._tokenizers:
            self._tokenizers[tokenizer_json] = llguidance.LLTokenizer(
                tokenizer_json, n_vocab=self.vocab_size, eos_token=self._eos_token_ids or None
            )
        return self._tokenizers[tokenizer_json]

    def _compile(self, source: str) -> Grammar:
        try:
            matcher = self._matcher(source, self._plain_json)
            if matcher.is_error() and _NAMES_SPECIAL in matcher.get_error():
                matcher = self._matcher(source, self._tokenizer_json)
            probe = matcher
            if not matcher.is_error():
                # What explodes does so with the first mask; copies share a lexer, which may tell only the next one.
                matcher.deep_copy().compute_bitmask()
                probe = matcher.deep_copy()
                probe.compute_bitmask()
        except BaseException as error:  # a panic of the library is none of Exception
            raise GrammarError(f"cannot be compiled: {type(error).__name__}") from error
        if probe.is_error():
            raise GrammarError(_first_line(probe.get_error()))
        return _CompiledGrammar(matcher, self.vocab_size)

    def _matcher(self, source: str, tokenizer_json: str) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self._tokenizer(tokenizer_json), source, limits=_LIMITS, log_level=0)


class _CompiledGrammar:
    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def start(self) -> TokenMatcher:
        return _Matcher(self._matcher.deep_copy(), self._vocab_size)


class _Matcher:
    __slots__ = ("_matcher", "_num_words")

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)

    def accept(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self._matcher.consume_tokens(list(token_ids))

    def fill_mask(self, out: npt.NDArray[np.uint32]) -> None:
        self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)

    @property
    def is_over(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str:
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else ""


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0][:300] or "cannot be compiled"


# ---- sources ----


def json_schema_grammar(schema: str, *, compact: bool = False) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(
        checked_schema(schema), overrides=_json_options(compact=compact)
    )


def json_object_grammar(*, compact: bool = False) -> str:
    return json_schema_grammar('{"type":"object"}', compact=compact)


def regex_grammar(regex: str) -> str:
    if len(regex) > MAX_REGEX_CHARS:
        raise GrammarError(f"has {len(regex)} characters; at most {MAX_REGEX_CHARS} are taken")
    _check_nesting(regex)
    return llguidance.LLMatcher.grammar_from_regex(with_plain_digits(regex))


def choice_grammar(texts: Sequence[str]) -> str:
    if not texts or not all(texts):
        raise GrammarError("must hold at least one text, and none that is empty")
    if len(texts) > MAX_CHOICES or sum(map(len, texts)) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"may hold at most {MAX_CHOICES} texts and {MAX_GRAMMAR_CHARS} characters together")
    return lark_grammar("start: " + " | ".join(map(quoted, texts)))


def context_free_grammar(text: str, syntax: str) -> str:
    """syntax: "lark" or "gbnf"."""
    _check_size(text)
    _check_nesting(text)
    if syntax == "gbnf":
        try:
            text = gbnf_to_lark.gbnf_to_lark(text)
        except Exception as error:  # the converter raises what it likes
            raise GrammarError(f"is not valid GBNF: {error}") from error
    return unforced_grammar(text)


def lark_grammar(text: str) -> str:
    return llguidance.LLMatcher.grammar_from_lark(text)


def unforced_grammar(text: str) -> str:
    """Lark of which a client wrote a part, so that it may force text without end."""
    # The last word on it: what the client's text says before does not count.
    return lark_grammar(f"{text}\n{_NOTHING_FORCED}\n")


def after(source: str, before: str, rules: str) -> str:
    """A text of which the last part is held to `source`, a grammar's source of any kind, and what comes before it to
    the expression `before` of Lark, with its rules."""
    inner = json.loads(source)["grammars"] if source.startswith('{"grammars"') else [{"lark_grammar": source}]
    unforced = any(_NOTHING_FORCED in (part.get("lark_grammar") or "") for part in inner)
    beginning = f"start: {before} @answer\n{rules}"
    outer = {"name": "outer", "lark_grammar": unforced_grammar(beginning) if unforced else beginning}
    return json.dumps({"grammars": [outer, {**inner[0], "name": "answer"}, *inner[1:]]})


def with_plain_digits(regex: str) -> str:
    """The regex with `\\d` for 0 to 9 alone, as JSON Schema's patterns (ECMA-262) have it.

    Other digits share their first bytes with emoji: a model that begins one could only go on with such a digit.
    """
    pieces, is_escaped, in_class = [], False, False
    for character in regex:
        if is_escaped:
            plain = {"d": "0-9" if in_class else "[0-9]", "D": "[^0-9]"}
            pieces.append(plain.get(character, "\\" + character))
            is_escaped = False
        elif character == "\\":
            is_escaped = True
        else:
            in_class = (in_class or character == "[") and character != "]"
            pieces.append(character)
    return "".join(pieces) + "\\" * is_escaped


def regex_literal(text: str) -> str:
    """A text within a regex of Lark."""
    return "".join(c if c.isalnum() or c in " _-" else f"\\x{{{ord(c):X}}}" for c in text)


def quoted(text: str) -> str:
    """A text as a literal of Lark; nothing for the empty text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def json_rule(schema: str, *, compact: bool = False) -> str:
    """A schema as part of a Lark rule."""
    options = {"x-guidance": _json_options(compact=compact)}
    parsed = json.loads(checked_schema(schema))
    return "%json " + json.dumps({**parsed, **options} if isinstance(parsed, dict) else options)


def checked_schema(schema: str) -> str:
    """The schema's text, if it is JSON of a bearable size."""
    _check_size(schema)
    _check_nesting(schema)
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"is not valid JSON: {error}") from error
    if parsed is True:
        return "{}"
    if not isinstance(parsed, dict):
        raise GrammarError("must be a JSON object")
    return schema


def _json_options(*, compact: bool) -> llguidance._lib.JsonCompileOptions:
    return {"whitespace_flexible": False} if compact else {"whitespace_pattern": JSON_BLANKS}


def _check_size(text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} are taken")


def _check_nesting(text: str) -> None:
    depth = 0
    for character in text:
        if character in "([{":
            depth += 1
            if depth > MAX_NESTING:
                raise GrammarError(f"nests brackets more than {MAX_NESTING} deep")
        elif character in ")]}":
            depth = max(0, depth - 1)
