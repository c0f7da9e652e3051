"""The commands of `demotools`: each parses options, makes one call and prints a few lines.

One file for each group that `--help` shows: `get` makes stores, `shape` makes new stores from
existing ones, packs and removes them, `look` shows and checks them, `share` exports and publishes
them. A command imports its job when it is called. Code that commands share is in `demotools.cli`.
"""
