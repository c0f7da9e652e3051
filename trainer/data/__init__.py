"""Makes batches from demo stores.

`iterator` is the memory-mapped iterator, and `sources` the stores it reads; `order` computes which
step comes where; `batches` gathers the steps into the two layouts; `augment` applies the symmetries
that a level declares; `own_iterator` takes batches from the user's code; `dataset` is the iterator
for PyTorch's DataLoader.
"""
