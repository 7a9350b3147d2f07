"""The command line, one file for each group of commands."""

from muco.cli.app import main

__all__ = ["main"]
