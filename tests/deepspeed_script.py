"""``deepspeed_script.py SCRIPT``: the script, with a DeepSpeed that builds no operators.

It would spend most of a minute with a compiler on its all-reduce through shared memory, which nothing of ours calls.
"""

import runpy
import sys

import deepspeed.ops

deepspeed.ops.__compatible_ops__ = {}
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
