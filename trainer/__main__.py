"""`trainer`, and `python -m trainer` as torchrun calls it; Ctrl-C is heard at once."""

from demotools.errors import exit_with_message


def run() -> None:
    """The command line; its imports take long enough to be interrupted in."""
    with exit_with_message():
        from trainer.cli import main

        main(prog_name="trainer")


if __name__ == "__main__":
    run()
