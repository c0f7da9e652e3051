"""Batches out of demo stores.

`iterator` is the memory-mapped iterator and `sources` the stores it plays; `order` says which step
comes where: arithmetic; `batches` gathers the steps into the two layouts; `augment` applies the
symmetries that a level declares; `own_iterator` takes batches from code of the user's; `dataset` is
the iterator for PyTorch's DataLoader.
"""
