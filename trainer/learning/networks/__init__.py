"""Networks: a batch of T x B steps and the memory before it -> logits, values, memory after.

`base` holds what they share, the LSTM that restarts where the masks say so among it; `small`,
`film` and `big` are the networks. A new one is added to `trainer.learning.building.NETWORKS`.
"""
