"""`trainer`, and `python -m trainer` as torchrun calls it; Ctrl-C is heard at once."""

from demotools.__main__ import run as run_named


def run() -> None:
    """The command line."""
    run_named("trainer")


if __name__ == "__main__":
    run()
