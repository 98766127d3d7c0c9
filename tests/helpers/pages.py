"""What the pages of the documentation show, for the tests that run it."""

import re
from pathlib import Path


def python_blocks(path: Path) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
