"""``fewer_steps.py STEPS SCRIPT …``: an example with that many steps in place of its own."""

import sys
from importlib.util import module_from_spec, spec_from_file_location

steps, script, *words = sys.argv[1:]
spec = spec_from_file_location("example", script)
assert spec is not None
assert spec.loader is not None
example = module_from_spec(spec)
spec.loader.exec_module(example)
example.STEPS = int(steps)
example.main(*words)
