"""What pip is configured with, for uv: reads `pip config list`, prints variables for a shell.

Ends with 1, and says why, where there is a setting that uv might not follow.
"""

import ast
import shlex
import sys

# Name for uv, and what stands between several values; in pip's configuration it is white space.
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "cert": ("SSL_CERT_FILE", " "),
}
# They change nothing in what is installed.
HARMLESS = {
    *("cache-dir", "no-cache-dir", "config-file", "timeout", "default-timeout", "retries"),
    *("disable-pip-version-check", "no-python-version-warning", "root-user-action", "require-virtualenv"),
    *("no-color", "no-input", "progress-bar", "quiet", "verbose", "log", "compile", "no-compile"),
}
# Of `pip install`, what counts more comes later; other sections are other commands'.
SECTIONS = ("global", "install", ":env:")


def main() -> int:
    """Print the variables; 1 where pip had better do it."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in sys.stdin:
        key, _, value = line.strip().partition("=")
        section, _, name = key.rpartition(".")
        if section in found:
            found[section][name] = ast.literal_eval(value)
    settings = {name: value for section in SECTIONS for name, value in found[section].items()}
    unknown = sorted(settings.keys() - VARIABLES.keys() - HARMLESS)
    if unknown:
        print(f"pip is configured with {', '.join(unknown)}, which uv might not follow.", file=sys.stderr)
        return 1
    for name, (variable, separator) in VARIABLES.items():
        if name in settings:
            print(f"export {variable}={shlex.quote(separator.join(settings[name].split()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
