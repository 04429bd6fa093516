"""`stepwire bench` is `python -m load_tests` under another name."""

from __future__ import annotations

import sys

from load_tests.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "stepwire bench"))
