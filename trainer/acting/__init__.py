"""A policy in environments: `vector` steps many of them, in this process or in several; `collect`
lets a network act in them and keeps what it saw; `evaluate` measures how often it succeeds.
"""
