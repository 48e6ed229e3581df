"""The model core: Hugging Face's Llama 4, written to be read, trained and cut open.

Shapes are suffixes of names, the same letters in the whole house:
  B batch            T query positions   S key positions     D hidden_size
  N query heads      K key/value heads   G = N / K           H head_dim
  F expert or mlp width                  E experts           A experts per token
  M flat tokens (B * T)                  R routed rows (M * A)
  V vocabulary       L layers            P image patches     C chunks
Letters are logical shapes, never sharded ones. In attention over gathered segments S counts
segments and L is a segment's padded length.
"""

from l4cli.model.config import (
    Llama4Config,
    TextConfig,
    VisionConfig,
    load_preset,
    preset_names,
)
from l4cli.model.llama4 import (
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    build_model,
    init_weights,
)
from l4cli.model.sizes import ParameterCounts, count_parameters

__all__ = [
    "Llama4Config",
    "Llama4ForCausalLM",
    "Llama4ForConditionalGeneration",
    "ParameterCounts",
    "TextConfig",
    "VisionConfig",
    "build_model",
    "count_parameters",
    "init_weights",
    "load_preset",
    "preset_names",
]
