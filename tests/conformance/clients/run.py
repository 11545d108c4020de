"""Every case, and then whether a method of the client was forgotten. The exit code tells."""

import pathlib
import sys
import unittest

from support import CALLED, VERSION, methods
from test_later import LATER

# Not a call of the API.
LOCAL = {"close"}

only = sys.argv[1:]
here = pathlib.Path(__file__).parent
loader = unittest.TestLoader()
if only:
    loader.testNamePatterns = [f"*{word}*" for word in only]
suite = loader.discover(str(here), top_level_dir=str(here))
print(f"stateset-sandbox {'.'.join(map(str, VERSION))}", file=sys.stderr)
result = unittest.TextTestRunner(verbosity=2, buffer=True).run(suite)
problems = not result.wasSuccessful()
if result.testsRun == 0:
    print("no case ran", file=sys.stderr)
    problems = True
if not only:
    for name in sorted(methods() - CALLED - LATER.keys() - LOCAL):
        print(f"forgotten: no case calls {name}", file=sys.stderr)
        problems = True
    for name in sorted(CALLED & LATER.keys()):
        print(f"{name} is both called and said to come later", file=sys.stderr)
        problems = True
sys.exit(problems)
