"""Evaluation: scores of a model on data.

metrics    ranks, hit@k, health of vectors          numpy only
cache      contents and their vectors, on disk
retrieval  tasks of a data set and their scores
report     table, Markdown, warnings, JSON file
evaluator  the same during training
"""
