"""A training run. Read `loop` first: the whole of training, top to bottom.

`state` is what a run and its present stage hold; `session.train` goes from settings to the folder
of a finished run; `checkpoint` is the file, `resume` writes it and takes a run up from it,
`loading` makes a policy of it; `cost` is worked out beforehand; `log` is what a run says.
"""
