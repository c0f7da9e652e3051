"""Episodes from environments: the fast environments, the expert, recording and replay.

`environment` makes a level's environment, several times faster than minigrid's and bit for bit the
same; `bot` is minigrid's expert in it, and `subgoals` puts the expert's subgoals into words;
`record` records its episodes to a store, `human` those of people; `replay` replays stored actions
and compares.
"""
