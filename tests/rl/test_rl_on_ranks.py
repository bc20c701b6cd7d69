"""A step of GRPO on several ranks: rollout, scores and statistics are those of one process."""

import json

import torch
from children import start_ranks, wait
from test_rl_loop import QUESTIONS, make_policy

from kit import ranks
from kit.rl.episodes import by_group
from kit.rl.grpo import rollout, rows_of
from kit.rl.objective import RunningStats


def step(file):
    """Write a rollout of four prompts, the reference's log-probs of each row, and statistics."""
    here = ranks.join("cpu")
    policy = make_policy()
    episodes = rollout(policy, QUESTIONS[:4])
    scored = [row.reference_logprobs.tolist() for row in rows_of(policy, by_group(episodes))]
    stats, ratios = RunningStats(), here.share([0.5, 2.0])  # a third rank has no tokens
    if ratios:
        stats.add(torch.tensor(ratios), kl=torch.tensor(ratios) / 4)
    found = [(e.group, e.question, e.completion.ids, e.completion.logprobs, e.rewards) for e in episodes]
    with open(f"{file}.{here.rank}", "w") as out:
        json.dump([found, scored, stats.read(), policy.drawn], out)
    ranks.leave()


def test_ranks_share_the_prompts_and_the_scoring_and_end_with_the_same_episodes_and_means(tmp_path):
    step(tmp_path / "alone")
    (alone, scored, stats, drawn) = json.loads((tmp_path / "alone.0").read_text())
    assert len(alone) == 12
    assert len(scored) > 1
    assert stats == {"ratio_mean": 1.25, "kl": 0.3125, "ratio_min": 0.5, "ratio_max": 2.0}

    for child in start_ranks(3, __file__, "step", str(tmp_path / "shared")):
        wait(child)
    found = [json.loads((tmp_path / f"shared.{rank}").read_text()) for rank in range(3)]
    for rank, (episodes, own, means, position) in enumerate(found):
        assert episodes == found[0][0]
        # log-probs differ from those of one process in the last bits, with the number sampled at once
        assert [(e[:3], e[4]) for e in episodes] == [(e[:3], e[4]) for e in alone]
        assert (means, position) == (stats, drawn)
        for i, (scores, expected) in enumerate(zip(own, scored, strict=True)):
            assert scores == (expected if i % 3 == rank else [0.0] * len(expected))
