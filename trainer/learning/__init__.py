"""What is learned, and how: `losses` (and the advantages that they need), `networks`, and
`building`, which makes networks, losses, optimizers and schedules by the names in the settings.
"""
