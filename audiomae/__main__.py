"""`python -m audiomae` is the command `audiomae`."""

import sys

from .cli import main

sys.exit(main())
