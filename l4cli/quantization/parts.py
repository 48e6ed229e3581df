"""Which part of a model a linear map belongs to, by its name.

in: module names as in checkpoints; out: a part's name, and patterns that find a part's maps again
source: HF Llama 4 module names with unfused experts; compressed-tensors' `re:` targets
"""

from __future__ import annotations

import re

# In the order in which a name is tried; patterns are those of published `ignore` lists.
PART_PATTERNS = {
    "vision": "re:.*(vision_model|multi_modal_projector).*",
    "lm-head": "re:.*lm_head",
    "attention": "re:.*self_attn.*",
    "router": "re:.*router.*",
    "shared": "re:.*shared_expert.*",
    "experts": "re:.*experts.*",
    "dense": "re:.*feed_forward\\.(gate|up|down)_proj",
}
PARTS = tuple(PART_PATTERNS)
_LAYER = re.compile(r"(?:language_model\.)?model\.layers\.(\d+)\.")


def part_of(name: str) -> str:
    """The part of a linear map, as `attention` of `model.layers.0.self_attn.q_proj`."""
    for part, pattern in PART_PATTERNS.items():
        if matches(pattern, name):
            return part
    raise AssertionError(f"no part of a Llama 4 is called {name}")


def matches(target: str, name: str) -> bool:
    """Whether a target of a quantization config means a module: by its name, or `re:` pattern."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name


def layer_of(name: str) -> int | None:
    """The decoder layer of a module, or None outside the decoder."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None
