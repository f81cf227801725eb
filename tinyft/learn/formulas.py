"""Formulas in TeX as Unicode text, for the terminal: \\frac{g^2}{n} becomes g²/n."""
from __future__ import annotations

import re
from functools import cache
from typing import Any

RAISED = str.maketrans("0123456789+-−nt⊤⋆*", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻ⁿᵗᵀ⋆*")
LOWERED = str.maketrans("0123456789+-−=ijknrt", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌ᵢⱼₖₙᵣₜ")
FUNCTIONS = "ln|log|exp|tanh|max|min|argmax|softmax|sign"


def to_unicode(formula: str) -> str:
    """A formula, without its dollar signs, as one line of text.

    ValueError if pylatexenc, which knows TeX's commands, is not installed."""
    text = _converter().latex_to_text(formula)
    text = re.sub(r"√\((\w+)\)", r"√\1", text)            # √(v) is √v
    text = re.sub(r"\^(\{[^{}]*\}|\S)", lambda found: _small(found[1], RAISED, "^"), text)
    text = re.sub(r"_(\{[^{}]*\}|\S)", lambda found: _small(found[1], LOWERED, "_"), text)
    text = re.sub(r" *([·←→=≈≤≥×∈⊙]) *", r" \1 ", text)
    text = re.sub(rf"\b({FUNCTIONS})(?=\w)", r"\1 ", text)    # ln p, not lnp
    return " ".join(text.replace("{", "").replace("}", "").split())


def _small(text: str, signs: dict[int, int], mark: str) -> str:
    """An exponent or an index in small signs, if there are such; else after its mark, in parentheses if it is long."""
    text = text.strip("{}")
    packed = text.replace(" ", "")
    if all(ord(c) in signs for c in packed):
        return packed.translate(signs)
    return f"{mark}{text}" if len(text) == 1 or mark == "_" else f"{mark}({text})"


@cache
def _converter() -> Any:
    """pylatexenc's converter, with parentheses where a part of a fraction has several terms."""
    try:
        from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec, get_default_latex_context_db
    except ImportError:
        raise ValueError('lessons show formulas with pylatexenc, which is not installed: pip install "tinyft[lessons]"'
                         ) from None

    def fraction(node: Any, l2tobj: Any) -> str:
        above, below = (l2tobj.nodelist_to_text([part]).strip(" {}") for part in node.nodeargs)
        return f"{_one_term(above)}/{_one_term(below)}"

    commands = get_default_latex_context_db()
    commands.add_context_category("tinyft", prepend=True, macros=[
        MacroTextSpec("frac", fraction),
        MacroTextSpec("tfrac", fraction),
        MacroTextSpec("hat", lambda node, l2tobj: l2tobj.nodelist_to_text(node.nodeargs).strip("{}") + "\u0302"),
        MacroTextSpec("top", "⊤"),
        MacroTextSpec("odot", "⊙"),
    ])
    return LatexNodes2Text(commands, math_mode="text", strict_latex_spaces="based-on-source", keep_braced_groups=True,
                           keep_braced_groups_minlen=2)


def _one_term(text: str) -> str:
    """A part of a fraction, in parentheses unless it is a single term."""
    is_single = re.fullmatch(r"[\w.√′^]+|√?\([^()]*\)", text)
    return text if is_single else f"({text})"
