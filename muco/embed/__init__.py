"""Embeds a folder of images, a JSONL or a Parquet file into one Parquet file."""

from muco.embed.parquet import embed

__all__ = ["embed"]
