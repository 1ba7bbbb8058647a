"""``python -m curvlib.cli`` is the command ``curvlib``, for launchers that want a module."""

import sys

from curvlib.cli import main

sys.exit(main())
