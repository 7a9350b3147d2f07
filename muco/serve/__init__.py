"""The server: embeddings and search over HTTP, in shapes that others already speak. The contract is docs/serving.md.

::

    request ─schema─▶ items ─batcher: prepared in threads, joined─▶ one forward pass of the model ─▶ answer
                        └ images                                        (engine)
"""
