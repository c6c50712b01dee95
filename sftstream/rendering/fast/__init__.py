"""The fast path of rendering: trace a template once per conversation shape, then fill in the values."""
