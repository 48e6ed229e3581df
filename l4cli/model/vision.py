"""The picture encoder: tiles to tokens of the text's width before the projector.

in: pixel_values [tiles, 3, S, S] in [-1, 1]; out: features [tiles, tokens_per_tile, O]
source: HF Llama4VisionModel, Llama4VisionPixelShuffleMLP
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l4cli.model.config import VisionConfig
from l4cli.model.layers import LayerNorm, Linear
from l4cli.ops.attention import full_attention
from l4cli.ops.rope import rotate, vision_rotation


class VisionAttention(nn.Module):
    """Bidirectional attention among the patches of one tile, with 2D rotary positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.q_proj = Linear(width, width)  # [Dv, Dv], bias [Dv]
        self.k_proj = Linear(width, width)  # [Dv, Dv], bias [Dv]
        self.v_proj = Linear(width, width)  # [Dv, Dv], bias [Dv]
        self.o_proj = Linear(width, width)  # [Dv, Dv], bias [Dv]

    def forward(self, x_BPD: Tensor, turn_BPH: Tensor) -> Tensor:
        split = (-1, self.head_dim)
        q_BPNH = rotate(self.q_proj(x_BPD).unflatten(-1, split), turn_BPH)
        k_BPNH = rotate(self.k_proj(x_BPD).unflatten(-1, split), turn_BPH)
        v_BPNH = self.v_proj(x_BPD).unflatten(-1, split)
        return self.o_proj(full_attention(q_BPNH, k_BPNH, v_BPNH).flatten(-2))


class VisionMLP(nn.Module):
    """fc2(gelu(fc1(x))), exact GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)  # [Fv, Dv], bias [Fv]
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)  # [Dv, Fv], bias [Dv]

    def forward(self, x_BPD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BPD)))


class VisionLayer(nn.Module):
    """Attention and MLP, each on a layer-normed copy and added back."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, h_BPD: Tensor, turn_BPH: Tensor) -> Tensor:
        h_BPD = h_BPD + self.self_attn(self.input_layernorm(h_BPD), turn_BPH)
        return h_BPD + self.mlp(self.post_attention_layernorm(h_BPD))


class VisionEncoder(nn.Module):
    """The stack of layers; a module of its own because Hugging Face's keys say so."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, h_BPD: Tensor, turn_BPH: Tensor) -> Tensor:
        for layer in self.layers:
            h_BPD = layer(h_BPD, turn_BPH)
        return h_BPD


class PatchEmbedding(nn.Module):
    """Cut a tile into patches, row-major, and map each from (channel, y, x) pixels."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        inputs = config.num_channels * config.patch_size**2
        self.linear = Linear(inputs, config.hidden_size, bias=False)  # [Dv, 3*p*p]

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        size = (self.patch_size, self.patch_size)
        patches = F.unfold(pixels_B3SS, kernel_size=size, stride=size)
        return self.linear(patches.transpose(1, 2))


class PixelShuffleMLP(nn.Module):
    """gelu(fc2(gelu(fc1(x)))): the second GELU is part of the published model."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.intermediate_size, config.projector_input_dim, bias=False)
        self.fc2 = Linear(config.projector_output_dim, config.projector_output_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc2(F.gelu(self.fc1(x))))


class VisionAdapter(nn.Module):
    """Fold neighbouring patches into one token's channels, then mix them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.shuffle = round(1 / config.pixel_shuffle_ratio)
        self.mlp = PixelShuffleMLP(config)

    def forward(self, h_BPD: Tensor) -> Tensor:
        return self.mlp(pixel_shuffle(h_BPD, self.shuffle))


def pixel_shuffle(h_BPD: Tensor, shuffle: int) -> Tensor:
    """Stack each shuffle x shuffle square of patches, row by row. shapes: [B, P/s^2, D*s^2]"""
    num_tiles, num_patches, width = h_BPD.shape
    side = round(num_patches**0.5) // shuffle
    squares = h_BPD.view(num_tiles, side, shuffle, side, shuffle, width)
    squares = squares.permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(num_tiles, side * side, shuffle * shuffle * width)


class VisionModel(nn.Module):
    """Patches and a class token through the encoder; the class token is dropped at the end."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(width))  # [Dv]
        positions = torch.empty(config.num_patches + 1, width)
        self.positional_embedding_vlm = nn.Parameter(positions)  # [P + 1, Dv], class last
        self.patch_embedding = PatchEmbedding(config)
        self.layernorm_pre = LayerNorm(width, eps=config.norm_eps)
        self.layernorm_post = LayerNorm(width, eps=config.norm_eps)
        self.model = VisionEncoder(config)
        self.vision_adapter = VisionAdapter(config)
        self.turn: Tensor | None = None  # a constant, made at first use

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        patches_BPD = self.patch_embedding(pixels_B3SS)
        class_B1D = self.class_embedding.to(patches_BPD.dtype).expand(len(patches_BPD), 1, -1)
        h_BPD = torch.cat([patches_BPD, class_B1D], dim=1)
        h_BPD = h_BPD + self.positional_embedding_vlm.to(h_BPD.dtype)
        h_BPD = self.model(self.layernorm_pre(h_BPD), self._turn(h_BPD.device))
        return self.vision_adapter(self.layernorm_post(h_BPD)[:, :-1].contiguous())

    def _turn(self, device: torch.device) -> Tensor:
        if self.turn is None or self.turn.device != device:
            config = self.config
            grid = config.image_size // config.patch_size
            head_dim = config.hidden_size // config.num_attention_heads
            self.turn = vision_rotation(grid, head_dim, config.rope_theta).to(device)
        return self.turn
