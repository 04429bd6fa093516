import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListGroupsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListGroupsResponse(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    def __init__(self, groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("state", "worker", "trouble", "model", "version", "devices")
    STATE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    state: GroupState
    worker: str
    trouble: str
    model: str
    version: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, state: _Optional[_Union[GroupState, _Mapping]] = ..., worker: _Optional[str] = ..., trouble: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ...) -> None: ...

class AddGroupRequest(_message.Message):
    __slots__ = ("worker", "timeout")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    worker: str
    timeout: _duration_pb2.Duration
    def __init__(self, worker: _Optional[str] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class AddGroupResponse(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: int
    def __init__(self, group: _Optional[int] = ...) -> None: ...

class DrainGroupRequest(_message.Message):
    __slots__ = ("group", "timeout")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    group: int
    timeout: _duration_pb2.Duration
    def __init__(self, group: _Optional[int] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainGroupResponse(_message.Message):
    __slots__ = ("is_drained",)
    IS_DRAINED_FIELD_NUMBER: _ClassVar[int]
    is_drained: bool
    def __init__(self, is_drained: _Optional[bool] = ...) -> None: ...

class ResumeGroupRequest(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: int
    def __init__(self, group: _Optional[int] = ...) -> None: ...

class ResumeGroupResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RemoveGroupRequest(_message.Message):
    __slots__ = ("group", "timeout")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    group: int
    timeout: _duration_pb2.Duration
    def __init__(self, group: _Optional[int] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RemoveGroupResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout", "exit")
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    timeout: _duration_pb2.Duration
    exit: bool
    def __init__(self, timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., exit: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("is_drained", "num_open_requests")
    IS_DRAINED_FIELD_NUMBER: _ClassVar[int]
    NUM_OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    is_drained: bool
    num_open_requests: int
    def __init__(self, is_drained: _Optional[bool] = ..., num_open_requests: _Optional[int] = ...) -> None: ...

class WatchStepsRequest(_message.Message):
    __slots__ = ("interval", "max_steps")
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    interval: _duration_pb2.Duration
    max_steps: int
    def __init__(self, interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_steps: _Optional[int] = ...) -> None: ...

class WatchStepsResponse(_message.Message):
    __slots__ = ("steps", "num_lost_steps", "state", "time_to_first_token", "inter_token_latency")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOST_STEPS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    INTER_TOKEN_LATENCY_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[StepSample]
    num_lost_steps: int
    state: ServerState
    time_to_first_token: LatencyCounts
    inter_token_latency: LatencyCounts
    def __init__(self, steps: _Optional[_Iterable[_Union[StepSample, _Mapping]]] = ..., num_lost_steps: _Optional[int] = ..., state: _Optional[_Union[ServerState, _Mapping]] = ..., time_to_first_token: _Optional[_Union[LatencyCounts, _Mapping]] = ..., inter_token_latency: _Optional[_Union[LatencyCounts, _Mapping]] = ...) -> None: ...

class StepSample(_message.Message):
    __slots__ = ("step_id", "ended_at_s", "duration_ns", "num_rows", "num_prefill_rows", "num_prefill_tokens", "num_decode_tokens", "queue_ns", "input_ns", "forward_ns", "sample_ns", "num_running_sequences", "num_waiting_requests", "num_kv_blocks_in_use", "group")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_S_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    INPUT_NS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_NS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    ended_at_s: float
    duration_ns: int
    num_rows: int
    num_prefill_rows: int
    num_prefill_tokens: int
    num_decode_tokens: int
    queue_ns: int
    input_ns: int
    forward_ns: int
    sample_ns: int
    num_running_sequences: int
    num_waiting_requests: int
    num_kv_blocks_in_use: int
    group: int
    def __init__(self, step_id: _Optional[int] = ..., ended_at_s: _Optional[float] = ..., duration_ns: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_prefill_rows: _Optional[int] = ..., num_prefill_tokens: _Optional[int] = ..., num_decode_tokens: _Optional[int] = ..., queue_ns: _Optional[int] = ..., input_ns: _Optional[int] = ..., forward_ns: _Optional[int] = ..., sample_ns: _Optional[int] = ..., num_running_sequences: _Optional[int] = ..., num_waiting_requests: _Optional[int] = ..., num_kv_blocks_in_use: _Optional[int] = ..., group: _Optional[int] = ...) -> None: ...

class ServerState(_message.Message):
    __slots__ = ("is_worker_connected", "is_draining", "num_running_sequences", "num_waiting_requests", "num_waiting_tokens", "num_kv_blocks", "num_kv_blocks_in_use", "num_kv_blocks_cached", "num_prompt_tokens", "num_generated_tokens", "num_preemptions", "num_prefix_cache_queries", "num_prefix_cache_hits", "max_num_sequences", "groups")
    IS_WORKER_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_CACHE_QUERIES_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    is_worker_connected: bool
    is_draining: bool
    num_running_sequences: int
    num_waiting_requests: int
    num_waiting_tokens: int
    num_kv_blocks: int
    num_kv_blocks_in_use: int
    num_kv_blocks_cached: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_prefix_cache_queries: int
    num_prefix_cache_hits: int
    max_num_sequences: int
    groups: _containers.RepeatedCompositeFieldContainer[GroupState]
    def __init__(self, is_worker_connected: _Optional[bool] = ..., is_draining: _Optional[bool] = ..., num_running_sequences: _Optional[int] = ..., num_waiting_requests: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., num_kv_blocks: _Optional[int] = ..., num_kv_blocks_in_use: _Optional[int] = ..., num_kv_blocks_cached: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_generated_tokens: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_prefix_cache_queries: _Optional[int] = ..., num_prefix_cache_hits: _Optional[int] = ..., max_num_sequences: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[GroupState, _Mapping]]] = ...) -> None: ...

class GroupState(_message.Message):
    __slots__ = ("group", "is_worker_connected", "is_draining", "num_running_sequences", "num_waiting_requests", "num_waiting_tokens", "num_kv_blocks", "num_kv_blocks_in_use", "num_kv_blocks_cached", "num_prompt_tokens", "num_generated_tokens", "num_preemptions", "num_prefix_cache_queries", "num_prefix_cache_hits", "max_num_sequences")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    IS_WORKER_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_CACHE_QUERIES_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_CACHE_HITS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    group: int
    is_worker_connected: bool
    is_draining: bool
    num_running_sequences: int
    num_waiting_requests: int
    num_waiting_tokens: int
    num_kv_blocks: int
    num_kv_blocks_in_use: int
    num_kv_blocks_cached: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_prefix_cache_queries: int
    num_prefix_cache_hits: int
    max_num_sequences: int
    def __init__(self, group: _Optional[int] = ..., is_worker_connected: _Optional[bool] = ..., is_draining: _Optional[bool] = ..., num_running_sequences: _Optional[int] = ..., num_waiting_requests: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., num_kv_blocks: _Optional[int] = ..., num_kv_blocks_in_use: _Optional[int] = ..., num_kv_blocks_cached: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_generated_tokens: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_prefix_cache_queries: _Optional[int] = ..., num_prefix_cache_hits: _Optional[int] = ..., max_num_sequences: _Optional[int] = ...) -> None: ...

class LatencyCounts(_message.Message):
    __slots__ = ("bounds_s", "counts")
    BOUNDS_S_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    bounds_s: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, bounds_s: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ...) -> None: ...
