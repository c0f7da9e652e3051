"""The legacy demo files: read without running anything in them, converted, and written.

`machine` is a pickle machine that runs nothing; `episodes` reads an episode from it, and `reader`
the episodes of a whole file in parts; `images` unpacks their views; `encoding` identifies which of
the three object encodings they use; `convert` makes the store; `writer` writes such files.
"""
