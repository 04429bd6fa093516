"""schemathesis on our own OpenAPI page: whatever a body looks like, the answer is no 5xx and has an error's shape."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.system.conftest import LIMIT_S, Stack

# Bodies that make the server work long are cut short by this; what is tested is what comes before.
TIMEOUT_S = 60


def operations(stack: Stack) -> list[schemathesis.schemas.APIOperation]:
    page = httpx.get(f"{stack.url}/openapi.json", timeout=LIMIT_S).json()
    schema = schemathesis.openapi.from_dict(page)
    found = [result.ok() for result in schema.get_all_operations()]
    assert len(found) > 25
    # The live view never ends.
    return [operation for operation in found if operation.path != "/console/steps"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_request_makes_the_server_fail(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url, timeout=TIMEOUT_S) as client:
        for operation in operations(stack):
            check(stack, operation)
            assert client.get("/health").status_code == 200
    stack.wait_idle()


def check(stack: Stack, operation: schemathesis.schemas.APIOperation) -> None:
    """Whatever is sent, the answer has a status that the page names, and is no failure of the server's."""
    strategy = operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    # A path parameter that is empty, or has a slash in it, is another route.
    documented = {*operation.definition.raw["responses"], *(("404", "405") if "{" in operation.path else ())}

    @settings(
        max_examples=25,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=strategy)
    def send(case: schemathesis.Case) -> None:
        answer = case.call(base_url=stack.url, timeout=TIMEOUT_S)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        assert str(answer.status_code) in documented, (case.as_curl_command(), answer.text)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"], case.as_curl_command()

    send()


def test_bytes_that_are_no_json_are_refused(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url, headers={"content-type": "application/json"}, timeout=LIMIT_S) as client:

        @given(body=st.binary(max_size=300))
        @settings(max_examples=30, deadline=None)
        def send(body: bytes) -> None:
            for path in ("/v1/messages", "/v1/responses", "/v1/batches", "/tokenize"):
                answer = client.post(path, content=body)
                assert answer.status_code == 400 and answer.json()["error"]["message"]

        send()
