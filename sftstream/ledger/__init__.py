"""The ledger of a run: a record of the conversations in each step's packs, and its proofs."""
