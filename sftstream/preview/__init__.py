"""Show packs as the model will see them: in a terminal, and as an HTML page."""
