"""`python -m qat` is the same as `qat`."""

from qat.cli.group import main

if __name__ == "__main__":
    main(prog_name="qat")
