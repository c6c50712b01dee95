"""Save a run's state to checkpoints and restore a run from them."""
