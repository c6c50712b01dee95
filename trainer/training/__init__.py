"""Parts of the training loop: model, packs of a step, optimizer, progress, validation,
evaluation."""
