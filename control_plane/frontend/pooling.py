"""Embed and Score: texts to ids, a request a text to the core, and what comes back to vectors and scores."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import (
    AdmissionError,
    CoreRequest,
    ModelFacts,
    PoolingFacts,
    PoolingParams,
    RequestFault,
    SamplingParams,
    SequenceOutput,
    TokenIdArray,
    VectorArray,
)
from control_plane.frontend.errors import RequestRefused, Violation, internal_error
from control_plane.frontend.prompt_limits import check_vocabulary
from control_plane.frontend.request_intake import RequestIntake
from control_plane.frontend.tokenizer import TextTokenizer

Answer = TypeVar("Answer")

MAX_INPUTS = 2048
# Of one call's requests, this many are in the core at a time: a long list neither fills the queue nor starves others.
_MAX_IN_FLIGHT = 128
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class _Job:
    """One vector that is wanted."""

    token_ids: TokenIdArray  # [num_tokens]
    second_text_start: int
    # The field of the request that it comes from.
    field: str


class _VectorSink:
    """Where one request's vector comes out."""

    def __init__(self) -> None:
        self.done: asyncio.Future[VectorArray] = asyncio.get_running_loop().create_future()
        self._vector: VectorArray | None = None

    def on_token(self, index: int, token_id: int) -> None:
        """Never: nothing is drawn."""

    def on_output(self, output: SequenceOutput) -> None:
        self._vector = output.vector

    def on_end(self, num_cached_tokens: int, fault: RequestFault | None) -> None:
        if self.done.done():
            return
        if fault is not None:
            self.done.set_exception(RequestRefused.from_fault(fault))
        elif self._vector is None:
            self.done.set_exception(internal_error())
        else:
            self.done.set_result(self._vector)


class PoolingService:
    """What `Embed` and `Score` do, on the way in that all requests share."""

    def __init__(self, intake: RequestIntake) -> None:
        self._intake = intake

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Raises `RequestRefused`."""
        return await self._counted(self._embed(request))

    async def score(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        """Raises `RequestRefused`."""
        return await self._counted(self._score(request))

    async def _counted(self, answer: Awaitable[Answer]) -> Answer:
        metrics = self._intake.metrics
        try:
            result = await answer
        except RequestRefused as error:
            metrics.count_end(error.code)
            raise
        except asyncio.CancelledError:
            metrics.count_end("CANCELLED")
            raise
        metrics.count_end("OK")
        return result

    async def _embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        facts = self._intake.facts()
        self._intake.builder.check_model(request.model, facts)
        pooling = self._check_pools(request.model, facts)
        if pooling.is_score:
            raise self._cannot(request.model, facts, "rates pairs of texts; it computes no embeddings")
        dimensions = request.dimensions if request.HasField("dimensions") else pooling.dimensions
        if not 1 <= dimensions <= pooling.dimensions:
            raise RequestRefused.invalid(
                Violation("dimensions", f"must be from 1 to {pooling.dimensions}, not {dimensions}")
            )
        _check_count("inputs", len(request.inputs))
        limit = _token_limit(request, facts)
        with self._intake.preparing():
            jobs = [
                await self._read(each, f"inputs[{index}]", limit, facts) for index, each in enumerate(request.inputs)
            ]
        vectors = await self._run(jobs, request.priority)
        return pb.EmbedResponse(
            model=self._intake.model.name(facts.model),
            embeddings=[pb.Embedding(values=_cut(vector, dimensions)) for vector in vectors],
            num_prompt_tokens=sum(len(job.token_ids) for job in jobs),
        )

    async def _score(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        facts = self._intake.facts()
        self._intake.builder.check_model(request.model, facts)
        pooling = self._check_pools(request.model, facts)
        _check_count("pairs", len(request.pairs))
        for index, pair in enumerate(request.pairs):
            for name in ("first", "second"):
                if not getattr(pair, name):
                    raise RequestRefused.invalid(Violation(f"pairs[{index}].{name}", "must not be empty"))
        limit = _token_limit(request, facts)
        rate = self._rate_pairs if pooling.is_score else self._compare
        scores, num_tokens = await rate(request, limit, facts)
        return pb.ScoreResponse(model=self._intake.model.name(facts.model), scores=scores, num_prompt_tokens=num_tokens)

    async def _rate_pairs(
        self, request: pb.ScoreRequest, limit: int | None, facts: ModelFacts
    ) -> tuple[list[float], int]:
        """By a model that reads both texts at once."""
        tokenizer = self._tokenizer("pairs")
        jobs = []
        with self._intake.preparing():
            for index, pair in enumerate(request.pairs):
                field = f"pairs[{index}]"
                self._intake.builder.check_num_chars(field, len(pair.first) + len(pair.second), facts)
                ids, start = await tokenizer.encode_pooled(pair.first, pair.second, max_tokens=limit)
                check_vocabulary(field, ids, facts.vocab_size)
                jobs.append(_Job(ids, start, field))
        vectors = await self._run(jobs, request.priority)
        return [float(vector[0]) for vector in vectors], sum(len(job.token_ids) for job in jobs)

    async def _compare(self, request: pb.ScoreRequest, limit: int | None, facts: ModelFacts) -> tuple[list[float], int]:
        """Cosines of embeddings; a text that comes several times is embedded once."""
        places: dict[str, int] = {}
        jobs: list[_Job] = []
        with self._intake.preparing():
            for index, pair in enumerate(request.pairs):
                for name in ("first", "second"):
                    text = getattr(pair, name)
                    if text not in places:
                        places[text] = len(jobs)
                        jobs.append(await self._read(pb.PooledInput(text=text), f"pairs[{index}].{name}", limit, facts))
        vectors = await self._run(jobs, request.priority)
        units = [vector / max(float(np.linalg.norm(vector)), 1e-12) for vector in vectors]
        scores = [float(units[places[pair.first]] @ units[places[pair.second]]) for pair in request.pairs]
        return scores, sum(len(job.token_ids) for job in jobs)

    async def _read(self, given: pb.PooledInput, field: str, limit: int | None, facts: ModelFacts) -> _Job:
        match given.WhichOneof("input"):
            case "text":
                tokenizer = self._tokenizer(f"{field}.text")
                self._intake.builder.check_num_chars(f"{field}.text", len(given.text), facts)
                ids, _ = await tokenizer.encode_pooled(given.text, max_tokens=limit)
                is_empty = not given.text
                field = f"{field}.text"
            case "token_ids":
                ids = np.array(given.token_ids.ids, dtype=np.uint32)[:limit]  # [num_tokens]
                is_empty = False
                field = f"{field}.token_ids.ids"
            case _:
                raise RequestRefused.invalid(Violation(field, "is missing: give text or token_ids"))
        if is_empty or not len(ids):
            raise RequestRefused.invalid(Violation(field, "must not be empty"))
        check_vocabulary(field, ids, facts.vocab_size)
        return _Job(ids, 0, field)

    async def _run(self, jobs: Sequence[_Job], priority: int) -> list[VectorArray]:
        """The jobs' vectors, in their order; when one fails or the caller leaves, none runs on."""
        engine = self._intake.engine
        sinks: list[_VectorSink] = []
        open_ids: dict[asyncio.Future[VectorArray], str] = {}
        try:
            for job in jobs:
                if len(open_ids) >= _MAX_IN_FLIGHT:
                    done, _ = await asyncio.wait(open_ids, return_when=asyncio.FIRST_COMPLETED)
                    for future in done:
                        del open_ids[future]
                        future.result()
                sink = _VectorSink()
                core = CoreRequest(
                    request_id=uuid.uuid4().hex,
                    prompt_ids=job.token_ids,
                    sampling=_GREEDY,
                    max_tokens=1,
                    priority=priority,
                    pooling=PoolingParams(job.second_text_start),
                )
                try:
                    engine.submit(core, sink)
                except AdmissionError as error:
                    if error.field is not None:
                        error.field = job.field
                    raise RequestRefused.from_admission(error) from error
                sinks.append(sink)
                open_ids[sink.done] = core.request_id
            vectors = [await sink.done for sink in sinks]
            open_ids.clear()
            return vectors
        finally:
            for future, request_id in open_ids.items():
                if not future.done():
                    engine.cancel(request_id)
                elif not future.cancelled():
                    future.exception()  # seen: the first failure was told already

    def _tokenizer(self, field: str) -> TextTokenizer:
        tokenizer = self._intake.model.tokenizer
        if tokenizer is None:
            raise RequestRefused.invalid(Violation(field, "this server has no tokenizer: give token ids"))
        return tokenizer

    def _check_pools(self, name: str, facts: ModelFacts) -> PoolingFacts:
        if facts.pooling is None:
            raise self._cannot(name, facts, "generates text; it computes neither embeddings nor scores")
        return facts.pooling

    def _cannot(self, name: str, facts: ModelFacts, what: str) -> RequestRefused:
        shown = name or self._intake.model.name(facts.model)
        return RequestRefused.invalid(Violation("model", f"{shown!r} {what}"), reason="model_cannot_embed")


def _check_count(field: str, count: int) -> None:
    if not 1 <= count <= MAX_INPUTS:
        raise RequestRefused.invalid(Violation(field, f"must be 1 to {MAX_INPUTS}, not {count}"))


def _token_limit(request: pb.EmbedRequest | pb.ScoreRequest, facts: ModelFacts) -> int | None:
    """Tokens that an input is cut to; None: it is not."""
    if not request.HasField("truncate_prompt_tokens"):
        return None
    wanted = request.truncate_prompt_tokens
    if wanted == -1:
        return facts.max_model_len
    if not 1 <= wanted <= facts.max_model_len:
        raise RequestRefused.invalid(
            Violation("truncate_prompt_tokens", f"must be -1 or from 1 to {facts.max_model_len}, not {wanted}")
        )
    return wanted


def _cut(vector: VectorArray, dimensions: int) -> VectorArray:
    """The first numbers, of length 1 again where the whole vector is."""
    if dimensions == len(vector):
        return vector
    cut = vector[:dimensions]
    is_unit = abs(float(np.linalg.norm(vector)) - 1.0) < 1e-2
    return cut / max(float(np.linalg.norm(cut)), 1e-12) if is_unit else cut
