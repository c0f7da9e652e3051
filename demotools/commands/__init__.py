"""The commands of `demotools`, thin: options in, one call of a job, a few lines out.

One file for each group that `--help` shows: `get` makes stores, `shape` makes stores out of stores,
packs and removes them, `look` shows and checks them, `share` hands them on. A command imports its
job when it is called. What they share is in `demotools.cli`.
"""
