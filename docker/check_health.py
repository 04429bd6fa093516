"""Health check of a container: exits with 0 if the service says that it can work, else with 1 and the reason.

check_health.py http://HOST:PORT/PATH    200 is healthy
check_health.py grpc://HOST:PORT         grpc.health.v1 says SERVING for the server as a whole
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

# Below the timeout of the images' HEALTHCHECK, so that the reason is seen.
TIMEOUT_S = 4.0


def http_problem(url: str) -> str | None:
    """Why the page is not answered with 200; None if it is."""
    # Proxies are for other hosts than this one.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            return None if answer.status == 200 else f"status {answer.status}"
    except urllib.error.HTTPError as error:
        return f"status {error.code}: {error.read(300).decode(errors='replace')}"
    except OSError as error:
        return str(error)


def grpc_problem(address: str) -> str | None:
    """Why the server is not SERVING; None if it is."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not arguments[0].startswith(("http://", "grpc://")):
        print(__doc__, file=sys.stderr)
        return 2
    target = arguments[0]
    problem = http_problem(target) if target.startswith("http://") else grpc_problem(target.removeprefix("grpc://"))
    print(f"{target}: {problem or 'healthy'}")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
