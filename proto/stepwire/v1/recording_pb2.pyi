from stepwire.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecordingEntry(_message.Message):
    __slots__ = ("header", "hello", "step", "mask", "result")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    header: RecordingHeader
    hello: _worker_pb2.SessionHello
    step: _worker_pb2.StepBatch
    mask: _worker_pb2.TokenMask
    result: _worker_pb2.StepResult
    def __init__(self, header: _Optional[_Union[RecordingHeader, _Mapping]] = ..., hello: _Optional[_Union[_worker_pb2.SessionHello, _Mapping]] = ..., step: _Optional[_Union[_worker_pb2.StepBatch, _Mapping]] = ..., mask: _Optional[_Union[_worker_pb2.TokenMask, _Mapping]] = ..., result: _Optional[_Union[_worker_pb2.StepResult, _Mapping]] = ...) -> None: ...

class RecordingHeader(_message.Message):
    __slots__ = ("format_version", "model", "worker", "flags", "began_at_s")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    BEGAN_AT_S_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    model: str
    worker: _worker_pb2.DescribeResponse
    flags: _containers.RepeatedScalarFieldContainer[str]
    began_at_s: float
    def __init__(self, format_version: _Optional[int] = ..., model: _Optional[str] = ..., worker: _Optional[_Union[_worker_pb2.DescribeResponse, _Mapping]] = ..., flags: _Optional[_Iterable[str]] = ..., began_at_s: _Optional[float] = ...) -> None: ...
