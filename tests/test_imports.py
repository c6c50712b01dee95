"""Imports go one way: between the packages, and inside each of them in the order that data goes."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ORDER = {
    "sftstream": [
        "refused",
        "records",
        "config",
        "excerpt",
        "door",
        "regular_files",
        "cli",
        "cli.results",
        "pages.figures",
        "pages.document",
        "pages.elements",
        "pages.plot",
        "pages",
        "toml_file",
        "cache",
        "sources.rows",
        "sources.stored",
        "sources.row_index",
        "sources.skipping",
        "sources.file_formats",
        "sources.file_formats.jsonl",
        "sources.file_formats.json_array",
        "sources.file_formats.delimited",
        "sources.file_formats.arrow",
        "sources.file_formats.parquet",
        "sources.file_formats.zstd_frames",
        "sources.file_formats.compressed",
        "sources.content",
        "sources.location",
        "sources.remote",
        "sources.kinds",
        "sources.saved",
        "sources.slices",
        "sources.hub",
        "sources.resolve",
        "sources.streamed",
        "sources.streamed_reader",
        "sources.corpus",
        "sources.full_digests",
        "sources",
        "formats.fields",
        "formats.roles",
        "formats.spelled",
        "formats.exclusions",
        "formats.keys",
        "formats.tools",
        "formats.harmony",
        "formats.thoughts",
        "formats.parts",
        "formats.items",
        "formats.messages",
        "formats.typed",
        "formats.layouts",
        "formats.unread",
        "formats.rows",
        "formats.unverified",
        "formats",
        "rendering",
        "rendering.bounds",
        "rendering.limits",
        "rendering.json_cache",
        "rendering.environment",
        "rendering.template",
        "rendering.payloads",
        "rendering.markers",
        "rendering.locate",
        "rendering.generation_tags",
        "rendering.overlap",
        "rendering.probe_messages",
        "rendering.turn_format",
        "rendering.shared_renders",
        "rendering.turns",
        "rendering.probe",
        "rendering.certificate_process",
        "rendering.certificate",
        "rendering.mask",
        "rendering.fast",
        "rendering.fast.symbolic",
        "rendering.fast.shape",
        "rendering.fast.render_plan",
        "rendering.fast.known_tails",
        "rendering.fast.render_cache",
        "rendering.renderer",
        "tokenization",
        "tokenization.alignment",
        "tokenization.fast_tokenizer",
        "tokenization.tokenizer_bounds",
        "tokenization.tokenizer_files",
        "tokenization.saved_tokenizer",
        "tokenization.vocabulary",
        "tokenization.tokenizer",
        "tokenization.overflow",
        "tokenization.unverified",
        "tokenization.encoder",
        "identity",
        "earlier_formats",
        "encoded_stream",
        "state",
        "inspection",
        "inspection.text",
        "inspection.summary",
        "inspection.stored",
        "streaming",
        "streaming.assignment",
        "streaming.order",
        "streaming.sampler",
        "streaming.example_reader",
        "streaming.packing",
        "streaming.skip",
        "streaming.packer",
        "streaming.graph",
        "streaming.length_sample",
        "streaming.forecast",
        "streaming.refusals",
        "streaming.deferred_signals",
        "streaming.worker",
        "streaming.beside",
        "source_changes",
        "state_checks",
        "rebase",
        "streaming.version_check",
        "start",
        "loader",
        "ledger",
        "ledger.segments",
        "ledger.records",
        "ledger.files",
        "ledger.writer",
        "ledger.data_run",
        "ledger.reader",
        "ledger.rebuild",
        "ledger.once",
        "ledger.mixture",
        "ledger.audit",
        "ledger.compare",
        "ledger.trace",
        "ledger.losses",
        "ledger.verify",
        "integrations.layouts",
        "integrations.dataset",
        "integrations.shards",
        "integrations.state_file",
        "integrations",
        "integrations.isolation",
        "integrations.token_loss",
        "integrations.transformers_trainer",
        "integrations.lightning_data",
        "integrations.titan_data",
        "integrations.automodel_data",
        "preview",
        "preview.parts",
        "preview.view",
        "preview.terminal",
        "preview.page",
        "starter",
        "starter.look",
        "starter.hardware",
        "starter.propose",
        "starter.toml",
        "starter.axolotl",
        "starter.write",
        "stats",
        "stats.measure",
        "stats.progress",
        "stats.summary",
        "stats.terminal",
        "stats.page",
        "public",
        "",
        "cli.output",
        "cli.usage",
        "cli.template_report",
        "cli.template",
        "cli.state",
        "cli.init",
        "cli.inspect",
        "cli.rebase",
        "cli.preview",
        "cli.stats",
        "cli.speed",
        "cli.bench",
        "cli.ledger",
        "cli.verify",
        "cli.main",
        "__main__",
    ],
    "checkpoints": [
        "errors",
        "tensor_file",
        "manifest",
        "digest",
        "commit",
        "values",
        "model",
        "model.card",
        "model.directory",
        "model.base",
        "lock",
        "ranks",
        "retention",
        "state",
        "compatibility",
        "local_store",
        "object_store",
        "staging",
        "storage",
        "model.export",
        "store",
        "model.hub",
        "public",
        "",
        "cli",
        "cli.usage",
        "cli.show",
        "cli.main",
        "__main__",
    ],
    "trainer": [
        "process",
        "usage",
        "duration",
        "whole_file",
        "distributed",
        "distributed.determinism",
        "distributed.mesh",
        "distributed.watch",
        "llama",
        "llama.config",
        "llama.rotary",
        "llama.attention",
        "llama.lora",
        "llama.lora.layers",
        "llama.flops",
        "llama.kernels",
        "llama.kernels.loss",
        "llama.kernels.swiglu",
        "llama.loss",
        "llama.sharding",
        "llama.selection",
        "llama.lora.nf4",
        "llama.float8",
        "llama.swiglu",
        "llama.model",
        "llama.init",
        "llama.replicas",
        "llama.working",
        "llama.parallel",
        "llama.blocks",
        "llama.hf_config",
        "llama.weights",
        "llama.lora.files",
        "llama.export",
        "llama.recipe",
        "training",
        "training.adamw_kernel",
        "training.adamw",
        "training.adamw8bit",
        "training.muon",
        "training.optimizer",
        "training.schedule",
        "training.step",
        "training.warm_up",
        "track",
        "track.config",
        "training.accepted",
        "config",
        "config_file",
        "training.model",
        "training.segment_gather",
        "training.step_reader",
        "training.nonfinite",
        "training.progress",
        "training.validation",
        "training.scorer",
        "training.evaluation",
        "training.answers",
        "training.stop",
        "reporting",
        "reporting.events",
        "reporting.environment",
        "report",
        "report.records",
        "report.lines",
        "report.flat",
        "report.bins",
        "report.steps",
        "report.launches",
        "report.read",
        "report.facts",
        "report.charts",
        "report.timeline",
        "report.page",
        "report.compare",
        "report.compare_page",
        "report.terminal",
        "report.writer",
        "report.main",
        "report.__main__",
        "track.content",
        "track.cursor",
        "track.tail",
        "track.tracker",
        "track.mlflow_run",
        "track.trackio_run",
        "track.wandb_run",
        "track.open",
        "track.send",
        "track.follow",
        "track.followers",
        "track.main",
        "track.__main__",
        "reporting.metrics",
        "reporting.shares",
        "reporting.ledger",
        "reporting.messages",
        "reporting.pace",
        "reporting.display",
        "reporting.losses",
        "reporting.trace",
        "reporting.fill",
        "checkpointing",
        "checkpointing.full_disk",
        "checkpointing.about",
        "checkpointing.settings",
        "checkpointing.snapshot",
        "checkpointing.directory",
        "checkpointing.saves",
        "comparison",
        "parity",
        "activations",
        "memory",
        "out_of_memory",
        "choices",
        "estimate",
        "opening",
        "serving",
        "setup",
        "finish",
        "run",
        "main",
        "",
    ],
}
"""The files of each package, each importing only from those above it; "" is the package's own `__init__`."""

FORBIDDEN = {"utils", "util", "common", "helpers", "helper", "misc"}


def files(package: str) -> dict[str, Path]:
    """Module name within the package -> its file."""
    names = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Each imported (module, name) of a file, those inside functions too; the name is "" for `import module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; name the package"
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("package", ORDER)
def test_every_file_has_its_place_in_the_order(package: str) -> None:
    assert sorted(files(package)) == sorted(ORDER[package])


@pytest.mark.parametrize("package", ORDER)
def test_a_file_imports_only_from_files_above_it(package: str) -> None:
    order = ORDER[package]
    for name, path in files(package).items():
        above = {f"{package}.{other}".rstrip(".") for other in order[: order.index(name)]}
        for module, imported in imports(path):
            if module.split(".")[0] == package:
                assert module in above or f"{module}.{imported}" in above, f"{path} imports {module}.{imported}"


@pytest.mark.parametrize("package", ["sftstream", "checkpoints"])
def test_the_two_libraries_know_neither_each_other_nor_the_trainer(package: str) -> None:
    for path in files(package).values():
        for module, _ in imports(path):
            assert module.split(".")[0] not in ORDER.keys() - {package}, f"{path} imports {module}"


def test_the_trainer_imports_public_names_only() -> None:
    for path in files("trainer").values():
        for module, name in imports(path):
            package = module.split(".")[0]
            if package in ("sftstream", "checkpoints"):
                assert module == package, f"{path} imports {module}, which is inside {package}"
                assert name in importlib.import_module(package).__all__, f"{path} imports {package}.{name}"


@pytest.mark.parametrize("package", ["sftstream", "checkpoints"])
def test_public_names_are_sorted_and_all_there(package: str) -> None:
    module = importlib.import_module(package)
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)


def test_no_file_is_named_for_what_is_left_over() -> None:
    for package in (*ORDER, "tests", "benchmarks", "examples"):
        for path in (ROOT / package).rglob("*"):
            assert path.stem not in FORBIDDEN, path


def test_no_test_asserts_a_time() -> None:
    """A wait may have a deadline, but no assertion compares a duration, which the machine's load decides."""
    clocks = ("time", "monotonic", "perf_counter", "process_time")
    for path in (ROOT / "tests").rglob("*.py"):
        for assertion in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(assertion, ast.Assert):
                for node in ast.walk(assertion.test):
                    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
                        called = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                        assert not called.intersection(clocks), f"{path}:{assertion.lineno}"


READERS_OF_THE_ENVIRONMENT = {
    "cache",
    "cli.main",
    "ledger.verify",
    "rendering.certificate",
    "tokenization.fast_tokenizer",
}
"""Files of `sftstream` that read environment variables: for directories, messages and processes, never for a pack."""


def test_no_environment_variable_decides_a_pack() -> None:
    for name, path in files("sftstream").items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        if any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in nodes):
            assert name in READERS_OF_THE_ENVIRONMENT, f"{path} reads an environment variable"


@pytest.mark.parametrize("package", ORDER)
def test_no_import_is_hidden_in_an_expression(package: str) -> None:
    for path in files(package).values():
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)
        }
        assert "__import__" not in names, path
