"""Presents runs: `plot` draws learning curves, `page` makes one HTML page about several runs,
`watch` shows a policy playing, and `push` publishes it.
"""
