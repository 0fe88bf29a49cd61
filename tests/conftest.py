import os
import tempfile

os.environ.setdefault("COLUMNS", "120")
#: Decisions of races in tests stay out of the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="pwopt-cache-")
os.environ["PWOPT_CACHE"] = _CACHE.name
