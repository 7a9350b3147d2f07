"""``muco synth``: from images to multi-turn training data, by models that the user serves.

    sources.py, pictures.py                 where pictures come from; one look at each
    catalogue.py                            which pictures there are, and which are kept: no near duplicates
    endpoint.py, limits.py                  an OpenAI-compatible server: retries, pace, budget
    messages.py, answers.py                 what it is sent, and what it sends back
    prompts.py, checks.py, pairs.py         what it is told, and what of its answers can be used
    flow.py                                 many requests at once, results in order
    writing.py, shards.py                   the turns of one picture, and its answers, which are paid for; the files
    pipeline.py, workers.py, run.py         both passes, in this process or several; a whole run
    card.py                                 what came of it

``muco data caption`` uses some of them. Nothing here imports torch; packages come with ``pip install 'muco[synth]'``.
"""
