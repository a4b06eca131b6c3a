# Set-up, the same in every chapter: find affnb, or install it from where this notebook came from.
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # "<address>@<branch>", written in when the book is published


def find_affnb():
    spec = importlib.util.find_spec("affnb")
    if spec and spec.origin:  # a mere folder of that name has no origin
        return
    for folder in [Path.cwd(), *Path.cwd().parents]:  # a clone that is not installed
        if (folder / "affnb" / "__init__.py").exists():
            sys.path.insert(0, str(folder))
            return
    source = os.environ.get("AFFNB_REPOSITORY") or REPOSITORY
    if not source and "COLAB_JUPYTER_IP" in os.environ:
        # Colab knows which file it opened.
        import re
        import urllib.parse
        import urllib.request

        sessions = f"http://{os.environ['COLAB_JUPYTER_IP']}:9000/api/sessions"
        opened = urllib.parse.unquote(urllib.request.urlopen(sessions).read().decode())
        found = re.search(r"(https://github\.com/[^/]+/[^/]+)/blob/([^/]+)/", opened)
        source = f"{found[1]}@{found[2]}" if found else ""
    if not source:
        raise ModuleNotFoundError(
            "affnb is not installed, and this copy of the notebook does not say where it came from. "
            "Run it inside a clone, or set AFFNB_REPOSITORY to the repository's address."
        )
    requirement = f"affnb[chapters] @ git+{source.removeprefix('git+')}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.check_call([*pip, requirement])
    importlib.invalidate_caches()


find_affnb()
