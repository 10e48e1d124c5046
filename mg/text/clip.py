"""The text tower of CLIP (arXiv 2103.00020): a causal transformer over at most 77 tokens.

The defaults are openai/clip-vit-base-patch32, which encodes the text for DiT in Open-Sora 1.0. Layer names, and so the
names in a checkpoint, are transformers'.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import initializer

from mg.models.config import StoredConfig, is_above_0
from mg.models.layers.layout import narrow
from mg.models.layers.precision import set_precision
from mg.models.registry import merge_config
from mg.text.layers import Dense, Embedding, MultiHeadAttention

ACTIVATIONS = ("quick_gelu", "gelu")
_MASKED = -1e9  # added to scores; exactly 0 after the softmax in fp32


@dataclass(frozen=True, eq=False)
class CLIPConfig(StoredConfig):
    """Config of CLIP's text tower, under transformers' names.

    Attributes:
        vocab_size: tokens of the embedding table.
        hidden_size: channels of a token.
        intermediate_size: channels within a feed-forward layer.
        num_hidden_layers, num_attention_heads: layers, and heads in each.
        max_position_embeddings: the most tokens of a text.
        hidden_act: one of `ACTIVATIONS`.
        layer_norm_eps: of the norms.
        eos_token_id: as released, though not the end token's ID: see `pooled_positions`.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2

    def __post_init__(self):
        self.check_positive("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        self.check_positive("num_attention_heads", "max_position_embeddings")
        heads = self.num_attention_heads
        self.check("hidden_size", self.hidden_size % heads == 0, f"a multiple of num_attention_heads, {heads}")
        self.check("hidden_act", self.hidden_act in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        self.check("layer_norm_eps", is_above_0(self.layer_norm_eps), "above 0")
        self.check("eos_token_id", type(self.eos_token_id) is int, "a token's ID")


def pooled_positions(ids: np.ndarray, eos_token_id: int) -> np.ndarray:
    """The position of a text's pooled state, (B, L) -> (B,): the first end token.

    The released config gives the end token's ID as 2, which is another token's. The end token is then the highest ID,
    at its first position, since padding is the same token.
    """
    return np.argmax(ids if eos_token_id == 2 else ids == eos_token_id, axis=-1)


class LayerNorm(nn.Cell):
    """LayerNorm over the last axis, in fp32; written out, since Ascend compiles MindSpore's operator per shape."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight = Parameter(initializer("ones", (channels,)), name="weight")
        self.bias = Parameter(initializer("zeros", (channels,)), name="bias")
        self.eps = eps

    def construct(self, x):
        x = x - mint.mean(x, dim=-1, keepdim=True)
        root = mint.rsqrt(mint.mean(x.square(), dim=-1, keepdim=True) + self.eps)
        return x * root * self.weight + self.bias


class SelfAttention(nn.Cell):
    def __init__(self, config: CLIPConfig, dtype: str):
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj = (Dense(width, width, dtype, bias=True) for _ in range(3))
        self.out_proj = Dense(width, width, dtype, bias=True)
        self.attention = MultiHeadAttention(heads, scale=(width // heads) ** -0.5)

    def construct(self, x, bias):
        return self.out_proj(self.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), bias))


class FeedForward(nn.Cell):
    """fc2(f(fc1 x)), the activation in fp32; quick GELU is x * sigmoid(1.702 x)."""

    def __init__(self, config: CLIPConfig, dtype: str):
        super().__init__()
        self.fc1 = Dense(config.hidden_size, config.intermediate_size, dtype, bias=True)
        self.fc2 = Dense(config.intermediate_size, config.hidden_size, dtype, bias=True)
        self.quick = config.hidden_act == "quick_gelu"

    def construct(self, x):
        x = self.fc1(x).astype(ms.float32)
        return self.fc2(x * mint.sigmoid(1.702 * x) if self.quick else ops.gelu(x, approximate="none"))


class CLIPLayer(nn.Cell):
    def __init__(self, config: CLIPConfig, dtype: str):
        super().__init__()
        self.self_attn = SelfAttention(config, dtype)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = FeedForward(config, dtype)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def construct(self, x, bias):
        x = x + self.self_attn(self.layer_norm1(x), bias).astype(ms.float32)
        return x + self.mlp(self.layer_norm2(x)).astype(ms.float32)


class Embeddings(nn.Cell):
    """Token plus position embeddings."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def construct(self, ids):
        return self.token_embedding(ids) + narrow(self.position_embedding.weight, 0, 0, ids.shape[1])


class Stack(nn.Cell):
    def __init__(self, config: CLIPConfig, dtype: str):
        super().__init__()
        self.layers = nn.CellList([CLIPLayer(config, dtype) for _ in range(config.num_hidden_layers)])

    def construct(self, x, bias):
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Tower(nn.Cell):
    def __init__(self, config: CLIPConfig, max_length: int, dtype: str):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Stack(config, dtype)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = Tensor(np.triu(np.full((max_length, max_length), _MASKED, np.float32), 1))

    def construct(self, ids):
        return self.final_layer_norm(self.encoder(self.embeddings(ids), self.bias))


class CLIPTextTower(nn.Cell):
    """Token IDs to the states after the final norm.

    Args:
        config: overrides of `CLIPConfig`.
        max_length: tokens per text.
        dtype: fp32 | fp16 | bf16, of matrix products and their weights.

    Raises:
        ValueError: a config that cannot be built, or more tokens than it has positions.
    """

    default_config = CLIPConfig()

    def __init__(self, config: Mapping, max_length: int, dtype: str = "fp32"):
        super().__init__()
        self.config = merge_config(self.default_config, config, "clip")
        if not 2 <= max_length <= self.config.max_position_embeddings:
            raise ValueError(
                f"model_max_length is {max_length}; CLIP takes 2 to {self.config.max_position_embeddings} tokens"
            )
        self.output_dim = self.config.hidden_size
        self.text_model = Tower(self.config, max_length, dtype)
        set_precision(self, dtype)

    def construct(self, ids):
        """ids (B, L) int32 -> (B, L, hidden_size) float32, L = max_length. There is no mask: padding follows the text,
        and attention is causal."""
        return self.text_model(ids)
