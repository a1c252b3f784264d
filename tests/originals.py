"""Stand-ins for models in their makers' own code: written here, called as the originals are.

Each says it is of the package that the original is of, has the original's class name, the names of its parts, and the
way its blocks, attentions and MLPs call each other. What it computes inside them is the plainest that there is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import silu

CHANNELS, HEADS, BLOCKS, NEURONS, PATCH, SIZE = 32, 4, 3, 48, 8, 32


def of(module: str) -> Any:
    """Makes a class say that `module` is where it comes from."""

    def decorate(cls: type) -> type:
        cls.__module__ = module
        return cls

    return decorate


def turned(values: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Queries or keys `(..., tokens, channels)`, turned by their positions."""
    first, second = values.chunk(2, dim=-1)
    return values * cosine + torch.cat([-second, first], -1) * sine


def angles(height: int, width: int, channels: int, first: int = 0) -> Tensor:
    """One row per patch `(height * width, channels)`."""
    rates = torch.arange(1, channels // 4 + 1) / channels
    rows = (torch.arange(height) + first)[:, None, None] * rates
    columns = (torch.arange(width) + first)[None, :, None] * rates
    half = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], -1).flatten(0, 1)
    return torch.cat([half, half], -1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(CHANNELS, NEURONS), nn.GELU(), nn.Linear(NEURONS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    """Value and gate in `first` and `second`, the way back in `last`."""

    def __init__(self, first: str, second: str, last: str) -> None:
        super().__init__()
        self.names = first, second, last
        for name in sorted(self.names):
            ends = (NEURONS, CHANNELS) if name == last else (CHANNELS, NEURONS)
            setattr(self, name, nn.Linear(*ends))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = (getattr(self, name) for name in self.names)
        return last(silu(first(x)) * second(x))


class Fused(Gated):
    """As a fused kernel does it: weights are read, modules never called."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = (getattr(self, name) for name in self.names)
        hidden = silu(x @ first.weight.T + first.bias) * (x @ second.weight.T + second.bias)
        return hidden @ last.weight.T + last.bias


def mlp(kind: str) -> nn.Module:
    """The MLP of a maker: "mlp", or gated or fused with the names of its three linears, as in "gated w1 w2 w3"."""
    kind, *names = kind.split()
    return Mlp() if kind == "mlp" else {"gated": Gated, "fused": Fused}[kind](*names)


class Attention(nn.Module):
    """Queries, keys and values from one linear; the arguments after the tokens are each maker's own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def parts(self, x: Tensor) -> Any:
        """Queries, keys and values `(batch, heads, tokens, channels)`."""
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.proj(functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.parts(x))


class Block(nn.Module):
    attention: type = Attention

    def __init__(self, kind: str = "mlp") -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(CHANNELS), self.attention()
        self.norm2, self.mlp = nn.LayerNorm(CHANNELS), mlp(kind)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Embedded(nn.Module):
    """Patches, a class token and positions, as most have them."""

    def __init__(self, class_token: bool = True) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, CHANNELS, PATCH, PATCH)
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2 + class_token, CHANNELS))
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, CHANNELS))
        self.norm = nn.LayerNorm(CHANNELS)

    def embedded(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        if hasattr(self, "cls_token"):
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + self.pos_embed


# DINOv2 of torch.hub: blocks take a tensor or a list of tensors, may come in chunks


class BiasedAttention(Attention):
    def forward(self, x: Tensor, attn_bias: Any = None) -> Tensor:
        return self.attend(*self.parts(x), attn_bias)


class NestedTensorBlock(Block):
    attention = BiasedAttention

    def forward(self, x_or_x_list: Any) -> Any:
        one = super().forward
        return [one(x) for x in x_or_x_list] if isinstance(x_or_x_list, list) else one(x_or_x_list)


class BlockChunk(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class DinoV2(Embedded):
    def __init__(self, num_register_tokens: int = 0, kind: str = "mlp", chunks: int = 0) -> None:
        super().__init__()
        self.num_register_tokens = num_register_tokens
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, CHANNELS)) if num_register_tokens else None
        )
        blocks: list[nn.Module] = [NestedTensorBlock(kind) for _ in range(BLOCKS)]
        self.chunked_blocks = chunks > 0
        if chunks:
            size = BLOCKS // chunks
            starts = range(0, BLOCKS, size)
            blocks = [BlockChunk([nn.Identity()] * start + blocks[start : start + size]) for start in starts]
        self.blocks = nn.ModuleList(blocks)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Any = None) -> Tensor:
        x = self.embedded(x)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        return x

    def forward_features(self, x: Any, masks: Any = None) -> Any:
        several = isinstance(x, list)
        x = [self.prepare_tokens_with_masks(part) for part in x] if several else self.prepare_tokens_with_masks(x)
        for block in self.blocks:
            x = block(x)
        outputs = [self.described(part) for part in (x if several else [x])]
        return outputs if several else outputs[0]

    def described(self, x: Tensor) -> dict[str, Tensor]:
        normed, first = self.norm(x), self.num_register_tokens + 1
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": x,
        }

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> tuple[Tensor, ...]:
        x = self.prepare_tokens_with_masks(x)
        found = []
        for block in [b for blocks in self.blocks for b in blocks] if self.chunked_blocks else self.blocks:
            x = block(x)
            found.append(self.norm(x)[:, 1 + self.num_register_tokens :])
        return tuple(found[-n:])

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        features = self.forward_features(*args, **kwargs)
        return features if is_training else features["x_norm_clstoken"]


@of("dinov2.models.vision_transformer")
class DinoVisionTransformer(DinoV2):
    pass


@of("depth_anything_v2.dinov2")
class _DepthAnythingDino(DinoV2):
    pass


_DepthAnythingDino.__name__ = "DinoVisionTransformer"


@of("depth_anything_v2.dpt")
class DepthAnythingV2(nn.Module):
    """Depth Anything V2: the encoder is called `pretrained`, its features go to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained, self.head = _DepthAnythingDino(), nn.Linear(CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.pretrained.get_intermediate_layers(x, 2)
        return self.head(torch.stack(features).sum(0))


# DINOv3 of torch.hub: blocks take lists, the rotary table is (sine, cosine) for the last tokens


class RotaryAttention(Attention):
    def forward(self, x: Tensor, attn_bias: Any = None, rope: Any = None) -> Tensor:
        query, key, value = self.parts(x)
        if rope is not None:
            first = x.shape[1] - len(rope[0])
            query, key = (
                torch.cat([part[:, :, :first], turned(part[:, :, first:], *rope)], 2) for part in (query, key)
            )
        return self.attend(query, key, value)


class SelfAttentionBlock(Block):
    attention = RotaryAttention

    def forward(self, x_or_x_list: Any, rope_or_rope_list: Any = None) -> Any:
        if isinstance(x_or_x_list, Tensor):
            return self.listed([x_or_x_list], [rope_or_rope_list])[0]
        return self.listed(x_or_x_list, rope_or_rope_list or [None] * len(x_or_x_list))

    def listed(self, tokens: list[Tensor], ropes: list[Any]) -> list[Tensor]:
        found = []
        for x, rope in zip(tokens, ropes, strict=True):
            x = x + self.attn(self.norm1(x), rope=rope)
            found.append(x + self.mlp(self.norm2(x)))
        return found


@of("dinov3.models.vision_transformer")
class _DinoV3(nn.Module):
    def __init__(self, n_storage_tokens: int = 0, kind: str = "mlp") -> None:
        super().__init__()
        self.n_storage_tokens = n_storage_tokens
        self.patch_embed = nn.Conv2d(3, CHANNELS, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, CHANNELS))
        if n_storage_tokens:
            self.storage_tokens = nn.Parameter(torch.zeros(1, n_storage_tokens, CHANNELS))
        self.blocks = nn.ModuleList(SelfAttentionBlock(kind) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(CHANNELS)

    def rope_embed(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        table = angles(height, width, CHANNELS // HEADS).to(self.cls_token)
        return table.sin(), table.cos()

    def prepare_tokens_with_masks(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(x)
        height, width = x.shape[-2:]
        own = [self.cls_token, *([self.storage_tokens] if self.n_storage_tokens else [])]
        first = [token.expand(len(x), -1, -1) for token in own]
        return torch.cat([*first, x.flatten(2).transpose(1, 2)], 1), (height, width)

    def forward_features_list(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        prepared = [self.prepare_tokens_with_masks(x) for x in images]
        tokens = [x for x, _ in prepared]
        for block in self.blocks:
            tokens = block(tokens, [self.rope_embed(*size) for _, size in prepared])
        first = self.n_storage_tokens + 1
        normed = [self.norm(x) for x in tokens]
        return [
            {
                "x_norm_clstoken": x[:, 0],
                "x_storage_tokens": x[:, 1:first],
                "x_norm_patchtokens": x[:, first:],
            }
            for x in normed
        ]

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> tuple[Tensor, ...]:
        x, size = self.prepare_tokens_with_masks(x)
        found = []
        for block in self.blocks:
            x = block(x, self.rope_embed(*size))
            found.append(self.norm(x)[:, self.n_storage_tokens + 1 :])
        return tuple(found[-n:])

    def forward(self, x: Any, is_training: bool = False) -> Any:
        features = self.forward_features_list(x if isinstance(x, list) else [x])
        if isinstance(x, list):
            return features
        return features[0] if is_training else features[0]["x_norm_clstoken"]


_DinoV3.__name__ = "DinoVisionTransformer"


# CLIP's sequence-first blocks, with AlphaCLIP's attention and its second image


class SequenceFirstAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens, batch, _ = x.shape
        query, key, value = (
            part.reshape(tokens, batch * HEADS, -1).transpose(0, 1) for part in self.in_proj(x).chunk(3, dim=-1)
        )
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        maps = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
        return self.out_proj((maps @ value).transpose(0, 1).reshape(tokens, batch, -1)), maps


class CustomResidualAttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(CHANNELS), SequenceFirstAttention()
        self.ln_2 = nn.LayerNorm(CHANNELS)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(CHANNELS, NEURONS))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(NEURONS, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.attn(self.ln_1(x), attn_mask=None)
        x = x + found
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, block: type, **settings: Any) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(block(**settings) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


@of("alpha_clip.model")
class _AlphaClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, CHANNELS, PATCH, PATCH, bias=False)
        self.conv1_alpha = nn.Conv2d(1, CHANNELS, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(CHANNELS))
        self.positional_embedding = nn.Parameter(torch.zeros((SIZE // PATCH) ** 2 + 1, CHANNELS))
        self.ln_pre, self.ln_post = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.transformer = Transformer(CustomResidualAttentionBlock)
        self.proj = nn.Parameter(torch.zeros(CHANNELS, 16))

    def forward(self, x: Tensor, alpha: Tensor) -> Tensor:
        x = (self.conv1(x) + self.conv1_alpha(alpha)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0]) @ self.proj


_AlphaClip.__name__ = "VisionTransformer"


# Perception Encoder and EVA-CLIP: a callable turns queries and keys inside the attention


class Rope2D:
    """A plain object, shared by all blocks, that turns as many tokens as it was told of."""

    def __init__(self, class_token: bool) -> None:
        self.class_token = class_token
        self.table = torch.zeros(0)

    def update_grid(self, height: int, width: int) -> None:
        table = angles(height, width, CHANNELS // HEADS, first=int(self.class_token))
        self.table = torch.cat([torch.zeros(1, table.shape[1]), table]) if self.class_token else table

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        table = self.table.to(query)
        return turned(query, table.sin(), table.cos()), turned(key, table.sin(), table.cos())


class PerceptionAttention(nn.Module):
    def __init__(self, rope: Rope2D) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * CHANNELS, CHANNELS))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * CHANNELS))
        self.out_proj, self.rope = nn.Linear(CHANNELS, CHANNELS), rope

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        joined = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = joined.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rope:
            query, key = self.rope(query, key)
        return self.out_proj(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class PerceptionBlock(CustomResidualAttentionBlock):
    def __init__(self, rope: Rope2D | None) -> None:
        super().__init__()
        self.attn: nn.Module = (
            PerceptionAttention(rope) if rope else nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        own = isinstance(self.attn, PerceptionAttention)
        x = x + (self.attn(y, attn_mask=attn_mask) if own else self.attn(y, y, y, need_weights=False)[0])
        return x + self.mlp(self.ln_2(x))


@of("core.vision_encoder.pe")
class _Perception(nn.Module):
    def __init__(self, use_cls_token: bool = True, use_rope2d: bool = True) -> None:
        super().__init__()
        self.use_cls_token = use_cls_token
        self.conv1 = nn.Conv2d(3, CHANNELS, PATCH, PATCH, bias=False)
        self.rope = Rope2D(use_cls_token) if use_rope2d else None
        self.ln_pre, self.ln_post = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.transformer = Transformer(PerceptionBlock, rope=self.rope)
        if use_cls_token:
            self.class_embedding = nn.Parameter(torch.zeros(CHANNELS))
        self.proj = nn.Parameter(torch.zeros(CHANNELS, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.rope is not None:
            self.rope.update_grid(*x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        if self.use_cls_token:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_post(self.transformer(self.ln_pre(x)))
        return (x[:, 0] if self.use_cls_token else x.mean(1)) @ self.proj


_Perception.__name__ = "VisionTransformer"


class VisionRotaryEmbeddingFast(nn.Module):
    """A module, shared by all blocks, that turns all tokens but the class token, which is kept from it."""

    def __init__(self) -> None:
        super().__init__()
        table = angles(SIZE // PATCH, SIZE // PATCH, CHANNELS // HEADS)
        self.freqs_sin, self.freqs_cos = nn.Buffer(table.sin()), nn.Buffer(table.cos())

    def forward(self, t: Tensor, patch_indices_keep: Any = None) -> Tensor:
        return turned(t, self.freqs_sin, self.freqs_cos)


class EvaAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.rope: nn.Module | None = None

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        query, key, value = self.parts(x)
        if self.rope:
            query, key = (torch.cat([part[:, :, :1], self.rope(part[:, :, 1:])], 2) for part in (query, key))
        mask = None if rel_pos_bias is None else rel_pos_bias.to(x)
        if attn_mask is not None:
            closed = torch.zeros_like(attn_mask, dtype=x.dtype).masked_fill(~attn_mask.bool(), float("-inf"))
            mask = closed[:, None, None] if mask is None else mask + closed[:, None, None]
        return self.attend(query, key, value, mask)


class EvaBlock(Block):
    attention = EvaAttention

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), rel_pos_bias=rel_pos_bias, attn_mask=attn_mask)
        return x + self.mlp(self.norm2(x))


@of("eva_clip.eva_vit_model")
class EVAVisionTransformer(Embedded):
    def __init__(self, kind: str = "gated w1 w2 w3", rope: bool = True, biased: bool = False) -> None:
        super().__init__()
        self.rope = VisionRotaryEmbeddingFast() if rope else None
        tokens = (SIZE // PATCH) ** 2 + 1
        self.rel_pos_bias = nn.Parameter(torch.zeros(HEADS, tokens, tokens)) if biased else None
        self.blocks = nn.ModuleList(EvaBlock(kind) for _ in range(BLOCKS))
        for block in self.blocks:
            block.attn.rope = self.rope
        self.head = nn.Linear(CHANNELS, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedded(x)
        for block in self.blocks:
            x = block(x, rel_pos_bias=self.rel_pos_bias)
        return self.head(self.norm(x)[:, 0])


# InternViT by remote code, AIMv2


@of("transformers_modules.OpenGVLab.InternViT.modeling_intern_vit")
class InternVisionModel(nn.Module):
    class Encoder(nn.Module):
        class Layer(Block):
            def __init__(self) -> None:
                super().__init__()
                self.ls1, self.ls2 = nn.Parameter(torch.ones(CHANNELS)), nn.Parameter(torch.ones(CHANNELS))

            def forward(self, hidden_states: Tensor) -> Tensor:
                hidden_states = hidden_states + self.attn(self.norm1(hidden_states)) * self.ls1
                return hidden_states + self.mlp(self.norm2(hidden_states)) * self.ls2

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(self.Layer() for _ in range(BLOCKS))

        def forward(self, inputs_embeds: Tensor) -> Tensor:
            for layer in self.layers:
                inputs_embeds = layer(inputs_embeds)
            return inputs_embeds

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.encoder = Embedded(), self.Encoder()

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        x = self.encoder(inputs_embeds=self.embeddings.embedded(pixel_values))
        return {"last_hidden_state": x, "pooler_output": x[:, 0]}


class MaskedAttention(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None, **_: Any) -> Tensor:
        return self.attend(*self.parts(x), mask)


class AimBlock(Block):
    attention = MaskedAttention

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


@of("aim.v2.torch.models")
class AIMv2VisionEncoder(nn.Module):
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(AimBlock("gated fc1 fc3 fc2") for _ in range(BLOCKS))
            self.post_trunk_norm = nn.LayerNorm(CHANNELS)

        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
            features = []
            for block in self.blocks:
                tokens = block(tokens, mask=mask)
                features.append(tokens)
            return self.post_trunk_norm(tokens), features

    def __init__(self) -> None:
        super().__init__()
        self.preprocessor, self.trunk = Embedded(class_token=False), self.Trunk()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.trunk(self.preprocessor.embedded(x), mask)[0]


# I-JEPA and V-JEPA 2: both of a package called src


class PairAttention(Attention):
    """I-JEPA's: gives its maps beside the tokens."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        query, key, value = self.parts(x)
        maps = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        return self.proj((maps @ value).transpose(1, 2).flatten(2)), maps


class PairBlock(Block):
    attention = PairAttention

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
        found, maps = self.attn(self.norm1(x))
        if return_attention:
            return maps
        x = x + found
        return x + self.mlp(self.norm2(x))


@of("src.models.vision_transformer")
class _IJepa(Embedded):
    def __init__(self) -> None:
        super().__init__(class_token=False)
        self.blocks = nn.ModuleList(PairBlock() for _ in range(BLOCKS))

    def forward(self, x: Tensor, masks: Any = None) -> Tensor:
        x = self.embedded(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class RoPEAttention(Attention):
    """Positions are the tokens' own numbers in the clip, or 0, 1, 2 ... of as many as the clip has."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        T: int = 1,  # noqa: N803
        H_patches: int = 4,  # noqa: N803
        W_patches: int = 4,  # noqa: N803
    ) -> Tensor:
        query, key, value = self.parts(x)
        numbers = torch.arange(T * H_patches * W_patches, device=x.device) if mask is None else mask[:, None]
        rates = torch.arange(1, query.shape[-1] // 2 + 1) / query.shape[-1]
        table = numbers[..., None] * torch.cat([rates, rates]).to(x)
        query, key = (turned(part, table.sin(), table.cos()) for part in (query, key))
        return self.attend(query, key, value, attn_mask)


class JepaBlock(Block):
    def __init__(self, kind: str, rope: bool) -> None:
        super().__init__(kind)
        if rope:
            self.attn = RoPEAttention()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        T: Any = None,  # noqa: N803
        H_patches: Any = None,  # noqa: N803
        W_patches: Any = None,  # noqa: N803
    ) -> Tensor:
        y = self.norm1(x)
        if isinstance(self.attn, RoPEAttention):
            y = self.attn(y, mask=mask, attn_mask=attn_mask, T=T, H_patches=H_patches, W_patches=W_patches)
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


@of("src.models.vision_transformer")
class _VJepa2(nn.Module):
    def __init__(self, kind: str = "gated fc1 fc2 fc3", rope: bool = True) -> None:
        super().__init__()
        self.patch_embed = nn.Conv3d(3, CHANNELS, (2, PATCH, PATCH), (2, PATCH, PATCH))
        self.blocks = nn.ModuleList(JepaBlock(kind, rope) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(CHANNELS)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        x = self.patch_embed(x)
        frames, height, width = x.shape[-3:]
        x = x.flatten(2).transpose(1, 2)
        if masks is not None:
            x = x.gather(1, masks[..., None].expand(-1, -1, CHANNELS))
        for block in self.blocks:
            x = block(x, mask=masks, attn_mask=None, T=frames, H_patches=height, W_patches=width)
        return self.norm(x)


_IJepa.__name__ = _VJepa2.__name__ = "VisionTransformer"


# MAE: an encoder that sees some of the patches in any order, and a decoder with blocks of its own


@of("models_mae")
class MaskedAutoencoderViT(Embedded):
    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Buffer(torch.rand(1, (SIZE // PATCH) ** 2, generator=torch.Generator().manual_seed(0)))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.decoder_embed = nn.Linear(CHANNELS, CHANNELS)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, CHANNELS))
        self.decoder_blocks = nn.ModuleList(Block() for _ in range(2))
        self.decoder_pred = nn.Linear(CHANNELS, 3 * PATCH**2)

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> Tensor:
        x = self.patch_embed(imgs).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        order = self.noise.expand(len(x), -1).argsort(1)  # the original draws it anew, for each image its own
        kept = order[:, : int(x.shape[1] * (1 - mask_ratio))]
        x = x.gather(1, kept[..., None].expand(-1, -1, CHANNELS))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        masks = self.mask_token.expand(len(x), order.shape[1] + 1 - x.shape[1], -1)
        back = order.argsort(1)[..., None].expand(-1, -1, CHANNELS)
        x = torch.cat([x[:, :1], torch.cat([x[:, 1:], masks], 1).gather(1, back)], 1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(x)[:, 1:]


# RADIO in timm's form: its own generator of tokens in place of timm's embeddings


class PatchGenerator(nn.Module):
    def __init__(self, num_cls_tokens: int, num_registers: int) -> None:
        super().__init__()
        self.num_cls_tokens, self.num_registers = num_cls_tokens, num_registers
        self.embedder = nn.Conv2d(3, CHANNELS, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(num_cls_tokens + num_registers, CHANNELS))

    @property
    def num_skip(self) -> int:
        return self.num_cls_tokens + self.num_registers

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedder(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)


def radio(timm_vit: nn.Module, num_cls_tokens: int = 3, num_registers: int = 5) -> nn.Module:
    """timm's VisionTransformer as RADIO changes it."""

    class RADIOModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = timm_vit
            self.model.patch_generator = PatchGenerator(num_cls_tokens, num_registers)
            self.model.patch_embed = self.model.cls_token = self.model.pos_embed = None

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.model.norm(self.model.blocks(self.model.patch_generator(x)))
            return y[:, : self.model.patch_generator.num_cls_tokens].flatten(1), y[
                :, self.model.patch_generator.num_skip :
            ]

    return RADIOModel()
