"""The run store: a registry of runs, and the mailbox between a run's coordinator and the commands that control the run.

`base` defines the interface, and `sqlite` and `redis` implement it. `buffered` is the writer of a coordinator. `locate`
opens the store that a URL or the environment names. `remote_control` sends commands to a run. Other versions of Squall
read the stored data, so a new field needs a default.
"""
