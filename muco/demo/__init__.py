"""``muco demo``: everything from data to a search, on this machine, shown on one page.

stages.py has the stages, search.py queries and mistakes, page.py the HTML, recipe.yaml the training (recipes/demo.yaml
links to it).
"""

from muco.demo.stages import run_demo

__all__ = ["run_demo"]
