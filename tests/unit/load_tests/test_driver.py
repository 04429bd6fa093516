"""The driver against a small OpenAI-like server of this test: when it sends, how many at once, what it gives up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import StringIO

import pytest
from aiohttp import web
from rich.console import Console

from load_tests.driver import DriverProcesses, InProcessDriver, PhaseResult
from load_tests.phase_bar import phase_bar
from load_tests.records import phase_numbers
from load_tests.target import TargetError, TargetSpec
from load_tests.workload import Phase, RequestSpec

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class TokenServer:
    """Streams `max_tokens` chunks, `pause_s` apart, and remembers how many streams were open at once.

    No stream has its first chunk before `waits_for` of them were open at a time.
    """

    def __init__(self, pause_s: float = 0.0, waits_for: int = 0) -> None:
        self.pause_s = pause_s
        self.waits_for = waits_for
        self.bodies: list[dict[str, object]] = []
        self.most_open = 0
        self._num_open = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if body["max_tokens"] == 13:
            return web.json_response({"error": {"message": "13 brings bad luck"}}, status=400)
        self._num_open += 1
        self.most_open = max(self.most_open, self._num_open)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        while self.most_open < self.waits_for:
            await asyncio.sleep(0.01)
        for _ in range(body["max_tokens"]):
            await asyncio.sleep(self.pause_s)
            await response.write(b'data: {"choices": [{"text": "x", "finish_reason": null}]}\n\n')
        self._num_open -= 1
        if body["max_tokens"] == 7:
            return response  # no [DONE]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "first", "max_model_len": 512}, {"id": "second"}]})


@asynccontextmanager
async def serving(server: TokenServer) -> AsyncIterator[TargetSpec]:
    application = web.Application()
    application.add_routes([web.post("/v1/completions", server.complete), web.get("/v1/models", server.models)])
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        yield TargetSpec("rest", f"http://127.0.0.1:{port}", model="second", temperature=0.5)
    finally:
        await runner.cleanup()


def phase(*sizes: int, at_s: float = 0.0, max_concurrency: int | None = None) -> Phase:
    requests = [RequestSpec([1, 2, 3], size, at_s * index) for index, size in enumerate(sizes)]
    return Phase("test", requests, max_concurrency)


async def run(server: TokenServer, work: Phase, timeout_s: float = 120.0) -> PhaseResult:
    async with serving(server) as spec, InProcessDriver(spec) as driver:
        return await driver.run(work, timeout_s)


async def test_every_request_is_sent_as_asked_and_read_to_its_end() -> None:
    server = TokenServer()
    result = await run(server, phase(1, 5, 9))
    assert [record.num_tokens for record in result.records] == [1, 5, 9]
    assert [record.num_prompt_tokens for record in result.records] == [3, 3, 3]
    assert all(record.is_ok and record.arrivals_s[0] >= record.sent_s for record in result.records)
    assert result.driver_cpu_s > 0
    body = next(body for body in server.bodies if body["max_tokens"] == 5)
    assert body["prompt"] == [1, 2, 3]
    assert (body["model"], body["temperature"], body["ignore_eos"], body["stream"]) == ("second", 0.5, True, True)


async def test_a_closed_loop_keeps_its_concurrency() -> None:
    server = TokenServer(pause_s=0.01, waits_for=3)
    await run(server, phase(*[2] * 12, max_concurrency=3))
    assert server.most_open == 3


async def test_without_a_limit_all_are_open_at_once() -> None:
    server = TokenServer(waits_for=12)
    await run(server, phase(*[2] * 12))
    assert server.most_open == 12


async def test_requests_are_not_sent_before_their_time() -> None:
    result = await run(TokenServer(), phase(1, 1, 1, at_s=0.1))
    first, second, third = (record.sent_s for record in result.records)
    assert second - first >= 0.099 - result.records[0].late_s
    assert third - first >= 0.199 - result.records[0].late_s


async def test_a_refused_request_says_why_and_the_others_go_on() -> None:
    result = await run(TokenServer(), phase(2, 13, 3))
    assert [record.is_ok for record in result.records] == [True, False, True]
    assert "13 brings bad luck" in (result.records[1].error or "")
    assert (result.records[1].error or "").startswith("400: ")


async def test_a_stream_without_its_end_is_an_error() -> None:
    result = await run(TokenServer(), phase(7))
    assert result.records[0].error == "the stream ended without [DONE]"
    assert result.records[0].num_tokens == 7


async def test_what_is_not_done_in_time_is_given_up() -> None:
    async with serving(TokenServer(pause_s=0.05)) as spec, InProcessDriver(spec) as driver:
        await driver.run(phase(1), 120.0)  # what is slow the first time is done
        result = await driver.run(phase(1, 10_000), 6.0)
    assert [record.is_ok for record in result.records] == [True, False]
    assert result.records[1].error == "not finished within --timeout-s 6"
    assert phase_numbers(result.records)["num_failed"] == 1


async def test_the_server_says_what_it_serves() -> None:
    async with serving(TokenServer()) as spec, InProcessDriver(spec) as driver:
        facts = await driver.facts()
        assert (facts.model, facts.max_model_len) == ("second", None)


async def test_nobody_there() -> None:
    async with InProcessDriver(TargetSpec("rest", "http://127.0.0.1:9")) as driver:
        with pytest.raises(TargetError, match=r"no HTTP server answers at http://127\.0\.0\.1:9/v1/models"):
            await driver.facts()


async def test_a_terminal_shows_how_many_have_ended() -> None:
    server = TokenServer(pause_s=0.05)
    shown = StringIO()
    work = phase(1, 13, 500)
    async with serving(server) as spec, InProcessDriver(spec) as driver:
        async with phase_bar(work, driver, Console(file=shown, force_terminal=True, width=100), interval_s=0.01):
            running = asyncio.create_task(driver.run(work, 120.0))
            async with asyncio.timeout(60):
                while "2/3" not in shown.getvalue():
                    await asyncio.sleep(0.01)
            assert not running.done()
            server.pause_s = 0
            await running
        assert driver.num_ended == 3
        nobody_looks = StringIO()
        async with phase_bar(work, driver, Console(file=nobody_looks)):
            pass
    assert nobody_looks.getvalue() == ""


async def test_processes_share_the_work_and_return_it_in_order() -> None:
    server = TokenServer(pause_s=0.01)
    async with serving(server) as spec, DriverProcesses(spec, 2) as driver:
        assert (await driver.facts()).model == "second"
        result = await driver.run(phase(1, 13, 3, 4, 5, max_concurrency=4), 20.0)
        again = await driver.run(phase(6), 20.0)
    assert [record.num_tokens for record in result.records] == [1, 0, 3, 4, 5]
    assert [record.is_ok for record in result.records] == [True, False, True, True, True]
    assert result.num_processes == 2
    assert result.driver_cpu_s > 0
    # Their clocks are one clock.
    assert max(record.sent_s for record in result.records) < min(record.sent_s for record in again.records)


async def test_a_process_that_cannot_connect_says_so() -> None:
    with pytest.raises(TargetError, match="no HTTP server answers"):
        async with DriverProcesses(TargetSpec("rest", "http://127.0.0.1:9"), 2) as driver:
            await driver.facts()
