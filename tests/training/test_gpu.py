"""Isolation, determinism and exact resume with GPU kernels. Skipped without a GPU."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import runs
import torch
from test_kill import compare
from tiny_llama import public_llama
from torch import Tensor
from torch.nn import functional as F

from sftstream import IGNORE_INDEX
from trainer.distributed.determinism import determinism
from trainer.distributed.mesh import ParallelConfig, distributed
from trainer.llama import float8, loss, swiglu
from trainer.llama.attention import KERNELS, ORDER, KernelName, Segments, Shape, attend, choose_kernel
from trainer.llama.blocks import Recompute, prepare_blocks
from trainer.llama.config import LlamaConfig
from trainer.llama.init import init_weights
from trainer.llama.model import Llama
from trainer.training.adamw import AdamW
from trainer.training.warm_up import warm_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]

FAMILIES = ({}, {"tie_word_embeddings": True}, {"model_type": "qwen2"}, {"model_type": "qwen3"})
BORDERS = [0, 5, 133, 140, 512]
SHAPE = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)

WIDE = {"hidden_size": 128, "intermediate_size": 256}
"""Sizes whose matrices AdamW in 8 bits quantizes."""


@pytest.fixture
def segments() -> Segments:
    return Segments(torch.tensor(BORDERS, dtype=torch.int32, device="cuda"), 372)


@pytest.fixture
def model() -> Llama:
    model = Llama(SHAPE)
    init_weights(model, seed=0)
    return model.to("cuda", torch.bfloat16)


def _qkv(seed: int) -> tuple[Tensor, ...]:
    draw = torch.Generator("cuda").manual_seed(seed)
    sizes = (4, 2, 2)
    return tuple(
        torch.randn(512, heads, 32, device="cuda", generator=draw).bfloat16().requires_grad_() for heads in sizes
    )


def test_another_conversation_changes_no_bit_of_a_segment(segments: Segments) -> None:
    q, k, v = _qkv(0)
    before = attend(q, k, v, segments)
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor[133:140].normal_()
    after = attend(q, k, v, segments)
    assert torch.equal(before[:133], after[:133])
    assert torch.equal(before[140:], after[140:])
    assert not torch.equal(before[133:140], after[133:140])


def test_packed_attention_equals_each_segment_alone_in_double_precision(segments: Segments) -> None:
    q, k, v = _qkv(1)
    grouped = attend(q, k, v, segments).double().cpu()
    exact = [t.detach().cpu().double() for t in (q, k, v)]
    alone = attend(*exact, Segments(torch.tensor(BORDERS, dtype=torch.int32), 372))
    assert (grouped - alone).abs().max() < 0.02  # bf16 holds 8 bits


def test_two_backward_passes_give_the_same_bits(segments: Segments) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(2):
            q, k, v = _qkv(2)
            attend(q, k, v, segments).square().sum().backward()
            gradients.append([t.grad for t in (q, k, v)])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_packed_row_equals_its_conversations_one_by_one(model: Llama, segments: Segments) -> None:
    ids = torch.randint(512, (512,), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    lengths = segments.cu_seqlens.diff().tolist()
    positions = torch.cat([torch.arange(n, device="cuda") for n in lengths])
    packed = model(ids, positions, segments).float()
    alone = [
        model(part, torch.arange(len(part), device="cuda"), _whole(len(part))).float() for part in ids.split(lengths)
    ]
    assert (packed - torch.cat(alone)).abs().max() < 0.02


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("in_float8", [False, True])
def test_compiled_layers_are_never_compiled_again_over_50_packs(recompute: Recompute, in_float8: bool) -> None:
    torch._dynamo.reset()
    compiled = _built(recompute=recompute, compiled=True, in_float8=in_float8)
    plain = _built(recompute="none", compiled=False)
    draw = random.Random(0)
    _backward(compiled, [512])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in range(1, 51):
            cuts = sorted(draw.sample(range(1, 512), count))
            lengths = [end - start for start, end in itertools.pairwise([0, *cuts, 512])]
            losses = [_backward(model, lengths) for model in (compiled, plain)]
            assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("in_float8", [False, True])
def test_compiled_layers_give_the_same_bits_each_time(recompute: Recompute, in_float8: bool) -> None:
    found = []
    with determinism(True):
        for _ in range(2):
            torch._dynamo.reset()
            model = _built(recompute=recompute, compiled=True, in_float8=in_float8)
            _backward(model, [100, 12, 400])
            found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("in_float8", [False, True])
def test_compiled_code_does_not_depend_on_the_first_pack(in_float8: bool) -> None:
    found = []
    with determinism(True), distributed("cuda", ParallelConfig()) as topology:
        for first in ([512], [2] * 256):
            torch._dynamo.reset()
            model = _built(recompute="none", compiled=True, in_float8=in_float8)
            warm_up(model, 512, topology)
            _backward(model, first, trained=17 * len(first) % 500)
            model.zero_grad()
            _backward(model, [100, 12, 400], trained=300)
            found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_no_bit(recompute: Recompute) -> None:
    with determinism(True):
        found = []
        for way in ("none", recompute):
            model = _built(recompute=way, compiled=False)
            _backward(model, [100, 12, 400])
            found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_model_on_a_gpu_equals_transformers_up_to_bfloat16_rounding(tmp_path: Path) -> None:
    for number, keys in enumerate(FAMILIES):
        directory = tmp_path / str(number)
        public_llama(**(keys | {"hidden_size": 128, "head_dim": 32})).save_pretrained(directory)
        result = subprocess.run(
            [sys.executable, "-m", "trainer.parity", str(directory), "--device=cuda"], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert "torch.bfloat16" in result.stdout


def test_adapters_on_a_gpu_equal_those_of_peft_up_to_bfloat16_rounding(tmp_path: Path) -> None:
    for number, keys in enumerate(FAMILIES):
        base, adapter = tmp_path / f"{number}", tmp_path / f"{number} adapter"
        plain = public_llama(**(keys | {"hidden_size": 128, "head_dim": 32}))
        plain.save_pretrained(base)
        plain.name_or_path = str(base)
        lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(plain, lora).save_pretrained(adapter)
        words = ["-m", "trainer.parity", str(adapter), "--device=cuda"]
        result = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("base", [{}, {"quantize": "nf4"}], ids=["bf16", "4 bits"])
def test_kills_leave_no_trace_in_a_run_of_adapters_on_a_gpu(
    base: dict[str, str], tmp_path: Path, tokenizer: str
) -> None:
    public_llama(vocab_size=512, hidden_size=128, head_dim=32, intermediate_size=256).save_pretrained(tmp_path / "base")
    run = {"device": "cuda", "steps": 20}
    lora = {"rank": 8} | base
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run=run, data={"workers": 1}, lora=lora)
    config["model"] = {"init_from": str(tmp_path / "base")}
    compare(tmp_path, config, processes=1, draw=random.Random(0), kills=2)


@pytest.mark.parametrize("name", ORDER["cuda"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("deterministic", [True, False])
def test_every_installed_kernel_proves_itself(name: KernelName, size: int, deterministic: bool) -> None:
    shape = Shape(tokens=4096, queries=8, groups=2, size=size)
    try:
        KERNELS[name].load()
    except ImportError:
        pytest.skip(f"{name} is not installed")
    with determinism(deterministic):
        assert choose_kernel(name, shape, torch.device("cuda"), torch.bfloat16)[0].name == name


def test_float32_attention_on_a_gpu_uses_the_one_kernel_that_computes_it() -> None:
    shape, device = Shape(tokens=512, queries=4, groups=2, size=32), torch.device("cuda")
    kernel, passed = choose_kernel("auto", shape, device, torch.float32)
    assert kernel.name == "sdpa"
    assert all("not in float32" in reason for reason in passed)
    with pytest.raises(ValueError, match='"torch": attention "torch" computes in bfloat16, float16, not in float32'):
        choose_kernel("torch", shape, device, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 700, 2000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_the_heads_loss_equals_that_of_torch(
    rows: int, dtype: torch.dtype, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "MOST_LOGITS", 700 * 5000 * dtype.itemsize)
    draw = torch.Generator("cuda").manual_seed(0)
    exact = [torch.randn(n, 64, device="cuda", generator=draw).to(dtype).float().requires_grad_() for n in (rows, 5000)]
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    labels = torch.randint(5000, (rows,), device="cuda", generator=draw)
    labels[1] = IGNORE_INDEX
    found = loss.head_loss(*ours, labels, torch.full((), 1 / rows, device="cuda"), z_loss=z_loss).sum()
    (3 * found).backward()
    logits = exact[0] @ exact[1].t()
    squares = logits.logsumexp(1)[labels != IGNORE_INDEX].square()
    expected = (F.cross_entropy(logits, labels, reduction="sum") + z_loss * squares.sum()) / rows
    (3 * expected).backward()
    rounding = 1e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, expected, rtol=rounding, atol=0)
    for part, whole in zip(ours, exact, strict=True):
        scale = whole.grad.abs().max().item()
        torch.testing.assert_close(part.grad.float(), whole.grad, rtol=0, atol=rounding * scale + 1e-7)


def test_the_heads_loss_has_equal_bits_each_time() -> None:
    hidden, weight = (torch.randn(n, 64, device="cuda").bfloat16() for n in (1000, 5000))
    labels, scale = torch.arange(1000, device="cuda"), torch.ones((), device="cuda")
    found = []
    for _ in range(2):
        given = [x.clone().requires_grad_() for x in (hidden, weight)]
        value = loss.head_loss(*given, labels, scale)
        value.backward()
        found.append([value, *(x.grad for x in given)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)])
def test_steps_of_adamw_equal_those_of_torch(dtype: torch.dtype, rounding: float) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    sizes = [(300, 70), (5,), (4096, 3)]
    first = [torch.randn(size, device="cuda", generator=draw).to(dtype) for size in sizes]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in first] for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.1, "fused": True}
    optimizers = AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for scale in (None, torch.tensor(3.0, device="cuda"), torch.tensor(1.0, device="cuda")):
        for mine, other in zip(ours, theirs, strict=True):
            other.data.copy_(mine)  # so that a rounding difference does not grow
            mine.grad = torch.randn(mine.shape, device="cuda", generator=draw).to(dtype)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.grad_scale = scale
            optimizer.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=rounding, atol=rounding / 10)
    for mine, other in zip(ours, theirs, strict=True):
        state, expected = optimizers[0].state[mine], optimizers[1].state[other]
        assert list(state) == list(expected)
        assert torch.equal(state["step"], expected["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            # Three steps of roundings of numbers up to 1, in another order than torch's.
            torch.testing.assert_close(state[name], expected[name], rtol=rounding, atol=rounding / 2)


@pytest.mark.parametrize(("inner", "block"), [(8192, 1024), (14336, 1792), (256, 128)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)])
def test_the_fused_gradient_of_the_feed_forward_equals_the_plain_one(
    inner: int, block: int, dtype: torch.dtype, rounding: float
) -> None:
    gate_up, upstream = (torch.randn(300, n, device="cuda").to(dtype) for n in (2 * inner, inner))
    assert swiglu.tile(block)
    found = swiglu.fused_gradient(gate_up, upstream, block)
    expected = swiglu.plain_gradient(gate_up, upstream, block)
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [512, 77])
def test_float8_products_of_the_gpu_equal_those_of_the_rounded_numbers(rows: int, compiled: bool) -> None:
    draw = torch.Generator("cuda").manual_seed(rows)
    x, weight, upstream = (
        torch.randn(size, device="cuda", generator=draw).bfloat16().requires_grad_()
        for size in ((rows, 256), (512, 256), (rows, 512))
    )
    multiply = torch.compile(float8.linear, dynamic=True) if compiled else float8.linear
    out = multiply(x, weight)
    out.backward(upstream)
    left, right, down = _rounded(x, float8.E4M3), _rounded(weight, float8.E4M3), _rounded(upstream, float8.E5M2)
    # The sums of the forward pass have fewer bits than those of the backward pass.
    for found, expected, error in (
        (out, left @ right.t(), 2e-2),
        (x.grad, down @ right, 5e-3),
        (weight.grad, down.t() @ left, 5e-3),
    ):
        assert (found.double() - expected).norm() <= error * expected.norm()


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    found = float8.quantize(x.detach(), dtype)
    return found.values.double() * found.scale.double()


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run={"device": "cuda"})
    config["model"] |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 100}
    job = runs.Job(tmp_path, config)
    assert job.finish() == 1
    assert "the model does not fit: weights, gradients and optimizer alone need" in job.output()


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"run": {"weights_dtype": "bfloat16"}},
        {"run": {"compile": False, "recompute": "selective"}},
        {"run": {"attention": "torch", "recompute": "full"}},
        {"run": {"float8": True}},
        {"optimizer": {"kind": "adamw8bit"}, "model": WIDE},
        {"optimizer": {"kind": "muon"}, "model": WIDE},
    ],
    ids=str,
)
def test_kills_leave_no_trace_on_a_gpu(tables: dict[str, dict[str, Any]], tmp_path: Path, tokenizer: str) -> None:
    given = runs.run_config(tokenizer, runs.sources(tmp_path), data={"workers": 1})
    config = {name: table | tables.get(name, {}) for name, table in given.items()}
    config["run"] |= {"device": "cuda", "steps": 20}
    compare(tmp_path, config, processes=1, draw=random.Random(0), kills=2)


CHOICE = """
import sys
from contextlib import closing
from pathlib import Path
import torch
from trainer.choices import KernelChoice
from trainer.config_file import load_config
from trainer.distributed.mesh import distributed

config = load_config(Path(sys.argv[1]), [])
with closing(KernelChoice(config)) as choice, distributed("cuda", config.parallel) as topology:
    print(choice.of(config, config.model.shape, topology, None).kernel.name, torch.cuda.max_memory_allocated())
"""


def test_the_kernel_of_a_run_is_proved_in_another_process(tmp_path: Path, tokenizer: str) -> None:
    config = runs.run_config(tokenizer, runs.sources(tmp_path), run={"device": "cuda"})
    path = tmp_path / "run.toml"
    path.write_text("".join(f"{name} = {runs.toml(table)}\n" for name, table in config.items()))
    done = subprocess.run([sys.executable, "-c", CHOICE, str(path)], capture_output=True, text=True, check=True)
    name, allocated = done.stdout.split()
    assert name in ORDER["cuda"]
    assert int(allocated) == 0


def _built(*, recompute: Recompute, compiled: bool, in_float8: bool = False) -> Llama:
    model = Llama(SHAPE)
    init_weights(model, seed=0)
    model.to("cuda", torch.bfloat16)
    prepare_blocks(model, recompute=recompute, compiled=compiled, float8=in_float8)
    return model


@pytest.mark.parametrize(
    "system",
    ["ours-default", "ours-bf16", "ours-bf16-free", "ours-bf16-plain", "ours-float8", "ours-lora", "ours-lora-free"],
)
def test_the_benchmark_of_the_training_step_prints_a_row(system: str) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "train_step.py"
    small = ["--shape=tiny", "--layers=1", "--capacity=512", "--steps=1", f"--systems={system}"]
    done = subprocess.run([sys.executable, script, *small], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    speed = done.stdout.splitlines()[-1].split(" | ")[2]
    assert float(speed.replace(",", "")) > 0


def _backward(model: Llama, lengths: list[int], trained: int | None = None) -> float:
    """Add the gradients of a random pack to the model's; return the pack's loss.

    Only the first `trained` tokens have a loss.
    """
    draw = torch.Generator("cuda").manual_seed(sum(lengths[:1]))
    ids = torch.randint(512, (sum(lengths),), device="cuda", generator=draw)
    positions = torch.cat([torch.arange(n, device="cuda") for n in lengths])
    borders = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    chosen = None if trained is None else torch.arange(trained, device="cuda")
    loss = model(ids, positions, Segments(borders, max(lengths)), chosen, ids.roll(-1)[:trained])
    loss.backward()
    return loss.item()


def _whole(length: int) -> Segments:
    return Segments(torch.tensor([0, length], dtype=torch.int32, device="cuda"), length)
