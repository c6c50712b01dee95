"""Parquet by way of `datasets`, which keeps a memory-mapped Arrow copy in its cache: any row, no table in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyarrow import ArrowInvalid

from sftstream.sources.rows import identify


class Parquet:
    """Row groups are decoded once, into the cache; ranks and workers of a machine share its pages."""

    def __init__(self, path: Path) -> None:
        import datasets  # takes a second to import, and most runs read JSON

        self.path = path
        shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            # The cache knows a file by path and modification time, which a copy or an archive can keep while the content changes.
            cache = Path(datasets.config.HF_DATASETS_CACHE) / identify(path).sha256
            self._rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(cache))
        except (datasets.exceptions.DatasetGenerationError, ArrowInvalid) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error.__cause__ or error}") from None
        finally:
            if shown:
                datasets.enable_progress_bars()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> Any:
        return self._rows[row]

    def place(self, row: int) -> str:
        return f"{self.path}[{row}]"
