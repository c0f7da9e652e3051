"""`demotools`, and `python -m demotools`: Ctrl-C is answered from the first moment on."""

from functools import partial

from demotools.errors import run_program

run = partial(run_program, "demotools")

if __name__ == "__main__":
    run()
