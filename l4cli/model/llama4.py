"""Llama 4 whole: text alone, or text with pictures fused in before the first layer.

in: a `Batch`; out: hidden states [B, T, D], or logits [B, T, V] from `model(input_ids)`
source: HF Llama4ForCausalLM, Llama4ForConditionalGeneration (transformers 5.23)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l4cli.errors import L4Error
from l4cli.model.config import Llama4Config
from l4cli.model.layers import Linear
from l4cli.model.text import Cache, TextModel
from l4cli.model.vision import VisionModel
from l4cli.ops.batch import Batch
from l4cli.ops.moe import Routing


class Llama4ForCausalLM(nn.Module):
    """Text in, logits out. `compute_dtype` and `checkpoint_layers` are set from outside."""

    compute_dtype = torch.float32
    checkpoint_layers = False

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        self.config = config
        self.model = TextModel(config.text)
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)  # [V, D]

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Read each row as one document. shapes: [B, T] -> logits [B, T, V]"""
        chunk = self.config.text.attention_chunk_size
        batch = Batch.from_tokens(input_ids, pixel_values, chunk)
        return self.lm_head(self.hidden(batch))

    def hidden(
        self,
        batch: Batch,
        cache: Cache | None = None,
        routing: Routing | None = None,
        num_needed: int | None = None,
        outputs: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """The normed states that `lm_head` reads: all, or the last. shapes: -> h_BTD

        `outputs`: a layer's number to its states, filled in for the numbers it holds
        """
        h_BTD = self.embed(batch.input_ids, batch.pixel_values)
        return self.model(h_BTD, batch, cache, routing, self.checkpoint_layers, num_needed, outputs)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """What the first layer reads. shapes: [B, T] -> h_BTD"""
        if pixel_values is not None:
            fix = "use a checkpoint with vision, or leave the pictures out"
            raise L4Error("pictures given to a text model", why="it has no encoder", fix=fix)
        return _embed(self.model, input_ids, self.compute_dtype)


class Llama4ForConditionalGeneration(nn.Module):
    """Text and pictures in, logits out; the text half keeps its own names below it."""

    compute_dtype = torch.float32
    checkpoint_layers = False

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        assert config.vision is not None
        self.config = config
        self.vision_model = VisionModel(config.vision)
        self.multi_modal_projector = nn.ModuleDict(
            {
                "linear_1": Linear(  # [D, O]
                    config.vision.vision_output_dim, config.text.hidden_size, bias=False
                )
            }
        )
        self.language_model = Llama4ForCausalLM(config)

    @property
    def lm_head(self) -> Linear:
        return self.language_model.lm_head

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Read each row as one document. shapes: [B, T], [tiles, 3, S, S] -> logits [B, T, V]"""
        chunk = self.config.text.attention_chunk_size
        batch = Batch.from_tokens(input_ids, pixel_values, chunk)
        return self.lm_head(self.hidden(batch))

    def hidden(
        self,
        batch: Batch,
        cache: Cache | None = None,
        routing: Routing | None = None,
        num_needed: int | None = None,
        outputs: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """The normed states that `lm_head` reads: all, or the last. shapes: -> h_BTD

        `outputs`: a layer's number to its states, filled in for the numbers it holds
        """
        h_BTD = self.embed(batch.input_ids, batch.pixel_values)
        text = self.language_model.model
        return text(h_BTD, batch, cache, routing, self.checkpoint_layers, num_needed, outputs)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """What the first layer reads, pictures fused in. shapes: [B, T] -> h_BTD"""
        h_BTD = _embed(self.language_model.model, input_ids, self.compute_dtype)
        if pixel_values is None:
            return h_BTD
        return self.fuse(h_BTD, input_ids, self.picture_features(pixel_values))

    def picture_features(self, pixel_values: Tensor) -> Tensor:
        """Encode tiles. shapes: [tiles, 3, S, S] -> [tiles * tokens_per_tile, D]"""
        features = self.vision_model(pixel_values.to(self.compute_dtype))
        return self.multi_modal_projector["linear_1"](features).flatten(0, 1)

    def fuse(self, h_BTD: Tensor, input_ids_BT: Tensor, features_MD: Tensor) -> Tensor:
        """Put features, in order, where the placeholders are."""
        place_M = (input_ids_BT.flatten() == self.config.image_token_index).nonzero().flatten()
        if len(place_M) != len(features_MD):
            why = f"{len(features_MD)} picture features for {len(place_M)} placeholder tokens"
            fix = "give as many tiles as the text has placeholders for"
            raise L4Error("pictures do not match the text", why=why, fix=fix)
        fused_MD = h_BTD.flatten(0, 1).index_copy(0, place_M, features_MD)
        return fused_MD.view_as(h_BTD)


Llama4 = Llama4ForCausalLM | Llama4ForConditionalGeneration


def _embed(text: TextModel, input_ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    return F.embedding(input_ids_BT, text.embed_tokens.weight).to(dtype)


def build_model(
    config: Llama4Config,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> Llama4:
    """Make the modules; with a seed also the first weights, else memory as it comes.

    The compute dtype starts as the dtype of the weights.
    """
    cls = Llama4ForCausalLM if config.vision is None else Llama4ForConditionalGeneration
    with torch.device("meta"):
        model = cls(config)
    dtype = dtype or torch.float32
    model = model.to(dtype)
    if torch.device(device).type != "meta":
        model = model.to_empty(device=device)
    model.compute_dtype = dtype
    if seed is not None:
        init_weights(model, seed)
    return model


@torch.no_grad()
def init_weights(model: Llama4, seed: int) -> None:
    """Draw the first weights: fan-in scaled maps, quieter ends of residual branches, a small head.

    Embeddings of unit variance make small iRoPE models find retrieval circuits several times
    sooner than 0.02 everywhere does (measured on 0.2M to 1M parameters); positions of patches
    at half of it, or the encoder does not see where a patch is.
    """
    config = model.config
    generator = torch.Generator(device="cpu").manual_seed(seed)
    text_gain = (2 * config.text.num_hidden_layers) ** -0.5
    vision_gain = (2 * config.vision.num_hidden_layers) ** -0.5 if config.vision else 1.0
    for name, weight in model.named_parameters():
        gain = vision_gain if name.startswith("vision_model.model.") else text_gain
        weight.copy_(_first_values(name, weight, gain, generator))


_RESIDUAL_ENDS = ("o_proj.weight", "down_proj.weight", "down_proj", "fc2.weight")


def _first_values(name: str, weight: Tensor, gain: float, generator: torch.Generator) -> Tensor:
    """Values of one tensor; `gain` is for the maps that end a residual branch."""
    if weight.ndim == 1 and name.endswith("bias"):
        return torch.zeros(weight.shape)
    if weight.ndim == 1 and name.endswith("weight"):
        return torch.ones(weight.shape)
    if name.endswith("softmax_scale"):
        # Queries begin with a temperature of 1 at 512 keys.
        return torch.full(weight.shape, 1 / math.log(512))
    values = torch.randn(weight.shape, generator=generator)
    if name.endswith("embed_tokens.weight"):
        return values
    if name.endswith("positional_embedding_vlm"):
        return values * 0.5
    if name.endswith(("lm_head.weight", "class_embedding")):
        return values * 0.02
    # Fused experts are [E, in, out], every other matrix [out, in].
    values = values * weight.shape[1] ** -0.5
    is_residual_end = name.endswith(_RESIDUAL_ENDS) and "vision_adapter" not in name
    return values * gain if is_residual_end else values
