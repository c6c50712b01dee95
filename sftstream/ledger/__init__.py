"""The ledger of a run: the conversations of each step's packs, and the proof of their order."""
