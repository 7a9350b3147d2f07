"""``muco synth``: from images to multi-turn training data, by models that the user serves.

    sources.py, pictures.py                 where pictures come from; one look at each
    near.py, catalogue.py                   near duplicates; which pictures there are and which are kept
    endpoint.py, limits.py, messages.py     an OpenAI-compatible server: retries, pace, budget, pictures
    prompts.py, checks.py, pairs.py         what it is told, and what of its answers can be used
    flow.py, journal.py                     many requests at once in order; what is paid for is kept
    writing.py, shards.py                   the turns of one picture; what is written
    pipeline.py, workers.py, run.py         both passes, in this process or several; a whole run
    card.py                                 what came of it

``muco data caption`` uses some of them. Nothing here imports torch; packages come with ``pip install 'muco[synth]'``.
"""
