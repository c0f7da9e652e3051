"""Runs a policy in environments: `vector` steps many of them, in one or several processes;
`collect` lets a network act in them and records rollouts; `evaluate` measures its success rate.
"""
