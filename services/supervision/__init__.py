"""Supervision of a run: the coordinator starts, watches, and recreates the run's processes, and reports its state.

Start reading at `coordinator`. `topology` describes a run's processes, and `processes` handles the exit of a process.
"""
