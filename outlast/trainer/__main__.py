"""``python -m outlast.trainer CONFIG [--resume R] [--section.key VALUE …]``: one rank."""

import sys

from outlast.trainer.main import main

sys.exit(main())
