"""Count the operations that training on a pack needs, and look up the peak of a GPU.

The counts are those of the model, after Chowdhery et al., "PaLM", appendix B
(https://arxiv.org/abs/2204.02311), with the exact attention of a pack: 6 operations for each weight
of a matrix and each token (2 forward, 4 backward), the head and the matrices after the attention of
the last layer for trained tokens only, and for a conversation of n tokens 6 * n^2 operations for
each channel of the query heads in each layer (scores and weighted sum, forward and backward, the
half below the diagonal). Operations repeated to save memory do not count.

Example: a layer with 32 heads of 64 channels spends 6 * 1000^2 * 2048 = 1.2e10 operations on the
attention of a conversation of 1,000 tokens.
"""

from __future__ import annotations

from sftstream import Pack
from trainer.llama.config import LlamaConfig
from trainer.llama.lora.layers import LoraConfig, adapter_weights

PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 peaks in operations per second (NVIDIA's data sheets), by a part of the name."""


def peak_flops(gpu: str) -> float | None:
    """Return the dense bfloat16 peak of a GPU by its name, None for an unknown GPU."""
    return next((peak for name, peak in PEAKS.items() if name in gpu), None)


def squared_lengths(pack: Pack) -> int:
    """Return the sum of the squared lengths of the conversations in a pack."""
    return sum(segment.length**2 for segment in pack.segments)


def model_flops(
    config: LlamaConfig, tokens: int, trained_tokens: int, squares: int, lora: LoraConfig | None = None
) -> int:
    """Return the operations of a forward and a backward pass, padding excluded.

    `squares` is the sum of the conversations' squared lengths. With `lora` a frozen weight needs 4
    operations for each token: its own gradient is not computed.
    """
    width = config.num_attention_heads * config.head_size
    layers, wide = config.num_hidden_layers, 3 * config.hidden_size * config.intermediate_size
    head = trained_tokens * config.hidden_size * config.vocab_size
    needless = (tokens - trained_tokens) * (width * config.hidden_size + wide)
    products, attention = layers * tokens * block_weights(config) - needless, layers * 6 * squares * width
    if lora is None:
        return 6 * products + attention + 6 * head
    adapters = layers * tokens * adapter_weights(config, lora)
    trained_head = "lm_head" in lora.modules_to_save
    return 4 * products + 6 * adapters + attention + (6 if trained_head else 4) * head


def block_weights(config: LlamaConfig) -> int:
    """Return the number of weights in the matrices of one layer."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * config.head_size * (heads + config.num_attention_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size
