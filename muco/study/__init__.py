"""The paper's claims as small designed experiments on the built-in scenes, which anyone can repeat on two cores.

design.py       what a study is: its trainings, what starts from what, what costs the same, which scores are compared
base.py         what the studies share, scenes and a recipe; the studies of fine-tuning and of dear images
studies.py, true_sizes.py   the other studies; studies.py has all of them by name
run.py          trains and scores what is missing, several processes at a time; resumes after a kill
one.py          one training and its scores; what a step costs, for runs that shall cost the same
probes.py       whether dialogues are matched without their images, and how vectors lie
report.py       mean and interval over seeds, differences paired by seed, and the page that shows them
"""
