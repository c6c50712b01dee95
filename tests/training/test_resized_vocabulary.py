"""A model gets rows for the ids of a larger tokenizer: the mean of its rows, as transformers resizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import runs
import tiny
import torch
import transformers
from gloo_ranks import run_ranks
from test_run_ends import fails, store
from tiny_llama import pack_of, public_llama
from torch.distributed.device_mesh import init_device_mesh

from sftstream import count_token_ids
from trainer.llama.export import export
from trainer.llama.hf_config import read_config
from trainer.llama.model import Llama
from trainer.llama.parallel import build
from trainer.llama.sharding import gather_full
from trainer.llama.weights import load_weights


def resized(directory: Path, rows: int) -> Llama:
    before = read_config(directory)
    model = Llama(msgspec.structs.replace(before, vocab_size=rows))
    load_weights(model, directory, before.vocab_size)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_model_agrees_with_transformers(tmp_path: Path, tied: bool) -> None:
    theirs = public_llama(tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path / "public")
    model = resized(tmp_path / "public", 128)
    before = theirs.get_input_embeddings().weight.detach().clone()
    head = theirs.get_output_embeddings().weight.detach().clone()
    theirs.resize_token_embeddings(128)
    assert torch.equal(model.embedding.weight[:64], before)
    assert torch.equal(model.head.weight[:64], head)
    assert (model.head.weight is model.embedding.weight) is tied
    for ours, old, public in (
        (model.embedding.weight, before, theirs.get_input_embeddings().weight),
        (model.head.weight, head, theirs.get_output_embeddings().weight),
    ):
        mean = old.double().mean(0)
        assert torch.equal(ours[64:], mean.float().expand(64, -1))
        # transformers draws new rows around the mean, with a variance of 1e-9 of the rows' own.
        assert (public[64:] - ours[64:]).abs().max() < 1e-3 * old.std()
    export(model, model.config, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.vocab_size == again.get_input_embeddings().weight.shape[0] == 128
    assert again.config.tie_word_embeddings is tied
    again.set_attn_implementation("eager")
    ids = pack_of(41).input_ids[None] + torch.tensor([0, 64] * 20 + [0])
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-2, rtol=1e-2)


def gathered(rank: int, directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    before = read_config(directory)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    shape = msgspec.structs.replace(before, vocab_size=128)
    model = build(shape, mesh, torch.device("cpu"), capacity=24)
    load_weights(model, directory, before.vocab_size)
    with torch.no_grad():
        return gather_full(model.embedding.weight), gather_full(model.head.weight)


def test_rows_are_equal_on_any_topology(tmp_path: Path) -> None:
    public_llama().save_pretrained(tmp_path / "public")
    model = resized(tmp_path / "public", 128)
    for embedding, head in run_ranks(4, gathered, tmp_path / "public"):
        assert torch.equal(embedding, model.embedding.weight)
        assert torch.equal(head, model.head.weight)


@pytest.fixture
def config(tmp_path: Path, tokenizer: str) -> dict[str, Any]:
    public_llama(vocab_size=256, tie_word_embeddings=True).save_pretrained(tmp_path / "public")
    config = runs.run_config(tokenizer, runs.sources(tmp_path, 20), run={"steps": 2})
    return config | {"model": {"init_from": str(tmp_path / "public"), "resize_vocabulary": True}}


def test_a_run_with_more_ids_than_the_model_trains_resumes_and_exports(
    tmp_path: Path, tokenizer: str, config: dict[str, Any]
) -> None:
    fixed = config | {"model": {"init_from": str(tmp_path / "public")}}
    message = fails(tmp_path, fixed)
    assert "but model.vocab_size is 256" in message
    assert "set model.resize_vocabulary = true" in message
    runs.run(tmp_path, config)  # as the message advises
    assert store(tmp_path).values(2, "settings")["settings"]["rows_before"] == 256
    config["run"]["steps"] = 4
    runs.run(tmp_path, config, processes=2)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/run/export")
    ids = count_token_ids(tokenizer)
    assert ids == len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    assert exported.config.vocab_size == -(-ids // 64) * 64
    assert exported.get_input_embeddings().weight.shape[0] == exported.config.vocab_size
    config["run"]["steps"] = 6
    message = fails(tmp_path, config | {"model": {"init_from": str(tmp_path / "public")}})
    assert "model.vocab_size" in message
    assert "model.resize_vocabulary: 256 -> None" in message


def test_a_model_with_enough_rows_stays_as_it_is(tmp_path: Path, config: dict[str, Any]) -> None:
    public_llama(vocab_size=500, tie_word_embeddings=True).save_pretrained(tmp_path / "public")
    runs.run(tmp_path, config)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/run/export")
    assert exported.config.vocab_size == 500
    assert "rows_before" not in store(tmp_path).values(2, "settings")["settings"]


def test_the_largest_id_counts_and_not_the_number_of_tokens(tmp_path: Path, tokenizer: str) -> None:
    directory = tmp_path / "gap"
    directory.mkdir()
    for path in Path(tokenizer).iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    content = msgspec.json.decode((directory / "tokenizer.json").read_bytes())
    content["model"]["vocab"]["zz"] = 1000
    (directory / "tokenizer.json").write_bytes(msgspec.json.encode(content))
    assert count_token_ids(str(directory)) == 1001
    config = runs.run_config(str(directory), tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(20)))
    assert "the tokenizer has 1001 tokens, but model.vocab_size is 512" in fails(tmp_path, config)
