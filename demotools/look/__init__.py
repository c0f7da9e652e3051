"""Stores, shown: figures, pictures, text in a terminal, one HTML page.

`info` is what a store says of itself; `statistics` counts over all its episodes; `report` is the
page, with the findings of each store and of each two; `show` plays one episode; `pictures` draws
tiles, panels and animations, `terminal` the same as text.
"""
