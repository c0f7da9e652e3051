"""Runs, looked at: `plot` draws learning curves, `page` makes one HTML page of several runs,
`watch` shows a policy at play.
"""
