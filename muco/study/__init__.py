"""The paper's claims as small designed experiments on the built-in scenes, which anyone can repeat on two cores.

design.py     what a study is: its trainings, what starts from what, which scores are compared
studies.py    the studies themselves
run.py        trains and scores what is missing, several processes at a time; can be killed and goes on
one.py        one training and its scores, in a process of its own
report.py     mean and interval over seeds, differences paired by seed; a table, a plot, a page
"""
