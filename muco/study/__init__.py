"""The paper's claims as small designed experiments on the built-in scenes, which anyone can repeat on two cores.

design.py       what a study is: its trainings, what starts from what, what costs the same, which scores are compared
base.py         what the studies share: scenes and a recipe
pretraining.py, image_share.py, finetuning.py, true_sizes.py   the studies; studies.py has them by name
run.py          trains and scores what is missing, several processes at a time; resumes after a kill
calibrate.py    what a step costs, for runs that shall cost the same; one.py: one training and its scores
probes.py       whether dialogues are matched without their images, and how vectors lie
results.py      mean and interval over seeds, differences paired by seed; plots.py and report.py show them
"""
