"""How it runs: configuration, the topology, the coordinator, the run store and the command line."""
