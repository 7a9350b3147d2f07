"""Writes a model for others, and checks that plain transformers computes the same vectors."""

from muco.export.export import export

__all__ = ["export"]
