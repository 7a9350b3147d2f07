"""``muco synth``: from images to multi-turn training data, by models that the user serves.

    sources.py, pictures.py       where pictures come from; one look at each
    catalogue.py                  which pictures there are, and which are kept: no near duplicates
    chat.py, endpoint.py          messages, answers and limits; an OpenAI-compatible server: retries, pace, budget
    prompts.py, pairs.py          what it is told, and what of its answers can be used
    flow.py                       many requests at once, results in order
    writing.py, shards.py         the turns of one picture, and its answers, which are paid for; the files
    pipeline.py, run.py           both passes; a whole run, in this process or several

``muco data caption`` uses some of them. Nothing here imports torch; packages come with ``pip install 'muco[synth]'``.
"""
