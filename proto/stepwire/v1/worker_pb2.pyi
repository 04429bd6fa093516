from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PoolingKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOLING_KIND_UNSPECIFIED: _ClassVar[PoolingKind]
    POOLING_KIND_EMBEDDING: _ClassVar[PoolingKind]
    POOLING_KIND_SCORE: _ClassVar[PoolingKind]

class Capability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAPABILITY_UNSPECIFIED: _ClassVar[Capability]
    CAPABILITY_TOKEN_MASK: _ClassVar[Capability]
    CAPABILITY_PROMPT_LOGPROBS: _ClassVar[Capability]

class RowFaultCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROW_FAULT_CODE_UNSPECIFIED: _ClassVar[RowFaultCode]
    ROW_FAULT_CODE_POSITION_MISMATCH: _ClassVar[RowFaultCode]
    ROW_FAULT_CODE_UNKNOWN_ROW: _ClassVar[RowFaultCode]
    ROW_FAULT_CODE_BAD_BLOCK: _ClassVar[RowFaultCode]
    ROW_FAULT_CODE_BAD_TOKEN: _ClassVar[RowFaultCode]
    ROW_FAULT_CODE_NOT_FINITE: _ClassVar[RowFaultCode]
    ROW_FAULT_CODE_UNSUPPORTED: _ClassVar[RowFaultCode]
POOLING_KIND_UNSPECIFIED: PoolingKind
POOLING_KIND_EMBEDDING: PoolingKind
POOLING_KIND_SCORE: PoolingKind
CAPABILITY_UNSPECIFIED: Capability
CAPABILITY_TOKEN_MASK: Capability
CAPABILITY_PROMPT_LOGPROBS: Capability
ROW_FAULT_CODE_UNSPECIFIED: RowFaultCode
ROW_FAULT_CODE_POSITION_MISMATCH: RowFaultCode
ROW_FAULT_CODE_UNKNOWN_ROW: RowFaultCode
ROW_FAULT_CODE_BAD_BLOCK: RowFaultCode
ROW_FAULT_CODE_BAD_TOKEN: RowFaultCode
ROW_FAULT_CODE_NOT_FINITE: RowFaultCode
ROW_FAULT_CODE_UNSUPPORTED: RowFaultCode

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("instance_id", "model", "architecture", "dtype", "kv_cache_dtype", "devices", "num_blocks", "first_block_id", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "buckets", "vocab_size", "max_num_logprobs", "capabilities", "version", "block_bytes", "num_stages", "pooling", "weights_per_token", "keeps_row_states")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    KEEPS_ROW_STATES_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    model: str
    architecture: str
    dtype: str
    kv_cache_dtype: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    num_blocks: int
    first_block_id: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    buckets: _containers.RepeatedScalarFieldContainer[int]
    vocab_size: int
    max_num_logprobs: int
    capabilities: _containers.RepeatedScalarFieldContainer[Capability]
    version: str
    block_bytes: int
    num_stages: int
    pooling: PoolingFacts
    weights_per_token: int
    keeps_row_states: bool
    def __init__(self, instance_id: _Optional[str] = ..., model: _Optional[str] = ..., architecture: _Optional[str] = ..., dtype: _Optional[str] = ..., kv_cache_dtype: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ..., num_blocks: _Optional[int] = ..., first_block_id: _Optional[int] = ..., block_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., buckets: _Optional[_Iterable[int]] = ..., vocab_size: _Optional[int] = ..., max_num_logprobs: _Optional[int] = ..., capabilities: _Optional[_Iterable[_Union[Capability, str]]] = ..., version: _Optional[str] = ..., block_bytes: _Optional[int] = ..., num_stages: _Optional[int] = ..., pooling: _Optional[_Union[PoolingFacts, _Mapping]] = ..., weights_per_token: _Optional[int] = ..., keeps_row_states: _Optional[bool] = ...) -> None: ...

class PoolingFacts(_message.Message):
    __slots__ = ("kind", "dimensions", "whole_prompts", "only")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    WHOLE_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    ONLY_FIELD_NUMBER: _ClassVar[int]
    kind: PoolingKind
    dimensions: int
    whole_prompts: bool
    only: bool
    def __init__(self, kind: _Optional[_Union[PoolingKind, str]] = ..., dimensions: _Optional[int] = ..., whole_prompts: _Optional[bool] = ..., only: _Optional[bool] = ...) -> None: ...

class RunStepsRequest(_message.Message):
    __slots__ = ("hello", "step", "mask")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    hello: SessionHello
    step: StepBatch
    mask: TokenMask
    def __init__(self, hello: _Optional[_Union[SessionHello, _Mapping]] = ..., step: _Optional[_Union[StepBatch, _Mapping]] = ..., mask: _Optional[_Union[TokenMask, _Mapping]] = ...) -> None: ...

class RunStepsResponse(_message.Message):
    __slots__ = ("ready", "result", "leaving")
    READY_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    ready: SessionReady
    result: StepResult
    leaving: SessionLeaving
    def __init__(self, ready: _Optional[_Union[SessionReady, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., leaving: _Optional[_Union[SessionLeaving, _Mapping]] = ...) -> None: ...

class SessionHello(_message.Message):
    __slots__ = ("session_id", "protocol_version", "understands_leaving")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    UNDERSTANDS_LEAVING_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    protocol_version: int
    understands_leaving: bool
    def __init__(self, session_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., understands_leaving: _Optional[bool] = ...) -> None: ...

class SessionReady(_message.Message):
    __slots__ = ("session_id", "instance_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    instance_id: str
    def __init__(self, session_id: _Optional[str] = ..., instance_id: _Optional[str] = ...) -> None: ...

class SessionLeaving(_message.Message):
    __slots__ = ("serves_for_ns", "reason")
    SERVES_FOR_NS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    serves_for_ns: int
    reason: str
    def __init__(self, serves_for_ns: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class StepBatch(_message.Message):
    __slots__ = ("step_id", "bucket", "drop_rows", "add", "run_rows", "run_start_positions", "run_num_tokens", "run_samples", "run_num_new_blocks", "new_block_ids", "mask_rows")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    DROP_ROWS_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    RUN_ROWS_FIELD_NUMBER: _ClassVar[int]
    RUN_START_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    RUN_NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUN_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    RUN_NUM_NEW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEW_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    MASK_ROWS_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    bucket: int
    drop_rows: bytes
    add: _containers.RepeatedCompositeFieldContainer[RowAdd]
    run_rows: bytes
    run_start_positions: bytes
    run_num_tokens: bytes
    run_samples: bytes
    run_num_new_blocks: bytes
    new_block_ids: bytes
    mask_rows: bytes
    def __init__(self, step_id: _Optional[int] = ..., bucket: _Optional[int] = ..., drop_rows: _Optional[bytes] = ..., add: _Optional[_Iterable[_Union[RowAdd, _Mapping]]] = ..., run_rows: _Optional[bytes] = ..., run_start_positions: _Optional[bytes] = ..., run_num_tokens: _Optional[bytes] = ..., run_samples: _Optional[bytes] = ..., run_num_new_blocks: _Optional[bytes] = ..., new_block_ids: _Optional[bytes] = ..., mask_rows: _Optional[bytes] = ...) -> None: ...

class RowAdd(_message.Message):
    __slots__ = ("row", "token_ids", "num_prompt_tokens", "num_computed_tokens", "block_ids", "sampling", "pooling")
    ROW_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    row: int
    token_ids: bytes
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: bytes
    sampling: RowSampling
    pooling: RowPooling
    def __init__(self, row: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., num_computed_tokens: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[RowSampling, _Mapping]] = ..., pooling: _Optional[_Union[RowPooling, _Mapping]] = ...) -> None: ...

class RowPooling(_message.Message):
    __slots__ = ("second_text_start",)
    SECOND_TEXT_START_FIELD_NUMBER: _ClassVar[int]
    second_text_start: int
    def __init__(self, second_text_start: _Optional[int] = ...) -> None: ...

class RowSampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "sequence_index", "num_logprobs", "bias_token_ids", "bias_values", "min_tokens", "suppressed_token_ids", "allowed_token_ids", "num_prompt_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SUPPRESSED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    sequence_index: int
    num_logprobs: int
    bias_token_ids: bytes
    bias_values: bytes
    min_tokens: int
    suppressed_token_ids: bytes
    allowed_token_ids: bytes
    num_prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., sequence_index: _Optional[int] = ..., num_logprobs: _Optional[int] = ..., bias_token_ids: _Optional[bytes] = ..., bias_values: _Optional[bytes] = ..., min_tokens: _Optional[int] = ..., suppressed_token_ids: _Optional[bytes] = ..., allowed_token_ids: _Optional[bytes] = ..., num_prompt_logprobs: _Optional[int] = ...) -> None: ...

class TokenMask(_message.Message):
    __slots__ = ("step_id", "rows", "bitmask")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BITMASK_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    rows: bytes
    bitmask: bytes
    def __init__(self, step_id: _Optional[int] = ..., rows: _Optional[bytes] = ..., bitmask: _Optional[bytes] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step_id", "rows", "offsets", "token_ids", "logprobs", "num_top", "top_token_ids", "top_logprobs", "faults", "timings", "prompt_logprobs", "pooled")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    rows: bytes
    offsets: bytes
    token_ids: bytes
    logprobs: bytes
    num_top: int
    top_token_ids: bytes
    top_logprobs: bytes
    faults: _containers.RepeatedCompositeFieldContainer[RowFault]
    timings: StepTimings
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprobs]
    pooled: PooledRows
    def __init__(self, step_id: _Optional[int] = ..., rows: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., num_top: _Optional[int] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ..., faults: _Optional[_Iterable[_Union[RowFault, _Mapping]]] = ..., timings: _Optional[_Union[StepTimings, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprobs, _Mapping]]] = ..., pooled: _Optional[_Union[PooledRows, _Mapping]] = ...) -> None: ...

class PooledRows(_message.Message):
    __slots__ = ("rows", "values")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    values: bytes
    def __init__(self, rows: _Optional[bytes] = ..., values: _Optional[bytes] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("row", "start_position", "logprobs", "num_top", "top_token_ids", "top_logprobs", "ranks")
    ROW_FIELD_NUMBER: _ClassVar[int]
    START_POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    row: int
    start_position: int
    logprobs: bytes
    num_top: int
    top_token_ids: bytes
    top_logprobs: bytes
    ranks: bytes
    def __init__(self, row: _Optional[int] = ..., start_position: _Optional[int] = ..., logprobs: _Optional[bytes] = ..., num_top: _Optional[int] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[bytes] = ..., ranks: _Optional[bytes] = ...) -> None: ...

class RowFault(_message.Message):
    __slots__ = ("row", "code", "message")
    ROW_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    row: int
    code: RowFaultCode
    message: str
    def __init__(self, row: _Optional[int] = ..., code: _Optional[_Union[RowFaultCode, str]] = ..., message: _Optional[str] = ...) -> None: ...

class StepTimings(_message.Message):
    __slots__ = ("queue_ns", "input_ns", "forward_ns", "sample_ns")
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    INPUT_NS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_NS_FIELD_NUMBER: _ClassVar[int]
    queue_ns: int
    input_ns: int
    forward_ns: int
    sample_ns: int
    def __init__(self, queue_ns: _Optional[int] = ..., input_ns: _Optional[int] = ..., forward_ns: _Optional[int] = ..., sample_ns: _Optional[int] = ...) -> None: ...
