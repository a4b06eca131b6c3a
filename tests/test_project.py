"""The files around the package and the book: they exist, agree with each other, and are kept.

Nothing here runs a chapter (test_chapters.py does) or looks at the site (test_book.py does).
"""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import nbformat
import pytest
import yaml
from builder import canonical
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHAPTERS = sorted(ROOT.glob("chapters/*/*.ipynb"))
PARTS = sorted({path.parent.name for path in CHAPTERS})
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
# Documents for people, in which commands and links should work.
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("book/*.md"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def project_files() -> list[Path]:
    """What git knows or would add; all files of a copy without git."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [p for n in listed.stdout.split("\0") if n and (p := ROOT / n).is_file()]
    skipped = {".venv", "_build", "build", ".git", "__pycache__", "affnb.egg-info"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not skipped & set(p.parts)]


def chapter_of(entry: str) -> str:
    return entry.removeprefix("chapters/").removesuffix(".ipynb")


def toc_entries(node: Any) -> list[str]:
    """Every file that _toc.yml names, in reading order."""
    if isinstance(node, list):
        return [entry for child in node for entry in toc_entries(child)]
    if not isinstance(node, dict):
        return []
    own = [node[key] for key in ("root", "file") if key in node]
    return own + [e for k in ("parts", "chapters", "sections") for e in toc_entries(node.get(k))]


# ---- the environments ----------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


def reachable(requirements: list[str]) -> set[str]:
    """The names of all installed packages that the requirements lead to, on this machine."""
    names: set[str] = set()
    seen: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        wanted = todo.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        name = canonicalize_name(wanted.name)
        if name == "affnb":
            texts = [t for extra in wanted.extras for t in PROJECT["optional-dependencies"][extra]]
            todo += [Requirement(text) for text in texts]
            continue
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        names.add(name)
        for text in installed.requires or []:
            needed = Requirement(text)
            environments = [{"extra": extra} for extra in ("", *wanted.extras)]
            if not needed.marker or any(needed.marker.evaluate(e) for e in environments):
                todo.append(needed)
    return names


EXTRAS = sorted(set(PROJECT["optional-dependencies"]) - {"gpu"})  # torch pins its own Triton
DECLARED = sorted(
    {r for extra in EXTRAS for r in PROJECT["optional-dependencies"][extra]}
    | set(PROJECT["dependencies"])
)


def test_constraints_are_plain_pins_in_order() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert [line for line in pinned if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert len(pins()) == len(pinned), "a package is pinned twice"
    assert not [n for n in pins() if n.startswith(("nvidia", "triton", "cuda")) or n == "affnb"]


@pytest.mark.parametrize("text", DECLARED)
def test_dependency_is_pinned_within_its_range(text: str) -> None:
    declared = Requirement(text)
    name = canonicalize_name(declared.name)
    if name == "affnb":
        assert declared.extras <= set(PROJECT["optional-dependencies"])
        return
    if name == "triton":  # a GPU build of torch asks for its own version
        assert name not in pins()
        return
    assert name in pins(), f"{name} is in pyproject.toml and not in constraints.txt"
    assert Version(pins()[name]) in declared.specifier


def test_everything_that_is_needed_is_pinned() -> None:
    needed = reachable(["affnb[test]", *PROJECT["dependencies"]])
    cuda = ("nvidia", "triton", "cuda")
    assert sorted(n for n in needed - set(pins()) if not n.startswith(cuda)) == []


def test_installed_versions_are_the_pinned_ones() -> None:
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("this is not the environment that `make setup` installs")
    wrong = {}
    for name in reachable(["affnb[test]", *PROJECT["dependencies"]]) & set(pins()):
        # A CPU build of torch is "2.13.0+cpu": the same version, another build.
        version = Version(importlib.metadata.version(name)).public
        if Version(version) != Version(pins()[name]):
            wrong[name] = f"{version} is installed, {pins()[name]} is pinned"
    assert wrong == {}


def test_environment_yml_agrees_with_constraints() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    # pip installs what the Makefile installs, under the same constraints: so the versions agree ...
    makefile = (ROOT / "Makefile").read_text()
    (installed,) = re.findall(r"pip install .*?-c constraints\.txt -e '(\S+)'", makefile)
    assert pip == ["-c constraints.txt", f"-e {installed}"]
    # ... unless conda brings a package of the book in another version.
    versions = dict(re.fullmatch(r"([\w-]+)(?:=+([\d.]+))?", d).groups() for d in conda)  # type: ignore[union-attr]
    python = versions.pop("python")
    assert python in SpecifierSet(PROJECT["requires-python"])
    assert {n: v for n, v in versions.items() if n in pins() and v != pins()[n]} == {}


# ---- the package ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, built from a clean copy, was installed without anything else."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for path in project_files():
        if path.parts[len(ROOT.parts)] in {"affnb", "tests", "pyproject.toml"} or (
            path.name in {PROJECT["readme"], *PROJECT["license-files"]}
        ):
            copy = folder / "source" / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("affnb-*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", folder / "site", wheel]
    subprocess.run([*pip, *install], check=True)
    return folder / "site"


def test_wheel_has_the_package_and_nothing_else(wheel_site: Path) -> None:
    tops = {p.name for p in wheel_site.iterdir() if p.name != "__pycache__"}
    assert tops == {"affnb", f"affnb-{PROJECT['version']}.dist-info"}
    built = {str(p.relative_to(wheel_site)) for p in (wheel_site / "affnb").rglob("*.py")}
    sources = {name_of(p) for p in project_files() if name_of(p).startswith("affnb/")}
    assert built == {name for name in sources if name.endswith(".py")}
    assert (wheel_site / "affnb" / "py.typed").exists()
    assert list(wheel_site.glob("*.dist-info/licenses/LICENSE-CODE"))


# Runs with nothing on the path but the standard library, the wheel, and links to torch, numpy and what
# these two need. Prints what importing the package added, leaving out those two and the library.
BARE = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch, numpy
before = set(sys.modules)
import affnb
affnb_alone = set(sys.modules) - before
import importlib, json
for module in sys.argv[3:]:
    importlib.import_module(module)
own = sys.stdlib_module_names | {"torch", "numpy", "affnb"}
added = {name.partition(".")[0] for name in set(sys.modules) - before} - own
print(json.dumps([sorted(added), affnb.__version__, affnb.__file__, sorted(affnb_alone)]))
"""


def test_wheel_imports_with_torch_and_numpy_alone(wheel_site: Path, tmp_path: Path) -> None:
    for name in reachable(["torch", "numpy"]):
        files = importlib.metadata.files(name) or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            source = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(source)
    modules = [f"affnb.{part}" for part in PARTS] + ["affnb.checks", "affnb.distributed"]
    # -S leaves out site-packages, -I the current folder and PYTHONPATH.
    command = [sys.executable, "-I", "-S", "-c", BARE, str(wheel_site), str(tmp_path), *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    added, version, file, alone = json.loads(done.stdout)
    assert Path(file).is_relative_to(wheel_site)
    assert version == PROJECT["version"]
    assert added == [], "importing affnb should load nothing beyond torch and numpy"
    assert [name for name in alone if not name.startswith("affnb")] == []


MODULES = sorted(
    name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for path in (ROOT / "affnb").rglob("*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Kernels are imported lazily, where Triton is.
        if error.name == "triton" and name.startswith("affnb.kernels."):
            pytest.skip("Triton is not installed")
        raise
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("part", PARTS)
def test_public_names_are_documented_with_an_example(part: str) -> None:
    package = importlib.import_module(f"affnb.{part}")
    assert package.__all__
    for name in package.__all__:
        doc = getattr(package, name).__doc__ or ""
        assert ">>>" in doc, f"affnb.{part}.{name} has no example"


# ---- the chapters --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toc() -> list[str]:
    return toc_entries(yaml.safe_load((ROOT / "_toc.yml").read_text()))


def test_toc_lists_each_chapter_once(toc: list[str]) -> None:
    listed = [chapter_of(entry) for entry in toc if entry.startswith("chapters/")]
    assert sorted(listed) == [f"{path.parent.name}/{path.stem}" for path in CHAPTERS]
    preface = (ROOT / "book" / "preface.md").read_text()
    linked = set(re.findall(r"\]\(\.\./chapters/([\w/]+)\.ipynb\)", preface))
    assert linked == set(listed), "the table of the preface and _toc.yml name different chapters"


def test_openings_link_the_chapters_of_their_part_in_order(toc: list[str]) -> None:
    for part in dict.fromkeys(path.parent.name for path in CHAPTERS):
        text = (ROOT / "book" / "parts" / f"{part}.md").read_text()
        listed = [chapter_of(e) for e in toc if e.startswith(f"chapters/{part}/")]
        table = re.findall(rf"^\| \[.*?\]\(\.\./\.\./chapters/({part}/\w+)\.ipynb\)", text, re.M)
        assert table in ([], listed), part


def test_four_files_for_each_chapter() -> None:
    chapters = {(path.parent.name, path.stem) for path in CHAPTERS}
    assert chapters
    for pattern in ("affnb/*/{}.py", "tests/*/test_{}.py", "benchmarks/*/bench_{}.py"):
        before, after = pattern.split("/*/")[1].split("{}")
        found = {
            (path.parent.name, path.name.removeprefix(before).removesuffix(after))
            for path in ROOT.glob(pattern.replace("{}", "*"))
            if path.parent.name in PARTS and path.name not in {"__init__.py", "conftest.py"}
        }
        assert found == chapters, pattern


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_chapter_is_committed_in_canonical_form(path: Path) -> None:
    assert canonical.check(path) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_chapter_metadata(path: Path, toc: list[str]) -> None:
    metadata = nbformat.read(path, as_version=4)["metadata"]["affnb"]
    assert {"title", "paper", "builds_on", "minutes", "summary", "names"} == set(metadata)
    assert metadata["paper"] in parse_file(ROOT / "book" / "references.bib").entries
    order = [chapter_of(entry) for entry in toc if entry.startswith("chapters/")]
    earlier = order[: order.index(f"{path.parent.name}/{path.stem}")]
    assert set(metadata["builds_on"]) <= set(earlier), "a chapter builds on earlier ones"


def test_set_up_cell_is_the_same_in_all_chapters() -> None:
    expected = (ROOT / "book" / "builder" / "setup_cell.py").read_text().strip()
    for path in CHAPTERS:
        cells = nbformat.read(path, as_version=4)["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert code[0]["source"] == expected, name_of(path)
        assert "setup" in code[0]["metadata"]["tags"]
        assert "parameters" in code[1]["metadata"]["tags"], name_of(path)


# ---- the texts -----------------------------------------------------------------------------------


def test_repository_address_is_stated_once() -> None:
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    url = urlparse(address)
    assert url.scheme == "https"
    needle = (url.netloc + url.path.rstrip("/").removesuffix(".git")).encode()
    stating = {name_of(path) for path in project_files() if needle in path.read_bytes()}
    assert stating == {"_config.yml"}


def test_citation_file() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert str(citation["version"]) == PROJECT["version"]
    assert PROJECT["license"] in citation["license"]
    assert citation["authors"]


def test_version_is_the_same_everywhere() -> None:
    import affnb

    assert affnb.__version__ == PROJECT["version"]
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert latest is not None
    assert latest[1] == PROJECT["version"]


@pytest.mark.parametrize("path", [*DOCUMENTS, *WORKFLOWS], ids=name_of)
def test_commands_named_in_texts_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.M))
    named = set(re.findall(r"(?:`|run: |^)make ([a-z]+)", path.read_text(), flags=re.M))
    assert named <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_between_files_lead_somewhere(path: Path) -> None:
    generated = {"map.md", "scoreboard.md", "benchmarks.md"}  # by the builder
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in link and link not in generated:
            assert (path.parent / link).exists(), f"{name_of(path)} links to {link}"


def test_citations_are_in_the_bibliography() -> None:
    known = set(parse_file(ROOT / "book" / "references.bib").entries)
    for path in [*sorted(ROOT.glob("book/*.md")), *CHAPTERS]:
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", path.read_text()):
            assert {key.strip() for key in keys.split(",")} <= known, name_of(path)


def test_example_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["embed"].weight.grad.norm() > 0


# ---- the workflows -------------------------------------------------------------------------------


def test_there_are_workflows() -> None:
    assert {path.stem for path in WORKFLOWS} >= {"test", "publish"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_workflow_is_pinned_and_least_privileged(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert "write" not in workflow["permissions"].values(), "only a job may write"
    assert workflow["concurrency"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 60, name
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False
    # Beside each commit stands the release that it is, for those who update it.
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert [line for line in uses if not re.search(r"@[0-9a-f]{40} # v\d+(\.\d+)*$", line)] == []


def test_pages_are_published_with_the_address_of_their_repository() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())
    environment = workflow["jobs"]["build"]["env"]
    assert environment["AFFNB_REPOSITORY"] == "${{ github.server_url }}/${{ github.repository }}"
    assert environment["AFFNB_BRANCH"] == "${{ github.ref_name }}"
    assert "vars.AFFNB_SITE" in environment["AFFNB_SITE"]


def test_hooks_are_the_projects_own_tools() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    for hook in hooks[0]["hooks"]:
        assert hook["language"] == "system"
        assert ".venv/bin/python" in hook["entry"]


def test_what_ci_runs_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
