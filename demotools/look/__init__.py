"""Shows stores: figures, pictures, text in a terminal, one HTML page.

`info` summarises a store's metadata; `statistics` counts over all its episodes; `report` makes the
page, with findings for each store and each pair of stores; `show` plays one episode; `pictures`
draws tiles, panels and animations, and `terminal` the same as text.
"""
