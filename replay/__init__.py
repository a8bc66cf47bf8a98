"""What was experienced: segments, tables, samplers and the replay server. NumPy only, except `server`."""
