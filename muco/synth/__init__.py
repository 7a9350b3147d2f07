"""``muco synth``: from images to multi-turn training data, by models that the user serves.

    sources.py, pictures.py, catalogue.py   where pictures come from, one look at each, and which are kept
    chat.py, endpoint.py, flow.py           messages and limits; an OpenAI-compatible server; many requests at once
    prompts.py, pairs.py, writing.py        the prompts, the checks of answers, and the turns of one picture
    shards.py, pipeline.py, run.py          the files, both passes, and a whole run in one process or several

``muco data caption`` uses some of them. Nothing here imports torch; packages come with ``pip install 'muco[synth]'``.
"""
