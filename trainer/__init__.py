"""Train a Llama with tensor and sharded data parallelism on packs of sftstream."""

import os

# OpenMP's idle threads spin while they wait. The default spin count doubles the time of a step on a
# shared CPU. torch reads the variable at its import.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
