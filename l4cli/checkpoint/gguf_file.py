"""Write a checkpoint's text half as a GGUF file for llama.cpp, one expert at a time.

in: a `ParameterReader`, a `Tokenizer`, a precision; out: one file that is whole or not there
source: the `gguf` library writes the header; keys and tensors as llama.cpp's loader wants them
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from l4cli.checkpoint.atomic import replacing
from l4cli.checkpoint.gguf_fit import moe_step
from l4cli.checkpoint.gguf_layout import ALIGNMENT, GgufTensor, gguf_tensors
from l4cli.checkpoint.gguf_vocabulary import GgufVocabulary, gguf_vocabulary
from l4cli.checkpoint.hf_keys import TEXT_PREFIX, VISION_PREFIXES
from l4cli.checkpoint.parameters import ParameterReader
from l4cli.errors import L4Error
from l4cli.model import TextConfig
from l4cli.ops.rope import inverse_frequencies
from l4cli.quantization import QuantizedWeight
from l4cli.quantization.ggml_blocks import BLOCK_BYTES, encode_rows, holds_codes, rows_from_codes
from l4cli.text import Tokenizer

_LIBRARY_NAMES = {"f32": "F32", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_FILE_TYPES = {
    "f32": "ALL_F32",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
_VALUES_AT_ONCE = 1 << 24  # of one tensor, turned into bytes at a time
Progress = Callable[[int], None]


@dataclass(frozen=True)
class GgufReport:
    """What was written."""

    size_bytes: int
    num_tensors: int
    num_values: int
    kinds: dict[str, int]  # values by kind
    data_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.data_bytes / self.num_values


def require_gguf() -> Any:
    """The `gguf` library. raises: L4Error saying how to get it"""
    try:
        import gguf
    except ImportError:
        why = "GGUF files are written through the `gguf` library, which is not installed"
        fix = "install it with `pip install 'l4[gguf]'` or `pip install gguf`"
        raise L4Error("cannot write a GGUF file", why=why, fix=fix) from None
    return gguf


def kind_of_codes(parameters: ParameterReader) -> str | None:
    """The kind of file that keeps a quantized checkpoint's codes as they are, if there is one."""
    formats = parameters.formats()
    for kind in BLOCK_BYTES:
        if formats and all(holds_codes(kind, format) for format in formats):
            return kind
    return None


def write_gguf(
    parameters: ParameterReader,
    tokenizer: Tokenizer,
    path: Path,
    kind: str,
    progress: Progress = lambda _: None,
) -> GgufReport:
    """Write the file; a picture encoder, if there is one, stays out.

    raises: L4Error for a tokenizer that fits neither the format nor the model, or weights whose
    scales no block holds
    """
    gguf = require_gguf()
    text = parameters.config.text
    vocabulary = gguf_vocabulary(tokenizer, text.vocab_size)
    names = _text_names(parameters)
    factors = _rope_factors(text)
    tensors = gguf_tensors(
        {short: parameters.shapes[name] for short, name in names.items()},
        kind,
        0 if factors is None else len(factors),
        _kept(parameters, names, kind),
    )
    with replacing(path) as file:
        # The library writes by name, and closes what it opens before the data follow.
        temporary = Path(file.name)
        writer = gguf.GGUFWriter(temporary, "llama4")
        _say_shape(gguf, writer, text, parameters.folder, kind)
        _say_vocabulary(writer, vocabulary)
        _write_header(gguf, writer, temporary, tensors)
        _write_data(file, parameters, names, tensors, factors, progress)
    return _report(path, tensors)


def _text_names(parameters: ParameterReader) -> dict[str, str]:
    """The text half's parameters: name in a text model -> name here."""
    return {
        name.removeprefix(TEXT_PREFIX): name
        for name in parameters.shapes
        if not name.startswith(VISION_PREFIXES)
    }


def _kept(parameters: ParameterReader, names: dict[str, str], kind: str) -> list[str]:
    """What whoever quantized the checkpoint left in floating point is left so here."""
    if kind not in BLOCK_BYTES or not any(map(parameters.is_coded, names.values())):
        return []
    return [short for short, name in names.items() if not parameters.is_coded(name)]


def _rope_factors(text: TextConfig) -> Tensor | None:
    """What llama3's stretching divides each pair's turn by; other kinds are keys of the file."""
    scaling = text.rope_scaling
    if not scaling or scaling.get("rope_type") != "llama3":
        return None
    plain = inverse_frequencies(text.head_dim, text.rope_theta, None)
    return plain / inverse_frequencies(text.head_dim, text.rope_theta, scaling)


def _say_shape(gguf: Any, writer: Any, text: TextConfig, folder: Path, kind: str) -> None:
    step = moe_step(text)
    assert step is not None, "checked before"
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size_mlp)
    writer.add_expert_feed_forward_length(text.intermediate_size)
    writer.add_expert_count(text.num_local_experts)
    writer.add_expert_used_count(text.num_experts_per_tok)
    writer.add_interleave_moe_layer_step(step)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope_theta)
    scaling = text.rope_scaling or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    if scaling.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))


def _say_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.words)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for role, token_id in vocabulary.roles.items():
        getattr(writer, f"add_{role}_token_id")(token_id)
    writer.add_add_bos_token("bos" in vocabulary.roles)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _write_header(gguf: Any, writer: Any, path: Path, tensors: list[GgufTensor]) -> None:
    """Let the library write all but the data, which it would want to have in memory."""
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.size_bytes,
            gguf.GGMLQuantizationType[_LIBRARY_NAMES[tensor.kind]],
        )
    logger = logging.getLogger("gguf.gguf_writer")
    level = logger.level
    logger.setLevel(logging.WARNING)  # it announces what it does
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
    finally:
        logger.setLevel(level)


def _write_data(
    file: IO[bytes],
    parameters: ParameterReader,
    names: dict[str, str],
    tensors: list[GgufTensor],
    factors: Tensor | None,
    progress: Progress,
) -> None:
    """Write each parameter's tensors where they belong, reading every value once."""
    header_bytes = file.seek(0, os.SEEK_END)
    data_start = -(-header_bytes // ALIGNMENT) * ALIGNMENT
    last = tensors[-1]
    file.truncate(data_start + -(-(last.start + last.size_bytes) // ALIGNMENT) * ALIGNMENT)
    filled: dict[str, list[GgufTensor]] = {}
    for tensor in tensors:
        filled.setdefault(tensor.parameter, []).append(tensor)
    written = 0
    for parameter, own in filled.items():
        if not parameter:
            assert factors is not None
            _write_rows(file, data_start + own[0].start, factors[None], own[0].kind)
            continue
        name = names[parameter]
        for expert in range(own[0].num_parts):
            for tensor in own:
                start = data_start + tensor.start + expert * tensor.part_bytes
                if tensor.columns is None:
                    rows = parameters.linear(name)
                else:
                    rows = parameters.linear(name, expert, tensor.columns)
                try:
                    _write_rows(file, start, rows, tensor.kind)
                except OverflowError as error:
                    what = f"cannot write `{name}` as {tensor.kind}"
                    fix = "write plain numbers: `--dtype bf16`"
                    raise L4Error(what, why=str(error), fix=fix) from error
                written += tensor.part_bytes
            progress(written)


def _write_rows(file: IO[bytes], start: int, rows: Tensor | QuantizedWeight, kind: str) -> None:
    """Write rows [out, in], or a vector; codes that the format can hold go in as they are."""
    file.seek(start)
    if isinstance(rows, QuantizedWeight):
        if holds_codes(kind, rows.format):
            scale = rows.scale.float().numpy()
            file.write(rows_from_codes(kind, rows.codes.numpy(), scale).data)
            return
        rows = rows.dequantize()
    if rows.ndim == 1:
        rows = rows[None]
    step = max(1, _VALUES_AT_ONCE // rows.shape[1])
    for first in range(0, rows.shape[0], step):
        piece = rows[first : first + step].to(torch.float32).contiguous().numpy()
        file.write(encode_rows(piece, kind).data)


def _report(path: Path, tensors: list[GgufTensor]) -> GgufReport:
    kinds: dict[str, int] = {}
    for tensor in tensors:
        kinds[tensor.kind] = kinds.get(tensor.kind, 0) + int(np.prod(tensor.shape))
    return GgufReport(
        size_bytes=path.stat().st_size,
        num_tensors=len(tensors),
        num_values=sum(kinds.values()),
        kinds=kinds,
        data_bytes=sum(tensor.size_bytes for tensor in tensors),
    )
