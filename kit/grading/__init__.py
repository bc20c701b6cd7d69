"""How kit.grade decides, a noun a file.

extraction (where the answer is, with choices and prose) -> notation (tokens, by the vocabulary) -> answers (trees, with atoms,
numerals and commands) -> meaning (names, units) -> comparison (the judge of all forms) and scalars (of numbers), which ask values
(exact and capped arithmetic), intervals and identities, and sympy for the rest: workers here, symbolic there. limits bounds all.
"""
