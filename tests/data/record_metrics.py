"""Records tests/data/metrics.json: exact match and Rouge-L of awkward pairs, as Python scores them.

    pip install rouge-score==0.1.2
    python tests/data/record_metrics.py

Exact match restates SQuAD's official evaluate-v1.1.py; Rouge-L is Google's rouge-score.
"""

import json
import pathlib
import random
import re
import string

from rouge_score import rouge_scorer


def normalize_answer(s):
    """Lower text and remove punctuation, articles and extra whitespace. (SQuAD's own.)"""

    def remove_articles(text):
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def white_space_fix(text):
        return " ".join(text.split())

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


PAIRS = [
    # Empty, blank, nothing but what is dropped.
    ("", [""]), ("", ["a"]), ("the", [""]), ("", []), ("x", []), ("!!!", ["?"]), ("   ", ["\t\n"]),
    ("a an the", ["The"]), ("...", ["x"]), ("x", ["..."]), ("\u3000", [""]), ("\u200b", [""]),
    # Case.
    ("Yes", ["yes"]), ("YES", ["yes", "no"]), ("No", ["yes", "no"]), ("straße", ["STRASSE"]),
    ("STRAßE", ["straße"]), ("ΟΔΟΣ", ["οδος"]), ("ΟΔΟΣ", ["οδοσ"]), ("ΑΣ ΣΑΣ", ["ας σας"]),
    ("İstanbul", ["istanbul"]), ("İstanbul", ["i\u0307stanbul"]), ("ISTANBUL", ["ıstanbul"]),
    ("\u212a9", ["k9"]), ("\u212bngström", ["ångström"]), ("Ǆ", ["ǆ"]), ("ﬁne", ["fine"]),
    ("ＴＨＥ cat", ["the cat"]), ("ＴＨＥ cat", ["ｔｈｅ cat"]),
    # Articles: as words only, between any borders.
    ("The cat", ["cat"]), ("the a an cat", ["cat"]), ("a cat", ["an cat"]), ("A", ["the"]),
    ("theory", ["ory"]), ("banana", ["bnn"]), ("an-ode", ["anode"]), ("a-the", ["athe"]),
    ("a.the", ["the"]), ("the\u00a0end", ["end"]), ("a_b", ["ab"]), ("the_cat", ["thecat"]),
    ("_the_", [""]), ("the's", ["thes"]), ("'the'", [""]), ("a1", ["1"]), ("1 a 2", ["1 2"]),
    ("a²", ["²"]), ("a½", ["½"]), ("aⅣ", ["ⅳ"]), ("a①", ["①"]), ("aⓐ", ["ⓐ"]), ("ⓐ a", ["ⓐ"]),
    ("the\u0301", ["\u0301"]), ("thé", ["th"]), ("the\u0301 cat", ["thé cat"]),
    ("a\u0345", ["\u0345"]), ("a\u093e", ["\u093e"]), ("the\u200dcat", ["\u200dcat"]),
    ("the\u200ccat", ["\u200ccat"]), ("the‿cat", ["cat"]), ("the—cat", ["cat"]), ("the–end", ["–end"]),
    ("thе", [""]), ("aа", ["а"]), ("a中", ["中"]), ("a 中", ["中"]), ("the。", ["。"]), ("“the”", ["“ ”"]),
    ("a𝟙", ["𝟙"]), ("a😀", ["😀"]), ("the😀end", ["😀end"]), ("a\u20dd", ["\u20dd"]), ("a\u00aa", ["\u00aa"]),
    ("a\u02b0", ["\u02b0"]), ("an\u0660", ["\u0660"]), ("a\u0bf0", ["\u0bf0"]), ("a\u3007", ["\u3007"]),
    # Punctuation: ASCII's only.
    ("U.S.A.", ["USA"]), ("u.s. a", ["us"]), ("$1,000.50", ["1000.50"]), ("$1,000.50", ["100050"]),
    ("don't", ["dont"]), ("don’t", ["dont"]), ("don’t", ["don’t"]), ("co-op", ["coop"]),
    ("co-op", ["co op"]), ("«x»", ["x"]), ("50%", ["50"]), ("€50", ["50"]), ("x+y=z", ["xyz"]),
    ("¿qué?", ["qué"]), ("C#", ["C"]), ("C++", ["C"]), ("a/b", ["b"]), ("a / b", ["b"]),
    (string.punctuation, [""]), ("x" + string.punctuation + "y", ["xy"]), ("¡!", ["¡"]),
    # White space: Python's.
    ("x  y", ["x y"]), (" x\ty\n", ["x y"]), ("x\u00a0y", ["x y"]), ("x\u3000y", ["x y"]),
    ("x\x1cy", ["x y"]), ("x\x1dy\x1e\x1fz", ["x y z"]), ("x\x85y", ["x y"]), ("x\u2028y\u2029", ["x y"]),
    ("x\u200by", ["x y"]), ("x\ufeffy", ["x y"]), ("x\u180ey", ["x y"]), ("x\x0b\x0cy", ["x y"]),
    ("x\u202fy\u205fz\u1680w", ["x y z w"]), ("x\0y", ["x y"]), ("\r\nx\r\n", ["x"]),
    # Subsequences and the best of several references.
    ("the cat sat on the mat", ["the cat sat on the mat"]),
    ("the cat sat on the mat", ["on the mat sat the cat"]),
    ("the cat sat on the mat", ["a dog", "the mat", "cat on mat", ""]),
    ("police killed the gunman", ["police kill the gunman", "gunman kill police"]),
    ("the gunman police killed", ["police killed the gunman"]),
    ("a b c d e", ["e d c b a"]), ("a a a a", ["a a"]), ("a a", ["a a a a"]), ("x", ["y"]),
    ("x y", ["yx", "x-y", "Y,X"]), ("2024-01-02", ["2 1 2024"]), ("3.14", ["3 14"]), ("Σ x", ["σ x"]),
    ("naïve café", ["nave caf"]), ("naïve café", ["na ve caf"]), ("日本語", ["日本語"]), ("日本 x", ["x"]),
    ("one two three four five six seven", ["one three five seven", "two four six"]),
    ("not_entailment", ["entailment"]), ("not entailment", ["not_entailment"]),
]  # fmt: skip


def main():
    pairs = list(PAIRS)
    rng = random.Random(0)
    for n in (1, 2, 3, 7, 20, 65, 200):
        draw = lambda: " ".join(rng.choice("a an b the d E f.") for _ in range(rng.randint(n, 2 * n)))
        pairs.append((draw(), [draw() for _ in range(rng.randint(1, 3))]))
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    cases = []
    for prediction, references in pairs:
        normal = normalize_answer(prediction)
        cases.append({
            "prediction": prediction,
            "references": references,
            "exact_match": any(normal == normalize_answer(reference) for reference in references),
            "rouge_l": max(
                (scorer.score(r, prediction)["rougeL"].fmeasure for r in references), default=0.0
            ),
        })  # fmt: skip
    out = pathlib.Path(__file__).with_name("metrics.json")
    lines = ",\n".join(json.dumps(case) for case in cases)
    out.write_text(f"[\n{lines}\n]\n")
    print(f"{len(cases)} cases -> {out}")


if __name__ == "__main__":
    main()
