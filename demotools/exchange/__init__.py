"""Exports stores to other programs and machines, and imports theirs.

`archive` packs a store into one zip file and restores it; `export` writes legacy pickles and Minari
datasets, and `minari_import` reads the latter; `publish` uploads a store with its dataset card to
the Hugging Face hub, whose client is in `hub`.
"""
