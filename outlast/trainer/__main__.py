"""``python -m outlast.trainer CONFIG [--resume R] [--section.key VALUE …]``: one rank."""

import sys

from outlast.launch.lasting_output import make_output_last
from outlast.trainer.main import main

make_output_last()
sys.exit(main())
