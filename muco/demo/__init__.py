"""``muco demo``: everything from data to a search, on this machine, shown on one page.

stages (what is done, in order) · search (queries, answers, mistakes) · page (the HTML) · recipe.yaml (what is trained;
recipes/demo.yaml is a link to it)
"""

from muco.demo.stages import run_demo

__all__ = ["run_demo"]
