"""Order of rows, mixing and packing of one logical stream, and the assignment of packs to shards and workers."""
