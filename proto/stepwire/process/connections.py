"""gRPC options that every connection between our processes has, on both its sides."""

from __future__ import annotations

# Of one message. gRPC's own limit of 4 MiB is less than the log-probabilities of a long prompt.
MAX_MESSAGE_BYTES = 64 * 2**20
MESSAGE_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

# How long the other end may be silent before it is asked whether it lives, and how long it may take to say so. It
# answers without Python, however busy it is.
KEEPALIVE_TIME_S = 20
KEEPALIVE_TIMEOUT_S = 20
# A process that dies closes its connections; this is for one that hangs, and for a machine that has gone.
KEEPALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    # A question is a ping: without this gRPC waits a minute for its answer, whatever the keepalive's timeout is.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    # Also where nothing is said meanwhile.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Who asks more often than a server permits is cut off; its own limit is five minutes for one who waits in silence.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)

# For addresses of ours: a proxy that the environment names is for the outside world.
NO_PROXY_OPTIONS = (("grpc.enable_http_proxy", 0),)
