"""Networks and losses: `losses` (with the advantages that they need), `networks`, and `building`,
which builds networks, losses, optimizers and schedules by their names in the settings.
"""
