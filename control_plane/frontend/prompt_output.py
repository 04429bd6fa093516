"""What a request hears of its prompt: known at once, but for its logprobs, which come while it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import PromptLogprobs
from control_plane.frontend.detokenizer import Detokenization
from control_plane.frontend.request_builder import BuiltRequest


class PromptAssembly:
    """Takes the parts of a prompt's logprobs in, and gives the one message that tells of the prompt."""

    def __init__(self, built: BuiltRequest, detokenization: Detokenization | None) -> None:
        self._output = built.output.prompt
        self._prompt_ids = built.core.prompt_ids
        self._has_logprobs = built.core.sampling.num_prompt_logprobs is not None
        self._token_bytes = no_bytes if detokenization is None else detokenization.token_bytes
        self._parts: list[PromptLogprobs] = []
        self._num_left = len(built.core.prompt_ids) - 1 if self._has_logprobs else 0

    @property
    def is_complete(self) -> bool:
        return self._num_left == 0

    def add(self, part: PromptLogprobs) -> None:
        self._parts.append(part)
        self._num_left -= len(part.logprobs)

    def write(self, response: pb.GenerateResponse) -> None:
        if self._output is not None:
            response.prompt.CopyFrom(self._output)
        response.prompt.SetInParent()
        if not self._has_logprobs:
            return
        entries, token_bytes = response.prompt.logprobs, self._token_bytes
        first = int(self._prompt_ids[0])
        entries.add(token_id=first, logprob=math.nan, token=token_bytes(first))
        for part in self._parts:
            token_ids = self._prompt_ids[part.start_position :].tolist()
            logprobs, ranks = part.logprobs.tolist(), part.ranks.tolist()
            top_ids, top_logprobs = part.top_token_ids.tolist(), part.top_logprobs.tolist()
            for index, logprob in enumerate(logprobs):
                token_id = token_ids[index]
                entry = entries.add(token_id=token_id, logprob=logprob, token=token_bytes(token_id), rank=ranks[index])
                add_top(entry, top_ids[index], top_logprobs[index], token_bytes)
        self._parts.clear()


def add_top(
    entry: pb.TokenLogprob,
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    token_bytes: Callable[[int], bytes],
) -> None:
    """The alternatives of one token, most likely first."""
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        entry.top.add(token_id=token_id, logprob=logprob, token=token_bytes(token_id))


def no_bytes(token_id: int) -> bytes:
    """Of a token where there is no tokenizer."""
    return b""
