"""`trainer`, and `python -m trainer` as torchrun calls it; Ctrl-C is heard at once."""

from functools import partial

from demotools.errors import run_program

run = partial(run_program, "trainer")

if __name__ == "__main__":
    run()
