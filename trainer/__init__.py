import os

# OpenMP's idle threads spin, by default for so long that a step on a CPU which others use too takes twice the time (read when
# torch is imported).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
