from stepwire.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JoinRequest(_message.Message):
    __slots__ = ("hello", "event")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    hello: NodeHello
    event: RankEvent
    def __init__(self, hello: _Optional[_Union[NodeHello, _Mapping]] = ..., event: _Optional[_Union[RankEvent, _Mapping]] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("assignment", "command")
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    assignment: NodeAssignment
    command: bytes
    def __init__(self, assignment: _Optional[_Union[NodeAssignment, _Mapping]] = ..., command: _Optional[bytes] = ...) -> None: ...

class NodeHello(_message.Message):
    __slots__ = ("protocol_version", "version", "model_digest", "host")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    version: str
    model_digest: str
    host: str
    def __init__(self, protocol_version: _Optional[int] = ..., version: _Optional[str] = ..., model_digest: _Optional[str] = ..., host: _Optional[str] = ...) -> None: ...

class NodeAssignment(_message.Message):
    __slots__ = ("node", "places")
    NODE_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    node: int
    places: _containers.RepeatedCompositeFieldContainer[RankPlace]
    def __init__(self, node: _Optional[int] = ..., places: _Optional[_Iterable[_Union[RankPlace, _Mapping]]] = ...) -> None: ...

class RankPlace(_message.Message):
    __slots__ = ("rank", "tensor_parallel_size", "stage_layers", "expert_parallel", "local_rank", "num_local_ranks", "store_address", "host", "timeout_s", "settings")
    RANK_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    STAGE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_LOCAL_RANKS_FIELD_NUMBER: _ClassVar[int]
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    tensor_parallel_size: int
    stage_layers: _containers.RepeatedScalarFieldContainer[int]
    expert_parallel: bool
    local_rank: int
    num_local_ranks: int
    store_address: str
    host: str
    timeout_s: float
    settings: str
    def __init__(self, rank: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., stage_layers: _Optional[_Iterable[int]] = ..., expert_parallel: _Optional[bool] = ..., local_rank: _Optional[int] = ..., num_local_ranks: _Optional[int] = ..., store_address: _Optional[str] = ..., host: _Optional[str] = ..., timeout_s: _Optional[float] = ..., settings: _Optional[str] = ...) -> None: ...

class RankCommand(_message.Message):
    __slots__ = ("place", "step", "mask", "abandon", "reset", "close", "pause", "form")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    ABANDON_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    place: RankPlace
    step: _worker_pb2.StepBatch
    mask: _worker_pb2.TokenMask
    abandon: Empty
    reset: Empty
    close: Empty
    pause: Empty
    form: Empty
    def __init__(self, place: _Optional[_Union[RankPlace, _Mapping]] = ..., step: _Optional[_Union[_worker_pb2.StepBatch, _Mapping]] = ..., mask: _Optional[_Union[_worker_pb2.TokenMask, _Mapping]] = ..., abandon: _Optional[_Union[Empty, _Mapping]] = ..., reset: _Optional[_Union[Empty, _Mapping]] = ..., close: _Optional[_Union[Empty, _Mapping]] = ..., pause: _Optional[_Union[Empty, _Mapping]] = ..., form: _Optional[_Union[Empty, _Mapping]] = ...) -> None: ...

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankEvent(_message.Message):
    __slots__ = ("rank", "ready", "failure", "started", "leaving", "described")
    RANK_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    DESCRIBED_FIELD_NUMBER: _ClassVar[int]
    rank: int
    ready: RankReady
    failure: RankFailure
    started: Empty
    leaving: Empty
    described: _worker_pb2.StepResult
    def __init__(self, rank: _Optional[int] = ..., ready: _Optional[_Union[RankReady, _Mapping]] = ..., failure: _Optional[_Union[RankFailure, _Mapping]] = ..., started: _Optional[_Union[Empty, _Mapping]] = ..., leaving: _Optional[_Union[Empty, _Mapping]] = ..., described: _Optional[_Union[_worker_pb2.StepResult, _Mapping]] = ...) -> None: ...

class RankReady(_message.Message):
    __slots__ = ("device", "block_bytes")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    device: str
    block_bytes: int
    def __init__(self, device: _Optional[str] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class RankFailure(_message.Message):
    __slots__ = ("message", "is_consequence", "trace")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    IS_CONSEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    message: str
    is_consequence: bool
    trace: str
    def __init__(self, message: _Optional[str] = ..., is_consequence: _Optional[bool] = ..., trace: _Optional[str] = ...) -> None: ...
