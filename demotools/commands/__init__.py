"""The commands of `demotools`, thin: options in, one call of a job, a few lines out.

One file for each group: `get` makes stores (fetch, generate, convert, import), `shape` changes
what there is (shrink, remove), `look` shows and checks it (list, info, show, report,
verify), `share` hands it on (export, archive, unarchive, card, push). A command imports its job
when it is called. What they share is in `demotools.cli`.
"""
