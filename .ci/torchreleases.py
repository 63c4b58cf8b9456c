"""Releases of a package that a requirement admits, newest first: reads `pip index versions NAME`.

Usage: pip index versions torch | torchreleases.py 'torch>=2.11,<2.15'
"""

import re
import sys

from pip._vendor.packaging.requirements import Requirement


def main() -> int:
    """Print `NAME==VERSION` lines; none where the index names no release."""
    requirement = Requirement(sys.argv[1])
    listed = re.search(r"^Available versions: (.*)$", sys.stdin.read(), re.MULTILINE)
    versions = [version.strip() for version in listed[1].split(",")] if listed else []
    for version in requirement.specifier.filter(versions):
        print(f"{requirement.name}=={version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
