"""A model is tested before it is trained on packs: conversations see only themselves, the loss counts tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM

from sftstream.integrations import hugging_face, shifted
from sftstream.integrations.isolation import measured_leak, require_isolation
from sftstream.integrations.token_loss import require_token_loss

SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
    "pad_token_id": None,
}


def model(kind: str, attention: str = "sdpa", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def blind(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """Causal attention that ignores its mask, as a kernel without variable lengths would."""
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("blind", blind)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "mistral"])
def test_other_conversations_change_no_bit_of_the_logits(kind: str, attention: str) -> None:
    window = {"sliding_window": 64} if kind in ("gemma3_text", "mistral") else {}
    tested = model(kind, attention, **window)
    before, state = tested.training, torch.get_rng_state()
    assert measured_leak(tested, hugging_face) == 0.0
    require_isolation(tested, hugging_face)
    require_token_loss(tested)
    assert tested.training == before
    assert torch.equal(torch.get_rng_state(), state)


def test_experts_pass_whose_sums_round_differently() -> None:
    require_isolation(model("mixtral", num_local_experts=4), hugging_face)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_attention_that_ignores_its_mask_is_refused_with_one_that_passes(layers: int) -> None:
    leaking = model("llama", "blind", num_hidden_layers=layers)
    with pytest.raises(ValueError, match=r"attention 'blind': .* attn_implementation=\"(\w+)\", which passes") as error:
        require_isolation(leaking, hugging_face)
    assert leaking.config._attn_implementation == "blind"
    remedy = str(error.value).split('attn_implementation="')[1].split('"')[0]
    require_isolation(model("llama", remedy, num_hidden_layers=layers), hugging_face)


def test_a_model_with_a_cache_is_refused_with_the_cache_as_the_cause() -> None:
    leaking = model("llama", use_cache=True)
    with pytest.raises(ValueError, match=r"set use_cache=False"):
        require_isolation(leaking, hugging_face)
    assert leaking.config.use_cache
    leaking.config.use_cache = False
    require_isolation(leaking, hugging_face)


def test_a_model_without_attention_is_refused() -> None:
    """A recurrent state passes from conversation to conversation, whatever the positions."""
    with pytest.raises(ValueError, match="no attention implementation installed here isolates them"):
        require_isolation(model("mamba", "eager", state_size=8, expand=2), hugging_face)


def test_a_batch_without_positions_is_refused() -> None:
    def without_positions(pack: Any) -> Any:
        return {"input_ids": pack.input_ids[None], "labels": pack.labels[None]}

    with pytest.raises(ValueError, match="conversations of a pack see each other"):
        require_isolation(model("llama"), without_positions)


def test_a_loss_over_the_tokens_of_each_pack_alone_is_refused() -> None:
    tested = model("llama")
    own = tested.loss_function
    tested.loss_function = lambda *a, num_items_in_batch=None, **k: own(*a, **k)
    with pytest.raises(ValueError, match=r"where the sum over 117 trained tokens divided by num_items_in_batch = 234"):
        require_token_loss(tested)


def test_labels_shifted_twice_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the loss of LlamaForCausalLM is"):
        require_token_loss(model("llama"), shifted)


def test_a_model_that_takes_no_count_is_refused() -> None:
    tested = model("llama")
    tested.accepts_loss_kwargs = False
    with pytest.raises(ValueError, match="mean of means"):
        require_token_loss(tested)
