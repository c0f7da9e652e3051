"""A training run. Read `loop` first: it is the whole training loop, from top to bottom.

`state` is the state of a run and of its current stage; `session.train` turns settings into the
folder of a finished run; `checkpoint` is the checkpoint file, `resume` writes it and resumes a run
from it, `loading` makes a policy from it; `cost` estimates the cost beforehand; `log` is the log.
"""
