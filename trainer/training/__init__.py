"""The training loop's parts: packs of a step, forward and backward, optimizer, validation, evaluation."""
