"""The web console in a real browser, against the real stack: chat, probabilities, the key, the live view."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.system.browser import CHROMIUM, Page
from tests.system.conftest import LIMIT_S, ROOT, Stack

KEY = "console-key"
# Kept by CI; ignored by git.
ARTIFACTS = ROOT / ".stepwire" / "artifacts"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def watched(tiny_model: Path) -> Iterator[Stack]:
    """A stack with a key, and with an AdminService behind another one."""
    stack = Stack(tiny_model, worker_flags=["--sim-step-ms", "5"], api_key=KEY, num_workers=2)
    admin = f"unix:{stack.directory}/admin.sock"
    stack.control_plane_flags = ["--api-key", KEY, "--admin-listen", admin, "--admin-api-key", "admin-key"]
    stack.gateway_flags = ["--control-plane-admin", admin, "--control-plane-admin-api-key", "admin-key"]
    with stack:
        yield stack


def test_the_page_is_closed_to_everything_but_itself(watched: Stack) -> None:
    page = httpx.get(watched.url, timeout=LIMIT_S)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    # Nothing is fetched from anywhere else, and nothing of the server is told without the key.
    assert "https://" not in page.text and "//" not in page.text.replace("http://www.w3.org", "").split("<script>")[0]
    assert "tiny" not in page.text
    assert httpx.get(f"{watched.url}/console/steps", timeout=LIMIT_S).status_code == 401


def test_a_gateway_without_an_admin_service_says_so(stack: Stack) -> None:
    answer = httpx.get(f"{stack.url}/console/steps", timeout=LIMIT_S)
    assert answer.status_code == 404
    assert "--control-plane-admin" in answer.json()["error"]["message"]


@needs_chromium
async def test_chat_probabilities_and_live_view(watched: Stack) -> None:
    async with Page() as page:
        await page.open(watched.url)
        await page.wait_for("document.getElementById('key-dialog').open")
        await page.evaluate(
            f"document.getElementById('key').value = '{KEY}'; document.getElementById('key-form').requestSubmit()"
        )
        await page.wait_for("document.getElementById('models').value === 'tiny'")
        # Asking without a key was answered 401: the browser notes that, and it is no problem of the page.
        assert all("401" in problem for problem in page.problems), page.problems
        page.problems.clear()

        await page.evaluate(
            "document.getElementById('max_tokens').value = 500;"
            "document.getElementById('seed').value = 7;"
            "document.getElementById('prompt').value = 'What is the capital of France?';"
            "document.getElementById('ask').requestSubmit()"
        )
        await page.wait_for("document.querySelectorAll('.turn.assistant .token').length > 10")
        # The number itself may be gone before a busy machine looks; the chart keeps it.
        await page.wait_for(r"/running sequences\s+max [1-9]/.test(document.body.innerText)")
        await page.wait_for("document.querySelector('.turn.assistant .meta').textContent.includes('500 tokens')")
        # Token probabilities appear under the pointer.
        await page.evaluate(
            "document.querySelector('.turn.assistant .token')"
            ".dispatchEvent(new MouseEvent('mousemove', {bubbles: true, clientX: 80, clientY: 80}))"
        )
        tip = await page.evaluate("document.getElementById('tip').textContent")
        assert tip.count("%") >= 5 and ">" in tip
        # What the steps held has arrived, over the gateway, from the control plane.
        await page.wait_for("document.querySelectorAll('#steps tr').length === 6")
        await page.wait_for("document.getElementById('v-ttft').textContent.includes('ms')")
        await page.wait_for("document.getElementById('v-itl').textContent.includes('ms')")
        # Each group has its line, and all that has been generated was so in one of them.
        await page.wait_for(
            "[...document.querySelectorAll('#groups tr')].map((row) => row.cells[1].textContent) == 'ready,ready'"
        )
        assert (
            await page.evaluate(
                "[...document.querySelectorAll('#groups tr')].map((row) => row.cells[0].textContent).join()"
            )
            == "0,1"
        )
        assert await page.evaluate("document.getElementById('groups-table').hidden") is False
        await page.screenshot(ARTIFACTS / "console.png")
        assert (ARTIFACTS / "console.png").stat().st_size > 20_000
        assert page.problems == [], page.problems

        # A second question stops when it is told to.
        await page.evaluate(
            "document.getElementById('max_tokens').value = 3000;"
            "document.getElementById('prompt').value = 'And of Spain?';"
            "document.getElementById('ask').requestSubmit()"
        )
        await page.wait_for("document.querySelectorAll('.turn.assistant').length === 2")
        await page.wait_for("document.querySelectorAll('.turn.assistant')[1].querySelector('.token') !== null")
        await page.evaluate("document.getElementById('stop').click()")
        await page.wait_for("document.querySelectorAll('.turn.assistant .meta')[1].textContent.includes('stopped')")
        # The last answer can be copied and asked for again; only the last one.
        assert await page.evaluate("document.querySelectorAll('.actions .again').length") == 1
        await page.evaluate("document.getElementById('max_tokens').value = 5; document.querySelector('.again').click()")
        await page.wait_for("document.querySelectorAll('.turn.assistant .meta')[1].textContent.includes('5 tokens')")
        asked = await page.evaluate("history.map((each) => each.role).join()")
        assert asked == "user,assistant,user,assistant"
        # Told to forget everything while an answer is coming, it does.
        await page.evaluate(
            "document.getElementById('max_tokens').value = 3000;"
            "document.getElementById('prompt').value = 'And of Italy?';"
            "document.getElementById('ask').requestSubmit(); document.getElementById('clear').click()"
        )
        await page.wait_for("running === null")
        assert await page.evaluate("history.length + document.querySelectorAll('.turn').length") == 0
    watched.wait_idle()


HOLD_A_REFUSAL = """
const asked = window.fetch;
window.fetch = async (url, options) => {
  const response = await asked(url, options);
  if (url === "/console/steps" && response.status === 401) await new Promise((resume) => { window.release = resume; });
  return response;
};
"""


@needs_chromium
async def test_a_refusal_that_comes_after_the_key_does_not_ask_for_it_again(watched: Stack) -> None:
    async with Page() as page:
        await page.command("Page.addScriptToEvaluateOnNewDocument", source=HOLD_A_REFUSAL)
        await page.open(watched.url)
        await page.wait_for("document.getElementById('key-dialog').open && window.release !== undefined")
        await page.evaluate(
            f"document.getElementById('key').value = '{KEY}'; document.getElementById('key-form').requestSubmit()"
        )
        await page.wait_for("document.getElementById('models').value === 'tiny'")
        await page.evaluate("window.release()")
        await page.wait_for("document.getElementById('v-running').textContent === '0'")
        assert await page.evaluate("document.getElementById('key-dialog').open") is False


MARKDOWN = """# A <b>title</b>
Some **bold** and `code` <img src=x onerror="window.broken=1"> [link](javascript:alert(1))

```html
<script>window.broken = 1</script>
```
1. one
2. two
- <svg onload="window.broken=1">"""


@needs_chromium
async def test_what_a_model_writes_stays_text_and_a_narrow_page_is_whole(stack: Stack) -> None:
    async with Page() as page:
        await page.open(stack.url)
        await page.wait_for("document.getElementById('models').value === 'tiny'")
        written = await page.evaluate(
            f"const made = element('div', 'text'); renderMarkdown(made, {json.dumps(MARKDOWN)});"
            "document.getElementById('log').append(made);"
            "[[...made.querySelectorAll('*')].map((each) => each.localName).join(), made.textContent, window.broken]"
        )
        names, text, *broken = written
        assert names == "h3,p,strong,code,pre,code,ol,li,li,ul,li" and broken in ([None], [])
        assert '<img src=x onerror="window.broken=1">' in text and "<script>window.broken = 1</script>" in text
        # A question that fails says why, and can be asked again.
        await page.evaluate(
            "document.getElementById('temperature').value = 9; document.getElementById('logprobs').checked = false;"
            "document.getElementById('prompt').value = 'Hello'; document.getElementById('ask').requestSubmit()"
        )
        await page.wait_for("(document.querySelector('.turn .error') || {}).textContent?.includes('temperature')")
        await page.evaluate(
            "document.getElementById('temperature').value = ''; document.getElementById('max_tokens').value = 5;"
            "document.querySelector('.again').click()"
        )
        await page.wait_for("document.querySelector('.copy') !== null")
        assert await page.evaluate("document.querySelector('.turn.assistant .markdown') !== null")
        await page.command(
            "Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True
        )
        await page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert await page.evaluate("document.documentElement.scrollWidth") <= 390
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 17, 22)"
        await page.screenshot(ARTIFACTS / "console-narrow.png")
        # Everything that can be used has a name.
        unnamed = await page.evaluate(
            "[...document.querySelectorAll('button, input, select, textarea')].filter((each) =>"
            " !(each.textContent.trim() || each.getAttribute('aria-label') || each.closest('label'))).length"
        )
        assert unnamed == 0
