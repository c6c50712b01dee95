"""Low-rank adapters on a frozen model: layers, files in the format of peft, and 4-bit weights."""
