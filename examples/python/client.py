"""stepwire's gRPC API from Python: python client.py HOST:PORT COMMAND [TEXT]; README.md has the commands.

STEPWIRE_API_KEY holds the key, if one is set.
"""

from __future__ import annotations

import os
import sys
import uuid

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from stepwire.v1 import inference_pb2, inference_pb2_grpc

SERVICE = "stepwire.v1.InferenceService"
DEADLINE_S = 60.0
SHORT_DEADLINE_S = 2.0
MAX_TOKENS = 64
MANY_TOKENS = 3000


def metadata() -> list[tuple[str, str]]:
    """The key, and a trace of one's own as W3C's traceparent: both go along with every call."""
    found = [("traceparent", f"00-{uuid.uuid4().hex}-{uuid.uuid4().hex[:16]}-01")]
    if key := os.environ.get("STEPWIRE_API_KEY"):
        found.append(("authorization", f"Bearer {key}"))
    return found


def check_health(channel: grpc.Channel) -> None:
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


def watch_health(channel: grpc.Channel) -> None:
    """The status now, and each that follows, until the server goes or Ctrl-C: no deadline on this call."""
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    for response in health_pb2_grpc.HealthStub(channel).Watch(request):
        print(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status), flush=True)


def list_services(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    for response in stub.ServerReflectionInfo(requests, timeout=5, metadata=metadata()):
        for service in response.list_services_response.service:
            print(service.name)


def generate(channel: grpc.Channel, request: inference_pb2.GenerateRequest, timeout_s: float, cancel: bool) -> None:
    """Print the text as it comes. The call's deadline is the request's; `cancel()` aborts it within one step."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    stream = stub.Generate(request, timeout=timeout_s, metadata=metadata())
    for response in stream:
        for delta in response.deltas:
            print(delta.text, end="", flush=True)
            if cancel:
                stream.cancel()
        if response.HasField("usage"):
            usage = response.usage
            print(f"\n{usage.num_prompt_tokens} + {usage.num_completion_tokens} tokens", file=sys.stderr)
        if response.HasField("error"):
            sys.exit(f"failed: {response.error.message}")


def embed(channel: grpc.Channel, text: str) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = inference_pb2.EmbedRequest(inputs=[inference_pb2.PooledInput(text=text)])
    values = stub.Embed(request, timeout=DEADLINE_S, metadata=metadata()).embeddings[0].values
    print(len(values), *(f"{value:.4f}" for value in values[:3]))


def explain(error: grpc.RpcError) -> None:
    """A refusal is a status with google.rpc details: which fields are wrong, when to try again."""
    print(f"refused: {error.code().name}: {error.details()}", file=sys.stderr)
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        violations, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(violations):
            for violation in violations.field_violations:
                print(f"  {violation.field}: {violation.description}", file=sys.stderr)
        elif detail.Unpack(retry):
            print(f"  try again in {retry.retry_delay.seconds} s", file=sys.stderr)


def run(channel: grpc.Channel, command: str, text: str) -> None:
    few = inference_pb2.StopConditions(max_tokens=MAX_TOKENS)
    many = inference_pb2.StopConditions(max_tokens=MANY_TOKENS, ignore_eos=True)
    match command:
        case "health":
            check_health(channel)
        case "watch":
            watch_health(channel)
        case "reflect":
            list_services(channel)
        case "generate":
            generate(channel, inference_pb2.GenerateRequest(text=text, stop=few), DEADLINE_S, cancel=False)
        case "chat":
            message = inference_pb2.ChatMessage(role="user", content=[inference_pb2.ContentPart(text=text)])
            chat = inference_pb2.ChatInput(messages=[message])
            generate(channel, inference_pb2.GenerateRequest(chat=chat, stop=few), DEADLINE_S, cancel=False)
        case "deadline":
            generate(channel, inference_pb2.GenerateRequest(text=text, stop=many), SHORT_DEADLINE_S, cancel=False)
        case "cancel":
            generate(channel, inference_pb2.GenerateRequest(text=text, stop=many), DEADLINE_S, cancel=True)
        case "embed":
            embed(channel, text)
        case _:
            sys.exit(f"unknown command {command}: {__doc__}")


def main(address: str, command: str, text: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        try:
            run(channel, command, text)
        except grpc.RpcError as error:
            explain(error)
            return 1
    return 0


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
