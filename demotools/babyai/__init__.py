"""BabyAI as data, without environments.

`cells` has the egocentric views, with each cell packed into one byte, and the object encodings that
BabyAI has used; `vocabulary` has the words of missions and their ids; `levels` reads each level's
manifest: its environment, mission grammar, symmetries and published files. It also says which seeds
belong to which split.
"""
