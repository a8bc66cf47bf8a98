"""The run store: where runs are registered, and where coordinators and commands leave messages for each other.

`base` is the contract, `sqlite` and `redis` keep it, `buffered` is the coordinator's writer, `locate` opens the store
that a URL or the environment names, and `remote_control` sends commands to a run. What is written here is read by
other versions of Squall: a new field needs a default.
"""
