"""Logits and gradients equal those of transformers, and a pack equals its conversations alone."""

from pathlib import Path

import msgspec
import pytest
import torch
from tiny_llama import CONFIG, FAMILIES, LLAMA3, TIED, built, gradients, loss_of, pack_of, public_llama, segments
from torch.nn import functional as F

from trainer.llama.config import LinearScaling, Llama3Scaling, LlamaConfig
from trainer.llama.hf_config import read_config
from trainer.llama.init import init_weights
from trainer.llama.model import Llama
from trainer.llama.rotary import inverse_frequencies
from trainer.llama.weights import layout, load_weights


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_every_gradient_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    theirs = public_llama(**FAMILIES[family])
    theirs.save_pretrained(tmp_path)
    ours = Llama(read_config(tmp_path))
    load_weights(ours, tmp_path)
    pack = pack_of(41)

    expected = theirs(input_ids=pack.input_ids[None]).logits[0]
    expected_loss = F.cross_entropy(expected, pack.labels, reduction="sum")
    expected_loss.backward()
    logits = ours(pack.input_ids, pack.position_ids, pack.segments)
    loss = loss_of(ours, pack)
    loss.backward()

    # Measured: below 3e-6 of the largest value, the rounding of sums in another order.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    parameters = dict(theirs.named_parameters())
    for name, gradient in gradients(ours).items():
        pieces = layout(ours.config)[name]
        fused = torch.cat([parameters[p.tensor].grad[p.start : p.start + p.rows] for p in pieces])
        torch.testing.assert_close(gradient, fused, rtol=0, atol=1e-5 * fused.abs().max().item(), msg=name)


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "factor": 4.0}, None])
def test_frequencies_have_the_bits_of_transformers(scaling: dict[str, object] | None) -> None:
    rope = {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}
    theirs = public_llama(head_dim=64, rope_parameters=rope).model.rotary_emb.inv_freq
    fields = msgspec.to_builtins(CONFIG) | {"head_dim": 64, "rope_scaling": scaling}
    assert torch.equal(inverse_frequencies(msgspec.convert(fields, LlamaConfig)), theirs)


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_a_pack_gives_the_logits_and_gradients_of_its_conversations_one_by_one(config: LlamaConfig) -> None:
    lengths = (9, 1, 14, 8)
    packed = pack_of(*lengths)
    together, alone = built(config), built(config)

    logits = together(packed.input_ids, packed.position_ids, packed.segments)
    loss_of(together, packed).backward()
    parts = []
    for ids, labels in zip(packed.input_ids.split(lengths), packed.labels.split(lengths), strict=True):
        parts.append(alone(ids, torch.arange(len(ids)), segments(len(ids))))
        F.cross_entropy(parts[-1], labels, reduction="sum").backward()

    torch.testing.assert_close(logits, torch.cat(parts), rtol=0, atol=1e-5)
    expected = gradients(alone)
    for name, gradient in gradients(together).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=2e-6 * scale, msg=name)


def test_a_conversation_changes_no_bit_of_another_in_the_pack() -> None:
    model, packed = built(CONFIG), pack_of(9, 14, 9)
    changed = packed.input_ids.clone()
    changed[9:23] = (changed[9:23] + 1) % CONFIG.vocab_size
    before = model(packed.input_ids, packed.position_ids, packed.segments)
    after = model(changed, packed.position_ids, packed.segments)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[23:], after[23:])
    assert not torch.equal(before[9:23], after[9:23])


def test_a_later_token_changes_no_bit_of_an_earlier_logit() -> None:
    model, packed = built(CONFIG), pack_of(16)
    changed = packed.input_ids.clone()
    changed[11] = (changed[11] + 1) % CONFIG.vocab_size
    before = model(packed.input_ids, packed.position_ids, packed.segments)
    after = model(changed, packed.position_ids, packed.segments)
    assert torch.equal(before[:11], after[:11])
    assert not torch.equal(before[11:], after[11:])


def test_logits_depend_only_on_distances_between_the_given_positions() -> None:
    model, packed = built(CONFIG), pack_of(9, 14)
    logits, moved, stretched = (
        model(packed.input_ids, positions, packed.segments)
        for positions in (packed.position_ids, packed.position_ids + 3, packed.position_ids * 3)
    )
    torch.testing.assert_close(moved, logits, rtol=0, atol=1e-4)
    assert (stretched - logits).abs().amax(1)[[2, 8, 12, 22]].gt(1e-2).all()


def test_trained_positions_alone_give_the_loss_and_gradients_of_all_positions() -> None:
    packed = pack_of(9, 14, 9)
    everywhere, trained_only = built(TIED), built(TIED)
    loss = loss_of(everywhere, packed)
    loss.backward()
    positions = torch.nonzero(packed.labels >= 0).flatten()
    inputs = packed.input_ids, packed.position_ids, packed.segments, positions
    assert trained_only(*inputs).shape == (len(positions), CONFIG.vocab_size)
    partial = trained_only(*inputs, packed.labels[positions])
    partial.backward()
    torch.testing.assert_close(partial, loss, rtol=1e-6, atol=0)
    expected = gradients(everywhere)
    for name, gradient in gradients(trained_only).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * expected[name].abs().max().item())


def test_a_pack_without_trained_positions_still_gives_every_parameter_a_zero_gradient() -> None:
    model, packed = built(CONFIG), pack_of(9, 14, 9)
    none = torch.empty(0, dtype=torch.int64)
    loss = model(packed.input_ids, packed.position_ids, packed.segments, none, none)
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_two_deterministic_runs_have_the_same_bits() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            model = built(TIED)
            loss = loss_of(model, pack_of(9, 14, 9))
            loss.backward()
            runs.append([loss.detach(), *gradients(model).values()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    deeper = built(msgspec.structs.replace(CONFIG, num_hidden_layers=3)).state_dict()
    for name, weight in built(CONFIG).state_dict().items():
        assert torch.equal(weight, deeper[name]), name
    assert not torch.equal(built(CONFIG, 0).head.weight, built(CONFIG, 1).head.weight)
    assert not torch.equal(built(CONFIG).head.weight, built(CONFIG).embedding.weight)
    assert built(CONFIG).norm.weight.eq(1).all()
    assert built(CONFIG).head.weight.std().item() == pytest.approx(CONFIG.initializer_range, rel=0.05)


def test_a_model_made_without_memory_gets_the_same_bits() -> None:
    with torch.device("meta"):
        model = Llama(TIED)
    model.to_empty(device="cpu")
    model.tie()
    init_weights(model, 0)
    expected, packed = built(TIED), pack_of(9, 14, 9)
    assert torch.equal(loss_of(model, packed), loss_of(expected, packed))
    assert model.head.weight is model.embedding.weight


def test_a_cast_of_the_model_leaves_the_positions_exact() -> None:
    model = built(CONFIG).bfloat16()
    far = torch.tensor([4095, 4096])
    cos = model.rotation(far, torch.float32).cos
    assert torch.equal(cos, built(CONFIG).rotation(far, torch.float32).cos)
    assert not torch.equal(cos[0], cos[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 33}, "hidden_size 33 must be a multiple of num_attention_heads 8"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 must be a multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be from 1 to 1024, not 0"),
        ({"head_dim": 5}, "head_dim 5 must be even"),
        ({"rope_theta": 0.0}, "rope_theta 0.0 must be above 0, rms_norm_eps 1e-05 between 0 and 1"),
    ],
)
def test_an_impossible_size_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        msgspec.structs.replace(CONFIG, **change)


def test_an_impossible_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="low_freq_factor < high_freq_factor"):
        Llama3Scaling(factor=8, low_freq_factor=4, high_freq_factor=1, original_max_position_embeddings=8192)
    with pytest.raises(ValueError, match=r"factor >= 1, not 0\.5"):
        LinearScaling(factor=0.5)
