"""What `--deterministic` does not cover, said before anything is loaded."""

from __future__ import annotations

from gpu_worker.model_spec import ModelConfigError, ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.quant.api import LinearMethod, QuantScheme
from gpu_worker.quant.stored import SplitLinear, StoredLinear


def refuse_uncovered(spec: ModelSpec, family: type[ModelFamily]) -> None:
    """Raises `ModelConfigError` for models with parts that have no fixed shapes yet."""
    parts = {
        "experts": spec.moe is not None,
        "latent attention": spec.latent is not None,
        "the gated delta rule": spec.gated_delta is not None,
        "heads of several kinds": len({(layer.num_kv_heads, layer.head_dim) for layer in spec.layers}) > 1,
        "layers that attend to the keys of others": any(layer.kv_source is not None for layer in spec.layers),
        "per-layer embeddings": spec.layer_inputs is not None,
        "attention in chunks": any(layer.attention_chunk is not None for layer in spec.layers),
        "transformers' own code": family.host_plans_attention,
        "encoders": family.is_encoder,
    }
    what = next((part for part, is_there in parts.items() if is_there), None)
    if what is not None:
        raise ModelConfigError(
            f"--deterministic does not cover {what} yet, which {spec.architecture} has: leave it out"
        )


class CoveredScheme:
    """A scheme that refuses linears whose inputs share one measured scale: it is of all tokens of a step."""

    def __init__(self, inner: QuantScheme) -> None:
        self._inner = inner
        self.fused_experts_are_packed = inner.fused_experts_are_packed

    def linear_method(self, path: str) -> LinearMethod:
        method = self._inner.linear_method(path)
        if shares_scales(method):
            raise ModelConfigError(
                f"--deterministic: {path} quantizes its inputs by one scale for all tokens of a step (dynamic, per "
                "tensor), which follows the batch: leave it out, or use a checkpoint with per-token or static scales"
            )
        return method


def shares_scales(method: LinearMethod) -> bool:
    if isinstance(method, SplitLinear):
        return any(shares_scales(part) for part in method.methods.values())
    if not isinstance(method, StoredLinear) or method.format.activations is None:
        return False
    return method.format.activations.dynamic and method.format.activations.granularity == "tensor"
