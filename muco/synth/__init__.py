"""What asks models that the user serves: captions of images, and the parts of a pipeline that makes multi-turn data.

    endpoint.py, limits.py, messages.py     an OpenAI-compatible server: retries, pace, budget, pictures
    prompts.py, checks.py, pairs.py         what it is told, and what of its answers can be used
    flow.py, journal.py                     many requests at once in order; what is paid for is kept

``muco data caption`` uses them; `muco synth`, which writes whole turns, is not there yet. Nothing here imports torch;
``openai`` comes with ``pip install 'muco[synth]'``.
"""
