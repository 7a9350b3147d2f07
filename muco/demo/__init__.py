"""``muco demo``: everything from data to a search, on this machine, shown on one page.

stages (what is done, and how it goes on after a kill) · search (queries, answers, mistakes) · page (the HTML) ·
recipe.yaml (what is trained; the same file as recipes/demo.yaml)
"""

from muco.demo.stages import run_demo

__all__ = ["run_demo"]
