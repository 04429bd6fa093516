"""EXAONE 4: norms after attention and MLP only, and on every head; the large one has windows and NoPE layers."""

from __future__ import annotations

from gpu_worker.model_spec import ModelSpec
from gpu_worker.models.family import ModelFamily
from gpu_worker.models.hf_config import FULL, SLIDING, HfConfig
from gpu_worker.models.olmo import POST_NORM_NAMES
from gpu_worker.models.registry import register


@register("Exaone4ForCausalLM")
class Exaone(ModelFamily):
    name_rules = POST_NORM_NAMES

    @staticmethod
    def read_config(config: HfConfig, architecture: str) -> ModelSpec:
        rope = config.rope(config.heads()[2])
        window = config.optional_integer("sliding_window", 4096)
        pattern = config.fields.get("sliding_window_pattern") or 4
        period = len(pattern) if isinstance(pattern, str) else int(pattern)  # "LLLG", or its length
        # Beside layers with windows, those that see everything are not told where it stands.
        ropes = {FULL: rope if window is None else None, SLIDING: rope}
        return config.decoder(
            architecture,
            config.layers(ropes, window, lambda layer: (layer + 1) % period != 0),
            norm_eps=config.number("rms_norm_eps", 1e-5),
            qk_norm="head",
            pre_norms=False,
            post_norms=True,
        )
