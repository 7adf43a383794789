"""``python -m elk_stress.cli`` is ``elk-stress``."""

import sys

from elk_stress.cli import main

sys.exit(main())
