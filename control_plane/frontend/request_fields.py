"""Checks of a request's fields: every violation is collected, each under the field's path in GenerateRequest."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import SamplingParams
from control_plane.frontend.errors import RequestRefused, Violation
from control_plane.frontend.stop import StopStrings

MAX_VIOLATIONS = 16
MAX_LOGPROBS = 20
MAX_ALLOWED_TOKEN_IDS = 16384
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_CACHE_SALT_CHARS = 256
_UINT64_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class StopFields:
    # None: as many as the context leaves.
    max_tokens: int | None
    min_tokens: int
    strings: StopStrings | None
    include_stop_string: bool
    # End-of-sequence tokens, unless ignored, and the request's own.
    token_ids: frozenset[int]
    # The request's own alone: these are named to the client when they stop a sequence.
    extra_token_ids: frozenset[int]


class FieldChecks:
    """Collects violations; `raise_if_any` refuses the request with all of them at once."""

    def __init__(self, vocab_size: int, max_num_logprobs: int) -> None:
        self.vocab_size = vocab_size
        self.max_num_logprobs = min(MAX_LOGPROBS, max_num_logprobs)
        self.violations: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        # A person mends a few at a time, and an answer must not be longer than its request.
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(Violation(field, description))

    def raise_if_any(self) -> None:
        if self.violations:
            raise RequestRefused.invalid(*self.violations)

    def number(self, field: str, value: float, low: float, high: float = math.inf, *, above_low: bool = False) -> None:
        """`low <= value <= high`, or `low < value` with `above_low`; NaN and infinity are in no range."""
        inside = (low < value if above_low else low <= value) and value <= high and math.isfinite(value)
        if inside:
            return
        if high == math.inf:
            wanted = f"{'above' if above_low else 'at least'} {low:g} and finite"
        else:
            wanted = f"{'above' if above_low else 'from'} {low:g} {'and up to' if above_low else 'to'} {high:g}"
        self.add(field, f"must be {wanted}, not {value:g}")

    def token_id(self, field: str, token_id: int) -> None:
        if token_id >= self.vocab_size:
            self.add(field, f"token id {token_id} is out of vocabulary: ids are below {self.vocab_size}")

    def sampling(
        self,
        params: pb.SamplingParams,
        defaults: Mapping[str, float],
        num_logprobs: int | None,
        num_prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The request's own values, then the model's defaults, then neutral ones."""

        def value(name: str, neutral: float) -> float:
            return float(getattr(params, name)) if params.HasField(name) else float(defaults.get(name, neutral))

        temperature = value("temperature", 1.0)
        top_p = value("top_p", 1.0)
        top_k = int(value("top_k", 0))
        min_p = value("min_p", 0.0)
        repetition_penalty = value("repetition_penalty", 1.0)
        self.number("sampling.temperature", temperature, 0, 2)
        self.number("sampling.top_p", top_p, 0, 1, above_low=True)
        self.number("sampling.min_p", min_p, 0, 1)
        self.number("sampling.repetition_penalty", repetition_penalty, 0, above_low=True)
        self.number("sampling.presence_penalty", params.presence_penalty, -2, 2)
        self.number("sampling.frequency_penalty", params.frequency_penalty, -2, 2)
        for field, count in (("logprobs", num_logprobs), ("prompt_logprobs", num_prompt_logprobs)):
            if count is not None and count > self.max_num_logprobs:
                self.add(f"output.{field}", f"must be from 0 to {self.max_num_logprobs}, not {count}")
        return SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k if top_k < self.vocab_size else 0,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=params.seed & _UINT64_MASK if params.HasField("seed") else random.getrandbits(64),
            num_logprobs=num_logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
            logit_bias=self._logit_bias(params),
            allowed_token_ids=self._allowed_token_ids(params),
        )

    def _logit_bias(self, params: pb.SamplingParams) -> dict[int, float]:
        field = "sampling.logit_bias"
        if len(params.logit_bias) > MAX_LOGIT_BIAS:
            self.add(field, f"has {len(params.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are taken")
            return {}
        bias = dict(sorted(params.logit_bias.items()))
        for token_id, added in bias.items():
            self.token_id(f"{field}[{token_id}]", token_id)
            self.number(f"{field}[{token_id}]", added, -100, 100)
        return bias

    def _allowed_token_ids(self, params: pb.SamplingParams) -> tuple[int, ...]:
        if len(params.allowed_token_ids) > MAX_ALLOWED_TOKEN_IDS:
            self.add(
                "sampling.allowed_token_ids",
                f"has {len(params.allowed_token_ids)} ids; at most {MAX_ALLOWED_TOKEN_IDS} are taken",
            )
            return ()
        allowed = tuple(dict.fromkeys(params.allowed_token_ids))
        largest = max(allowed, default=0)
        if largest >= self.vocab_size:
            index = list(params.allowed_token_ids).index(largest)
            self.token_id(f"sampling.allowed_token_ids[{index}]", largest)
        return allowed

    def stop(
        self,
        stop: pb.StopConditions,
        eos_token_ids: frozenset[int],
        *,
        has_tokenizer: bool,
        may_be_nothing: bool = False,
        is_held: bool = False,
    ) -> StopFields:
        """`may_be_nothing`: max_tokens 0 is allowed. `is_held`: a grammar says where the end may be."""
        max_tokens = stop.max_tokens if stop.HasField("max_tokens") else None
        if max_tokens == 0 and not may_be_nothing:
            self.add("stop.max_tokens", "must be at least 1")
        elif max_tokens is not None and stop.min_tokens > max_tokens:
            self.add("stop.min_tokens", f"is {stop.min_tokens}, more than stop.max_tokens, which is {max_tokens}")
        if len(stop.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            self.add(
                "stop.stop_token_ids", f"has {len(stop.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} are taken"
            )
        else:
            for index, token_id in enumerate(stop.stop_token_ids):
                self.token_id(f"stop.stop_token_ids[{index}]", token_id)
        extra = frozenset(stop.stop_token_ids)
        # An end-of-sequence id beyond the worker's vocabulary cannot be drawn.
        known_eos = frozenset(token_id for token_id in eos_token_ids if token_id < self.vocab_size)
        return StopFields(
            max_tokens=max_tokens,
            min_tokens=stop.min_tokens,
            strings=self._stop_strings(stop, has_tokenizer=has_tokenizer),
            include_stop_string=stop.include_stop_string,
            token_ids=extra if stop.ignore_eos and not is_held else extra | known_eos,
            extra_token_ids=extra,
        )

    def _stop_strings(self, stop: pb.StopConditions, *, has_tokenizer: bool) -> StopStrings | None:
        if not stop.stop:
            return None
        before = len(self.violations)
        if not has_tokenizer:
            self.add("stop.stop", "this model is served without a tokenizer; use stop_token_ids")
        if len(stop.stop) > MAX_STOP_STRINGS:
            self.add("stop.stop", f"has {len(stop.stop)} strings; at most {MAX_STOP_STRINGS} are taken")
        for index, string in enumerate(stop.stop):
            if not string:
                self.add(f"stop.stop[{index}]", "must not be empty")
            elif len(string) > MAX_STOP_STRING_CHARS:
                self.add(
                    f"stop.stop[{index}]", f"has {len(string)} characters; at most {MAX_STOP_STRING_CHARS} are taken"
                )
        return StopStrings(stop.stop) if len(self.violations) == before else None
