"""The words of answers: functions, relations, commands without meaning, units, currencies, multipliers."""

from __future__ import annotations


def names(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


FUNCTIONS = names(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp gcd lcm max min floor ceil abs"
)
OPAQUE = frozenset("fghFGH")  # f(2) is never a product
CONSTANTS = {"pi": ("const", "pi"), **dict.fromkeys(("infty", "infinity", "inf"), ("const", "inf"))}
GREEK = names(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma "
    "tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar"
)
RELATIONS = {
    "=": "=", "==": "=", ":=": "=", "<": "<", "lt": "<", ">": ">", "gt": ">",
    "<=": "<=", "le": "<=", "leq": "<=", "leqslant": "<=",
    ">=": ">=", "ge": ">=", "geq": ">=", "geqslant": ">=",
    "!=": "!=", "ne": "!=", "neq": "!=", "approx": "~", "simeq": "~",
    "in": "in", "equiv": "equiv", "cong": "equiv",
}  # fmt: skip
FONT_COMMANDS = names("mathrm mathbf mathit mathsf mathbb mathcal boldsymbol bm operatorname rm bf")
TEXT_COMMANDS = names("text textbf textit textrm textsf texttt textnormal mbox hbox emph textup")
FRACTIONS = names("frac dfrac tfrac cfrac nicefrac sfrac")
JOINTS = {"lor": "or", "vee": "or", "land": "and", "wedge": "and"}
SKIPPED = names(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr middle displaystyle textstyle limits "
    "nolimits quad qquad boxed fbox overline underline vec hat bar overrightarrow mathstrut large Large "
    "LARGE huge Huge small checkmark blacksquare"
)
INFIX_COMMANDS = names(
    "cup cap setminus backslash colon choose over cdot times ast div pm mp pmod bmod mod mid circ degree "
    "prime to hline end and"
)
CLOSERS = names("rfloor rceil rvert rVert rangle")
STRUCTURAL = (
    INFIX_COMMANDS | CLOSERS | names("implies iff mapsto lim limsup liminf atop substack overset underset")
)
MATRICES = names("matrix pmatrix bmatrix Bmatrix smallmatrix array")
MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MULTIPLIERS |= {f"{word}s": value for word, value in MULTIPLIERS.items()}
# What follows a number in plain words; each group is one unit. One-letter units count inside \text{} only:
# outside it, "5m" is a product.
UNIT_GROUPS = (
    "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre", "m meter metre",
    "in inch", "ft foot feet", "yd yard", "mi mile", "kg kilogram", "g gram", "mg milligram",
    "lb lbs pound", "oz ounce", "s sec second", "min minute", "h hr hour", "day", "week", "month", "year",
    "l liter litre", "ml milliliter millilitre", "mph", "kph kmh", "cent", "dollar usd", "euro eur",
    "sterling gbp", "yuan yen rmb cny jpy", "rupee inr", "degree deg", "radian rad", "unit", "people",
    "apple", "percent pct", "gallon", "hz", "volt", "joule", "watt", "newton", "c celsius", "f fahrenheit",
    "kelvin",
)  # fmt: skip
COMPOUND_UNITS = {"mph": "mi h", "kph": "km h"}
UNITS: dict[str, str] = {}
for _group in UNIT_GROUPS:
    for _name in _group.split():
        UNITS[_name] = _group.split()[0]
        if len(_name) > 1:
            UNITS[_name + "s"] = UNITS[_name + "es"] = _group.split()[0]
# upright after a number; e, i and d mean something else there
SI_LETTERS = names("m g s h L l J N V W K A T")
CURRENCIES = {"textdollar": "dollars", "euro": "euros", "pounds": "pounds", "yen": "yen", "cent": "cents"}
