"""Experience replay: segments, replay tables, the trajectory queue, and their servers and clients.

No module of this package imports PyTorch.
"""
