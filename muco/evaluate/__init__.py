"""Evaluation: scores of a model on data.

metrics    ranks, hit@k, nDCG, codes, health of vectors
cache      contents and their vectors, on disk
pool       pools too large for memory: vectors in shards, exact search

retrieval  any data of samples and turns (tasks)
mmeb       36 data sets, local lists (mmeb_task: one of them)
mmeb_v2    these, 18 of videos and 24 of documents, lists and pools
mbeir      16 tasks, local and global pool
beir       any set in BEIR's form (ranked, outcomes: what it shares with mbeir and mmeb_v2)
mteb       a model for the mteb package; mteb_run: its benchmarks, mteb_found: what is found done

driver     how every benchmark runs, benchmark: what it leaves behind and resumes from
report     terminal, CSV and Markdown; page: HTML
compare    two results with bootstrap intervals
"""
