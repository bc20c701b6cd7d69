"""The page about many cards holds what its command prints, and its formula counts a ring."""

from children import ROOT
from many_cards import Config, sent, tables


def test_the_page_holds_what_the_command_prints_without_a_card(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # nothing was measured here
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    source, *parts = tables(Config()).split("\n\n")
    assert source == "One card: estimate: 40% of the datasheet's rates of an NVIDIA GeForce RTX 3090."
    page = (ROOT / "recipes" / "bench" / "README.md").read_text()
    assert len(parts) == 3 and not [part for part in parts if part not in page]
    assert tables(Config(card="h100")).split("\n\n")[2] != parts[1]


def test_a_ring_sends_what_its_formula_says():
    n, parts = (
        4,
        [[card] * 4 for card in range(4)],
    )  # each card's vector, in n parts
    moved = 0
    for gather in (False, True):
        for turn in range(n - 1):
            before = [row[:] for row in parts]
            for card in range(n):
                part = (card - turn + gather) % n
                after = (card + 1) % n
                parts[after][part] = before[card][part] + (0 if gather else before[after][part])
                moved += 1
    assert parts == [[0 + 1 + 2 + 3] * n] * n
    assert moved / n == sent(n, n)
