"""Make packs in logical streams: order of rows, mixture, packing, assignment to shards."""
