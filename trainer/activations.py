"""Count the activations that a pack keeps for its backward pass."""

from __future__ import annotations

from trainer.llama.blocks import Recompute
from trainer.llama.config import LlamaConfig
from trainer.llama.lora.layers import LoraConfig


def activations(
    shape: LlamaConfig,
    tokens: int,
    tp: int,
    recompute: Recompute,
    lora: LoraConfig | None = None,
    *,
    compiled: bool = False,
) -> tuple[int, int]:
    """Return the numbers of activation elements of a pack of `tokens` for the backward pass.

    The first number is kept, in all layers; the second is computed again, in one layer at a time. A
    layer with frozen weights and no adapter keeps no input; an adapter keeps the product of its
    input and `A`. Without tensor parallelism, `compiled` layers compute the first norm's output
    again from its input.
    """
    heads, groups, size = shape.num_attention_heads, shape.num_key_value_heads, shape.head_size
    # Between layers each rank holds its share of the tokens, inside a layer its share of the heads.
    row, full_row = shape.hidden_size // tp, shape.hidden_size
    projected = (heads + 2 * groups) * size // tp
    rotated = (heads + groups) * size // tp
    wide = shape.intermediate_size // tp
    ranks = _adapter_ranks(lora)
    keeps = {role: lora is None or rank > 0 for role, rank in ranks.items()}
    normed = 0 if compiled and tp == 1 else full_row * keeps["qkv"]
    attention = row + normed + projected + rotated + heads * size // tp
    attention += ranks["qkv"] + ranks["output"]
    # Input and output of the norm; gate, up and silu(gate) * up.
    feed_forward = row + full_row * keeps["gate_up"] + 2 * wide + wide * keeps["down"]
    feed_forward += ranks["gate_up"] + ranks["down"]
    kept, again = {
        "none": (attention + feed_forward, 0),
        "selective": (attention + 2 * row, feed_forward - row),
        "full": (row, attention + feed_forward - row),
    }[recompute]
    return tokens * shape.num_hidden_layers * kept, tokens * again


def _adapter_ranks(lora: LoraConfig | None) -> dict[str, int]:
    """Return the sum of the ranks of the adapters of each fused layer, by role."""
    fused = {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "output": ("o_proj",),
        "gate_up": ("gate_proj", "up_proj"),
        "down": ("down_proj",),
    }
    if lora is None:
        return dict.fromkeys(fused, 0)
    return {role: lora.rank * sum(name in lora.adapted for name in names) for role, names in fused.items()}
