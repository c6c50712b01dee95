"""Logical streams: order of rows, mixing, packing, and the assignment of packs to shards."""
