"""Stores, shown: figures, pictures, text in a terminal, one HTML page.

`info` is what a store says of itself; `survey` counts over all its episodes; `report` is the page,
with the findings; `diff` compares two stores; `show` plays one episode; `pictures` draws tiles,
panels and animations, `terminal` the same as text.
"""
