"""The tests in ``interpreted`` need Triton's interpreter, which must be chosen before Triton is imported.

So they run in a process of their own: ``test_interpreted.py`` starts it, and by hand it is
``TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/interpreted``.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
else:
    collect_ignore_glob = ["interpreted/*"]
