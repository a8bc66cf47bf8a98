"""Experience replay: segments, replay tables, the trajectory queue, and their servers and clients.

Nothing here imports PyTorch.
"""
