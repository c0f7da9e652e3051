"""`demotools`, and `python -m demotools`: Ctrl-C is answered from the first moment on."""

from demotools.errors import exit_with_message


def run() -> None:
    """The command line; its imports take long enough to be interrupted in."""
    with exit_with_message():
        from demotools.cli import main

        main(prog_name="demotools")


if __name__ == "__main__":
    run()
