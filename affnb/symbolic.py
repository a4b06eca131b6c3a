"""State a proposition, have SymPy prove it, and show it in the page; or raise.

A proposition is a list of identities (and, where they are decided by the symbols' assumptions,
inequalities). Each side may hold unevaluated derivatives, integrals, sums and limits: they are shown as
they stand and evaluated for the proof.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import sympy as sp
from sympy.matrices.expressions.matexpr import MatrixElement
from sympy.polys.polyerrors import PolynomialError

from .claims import MIME, anchor, badge, claim

__all__ = ["ProofError", "prove"]

_DIGITS = 40  # working precision of the numeric search for counterexamples
_TINY = sp.Float(10) ** (-_DIGITS // 2)  # what counts as 0 there


class ProofError(AssertionError):
    """SymPy could not confirm a stated proposition, or found a counterexample."""


def _entries(expression: Any) -> Iterator[sp.Expr]:
    yield from expression if isinstance(expression, sp.MatrixBase) else (expression,)


def _evaluated(side: Any) -> Any:
    side = sp.sympify(side)
    if isinstance(side, sp.MatrixExpr):
        side = side.as_explicit()
    return side.doit() if hasattr(side, "doit") else side


def _unknowns(expression: sp.Expr) -> list[sp.Expr]:
    """List what a random point gives a value to: symbols, and entries of vectors and matrices."""
    entries = {
        entry
        for entry in expression.atoms(sp.Indexed, MatrixElement)
        if all(index.is_number for index in entry.args[1:])
    }
    names = {entry.args[0] for entry in expression.atoms(sp.Indexed, MatrixElement)}
    names |= {name.label for name in names if isinstance(name, sp.IndexedBase)}
    symbols = {s for s in expression.free_symbols if isinstance(s, sp.Symbol) and s not in names}
    return sorted(symbols | entries, key=str)


def _fits(value: sp.Rational, unknown: sp.Expr) -> bool:
    facts = unknown.assumptions0
    return all(getattr(value, f"is_{fact}", None) in (None, facts[fact]) for fact in facts)


def _random_point(expression: sp.Expr, rng: random.Random) -> dict[sp.Expr, sp.Rational]:
    """Draw exact rationals for the unknowns whose assumptions allow it."""
    point = {}
    for unknown in _unknowns(expression):
        for _ in range(50):
            # Every integer from -5 to 5 has its chance; other rationals stay within 60/17.
            value = sp.Integer(rng.randint(-5, 5))
            if not unknown.is_integer:
                value = sp.Rational(rng.randint(-60, 60), 17)
            if _fits(value, unknown):
                point[unknown] = value
                break
    return point


def _real(value: sp.Expr, digits: int) -> sp.Number | None:
    """Evaluate numerically; ``None`` unless the result is a finite real number."""
    real, imaginary = sp.N(value, digits, maxn=10 * digits).as_real_imag()
    if not (real.is_Number and real.is_finite and imaginary.is_Number) or abs(imaginary) > _TINY:
        return None
    return sp.Integer(0) if abs(real) < _TINY else real


def _value_at(expression: sp.Expr, point: dict[sp.Expr, Any]) -> sp.Number | None:
    """Evaluate at a point; ``None`` where the value is not finite, not real, or not known well."""
    value = expression.subs(point)
    if value.is_Rational:
        return value
    real = _real(value, _DIGITS)
    if not real:  # unknown, or zero
        return real
    # What cancellation leaves of huge terms is noise, and differs when more digits are carried.
    again = _real(value, 3 * _DIGITS)
    return real if again is not None and abs(real - again) < abs(real) / 10**6 else None


def _simplifies_to_zero(difference: sp.Expr) -> bool:
    """Try cheap tactics first; any one that reaches 0 is a proof."""
    for tactic in (
        lambda e: e,
        sp.expand,
        lambda e: sp.cancel(sp.together(e)),
        lambda e: sp.cancel(sp.together(sp.expand_log(sp.powsimp(e), force=False))),
        sp.simplify,
        lambda e: sp.simplify(sp.expand(e.rewrite(sp.exp))),
        lambda e: sp.simplify(sp.piecewise_fold(e.rewrite(sp.Piecewise))),
        # Only where the difference is real: there, exp is 1 at 0 alone (log-sum-exp identities).
        lambda e: sp.simplify(sp.exp(e) - 1) if e.is_real else e,
    ):
        try:
            if tactic(difference) == 0:
                return True
        except (NotImplementedError, PolynomialError):  # a tactic that does not apply
            continue
    return False


def _sides(item: Any) -> tuple[Any, str, Any]:
    if isinstance(item, tuple) and len(item) == 2:
        return item[0], "=", item[1]
    if isinstance(item, sp.core.relational.Relational):
        symbol = {"==": "=", ">": ">", ">=": r"\ge", "<": "<", "<=": r"\le"}.get(item.rel_op)
        if symbol:
            return item.lhs, symbol, item.rhs
    if item in (sp.true, sp.false):
        raise TypeError(
            f"identities: expected a relation, got one that SymPy evaluated to {item} at once; "
            "state it as sp.Gt(left, right, evaluate=False)"
        )
    raise TypeError(f"identities: expected (left, right) pairs or relations, got {item!r}")


def _check_identity(left: Any, right: Any, instances: int, seed: int) -> bool:
    """Return whether every entry was proved generically; raise on a counterexample."""
    left, right = _evaluated(left), _evaluated(right)
    if isinstance(left, sp.MatrixBase) != isinstance(right, sp.MatrixBase):
        raise TypeError("identities: expected two scalars or two matrices, got one of each")
    if isinstance(left, sp.MatrixBase) and left.shape != right.shape:
        raise ProofError(f"matrices of shapes {left.shape} and {right.shape} are not equal")
    generic = True
    difference = left - right
    for entry in _entries(difference):
        rng, tried, drawn = random.Random(seed), 0, 0
        wanted = max(3, instances)
        while tried < wanted and drawn < 20 * wanted:
            drawn += 1
            point = _random_point(entry, rng)
            value = _value_at(entry, point)
            if value not in (None, 0):
                raise ProofError(f"{sp.Eq(left, right, evaluate=False)} fails at {point}")
            tried += value is not None
        if instances:
            if tried < instances:
                raise ProofError(f"only {tried} of {instances} random points were in the domain")
            generic = False
        elif not _simplifies_to_zero(entry):
            raise ProofError(f"SymPy does not reduce {entry} to 0 (no counterexample found)")
    return generic


def _check_inequality(left: Any, symbol: str, right: Any, seed: int) -> None:
    difference = _evaluated(left) - _evaluated(right)
    fact = {">": "positive", r"\ge": "nonnegative", "<": "negative", r"\le": "nonpositive"}[symbol]
    for form in (difference, sp.simplify(difference), sp.factor(difference)):
        if getattr(form, f"is_{fact}"):
            return
    rng = random.Random(seed)
    for _ in range(20):
        point = _random_point(difference, rng)
        value = _value_at(difference, point)
        if value == 0:  # rounded, perhaps, where a strict relation must tell
            value = difference.subs(point)
        if value is not None and getattr(value, f"is_{fact}") is False:
            raise ProofError(f"{left} {symbol} {right} fails at {point}")
    raise ProofError(f"the assumptions do not decide {difference} {symbol} 0")


# What fits a line of a card on a phone, in symbols.
_LINE = 32


def _symbols_in(latex: str) -> int:
    """Estimate how many symbols wide a formula is (numerator and denominator count both)."""
    return len(re.sub(r"[{}^_\s]", "", re.sub(r"\\[a-zA-Z]+|\\.", "x", latex)))


def _terms_in_lines(side: Any) -> list[str]:
    """Cut a long sum between its terms, into lines that fit."""
    whole = sp.latex(side)
    if not isinstance(side, sp.Add) or _symbols_in(whole) <= _LINE:
        return [whole]
    lines = [""]
    for term in side.as_ordered_terms():
        text = sp.latex(term)
        signed = text if text.startswith("-") or not lines[0] else f"+ {text}"
        if lines[-1] and _symbols_in(lines[-1] + signed) > _LINE:
            lines.append(signed)
        else:
            lines[-1] = f"{lines[-1]} {signed}".strip()
    return lines


def _shown(left: Any, symbol: str, right: Any) -> str:
    """A relation as LaTeX: in one line if it fits, else broken before the relation, and in sums."""
    left, right = sp.sympify(left), sp.sympify(right)
    short = f"{sp.latex(left)} \\;{symbol}\\; {sp.latex(right)}"
    if _symbols_in(short) <= _LINE + 4:
        return short
    (first, *more), (value, *others) = _terms_in_lines(left), _terms_in_lines(right)
    rows = [first, *(f"\\quad {line}" for line in more)]
    rows += [f"{symbol}\\; {value}", *(f"\\quad {line}" for line in others)]
    return "\\begin{aligned}\n&" + " \\\\\n&".join(rows) + "\n\\end{aligned}"


def prove(
    statement: str,
    *identities: Any,
    id: str | None = None,
    instances: int = 0,
    seed: int = 0,
    steps: str = "",
) -> None:
    r"""Prove a proposition with SymPy and show it; raise when it does not hold.

    Parameters
    ----------
    statement
        The proposition in words (Markdown, with mathematics between dollar signs).
    *identities
        ``(left, right)`` pairs (scalars or matrices), or SymPy relations. Equalities are proved by
        reducing the difference to 0; inequalities must follow from the symbols' assumptions.
    id
        When given, the result is also recorded on the scoreboard under this id
        (``"<part>/<method>:<slug>"``).
    instances
        0 asks for a generic proof. A positive number instead checks that many exact random rational
        points, for identities whose generic proof does not terminate; the page then says so, and the
        verdict recorded is *equal*, not *proved*.
    seed
        Seed of the random points, which are also used to look for counterexamples first.
    steps
        An optional remark on the idea of the proof, shown below the identities.

    Raises
    ------
    ProofError
        A counterexample was found, or SymPy could not decide.
    TypeError
        Something that is neither a pair nor a relation.

    Notes
    -----
    SymPy's assumptions know signs, not intervals. What holds on (0, 1) alone is stated with
    ``1 / (1 + u)`` for a positive ``u``, which takes every value of (0, 1) once.

    A relation that SymPy evaluates as soon as it is written (``p + 1 > 0`` becomes ``True``) is
    stated as ``sp.Gt(p + 1, 0, evaluate=False)``.

    Examples
    --------
    >>> x = sp.symbols("x", real=True)
    >>> prove("A derivative.", (sp.Derivative(x**2, x), 2 * x))  # doctest: +ELLIPSIS
    {'text/markdown': ...'[proved] A derivative.'}
    >>> prove("Not so.", (sp.sin(x), x))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    affnb.symbolic.ProofError: Eq(sin(x), x) fails at {x: ...}
    """
    from IPython.display import display

    if not identities:
        raise ValueError("identities: expected at least one, got none")
    if instances < 0:
        raise ValueError(f"instances: expected a number >= 0, got {instances}")
    generic, lines = True, []
    symbols: set[sp.Symbol] = set()
    for item in identities:
        left, symbol, right = _sides(item)
        if symbol == "=":
            generic &= _check_identity(left, right, instances, seed)
        else:
            _check_inequality(left, symbol, right, seed)
        lines.append(_shown(left, symbol, right))
        for side in (left, right):
            symbols |= getattr(sp.sympify(side), "free_symbols", set())

    names = ", ".join(f"${sp.latex(s)}$" for s in sorted(symbols, key=sp.default_sort_key))
    if generic:
        verdict, method = "proved", "generic: each difference reduces to 0"
        evidence = {"method": f"SymPy {sp.__version__}, {method}"}
        footer = f"SymPy {sp.__version__}{', for all ' + names if names else ''}."
    else:
        verdict, method = "equal", f"{instances} exact random rational points"
        evidence = {"tolerance": f"0 (to {_DIGITS // 2} digits)", "at": method}
        footer = f"SymPy {sp.__version__}, at {method} in {names}; not a generic proof."
    body = "\n\n".join(f"$$\n{line}\n$$" for line in lines)
    card = (
        f'<div class="affnb-card affnb-proof affnb-{verdict}"'
        + (f' id="{anchor(id)}"' if id is not None else "")
        + f">\n\n{badge(verdict)} {statement}\n\n{body}\n\n"
        + (f"{steps}\n\n" if steps else "")
        + f"{footer} $\\blacksquare$\n\n</div>"
    )
    bundle: dict[str, Any] = {"text/markdown": card, "text/plain": f"[{verdict}] {statement}"}
    if id is not None:
        bundle[MIME] = claim(id, statement, verdict, evidence)
    display(bundle, raw=True)
