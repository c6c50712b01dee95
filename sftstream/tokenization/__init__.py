"""Text and trained spans -> Example: token ids, and a loss mask aligned with the spans."""
