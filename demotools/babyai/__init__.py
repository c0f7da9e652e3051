"""BabyAI's world, as data: nothing here plays.

`cells` holds the egocentric views, a cell packed into one byte, and the object encodings of the
years; `vocabulary` the words of missions and their ids; `levels` what each level's manifest says:
its environment, mission grammar, symmetries, published files, and which seeds belong to which
split.
"""
