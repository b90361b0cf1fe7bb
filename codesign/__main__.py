"""`python -m codesign` is the command `codesign`."""

import sys

from codesign.experiments.cli import main

sys.exit(main())
