"""The rules that decide a verdict. `Verdict.rule` is the text of one of them; some add a detail.

A rule stays only while a case of tests/grade/cases needs it: the tests look for one case per rule.
"""

from __future__ import annotations

from enum import Enum


class Rule(Enum):
    """One rule per member. The value is the text that a user reads."""

    # no answer in the response
    NO_END = "no answer: the thought does not end"
    NOTHING = "no answer: nothing is there"
    NO_VALUE = "no answer: no value is named"

    # tier 0: plain text and exact fractions
    SAME_TEXT = "same text"
    TEXT_DIFFERS = "text differs"  # and one of the two texts cannot be read as mathematics
    CHOICE = "choice"  # the letters of a multiple choice
    TEXT_OF_CHOICE = "text of the choice"  # the text beside the letter

    # tier 1: any two answers
    SAME_STRUCTURE = "same structure"  # the same tree, but for the order of terms, factors and elements
    TEXT = "text"  # words, ignoring case and punctuation
    NOT_COMPARABLE = "not comparable"  # : why, for example a value that does not exist

    # tier 1: numbers and expressions
    NUMBER = "number"
    ROUNDED = "rounded decimal"
    IDENTITY = "identity at random points"
    FAMILY = "the same family"  # 2k pi and 2n pi
    RATIO = "ratio"
    TIME = "ratio or time"  # 2:30 is not 1:15
    PERCENT = "percent"  # one side has a percent sign
    DEGREES = "degrees"  # one side has a degree sign
    UNITS = "units"  # two units that differ
    MATRIX = "matrix"  # compared with something else
    NOT_A_NUMBER = "not a number"
    UNDEFINED = "undefined"  # such as a division by zero

    # tier 1: equations
    EQUATION_VALUE = "value of the equation"  # , the rule for its value: x = 5 against 5
    EQUATION_NO_VALUE = "an equation is not a value"
    EQUATION = "equation"  # , the rule for its right side: y = 3x against f(x) = 3x
    EQUATION_FACTOR = "equation up to a factor"

    # tier 1: lists, sets, tuples, matrices
    DECIMAL_COMMA = "decimal comma"  # 1,22 against 1.22
    SET = "set"
    LIST = "list, in order"
    LIST_AND_TUPLE = "a list against a tuple, in order"
    NO_TUPLE = "a tuple is not a number"
    BRACKETS = "brackets"  # [0, 9) against (0, 9)
    PAIR = "tuple or interval"  # of two entries, in the same brackets
    SHAPE = "shape"
    TUPLE = "tuple or matrix"

    # tier 1: sets of real numbers, and the conditions that describe them
    INTERVAL = "interval"
    OTHER_QUANTITY = "conditions on different quantities"  # x > 2 against y > 2
    OTHER_SET = "not the same kind of set"
    INEQUALITY = "inequality"  # the same chain read from either side, or two that differ
    INEQUALITY_FACTOR = "inequality up to a factor"
    CONGRUENCE = "congruence"

    # tier 2
    SYMPY = "sympy"

    # not decided; any other `unknown` has the reason itself as its rule, such as "deadline"
    TOO_LARGE = "too large"  # : which cap
