"""Running some cells of a chapter, made small, with ``profile="full"`` on stand-ins for its data.

Cells are found by the names that they define and the functions that they call, and made small by what
is assigned and passed, so that neither prose nor formatting nor the order of cells matters.
"""

import ast
import symtable
import sys
import types
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat

from affnb import training

ROOT = Path(__file__).resolve().parents[1]
MUTATORS = {"add", "append", "extend", "insert", "setdefault", "update"}


def fake_modules(monkeypatch, modules):
    """Make ``import`` find stand-ins: from each module's full name to what is in it."""
    for name, members in modules.items():
        made = types.ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)


def _loaded(statement):
    """Return the names of the chapter that a statement uses, also inside the functions in it."""

    def of(table, inside):
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or not inside):
                yield symbol.get_name()
        for child in table.get_children():
            yield from of(child, True)

    return set(of(symtable.symtable(ast.unparse(statement), "statement", "exec"), False))


def _bound(node):
    """Return the names that a top-level statement binds; those of functions inside it are their own."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return {n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr)}
    own = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    return own.union(*map(_bound, ast.iter_child_nodes(node)))


def _changed(tree):
    """Return the names whose objects change in place: entries, attributes, lists that grow."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Subscript, ast.Attribute)):
            changes = isinstance(node.ctx, ast.Store)
            grows = isinstance(node, ast.Attribute) and node.attr in MUTATORS
            while isinstance(node, (ast.Subscript, ast.Attribute)):
                node = node.value
            if (changes or grows) and isinstance(node, ast.Name):
                found.add(node.id)
    return found


class _Cell:
    def __init__(self, source, tags):
        self.tree, self.tags = ast.parse(source), tags
        self.defines = set().union(*map(_bound, self.tree.body))
        self.changes = _changed(self.tree)
        called = [n.func for n in ast.walk(self.tree) if isinstance(n, ast.Call)]
        self.calls = {f.id for f in called if isinstance(f, ast.Name)}
        functions = [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)]
        self.changed_by = {f.name: _changed(f) for f in functions}
        self.needs, before = set(), set()
        for statement in self.tree.body:
            # What a function needs, it needs when it is called; a loop binds before it uses.
            later = isinstance(statement, (ast.FunctionDef, ast.ClassDef))
            if not isinstance(statement, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
                before |= _bound(statement)
            known = self.defines if later else before
            self.needs |= _loaded(statement) - known
            if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                self.needs |= {statement.target.id} - before
            before |= _bound(statement)


def _chosen(cells, define, call, given):
    """Return the indices of the cells asked for, and of all cells that these need."""
    wanted = {k for k, c in enumerate(cells) if c.defines & define or c.calls & call}
    missing = define.difference(*(c.defines for c in cells))
    assert not missing, f"the chapter defines these names no more: {sorted(missing)}"
    unused = call.difference(*(c.calls for c in cells))
    assert not unused, f"the chapter calls these functions no more: {sorted(unused)}"
    changed_by, changes = {}, []
    for cell in cells:
        changed_by |= cell.changed_by
        changes.append(cell.changes.union(*(changed_by.get(name, ()) for name in cell.calls)))
    waiting = sorted(wanted)
    while waiting:
        k = waiting.pop()
        for name in cells[k].needs - given:
            made = [j for j in range(k) if name in cells[j].defines][-1:]
            for j in made:
                also = [i for i in range(j + 1, k) if name in changes[i]]
                for i in {j, *also} - wanted:
                    wanted.add(i)
                    waiting.append(i)
    return sorted(wanted)


class _Smaller(ast.NodeTransformer):
    """Puts other expressions in place of some; see `run_cells` for the forms of the keys."""

    def __init__(self, changes):
        self.unused, self.scopes = set(changes), [""]
        self.assigned, self.passed, self.equal = {}, {}, {}
        for key, new in changes.items():
            change = key, ast.parse(new, mode="eval").body
            if key.endswith("=)"):
                self.passed[tuple(key.removesuffix("=)").split("("))] = change
            elif key.replace(".", "").isidentifier():
                self.assigned[("." + key).rpartition(".")[::2]] = change
            else:
                self.equal[ast.dump(ast.parse(key, mode="eval").body)] = change

    def _take(self, change):
        self.unused.discard(change[0])
        return change[1]

    def _assign(self, target, value):
        if isinstance(target, ast.Name):
            change = self.assigned.get((self.scopes[-1], target.id))
            return self._take(change) if change else value
        if not isinstance(target, ast.Tuple):
            return value
        if isinstance(value, ast.IfExp):
            sides = (self._assign(target, side) for side in (value.body, value.orelse))
            return ast.IfExp(value.test, *sides)
        starred = any(isinstance(part, ast.Starred) for part in ast.iter_child_nodes(value))
        if isinstance(value, ast.Tuple) and not starred:
            pairs = zip(target.elts, value.elts, strict=True)
            return ast.Tuple([self._assign(t, v) for t, v in pairs], ast.Load())
        return value

    def visit_Assign(self, node):
        self.generic_visit(node)
        node.value = self._assign(node.targets[0], node.value)
        return node

    def _scope(self, node):
        self.scopes.append(f".{node.name}")
        self.generic_visit(node)
        self.scopes.pop()
        return node

    visit_ClassDef = _scope  # noqa: N815

    def visit_FunctionDef(self, node):
        owner = self.scopes[-1][1:] if node.name == "__init__" else node.name
        given = node.args.args[len(node.args.args) - len(node.args.defaults) :]
        for k, argument in enumerate(given):
            if change := self.passed.get((owner, argument.arg)):
                node.args.defaults[k] = self._take(change)
        return self._scope(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        called = getattr(node.func, "id", getattr(node.func, "attr", None))
        for keyword in node.keywords:
            if change := self.passed.get((called, keyword.arg)):
                keyword.value = self._take(change)
        return node

    def visit(self, node):
        if isinstance(node, ast.expr) and (change := self.equal.get(ast.dump(node))):
            return self._take(change)
        return super().visit(node)


def cells_of(chapter):
    """Return the code cells of a chapter, ``"<part>/<method>"``, but its set-up."""
    notebook = nbformat.read(ROOT / "chapters" / f"{chapter}.ipynb", as_version=4)
    cells = [
        _Cell(cell.source, set(cell.metadata.get("tags", [])))
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    return [cell for cell in cells if "setup" not in cell.tags]


def run_cells(
    chapter,
    monkeypatch,
    *,
    define=(),
    call=(),
    small=None,
    after=None,
    fit=None,
    explore=None,
    **names,
):
    """Run cells of a chapter with ``profile="full"`` on the CPU, with nothing shown.

    Parameters
    ----------
    chapter
        ``"<part>/<method>"``.
    define, call
        The cells that define one of these names, or call one of these functions, run, and before them
        all cells that they need.
    small
        What makes the full profile small: from a place in the code to the expression to put there.
        ``"name"`` is what is assigned to the name outside functions, ``"owner.name"`` inside the function
        or class; ``"function(name=)"`` is an argument by name in calls of the function, or its default;
        anything else is an expression, however it is formatted. Each must occur in the cells that run.
    after
        From a name to a function of the names, called when the cell that defines it has run.
    explore
        In place of `affnb.widgets.explore`, which does nothing here.
    fit
        In place of `affnb.training.fit`; the real one comes as its first argument.
    names
        What the cells find defined; the parameters of the chapter, too.

    Returns
    -------
    dict, dict
        The names that the cells leave; the verdicts that they record, by id.
    """
    verdicts, real = {}, training.fit
    if fit is not None:
        monkeypatch.setattr(training, "fit", lambda *args, **options: fit(real, *args, **options))
    nothing = lambda *args, **options: None  # noqa: E731
    monkeypatch.setattr("affnb.widgets.explore", explore or nothing)
    monkeypatch.setattr("affnb.plotting.show", lambda *args, **options: plt.close("all"))
    monkeypatch.setattr("IPython.display.display", nothing)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(
        "affnb.claims.record",
        lambda id, statement, verdict, evidence: verdicts.update({id: verdict}),
    )
    plt.switch_backend("Agg")
    parameters = {"profile": "full", "device": "cpu", "seed": 0, "data_root": None}
    parameters |= {name: names.pop(name) for name in parameters.keys() & names.keys()}
    names |= {"__name__": "chapter"}
    smaller, cells = _Smaller(small or {}), cells_of(chapter)
    for k in _chosen(cells, set(define), set(call), set(names)):
        cell = cells[k]
        tree = ast.fix_missing_locations(smaller.visit(cell.tree))
        exec(compile(tree, f"{chapter}, cell {k}", "exec"), names)
        if "parameters" in cell.tags:
            names |= parameters
        for name, act in (after or {}).items():
            if name in cell.defines:
                act(names)
    assert not smaller.unused, f"not in the cells that ran: {sorted(smaller.unused)}"
    return names, verdicts
