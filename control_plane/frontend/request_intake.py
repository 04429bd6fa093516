"""From a request message to a mailbox that the core fills: the way in that Generate and Session share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from stepwire.v1 import inference_pb2 as pb

from control_plane.core.request import AdmissionError, EngineClient, ModelFacts
from control_plane.frontend.detokenizer import Detokenization
from control_plane.frontend.errors import RequestRefused, internal_error
from control_plane.frontend.metrics import FrontendMetrics
from control_plane.frontend.output_stream import RequestOutput
from control_plane.frontend.packed_texts import PackedTexts
from control_plane.frontend.request_builder import BuiltRequest, RequestBuilder, from_admission
from control_plane.frontend.served_model import ServedModel

log = structlog.get_logger(__name__)


class RequestIntake:
    """`max_preparing` bounds the requests whose text is being tokenized: the core's queue does not know of them yet."""

    def __init__(
        self,
        engine: EngineClient,
        model: ServedModel,
        metrics: FrontendMetrics,
        *,
        max_n: int = 128,
        max_preparing: int = 1024,
    ) -> None:
        self.engine = engine
        self.model = model
        self.metrics = metrics
        self.builder = RequestBuilder(model, max_n=max_n)
        self._max_preparing = max_preparing
        self._num_preparing = 0

    def facts(self) -> ModelFacts:
        """Raises `RequestRefused` (UNAVAILABLE) while no worker is known."""
        try:
            return self.engine.facts
        except AdmissionError as error:
            raise RequestRefused.from_admission(error) from error

    async def submit(
        self,
        request: pb.GenerateRequest,
        on_ready: Callable[[RequestOutput], None],
        *,
        tag: int = 0,
        packed: PackedTexts | None = None,
    ) -> RequestOutput:
        """Check, tokenize and queue a request; its outputs go to the mailbox that is returned.

        Raises:
            RequestRefused: the request was not accepted. Counted in the metrics here.
        """
        arrival_s = time.monotonic()
        try:
            return await self._submit(request, on_ready, arrival_s, tag, packed)
        except RequestRefused as error:
            self.metrics.count_end(error.code)
            raise
        except Exception as error:
            log.exception("a request could not be prepared", client_request_id=request.request_id)
            self.metrics.count_end("INTERNAL")
            raise internal_error() from error

    def _detokenization(self, built: BuiltRequest) -> Detokenization | None:
        """A parser has to see marks that are special tokens."""
        if built.output.start_parser is not None and self.model.marked_detokenization is not None:
            return self.model.marked_detokenization
        return None if self.model.tokenizer is None else self.model.tokenizer.detokenization

    async def _submit(
        self,
        request: pb.GenerateRequest,
        on_ready: Callable[[RequestOutput], None],
        arrival_s: float,
        tag: int,
        packed: PackedTexts | None,
    ) -> RequestOutput:
        facts = self.facts()
        with self.preparing():
            built = await self.builder.build(request, facts)
        output = RequestOutput(
            built,
            self.engine,
            self._detokenization(built),
            self.metrics,
            on_ready,
            arrival_s=arrival_s,
            tag=tag,
            packed=packed,
        )
        try:
            self.engine.submit(built.core, output)
        except AdmissionError as error:
            raise from_admission(error, request) from error
        output.on_accepted()
        log.debug("request accepted", request_id=built.core.request_id, client_request_id=request.request_id)
        return output

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """While a request's text is being tokenized. Raises `RequestRefused` where too many are."""
        if self._num_preparing >= self._max_preparing:
            raise RequestRefused(
                "RESOURCE_EXHAUSTED",
                "queue_full",
                f"the queue is full: {self._num_preparing} requests are being tokenized, the limit is "
                f"{self._max_preparing}; try again in a second",
                retry_after_s=1.0,
                retryable=True,
            )
        self._num_preparing += 1
        try:
            yield
        finally:
            self._num_preparing -= 1
