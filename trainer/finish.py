"""Finish a complete run: export the model, and evaluate the export."""

from __future__ import annotations

from trainer.distributed.mesh import named_dtype
from trainer.distributed.watch import Watch
from trainer.llama.export import export, export_adapter
from trainer.serving import serving_lines
from trainer.setup import Run
from trainer.training.evaluation import evaluate
from trainer.training.progress import Progress


def finish(run: Run, progress: Progress, watch: Watch) -> None:
    """Export the model to `runs/<name>/export`, then evaluate the export. Collective.

    An adapter is exported to `runs/<name>/adapter`.

    Raises ValueError if no token was trained.
    """
    if not progress.rows:
        raise ValueError(
            "nothing was trained: the sources gave no row; raise the repeat of a source, or name files with more rows"
        )
    if not progress.trained_tokens:
        raise ValueError(
            f"nothing was trained: all {progress.rows:,} rows were refused; see refused.jsonl for the reasons"
        )
    if run.config.lora is not None:
        with watch.waiting_for(progress.step, "the adapter of all ranks"):
            _export_adapter(run)
        run.display.say(f"exported the adapter to {run.config.run.adapter_directory}")
    if run.config.lora is None or run.config.lora.export_merged:
        with watch.waiting_for(progress.step, "the export of all ranks"):
            _export(run)
        run.display.say(f"exported to {run.config.run.export_directory}")
    if run.evaluator.questions:
        _evaluate(run)
    merged = run.config.lora is None or run.config.lora.export_merged
    for line in serving_lines(run.config, None if merged else run.source.name):
        run.display.say(line)


def _export(run: Run) -> None:
    encoder = run.encoder
    export(
        run.model,
        run.source.shape,
        run.config.run.export_directory,
        encoder.saved_tokenizer() if encoder and run.topology.first else None,
        stop_token_ids=encoder.stop_ids if encoder else (),
        init_from=run.source.init_from,
        dtype=named_dtype(run.config.run.export_dtype, run.topology.device),
    )


def _export_adapter(run: Run) -> None:
    encoder = run.encoder
    assert run.source.name is not None
    export_adapter(
        run.model,
        run.config.run.adapter_directory,
        run.source.name,
        encoder.saved_tokenizer() if encoder and run.topology.first else None,
    )


def _evaluate(run: Run) -> None:
    """Generate and print answers, on rank 0 only.

    The other ranks exit meanwhile, since NCCL ends a waiting rank after ten minutes.
    """
    config, encoder = run.config.evaluation, run.encoder
    assert config is not None
    assert encoder is not None
    directory, device = run.config.run.export_directory, run.topology.device
    questions, scorer = run.evaluator.questions, run.evaluator.scorer
    evaluation = evaluate(directory, questions, encoder.stop_ids, config.max_new_tokens, device, scorer)
    run.display.say(evaluation.describe(config.show))
