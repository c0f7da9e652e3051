"""The legacy demo files: read without running anything in them, converted, and written.

`machine` is a pickle machine that runs nothing; `episodes` takes an episode from it, `reader` gives
those of a whole file in parts; `images` unpacks their views; `encoding` tells which of the three
object encodings they are in; `convert` makes the store; `writer` writes such files anew.
"""
