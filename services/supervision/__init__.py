"""Supervision: the coordinator of one run, the processes it starts, watches, and recreates, and what it reports.

Start at `coordinator`; `topology` says which processes a run has, `processes` what happens when one dies.
"""
