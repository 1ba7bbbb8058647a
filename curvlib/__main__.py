"""``python -m curvlib`` is the command ``curvlib``."""

import sys

from curvlib.cli import main

sys.exit(main())
