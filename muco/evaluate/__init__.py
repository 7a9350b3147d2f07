"""Evaluation: scores of a model on data.

metrics    ranks, hit@k, precision, health of vectors
ranking    metrics of ranked lists with graded judgements; TREC files
cache      contents and their vectors, on disk
pool       pools too large for memory: vectors in shards, exact search

retrieval  any data of samples and turns (tasks, report, blind; evaluator: the same during training)
mmeb       36 data sets, local lists (mmeb_data: their files, mmeb_task: one of them)
mbeir      16 tasks, local and global pool (mbeir_data: their files)
beir       any set in BEIR's form (ranked, lines: what it shares with mbeir)
mteb       a model for the mteb package

benchmark  what every benchmark leaves behind, and how it goes on
tables     terminal, CSV and Markdown; page, thumbnails: HTML; published: scores of others
compare    two results with bootstrap intervals
leak       training data in evaluation data (identity: when two things are the same)
"""
