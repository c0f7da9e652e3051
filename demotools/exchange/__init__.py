"""Stores handed to other programs and machines, and taken from them.

`archive` packs a store into one zip and restores it; `export` writes legacy pickles and Minari
datasets, `minari_import` reads the latter; `publish` sends a store with its dataset card to the
Hugging Face hub, whose client is `hub`.
"""
