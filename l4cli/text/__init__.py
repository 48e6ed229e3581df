"""Text: vocabulary, token ids, the chat format; knows nothing of tensors."""

from l4cli.text.chat import ChatTokens, image_block, num_tiles, render_chat
from l4cli.text.loading import load_tokenizer, tokenizer_from_files
from l4cli.text.special_tokens import NAMED_SPECIAL_TOKENS, SPECIAL_TOKENS
from l4cli.text.tokenizer import Tokenizer

__all__ = [
    "NAMED_SPECIAL_TOKENS",
    "SPECIAL_TOKENS",
    "ChatTokens",
    "Tokenizer",
    "image_block",
    "load_tokenizer",
    "num_tiles",
    "render_chat",
    "tokenizer_from_files",
]
