"""The command line: one module for each command or family of commands.

A command's module declares its arguments and imports what it needs only when it runs, so that `squall --help` is
quick. `display` renders results for people, `installation` checks where Squall's packages come from. Anything here may
change except what users script: flags, JSON keys, and exit statuses.
"""
