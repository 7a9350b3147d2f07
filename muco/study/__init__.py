"""The paper's claims as small designed experiments on the built-in scenes, which anyone can repeat on two cores.

design.py                          the parts of a study: runs, starts, equal costs, comparisons
base.py, studies.py, true_sizes.py the studies; studies.py has all of them by name
run.py, one.py                     runs what is missing, several processes at a time; one training, or costs of steps
probes.py, report.py               measures beside retrieval; the page with means, intervals and paired differences
"""
