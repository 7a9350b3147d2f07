"""Embeds the images of a folder, or rows of JSONL or Parquet files, into one Parquet file."""

from muco.embed.parquet import embed

__all__ = ["embed"]
