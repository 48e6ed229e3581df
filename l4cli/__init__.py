"""`l4`: text and pictures in, a Llama-4-shaped model you can talk to out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l4cli.checkpoint import load_model as load_model
    from l4cli.text import load_tokenizer as load_tokenizer

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import l4cli` (and with it `l4 --help`) does not import torch.
    if name == "load_model":
        from l4cli.checkpoint import load_model

        return load_model
    if name == "load_tokenizer":
        from l4cli.text import load_tokenizer

        return load_tokenizer
    raise AttributeError(f"module `l4cli` has no attribute `{name}`")
