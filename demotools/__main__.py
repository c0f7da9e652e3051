"""`demotools`, and `python -m demotools`: Ctrl-C is answered from the first moment on."""

import sys


def run(name: str = "demotools") -> None:
    """The command line of a package, whose imports take long enough to be interrupted in."""
    try:
        from importlib import import_module

        from demotools.errors import exit_with_message

        with exit_with_message():
            import_module(f"{name}.cli").main(prog_name=name)
    except KeyboardInterrupt:  # before there was anybody else to answer it
        sys.stderr.write("\ninterrupted\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    run()
