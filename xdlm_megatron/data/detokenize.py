"""Rules that turn the token streams of old benchmarks back into text, before it is scored.

PTB, WikiText, LM1B and LAMBADA come split at punctuation, with stand-ins for numbers and marks. A model of
ordinary text pays for these by the token, so perplexities are comparable only under the same rules. These are
the ones of SEDD and MDLM (and of XDLM's tables), as a table: they apply in order, each to the whole text.
Not taken over: their rule for "' [0-9]", whose pattern never occurs.
"""

import re

Rule = tuple[re.Pattern[str], str]


def _literal(old: str, new: str) -> Rule:
    return re.compile(re.escape(old)), new.replace("\\", r"\\")


def _close_up(marks: str) -> tuple[Rule, ...]:
    """Each mark moves to the word before it."""
    return tuple(_literal(f" {mark} ", f"{mark} ") for mark in marks)


_WIKITEXT: tuple[Rule, ...] = (
    _literal("s '", "s'"),
    *(_literal(f" @{mark}@ ", mark) for mark in "-,."),  # ten @-@ year, 1 @,@ 000, 2 @.@ 5
    *_close_up(":;.!?,"),
    *(
        (re.compile(rf"{re.escape(a)}\s*([^{re.escape(b)}]*?)\s*{re.escape(b)}"), rf"{a}\1{b}")
        for a, b in ("()", "[]", "{}", '""', "''")
    ),
    *(_literal(" ".join("=" * n), "=" * n) for n in (4, 3, 2)),  # headings
    _literal(" ° ", "°"),
    _literal(" \n", "\n"),
    _literal("\n ", "\n"),
    _literal(" N ", " 1 "),
    _literal(" 's", "'s"),
)

_PTB: tuple[Rule, ...] = (
    _literal(" 's", "'s"),
    _literal("s ' ", "s' "),
    _literal(" n't", "n't"),
    _literal(" \n ", "\n"),
    _literal("\\/", "/"),
    (re.compile(" N(?= )"), " 1"),  # numbers, also several in a row
    _literal("$ 1", "$1"),
    _literal("# 1", "#1"),
    _literal("<unk>", "?"),
)

_LM1B: tuple[Rule, ...] = (
    _literal("http : / / ", "http://"),
    _literal("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    *(rule for mark in "?!" for rule in (*_close_up(mark), (re.compile(rf" {re.escape(mark)}$"), mark))),
    *_close_up(",:;"),
    _literal(" / ", "/"),
    *(
        (re.compile(f"{re.escape(a)} ([^{re.escape(a + b)}]+) {re.escape(b)}"), rf"{a}\1{b}")
        for a, b in ('""', "''", "()", "[]")
    ),
    _literal("$ ", "$"),
    _literal("£ ", "£"),
)

_LAMBADA: tuple[Rule, ...] = (
    (re.compile("[“”]"), '"'),
    (re.compile(r"\s+\Z"), ""),
    (re.compile(r"\A\s*"), "\n"),
)

# A new set of rules is a line here.
RULES: dict[str, tuple[Rule, ...]] = {
    "plain": (),
    "wikitext": _WIKITEXT,
    "ptb": _PTB,
    "lm1b": _LM1B,
    "lambada": _LAMBADA,
    "scientific_papers": _WIKITEXT + _LM1B,
}


def detokenize(text: str, rules: str) -> str:
    """The text under the rules of that name, one of RULES."""
    for pattern, replacement in RULES[rules]:
        text = pattern.sub(replacement, text)
    return text
