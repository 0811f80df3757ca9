r"""The structure of an answer: one notation for its text, then lists, sets, tuples, intervals, equations and units."""

import functools
import itertools
import unicodedata
from dataclasses import dataclass, replace

import regex as re  # for balanced brackets

from opsd.grading.extract import extract_answer

MAX_CHARACTERS = 1500  # of an answer that is to be parsed, each run of digits counted as one
MAX_DEPTH = 25  # of nested brackets
MAX_ELEMENTS = 200  # of a set that is given by a rule


class TooLargeError(Exception):
    """A text, a number or a range that no time limit should be spent on."""


@dataclass(frozen=True)
class ParsedAnswer:
    """The structure of an answer."""

    kind: str  # `value`, `set` or `tuple` (with items), or `relation` (an equation, an inequality or a condition)
    text: str  # the source in the notation of `normalize`; of a value, without its unit
    items: tuple["ParsedAnswer", ...] = ()
    brackets: str = ""  # "(]" and the like of a tuple or interval; "{}" of a set in braces
    name: str = ""  # what stands left of "="
    relation: str = ""  # the whole equation or inequality, if it is one
    computation: tuple[str, ...] = ()  # what stands left of 8 in 2^3=8, and must have its value
    unit: str = ""  # the unit or the counted noun after a value
    unit_required: bool = False  # the value is another one without `unit`, as for "5 tenths"
    percent: bool = False


# ---- One notation ----

BALANCED = r"(?P<b>[(\[{](?:[^()\[\]{}]|(?&b))*+[)\]}])"  # intervals mix ( and [
DOUBLED = r"\{(\{(?:[^{}]|(?1))*+\})\}|\((\((?:[^()]|(?2))*+\))\)"
SYMBOLS = {
    **{"−": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot "},
    **{"÷": "/", "⁄": "/", "∕": "/", "∣": "|", "∶": ":", "≡": r"\equiv "},
    **{"≤": r"\le ", "≥": r"\ge ", "≦": r"\le ", "≧": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp "},
    **{"∞": r"\infty ", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "°": r"^\circ ", "º": r"^\circ "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "∅": r"\emptyset "},
    **{"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil "},
    **{"⟨": r"\langle ", "⟩": r"\rangle "},
    **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}"},
    **{"≈": r"\approx ", "。": ".", "、": ",", '"': "", "µ": "μ", "μ": "μ", "✓": "", "✔": "", "∎": ""},
}
CURRENCIES = {r"\$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "¢": "cent", "₩": "won"}
CURRENCY = r"(?:\\\$|[€£¥₹¢₩])"
COMMANDS = {  # what each command is replaced by; the argument of a face or a box stays in its braces
    r"\text": "mathrm mathsf mathtt mbox hbox emph textrm textbf textit textsf texttt textup textnormal operatorname",
    "": "boxed fbox framebox bm boldsymbol pmb mathbf mathit mathord mathop mathbin mathcal mathscr underline rm bf "
    "it sf tt tiny small large Large LARGE huge Huge displaystyle textstyle scriptstyle scriptscriptstyle limits qed "
    "checkmark blacksquare left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr bigm",
    " ": "quad qquad space",
    **{r"\frac": "dfrac tfrac cfrac sfrac nicefrac", r"\binom": "dbinom tbinom", r"\ldots ": "dots cdots dotsc dotsb"},
    **{r"\le ": "leq leqslant leqq", r"\ge ": "geq geqslant geqq", r"\ne ": "neq", r"\log_{10}": "lg"},
    **{r"\setminus ": "smallsetminus backslash", r"\emptyset ": "varnothing", r"\{": "lbrace", r"\}": "rbrace"},
    **{"<": "lt", ">": "gt", "|": "mid vert lvert rvert", ":": "colon", "(": "langle", ")": "rangle"},
}
COMMANDS = {rf"\{name}": replacement for replacement, names in COMMANDS.items() for name in names.split()}
TEXT = r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
END = r"(?![a-zA-Z])"
REWRITES = [  # in this order
    (r"\\(?:[hv]?phantom|[hv]space|tag|label)\*?\s*\{[^{}]*\}|\\(?:text)?color\s*\{[^{}]*\}", ""),
    (r"\\operatorname\*?\s*\{\s*(gcd|lcm|max|min|ln|log|(?:arc)?(?:sin|cos|tan)|cot|sec|csc)\s*\}", r"\\\1 "),
    (r"\\[a-zA-Z]+", lambda match: COMMANDS.get(match[0], match[0])),
    (r"(?<=\d)(?:\{,\}|\\[,;: ]|[~ '])(?=\d{3}(?!\d))", ","),  # thousands
    (r"(?<!\\)\\[()\[\],;: ]|\\!|[`~\s]", " "),
    (r"\*\*(?=\S)(.*?\S)\*\*(?!\w)", r"\1"),
    (r"[,;.]?\s*\$?\s*(?:\\text\s*\{)?\s*\bwhere\b.*", ""),  # an explanation of what the answer has said
    (r"\{?([^{}]*?)\s*\\choose\s*([^{}]*)\}?", r"\\binom{\1}{\2}"),
    (r"<=|>=|(?<=\s)!=|\.\.\.", lambda match: {"<=": r"\le ", ">=": r"\ge ", "!=": r"\ne "}.get(match[0], r"\ldots ")),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (rf"\\mathbb\s*\{{?\s*([RZNQC]){END}\s*\}}?", r"\\mathbb{\1}"),
    (rf"\^\s*\{{?\s*(?:\\circ|\\degree)\s*\}}?|\\degree{END}", r"^\\circ "),
    (rf"\^\\circ\s*(?:\\text\s*\{{\s*([CF])\s*\}}|([CF]){END})", r"\\text{deg\1\2}"),
    (rf"\^\s*\{{?\s*\\text\s*\{{\s*(?:st|nd|rd|th)\s*\}}\s*\}}?|(?<=\d)(?:st|nd|rd|th){END}", ""),
    (r"\\text\s*\{\s*,?\s*(and|or)\s*,?\s*\}", r" \1 "),
    (r"\\text\s*\{\s*only\s*\}\s*$|\bonly\s*$", ""),
    (r"(?<=\d)\s*(?:\\text\s*\{|\s)\s*(?i:([ap])\.?\s?m)\.?\s*\}?$", lambda match: rf"\text{{{match[1].lower()}m}}"),
    (rf"(?<![a-zA-Z\\])infinity{END}", r"\\infty "),
    (rf"(?<![a-zA-Z\\])(pi|sqrt|sin|cos|tan|ln|log|exp){END}", r"\\\1 "),
    (r"\*\*", "^"),
    (r"\^\s*-\s*(\d+)", r"^{-\1}"),
    (r"(?<![\w.}])\.(?=\d|\\(?:overline|bar|dot)\b)", "0."),
    (r"(?<=\d)\.(?!\d|\\(?:overline|bar|dot)\b)", ""),
    (r"(?<=\d)[eE]([+-]?\d+)(?!\w)", r"\\cdot 10^{\1}"),
    (r"\.(\d*?)(?:(\d)\2{2,}|(\d{2,}?)\3+)\s*\\ldots", r".\1\\overline{\2\3}"),
    (r"(?<![\d.])(\d+) +(\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
]
REPEATING = re.compile(
    r"(\d*)\.(\d*)(?:\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))|\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?)"
)
WHOLE_ANSWERS = {
    r"\emptyset": r"(?:there (?:is|are) )?no (?:real |integer |such )?(?:solution|value|root)s?(?: exists?)?"
    r"|(?:the )?empty set",
    r"\mathbb{R}": r"(?:the set of )?(?:(?:all|any) )?(?:the )?(?:real numbers?|reals)|all real (?:x|values)",
    r"\infty": r"(?:there (?:is|are) )?infinite(?:ly many)?\b(?:(?!\b(?:not?|non|never|finite|finitely)\b)\D)*",
}


def _plain(character: str) -> str:
    """A character in the notation of LaTeX, or in its plain form, such as "2" for a full-width 2."""
    if character in SYMBOLS or character in CURRENCIES or character.isascii():
        return SYMBOLS.get(character, character)
    if (category := unicodedata.category(character)) in ("Pi", "Pf", "Cf", "Pd"):  # quotes, invisible marks, dashes
        return "-" if category == "Pd" else ""
    if match := re.fullmatch("GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", unicodedata.name(character, "")):
        letter = match[2].replace("LAMDA", "lambda").lower()
        return rf"\{letter if match[1] == 'SMALL' else letter.capitalize()} "
    tag, text = unicodedata.decomposition(character).split(" ")[0], unicodedata.normalize("NFKC", character)
    text = text if text == character else "".join(map(_plain, text))
    if tag == "<fraction>":
        return r"\frac{{{}}}{{{}}}".format(*text.split("/"))
    return {"<super>": f"^{{{text}}}\0", "<sub>": f"_{{{text}}}\0"}.get(tag, text)


def _fraction(match: re.Match[str]) -> str:
    """A repeating decimal as a fraction."""
    whole, head, *marked = match.groups("")
    period = "".join(marked)
    numerator = int(whole + head + period) - int((whole + head) or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(head)}}}"


def normalize(text: str) -> str:
    """Return `text` in one notation: LaTeX without delimiters, styles, sizes and spacing; or raise `TooLargeError`."""
    text = " ".join(text.split())
    if len(re.sub(r"\d+", "0", text)) > MAX_CHARACTERS:
        raise TooLargeError
    if not re.match(r"[\s$]*\\(?:boxed|fbox|framebox)", text):  # else, a unit may follow
        text = extract_answer(text) or text
    while text != (text := re.sub(DOUBLED, r"\1\2", text)):
        pass
    text = re.sub(r"([√∛])\s*([\d.]+)", r"\1{\2}", text)
    text = re.sub("}\0[_^]{|\0", "", "".join(map(_plain, text)))  # x¹² is x^{12}
    dollars = re.findall(r"(?<!\\)\$", text)
    text = re.sub(r"(?<!\\)\$", r"\\$" if len(dollars) == 1 else " ", text)  # a single one is the currency
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    text = REPEATING.sub(_fraction, text)
    if not re.search("matrix|array|cases", text):
        text = re.sub(r"\\(?:begin|end)\{(?:aligned|align\*?|gathered|split|equation\*?)\}|&", "", text)
        text = text.replace(r"\\", ";")
    text = re.sub(rf"^\s*{TEXT}\s*$", r"\1", text)
    words = " ".join(re.sub(TEXT, r" \1 ", text).strip(" .").lower().split())
    for meaning, pattern in WHOLE_ANSWERS.items():
        if re.fullmatch(pattern, words):
            return meaning
    depth = itertools.accumulate((character in "([{") - (character in ")]}") for character in text)
    if max(depth, default=0) > MAX_DEPTH:
        raise TooLargeError
    return text.lstrip(" ,;:").rstrip(" .,;:\\")


# ---- Units ----

SHORT_UNITS = re.compile("[cdkm]m|[km]g|[cdm][lL]|ms|ft|in|yd|mi|lb|oz|hr|yr|cc|ha|[kM]?Hz|k[WJN]|k?Pa|eV")
PURE_UNITS = {"degree", "radian", "bit", "byte"}  # the other units without a dimension are numbers
WORDS_OF_UNITS = {"square", "cubic", "per"}
LETTER_UNITS = set("mgshlLNJWVKCF")
PLURAL = re.compile(r"\w*[^s]s|people|(?:wo)?men|children|dice|mice")
# Plural or not, these change the number before them or are no nouns.
NOT_COUNTED = re.compile(
    r"(?:half|halve|score|gross|dozen|ten|lakh|crore|quarter|third|hundred|thousand|\w*illion|"
    r"minu|plu|les|i|wa|ha|doe|thi|"
    r"unles|alway|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand|\w*illion)th)s?"
)
ADJECTIVE = r"(?:(?:real|distinct|different|possible|total|whole|ordered) )?"
WORD = rf"(?:{TEXT}|[a-zA-Zμ]+\.?|{CURRENCY})(?:\s*\^\s*(?:\{{\s*-?\d\s*\}}|\d))?"
UNIT = re.compile(
    rf"(?P<number>.*?(?:[\d)}}]|\\pi|\\infty)!*)(?P<unit>\s*{WORD}(?:\s*(?:/|\\cdot|\\times)?\s*{WORD})*\s*)"
)


@functools.cache
def _registry():
    """The table of units, with currencies and the "unit" of geometry; loaded by the first answer that needs it."""
    import pint

    registry = pint.UnitRegistry(cache_folder=None)
    registry.define("dollar = [dollar] = _ = USD = usd = buck")
    registry.define("cent = [cent] = _ = penny = pennies = pence")
    for name in ("unit", "euro", "yen", "rupee", "won"):
        registry.define(f"{name} = [{name}]")
    return registry


def _is_unit(word: str, in_text: bool, spaced: bool) -> bool:
    if word in WORDS_OF_UNITS or NOT_COUNTED.fullmatch(word) or (len(word) == 1 and word not in LETTER_UNITS):
        return word in WORDS_OF_UNITS
    known = in_text or SHORT_UNITS.fullmatch(word) or (spaced and word in LETTER_UNITS)
    for prefix, name, _ in _registry().parse_unit_name(word) or _registry().parse_unit_name(word.lower()):
        spelled_out = word.lower().startswith(prefix) and len(word) > 2  # else, it may be a product of variables
        if (known or spelled_out) and (name in PURE_UNITS or not _registry().parse_units(name).dimensionless):
            return True
    return False


@functools.cache
def _unit(text: str) -> tuple[str, bool]:
    """
    Return the canonical name of the words after a number, and True if the number is another one without them.

    A unit is one that pint knows. Else, a plural noun is what the number counts.
    """
    in_text, spaced = r"\text" in text, text[:1].isspace()
    for sign, name in CURRENCIES.items():
        text = text.replace(sign, f" {name} ")
    text = re.sub(r"[{}]", "", re.sub(TEXT, r" \1 ", re.sub(r"\\(?:cdot|times)", " ", text)))
    text = re.sub(r"\bsq(?:uared)?\b\.?(?=\s*[a-zA-Z])", "square", text)
    text = " ".join(re.sub(r"(?<=[a-zA-Z])\.", "", text).split())
    words = re.findall(r"[a-zA-Zμ]+", text)
    is_product = re.fullmatch(r"/?(?:[a-zA-Zμ]+(?: *\^ *-?\d)?[ /]*)+", text) and not WORDS_OF_UNITS.issuperset(words)
    if is_product and all(_is_unit(word, in_text, spaced or len(words) > 1) for word in words):
        known = _registry().parse_unit_name
        text = re.sub(r"[a-zA-Zμ]+", lambda match: match[0] if known(match[0]) else match[0].lower(), text)
        return str(_registry().parse_units(re.sub(r" *\^ *(-?\d)", r"**(\1)", text))), False
    noun = re.fullmatch(rf"{ADJECTIVE}([a-z]+)", text)
    required = noun is None or not PLURAL.fullmatch(noun[1]) or NOT_COUNTED.fullmatch(noun[1]) is not None
    return re.sub(r"(?:(?<=[sxz]|[cs]h)es|(?<!s)s)$", "", text), required


# ---- Structure ----

OR = rf"\\(?:cup|lor|vee){END}|\bor\b"
SEPARATOR = rf"(?:[,;]\s*)?(?:{OR}|\band\b|\\(?:land|wedge){END})|[,;]"
RELATION = rf"\\(?:equiv|le|ge|ne|in){END}|:?=|[<>]"
THOUSANDS = re.compile(rf"{BALANCED}(*SKIP)(*FAIL)|(?<![\d.,])([1-9]\d{{0,2}}(?:,\d{{3}})+)(?![\d,])")
SPACE = re.compile(r"(\\[a-zA-Z]+\s(?=[a-zA-Z])|\d\s+(?=\d))|\s+")  # except those that mean something: \pi r, 1 2
PREFIX = re.compile(
    r"(?:\\text\s*\{[^{}]*(?::|\bis|(?i:answer|solution))\s*\}"
    r"|[a-zA-Z ]*\b(?:is\b|(?i:answer|solution|result)\s*[:=]))\s*:?(?=.)"
    r"|(?:\\text\s*\{\s*)?\b(?:approximately|about|exactly)\b\s*\}?"
)
RULE = re.compile(r"(.+?)[:|](-?\d+)(<|\\le ?)([a-zA-Z])(<|\\le ?)(-?\d+)(?:,\4\\in\\mathbb\{[ZN]\})?")
PROGRESSION = re.compile(r"(-?\d+),(-?\d+),(?:-?\d+,)*\\ldots,(-?\d+)")


def without_spaces(text: str) -> str:
    """Return `text` without the spaces that mean nothing in LaTeX."""
    return SPACE.sub(r"\1", text.strip())


def parse_answer(text: str, thousands: bool = False) -> ParsedAnswer:
    """Return the structure of a normalized answer. `thousands`: read 1,234 outside of brackets as one number."""
    if thousands:
        text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    while _is_bracketed(text, "({"):
        if text[0] == "(" and len(_split(text[1:-1], SEPARATOR)[0]) > 1:
            break
        text = text[1:-1].strip()
    parts, separators = _split(text, SEPARATOR)
    parts = [part for part in parts if part] or [""]
    answers = []
    for part in parts:
        signs = ["+-", "-+"] if re.search(rf"\\(?:pm|mp){END}", part) else ["+-"]
        answers += [_parse_one(re.sub(rf"\\pm{END}", s[0], re.sub(rf"\\mp{END}", s[1], part))) for s in signs]
    if any(re.search(OR, separator) for separator in separators):  # "5 or 5"
        answers = list(dict.fromkeys(answers))
    return answers[0] if len(answers) == 1 else ParsedAnswer("set", text, tuple(answers))


def _is_bracketed(text: str, brackets: str) -> bool:
    return text[:1] in tuple(brackets) and re.fullmatch(BALANCED, text) is not None


def _split(text: str, separator: str) -> tuple[list[str], list[str]]:
    """The parts of `text` between the separators outside of all brackets, and these separators."""
    pieces = re.split(rf"{BALANCED}(*SKIP)(*FAIL)|({separator})", text)
    return [part.strip() for part in pieces[::3]], pieces[2::3]


def _elements(inner: str) -> list[str]:
    r"""The elements of `\{2k : 0 \le k \le 15\}` or `\{0, 2, 4, \ldots, 30\}`; empty if the set is of another form."""
    if (match := RULE.fullmatch(inner)) and int(match[6]) - int(match[2]) < MAX_ELEMENTS:
        numbers = range(int(match[2]) + (match[3] == "<"), int(match[6]) + (match[5] != "<"))
        return [re.sub(rf"(?<![a-zA-Z\\]){match[4]}{END}", f"({number})", match[1]) for number in numbers]
    if (match := PROGRESSION.fullmatch(inner)) and int(match[2]) > int(match[1]):
        numbers = range(int(match[1]), int(match[3]) + 1, int(match[2]) - int(match[1]))
        written_out = ",".join(map(str, numbers)) if len(numbers) < MAX_ELEMENTS else ""
        if written_out.startswith(inner.split(r"\ldots")[0]) and written_out.endswith(f",{match[3]}"):
            return written_out.split(",")
    return []


def _is_name(text: str) -> bool:
    r"""True if `text` can stand left of an answer, as in `x=5`, `f(2)=5`, `m+n=5`, unlike `2x=5` or `x^2=5`."""
    text = re.sub(r"\^\s*\{?-1\}?\s*(?=\()", "", text)  # f^{-1}(3)
    if re.search(rf"[\^<>]|\\(?:sqrt|infty|pi|pm){END}|^[+-]", text):
        return False
    outside = re.sub(r"_\s*(?:\{[^{}]*\}|\w)|\([^()]*\)", "", text)
    return re.search("[a-zA-Z]", text) is not None and re.search(r"\d", outside) is None


def _parse_one(text: str) -> ParsedAnswer:
    """The structure of an answer without separators outside of brackets."""
    text = text[prefix.end() :].strip() if (prefix := PREFIX.match(text)) else text
    text = next(filter(None, _split(text, rf"\\approx{END}")[0]), "")  # the exact one, if both are given
    parts, relations = _split(text, RELATION)
    if relations and set(relations) <= {"=", ":=", r"\in", r"\equiv"}:
        if _is_name(parts[0]):
            return replace(parse_answer(parts[-1]), name=without_spaces(parts[0]), relation=text)
        if all(parts) and not re.search(rf"(?<![\\a-zA-Z])[a-zA-Z]{END}", parts[-1]):
            is_equation = re.search(rf"(?<![\\a-zA-Z])[a-zA-Z]{END}", text) is not None
            return replace(parse_answer(parts[-1]), computation=tuple(parts[:-1]), relation=text * is_equation)
    if relations:
        return ParsedAnswer("relation", text, relation=text)
    if text.startswith(r"\{") and text.endswith(r"\}") and _is_bracketed(text[1:-2] + "}", "{"):
        elements = _elements(without_spaces(text[2:-2]))
        if not elements and len(_split(text[2:-2], "[:|]")[0]) == 2:
            return ParsedAnswer("relation", text, relation=text.replace("|", ":"))
        answer = parse_answer(",".join(elements) or text[2:-2].strip())
        return replace(answer, items=tuple(dict.fromkeys(answer.items)), brackets="{}") if answer.items else answer
    if _is_bracketed(text, "(["):
        parts, _ = _split(text[1:-1], SEPARATOR)
        if len(parts) > 1:
            return ParsedAnswer("tuple", text, tuple(map(parse_answer, parts)), text[0] + text[-1])
    return _parse_value(text)


def _parse_value(text: str) -> ParsedAnswer:
    """A single value, with its unit."""
    currency, unit, required = "", "", False
    if match := re.match(rf"([+-]?)\s*({CURRENCY})\s*(?=[+-]?\s*[\d\\(])", text):
        currency, text = match[2], match[1] + text[match.end() :]
    percent = re.search(r"\s*(?:\\?%|percent|\\text\s*\{\s*percent\s*\})$", text)
    if percent:
        text = text[: percent.start()]
    elif re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])", text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\\circ", r"\\frac{\1\\pi}{180}", text)
    elif match := re.search(r"\s*(?:\^\\circ|\\text\s*\{\s*degrees?\s*\}|\bdegrees?)$", text):
        text, unit = text[: match.start()], "degree"
    elif match := re.fullmatch(r"(\([\dA-F]+\)|\d[\dA-F]*)\s*_\s*\{?(\d+)\}?", text):
        text, unit = match[1], f"base {match[2]}"
    elif match := UNIT.fullmatch(text):
        found, is_required = _unit(f"{currency}{match['unit']}")
        if not is_required or re.match(r"(?:\s|\\text\s*\{)\s*[a-z]{3,}", match["unit"]):
            text, unit, required = match["number"], found, is_required
    if currency and not unit:
        unit, _ = _unit(currency)
    text = re.sub(TEXT, r" \1 ", text).strip()
    while _is_bracketed(text, "({"):
        text = text[1:-1].strip()
    text = without_spaces(text.strip(" .,;:")).removeprefix("+")
    return ParsedAnswer("value", text, unit=unit, unit_required=required, percent=percent is not None)
