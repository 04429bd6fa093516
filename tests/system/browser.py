"""Chromium without a window, driven over its DevTools protocol: as much of it as the console's test needs."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any, Self

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# On a machine that may be busy; limits only end a test that has failed.
_START_LIMIT_S = _LIMIT_S = 120.0


class Page:
    """One tab. Errors and messages of the page's console are collected in `problems`."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()

    async def __aenter__(self) -> Self:
        assert CHROMIUM is not None
        self._profile = tempfile.mkdtemp(prefix="stepwire-chromium-")
        self._process = await asyncio.create_subprocess_exec(
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--no-proxy-server",
            "--window-size=1360,860",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._profile}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            port = await self._debugging_port()
            self._session = aiohttp.ClientSession()
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as response:
                tabs = await response.json()
            url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            self._socket = await self._session.ws_connect(url, max_msg_size=1 << 26)
            self._reader = asyncio.create_task(self._read())
            for domain in ("Page", "Runtime", "Log"):
                await self.command(f"{domain}.enable")
        except BaseException:
            self._process.kill()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._reader.cancel()
        await self._socket.close()
        await self._session.close()
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), 10)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    async def _debugging_port(self) -> int:
        file = Path(self._profile) / "DevToolsActivePort"
        async with asyncio.timeout(_START_LIMIT_S):
            while not file.exists() or not file.read_text().strip():
                assert self._process.returncode is None, f"chromium ended with {self._process.returncode}"
                await asyncio.sleep(0.05)
        return int(file.read_text().split()[0])

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        return await asyncio.wait_for(answer, _LIMIT_S)

    async def _read(self) -> None:
        async for message in self._socket:
            event = message.json()
            if "id" in event:
                answer = self._answers.pop(event["id"])
                if "error" in event:
                    answer.set_exception(RuntimeError(event["error"]["message"]))
                else:
                    answer.set_result(event["result"])
            elif event["method"] == "Page.loadEventFired":
                self._loaded.set()
            elif event["method"] == "Runtime.exceptionThrown":
                self.problems.append(str(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                self.problems.append(event["params"]["entry"]["text"])

    async def open(self, url: str) -> None:
        self._loaded.clear()
        await self.command("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), _LIMIT_S)

    async def evaluate(self, expression: str) -> Any:
        result = await self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def wait_for(self, expression: str, limit_s: float = _LIMIT_S) -> Any:
        """Until the expression is true in the page; the limit only ends a test that has failed."""
        value = None
        try:
            async with asyncio.timeout(limit_s):
                while not (value := await self.evaluate(expression)):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"not within {limit_s} s: {expression}\n{text}\n{self.problems}") from None
        return value

    async def screenshot(self, path: Path) -> None:
        picture = await self.command("Page.captureScreenshot", format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(picture["data"]))
