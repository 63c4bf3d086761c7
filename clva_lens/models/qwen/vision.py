"""Qwen-VL's eyes: a vision transformer, and the resampler that makes 256 tokens of its patches.

Facts from Qwen's released code (``visual.py`` of Qwen/Qwen-VL-Chat). The layers are of CLIP's own
class; what differs is around them: no class token, a norm before the first layer and none after the
last, and positions learned for 16 × 16 patches that are stretched to the picture's 32 × 32.
"""

import math
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPEncoder, eager_attention_forward

from clva_lens.models.qwen.configuration import QwenVLVisionConfig


def sine_cosine_positions(side: int, width: int) -> Float[Tensor, "cell width"]:
    """Return fixed positions of a square grid, row by row, in [-1, 1].

    The first half of a cell's vector tells its column, the second its row; each is sin(p·ω) and
    then cos(p·ω) for the frequencies ω_i = 10000^(−i/(width/4)).
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = line[None].expand(side, side, -1)
    row = line[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(side * side, width).float()


def on_another_grid(
    positions: Float[Tensor, "cell width"], cells: int
) -> Float[Tensor, "other width"]:
    """Return positions of a square grid on one of ``cells`` cells, bicubic in float32 or better."""
    side, other = math.isqrt(len(positions)), math.isqrt(cells)
    if side == other:
        return positions
    kind = torch.promote_types(positions.dtype, torch.float32)
    square = positions.to(kind).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    stretched = functional.interpolate(
        square, size=(other, other), mode="bicubic", align_corners=False
    )
    return stretched.flatten(2).squeeze(0).T.to(positions.dtype)


@no_type_check
class QwenVLVisionTower(PreTrainedModel):
    """Pixels to patches: [batch, 3, size, size] to [batch, patch, width]."""

    config: QwenVLVisionConfig
    input_modalities = "image"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CLIPEncoderLayer"]  # noqa: RUF012 - transformers' own spelling

    def __init__(self, config: QwenVLVisionConfig) -> None:
        """Make the tower of ``config``, with random weights."""
        super().__init__(config)
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(config.position_side**2, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        layers: Any = config  # CLIP's own annotation is of both its halves
        self.encoder = CLIPEncoder(layers)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            initialization.normal_(self.position_embedding, std=self.config.hidden_size**-0.5)

    def forward(
        self, pixel_values: Float[Tensor, "batch 3 height width"], **kwargs: Any
    ) -> BaseModelOutput:
        """Return the last layer's patches, row by row."""
        pixels = pixel_values.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        patches = patches + on_another_grid(self.position_embedding, patches.shape[1])
        return self.encoder(self.pre_layernorm(patches), **kwargs)


@no_type_check
class QwenVLResampler(nn.Module):
    """One cross-attention: learned queries on a grid of their own read the patches.

    The positions, the queries' own on both sides (stretched to the grid of the patches), are added
    to queries and keys, not to values. A norm and a square matrix follow.
    """

    def __init__(self, config: QwenVLVisionConfig) -> None:
        """Make the resampler of ``config``; the model's ``_init_weights`` calls ``fill``."""
        super().__init__()
        self.config, width = config, config.output_size
        self.head_dim = width // config.resampler_heads
        self.scaling, self.is_causal = self.head_dim**-0.5, False
        self.query = nn.Parameter(torch.empty(config.num_queries, width))
        self.positions = nn.Parameter(torch.empty(config.num_queries, width), requires_grad=False)
        self.kv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.ln_q = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ln_kv = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.ln_post = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(width, width, bias=False)

    @torch.no_grad()
    def fill(self) -> None:
        """Fill the queries with small noise, and their positions by formula."""
        count, width = self.query.shape
        initialization.normal_(self.query, std=0.02)
        initialization.copy_(self.positions, sine_cosine_positions(math.isqrt(count), width))

    def forward(
        self, patches: Float[Tensor, "batch patch width"], **kwargs: Any
    ) -> Float[Tensor, "batch query out"]:
        """Return one token for each query, for the language model."""
        batch, count, _ = patches.shape
        seen = self.ln_kv(self.kv_proj(patches))
        asked = (self.ln_q(self.query) + self.positions).expand(batch, -1, -1)
        keys = seen + on_another_grid(self.positions, count)
        heads = [
            part.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj(asked), self.k_proj(keys), self.v_proj(seen))
        ]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            str(self.config._attn_implementation), eager_attention_forward
        )
        out, _ = attend(self, *heads, None, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.projection(self.ln_post(self.out_proj(out.flatten(2))))
