"""Episodes made by playing: the environment, the bot, recording, replay.

`environment` makes a level's environment, several times faster and bit for bit the same; `bot`
is minigrid's expert on it, `subgoals` what it is about, in words; `record` makes a store of its
episodes, `human` one of what people play; `replay` plays stored actions again and compares.
"""
