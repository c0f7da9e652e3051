"""The promises of both programs attacked: killed, starved, lied to. `make attack` runs it all.

Every attack is a function that tries many things in a folder of its own and says of each whether
the promise held. The figures go to `results.json` and into docs/reliability.md.
"""
