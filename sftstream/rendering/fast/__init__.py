"""The fast path: trace a template once per conversation shape, then fill in the values.

Only `RenderCache` is used from outside.
"""
