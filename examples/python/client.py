"""Chat over stepwire's gRPC API: python client.py HOST:PORT "question" (STEPWIRE_API_KEY holds the key, if one is set).

Shows health, metadata, a deadline, streamed deltas, and what an error says.
"""

from __future__ import annotations

import os
import sys
import uuid

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from stepwire.v1 import inference_pb2, inference_pb2_grpc

DEADLINE_S = 60.0


def main(address: str, question: str) -> int:
    key = os.environ.get("STEPWIRE_API_KEY")
    # A trace of your own goes along as W3C's traceparent.
    metadata = [("traceparent", f"00-{uuid.uuid4().hex}-{uuid.uuid4().hex[:16]}-01")]
    if key:
        metadata.append(("authorization", f"Bearer {key}"))
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        status = health.Check(health_pb2.HealthCheckRequest(service="stepwire.v1.InferenceService"), timeout=5).status
        print(f"health: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}", file=sys.stderr)
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        message = inference_pb2.ChatMessage(role="user", content=[inference_pb2.ContentPart(text=question)])
        request = inference_pb2.GenerateRequest(
            chat=inference_pb2.ChatInput(messages=[message]),
            stop=inference_pb2.StopConditions(max_tokens=64),
        )
        # The call's deadline is the request's; `stream.cancel()` would abort it within one step.
        stream = stub.Generate(request, timeout=DEADLINE_S, metadata=metadata)
        try:
            for response in stream:
                for delta in response.deltas:
                    print(delta.text, end="", flush=True)
                if response.HasField("usage"):
                    print(f"\n{response.usage.num_completion_tokens} tokens", file=sys.stderr)
                if response.HasField("error"):
                    print(f"failed: {response.error.message}", file=sys.stderr)
                    return 1
        except grpc.RpcError as error:
            return explain(error)
    return 0


def explain(error: grpc.RpcError) -> int:
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
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
