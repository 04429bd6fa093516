"""What to say of `vllm serve`'s flags that `stepwire serve` has under another name, has always on, or has not.

Flags of the same name and meaning are not here. Names as in https://docs.vllm.ai/en/latest/cli/serve/.
"""

from __future__ import annotations

from collections.abc import Mapping

_ALWAYS_ON = "leave it out, that is always on"
_NOT_NEEDED = "leave it out, nothing depends on it here"
_NO_ADAPTERS = "adapters are not served: merge them into the model"
_NO_SPECULATION = "leave it out, speculative decoding is not there"
_NO_OFFLOAD = (
    "leave it out, nothing is moved to host memory; --gpu-memory-utilization and --max-num-seqs bound what is used"
)
_NO_REMOTE_CODE = "leave it out, a checkpoint's own code is never run"
_TEXT_ONLY = "leave it out, messages hold text alone"
_LOG_LEVEL = "--log-level warning leaves out the line of each request"
_GRAMMARS = "leave it out, every format is enforced by one backend (docs/structured_output.md)"
_REVISION = "serve the directory that `stepwire prepare MODEL --revision COMMIT` prints"
_TLS = "start `stepwire gateway --tls-cert FILE --tls-key FILE`, the control plane and the worker by themselves"
_TASK = "--task embed or --task score; auto asks the checkpoint"

ADVICE: Mapping[str, str] = {
    # Under another name.
    "--model": "the model comes without a flag: stepwire serve MODEL",
    "--allowed-origins": "set the variable STEPWIRE_CORS_ORIGINS",
    "--api-server-count": "--gateway-processes",
    "--convert": _TASK,
    "--disable-log-requests": _LOG_LEVEL,
    "--disable-log-stats": _LOG_LEVEL,
    "--disable-uvicorn-access-log": _LOG_LEVEL,
    "--download-dir": "--cache-dir is where prepared models are kept; downloads go where HF_HOME says",
    "--enable-log-requests": "--log-level info",
    "--enable-auto-tool-choice": "leave it out, tools work as they are; --tool-call-parser names a format",
    "--enable-reasoning": "leave it out, reasoning is found as it is; --reasoning-parser names a format",
    "--hf-token": "set the variable HF_TOKEN",
    "--kv-cache-memory-bytes": "--gpu-memory-utilization, or --cpu-kv-cache-gib on a CPU",
    "--long-prefill-token-threshold": "--mixed-step-tokens",
    "--override-pooler-config": "--pooling",
    "--pooler-config": "--pooling",
    "--revision": _REVISION,
    "--shutdown-timeout": "--drain-timeout-s",
    "--ssl-ca-certs": _TLS,
    "--ssl-certfile": _TLS,
    "--ssl-keyfile": _TLS,
    "--tokenizer-revision": _REVISION,
    "--uds": "start `stepwire gateway --uds PATH`, the control plane and the worker by themselves",
    "--uvicorn-log-level": "--log-level",
    "-asc": "--gateway-processes",
    "-dp": "--data-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-q": "--quantization",
    "-tp": "--tensor-parallel-size",
    # Always on.
    "--async-scheduling": _ALWAYS_ON,
    "--enable-chunked-prefill": f"{_ALWAYS_ON}; --mixed-step-tokens bounds a step's share",
    "--enable-force-include-usage": "leave it out, a stream's usage is sent where stream_options ask for it",
    "--enable-prompt-tokens-details": _ALWAYS_ON,
    "--enable-request-id-headers": _ALWAYS_ON,
    "--enable-server-load-tracking": _ALWAYS_ON,
    # Nothing to choose.
    "--chat-template-content-format": _NOT_NEEDED,
    "--compilation-config": _NOT_NEEDED,
    "--config-format": _NOT_NEEDED,
    "--disable-custom-all-reduce": _NOT_NEEDED,
    "--disable-frontend-multiprocessing": _NOT_NEEDED,
    "--distributed-executor-backend": _NOT_NEEDED,
    "--generation-config": "leave it out, the sampling defaults of the model's generation_config.json count",
    "--max-logprobs": "leave it out, a request may ask for up to 20",
    "--max-num-partial-prefills": _NOT_NEEDED,
    "--max-parallel-loading-workers": _NOT_NEEDED,
    "--max-seq-len-to-capture": _NOT_NEEDED,
    "--model-impl": "leave it out, transformers runs what has no file of its own (docs/models.md)",
    "--response-role": _NOT_NEEDED,
    "--tokenizer-mode": _NOT_NEEDED,
    "--use-v2-block-manager": _NOT_NEEDED,
    "-O": _NOT_NEEDED,
    "-cc": _NOT_NEEDED,
    "--guided-decoding-backend": _GRAMMARS,
    "--structured-outputs-config": _GRAMMARS,
    # Not there.
    "--cpu-offload-gb": _NO_OFFLOAD,
    "--swap-space": _NO_OFFLOAD,
    "--kv-transfer-config": "leave it out, prompts and their continuations run in the same worker group",
    "--enable-lora": _NO_ADAPTERS,
    "--lora-modules": _NO_ADAPTERS,
    "--max-lora-rank": _NO_ADAPTERS,
    "--max-loras": _NO_ADAPTERS,
    "--hf-overrides": "change config.json in a copy of the model's directory",
    "--rope-scaling": "change config.json in a copy of the model's directory",
    "--override-generation-config": "change generation_config.json in a copy of the model's directory",
    "--otlp-traces-endpoint": "leave it out, a caller's traceparent stands in the log lines and no spans are sent",
    "--root-path": "leave it out, a proxy in front has to strip its prefix",
    "--middleware": "leave it out, put a proxy in front",
    "--num-speculative-tokens": _NO_SPECULATION,
    "--speculative-config": _NO_SPECULATION,
    "--speculative-model": _NO_SPECULATION,
    "--tokenizer": "leave it out, the tokenizer is the one in the model's directory",
    "--trust-remote-code": _NO_REMOTE_CODE,
    "--allowed-local-media-path": _TEXT_ONLY,
    "--limit-mm-per-prompt": _TEXT_ONLY,
    "--mm-processor-kwargs": _TEXT_ONLY,
    "--trust-request-chat-template": "leave it out, requests bring no templates; --chat-template names one",
}
