"""How kit.grade decides, a noun a file.

extraction (where the answer is) -> notation (tokens) -> answers (trees) -> meaning (names, units) -> comparison (the judge),
which asks values (exact and capped arithmetic), intervals and identities, and sympy for the rest: workers here, symbolic there.
"""
