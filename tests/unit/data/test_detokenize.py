"""Each set of rules on lines as the benchmarks have them; the text expected is written by hand."""

from __future__ import annotations

import pytest

from xdlm_megatron.data.detokenize import RULES, detokenize


@pytest.mark.parametrize(
    ("rules", "text", "expected"),
    [
        ("plain", ' a " b " , N ', ' a " b " , N '),
        (
            "wikitext",
            " \n = = Early life = = \n \n The 1 @,@ 000 @-@ ton ship ( built in 1909 ) left ; it 's 2 @.@ 5 "
            'km long , said " a man " . [ 3 ] At 20 ° C , hats . \n',
            "\n== Early life ==\n\nThe 1,000-ton ship (built in 1909) left; it's 2.5 "
            'km long, said "a man". [3] At 20°C, hats.\n',
        ),
        (
            "ptb",
            "mr. <unk> did n't pay $ N N N or # N \\/ day for the banks ' debt \n the bank 's own",
            "mr. ? didn't pay $1 1 1 or #1 / day for the banks' debt\nthe bank's own",
        ),
        (
            "lm1b",
            'He said , " We are ready " ( again ) ; see https : / / a or b . Is it $ 5 ? Or both / all .',
            'He said, "We are ready" (again); see https://a or b. Is it $5? Or both/all.',
        ),
        ("lm1b", "Really ?", "Really?"),
        ("lambada", "  “ no , ” she said .  ", '\n" no , " she said .'),
        ("scientific_papers", "we find @xmath0 ( see [ 1 ] ) in it .", "we find @xmath0 (see [1]) in it."),
    ],
)
def test_rules(rules: str, text: str, expected: str) -> None:
    assert detokenize(text, rules) == expected


@pytest.mark.parametrize("rules", RULES)
def test_ordinary_text_stays(rules: str) -> None:
    text = "A man, \"quite old\", came (late). It's 1,000 miles: why? We don't know!"
    assert detokenize(text, rules).strip() == text
