"""The update against GRPO's formulas, written out episode by episode on full logits in float64."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import make_model

from kit.data.chat import ChatFormat
from kit.data.problems import Question
from kit.data.toy import make_rows, make_tokenizer
from kit.generate import engine
from kit.generate.graph import Eager
from kit.generate.sampler import Completion
from kit.kernels import linear_cross_entropy as lce
from kit.kernels.linear_cross_entropy_chunks import logit_chunks
from kit.models import load
from kit.models.backbone import head_weight, hidden_states
from kit.packing import Document, PackedBatch
from kit.rl.episodes import Episode, EpisodeBatch, WeightedEpisode
from kit.rl.grpo import Policy, rollout, update
from kit.rl.objective import token_losses
from kit.rl.rewards import correctness
from kit.rl.settings import Settings
from kit.train.savings import Savings

PLAIN = {"normaliser": "sequences", "dual_clip": 0.0, "undecided_is_wrong": False}  # nothing from verl
BASE = Settings(group_size=4, max_new_tokens=24, row_tokens=40, minibatch_prompts=99, kl_coef=0.0, **PLAIN)
REWARDS = [[0.0, 1.0, 0.25, 1.0], [0.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5]]  # the last group: no signal
LENGTHS = [[3, 9, 1, 5], [24, 2, 7, 11], [4, 6, 8, 2]]
TRUNCATED = {(1, 0), (0, 1), (2, 3)}


def plain_logprobs(model, episode, temperature):
    """Compute the log-probs of the completion's tokens from full logits of this episode alone."""
    ids = torch.tensor(episode.prompt + episode.completion.ids)
    hidden = hidden_states(model, PackedBatch.build([Document(ids, len(episode.prompt))]))
    logprobs = (hidden @ head_weight(model).T / temperature).log_softmax(-1)
    first = len(episode.prompt)
    return torch.stack([logprobs[i - 1, ids[i]] for i in range(first, len(ids))])


def make_episodes(model, *, temperature=1.0, noise=0.3, seed=0, rewards=REWARDS):
    """Make episodes of random tokens. The sampler's log-probs are the model's own plus noise, which
    gives ratios on both sides of the clip range."""
    generator = torch.Generator().manual_seed(seed)
    episodes = []
    for g, (group, lengths) in enumerate(zip(rewards, LENGTHS, strict=True)):
        prompt = torch.randint(3, 97, (5 + 3 * g,), generator=generator).tolist()
        for i, (reward, length) in enumerate(zip(group, lengths, strict=True)):
            ids = torch.randint(3, 97, (length,), generator=generator).tolist()
            completion = Completion(ids, [0.0] * length, finished=(g, i) not in TRUNCATED)
            episode = Episode(g, f"q{g}", prompt, completion, reward)
            with torch.no_grad():
                logprobs = plain_logprobs(model, episode, temperature)
            logprobs = logprobs + noise * torch.randn(length, generator=generator)
            episodes.append(replace(episode, completion=replace(completion, logprobs=logprobs.tolist())))
    return episodes


def formula(model, reference, episodes, s: Settings):
    """Compute GRPO's loss as the papers write it."""
    dtype = head_weight(model).dtype
    groups = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    terms, lengths, num_sequences = [], [], 0
    for group in groups.values():
        r = torch.tensor([e.reward for e in group], dtype=torch.float64)
        A = r - r.mean()
        if s.advantage_scale == "group-std" and r.max() > r.min():
            A = A / (((r - r.mean()) ** 2).sum().div(len(r) - 1).sqrt() + 1e-4)
        num_sequences += len(group)
        for episode, a in zip(group, A.tolist(), strict=True):
            if s.mask_truncated and not episode.completion.finished:
                continue
            logp = plain_logprobs(model, episode, s.temperature)
            sampler = torch.tensor(episode.completion.logprobs, dtype=dtype)
            ratio = (logp - sampler).exp()
            if s.ratio == "sequence":  # (product of the ratios) ** (1 / length)
                ratio = (ratio.prod() ** (1 / len(ratio))).expand_as(ratio)
            first, second = ratio * a, ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * a
            loss = -torch.where(first < second, first, second)
            if s.dual_clip and a < 0:
                loss = torch.where(loss > -a * s.dual_clip, torch.full_like(loss, -a * s.dual_clip), loss)
            if s.kl_coef:
                with torch.no_grad():
                    ref = plain_logprobs(reference, episode, s.temperature)
                loss = loss + s.kl_coef * ((ref - logp).exp() - (ref - logp) - 1)
            terms.append(loss)
            lengths.append(len(loss))
    if s.normaliser == "tokens":
        return sum(t.sum() for t in terms) / sum(lengths)
    return sum(t.mean() for t in terms) / num_sequences


def formula_gradients(model, reference, episodes, s, dtype):
    model, reference = copy.deepcopy(model).to(dtype), copy.deepcopy(reference).to(dtype)
    loss = formula(model, reference, episodes, s)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([g.flatten().double() for g in gradients])


def make_policy(model, settings, *, lr=0.0, **options):
    return Policy(
        model, ChatFormat(make_tokenizer(), instruction=""), settings, lr=lr, max_grad_norm=0.0, **options
    )


OPTIONS = {
    "GRPO": {},
    "no std": {"advantage_scale": "none"},
    "tokens": {"normaliser": "tokens"},
    "clip low": {"clip_low": 0.05},
    "clip high": {"clip_high": 0.6},
    "KL": {"kl_coef": 0.3},
    "GSPO": {"ratio": "sequence"},
    "GSPO, KL": {"ratio": "sequence", "kl_coef": 0.3, "clip_low": 0.01, "clip_high": 0.02},
    "GSPO, masked": {"ratio": "sequence", "mask_truncated": True, "normaliser": "tokens", "temperature": 0.7},
    "masked": {"mask_truncated": True},
    "masked, tokens": {"mask_truncated": True, "normaliser": "tokens"},
    "temperature": {"temperature": 0.7},
    "dual clip": {"dual_clip": 1.5},  # met by some of these ratios
    "verl": {"normaliser": "tokens", "dual_clip": 3.0, "kl_coef": 1e-4, "undecided_is_wrong": True},
    "GSPO, dual clip": {"ratio": "sequence", "dual_clip": 1.05, "clip_low": 0.01, "clip_high": 0.02},
    "all at once": {
        "advantage_scale": "none",
        "normaliser": "tokens",
        "clip_high": 0.28,
        "kl_coef": 0.1,
        "mask_truncated": True,
        "temperature": 1.3,
    },
}


@pytest.mark.parametrize(("name", "recompute"), [*((name, True) for name in OPTIONS), ("all at once", False)])
def test_loss_and_gradients_are_the_formulas(name, recompute):
    settings = replace(BASE, **OPTIONS[name])
    model = make_model("llama")
    policy = make_policy(model, settings, savings=Savings(recompute=recompute))
    with torch.no_grad():  # the policy has moved away from its reference, which was copied before
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    reference = policy.frozen if settings.uses_reference else model
    episodes = make_episodes(model, temperature=settings.temperature)
    truth, true_gradient = formula_gradients(model, reference, episodes, settings, torch.float64)
    loss, gradient = formula_gradients(model, reference, episodes, settings, torch.float32)
    found = update(policy, episodes)
    ours = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    assert found["updates"] == 1
    assert true_gradient.norm() > 1e-3
    assert (ours - true_gradient).norm() <= 2 * (gradient - true_gradient).norm()
    magnitude = true_gradient.norm().item()  # the loss is a difference, often far smaller than its terms
    assert abs(found["loss"] - truth) <= 2 * max(abs(loss - truth), 2**-23 * max(1.0, magnitude))


def test_what_is_measured_is_what_the_formulas_give():
    settings = replace(BASE, kl_coef=0.1, clip_low=0.1, clip_high=0.15, dual_clip=1.4)
    model = make_model("llama")
    policy = make_policy(model, settings)
    episodes = make_episodes(model)
    found = update(policy, episodes)
    ratios, signs = [], []
    for group in range(3):
        rewards = torch.tensor(REWARDS[group])
        for episode, reward in zip([e for e in episodes if e.group == group], rewards, strict=True):
            with torch.no_grad():
                logprobs = plain_logprobs(model, episode, 1.0)
            ratio = (logprobs - torch.tensor(episode.completion.logprobs)).exp()
            ratios.append(ratio)
            signs.append((reward - rewards.mean()).sign().expand_as(ratio))
    ratio, sign = torch.cat(ratios), torch.cat(signs)
    expected = {
        "ratio_min": ratio.min().item(),
        "ratio_mean": ratio.mean().item(),
        "ratio_max": ratio.max().item(),
        "sampler_ratio_min": ratio.min().item(),
        "sampler_ratio_max": ratio.max().item(),
        "clipped_low": ((ratio < 0.9) & (sign < 0)).float().mean().item(),
        "clipped_high": ((ratio > 1.15) & (sign > 0)).float().mean().item(),
        "clipped_dual": ((ratio > 1.4) & (sign < 0)).float().mean().item(),
        "undecided": 0.0,
        "kl": 0.0,  # the policy has not moved
        "reward_mean": 5.25 / 12,
        "no_signal": 1 / 3,
        "truncated": 3 / 12,
        "length": sum(map(sum, LENGTHS)) / 12,
        "entropy": -sum(x for e in episodes for x in e.completion.logprobs) / sum(map(sum, LENGTHS)),
        "episodes": 12,
        "groups": 3,
        "updates": 1,
        "empty_minibatches": 0,
    }
    assert 0 < expected["clipped_low"] != expected["clipped_high"] > 0 < expected["clipped_dual"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert found["reward_std"] == pytest.approx(torch.tensor(REWARDS).std(correction=0).item())


def test_a_rollouts_mini_batches_share_the_old_log_probs_of_the_policy_that_sampled():
    """Two mini-batches are two optimizer steps. The second's ratio is against the weights of the rollout."""
    settings = replace(BASE, minibatch_prompts=1)
    model = make_model("llama")
    before = copy.deepcopy(model)
    policy = make_policy(model, settings, lr=1e-2)
    episodes = [e for e in make_episodes(model, noise=0.0) if e.group < 2]
    found = update(policy, episodes)
    assert found["updates"] == 2
    assert found["sampler_ratio_min"] == pytest.approx(1, abs=1e-4)
    assert found["sampler_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert found["ratio_max"] > 1.01
    # the same two steps by hand
    other = make_policy(before, settings, lr=1e-2)
    fixed = copy.deepcopy(before)
    for group in (0, 1):
        other.optimizer.zero_grad()
        before.eval()
        total = 0
        batch = [e for e in episodes if e.group == group]
        rewards = torch.tensor([e.reward for e in batch])
        for episode, a in zip(batch, (rewards - rewards.mean()) / (rewards.std() + 1e-4), strict=True):
            with torch.no_grad():
                fixed_logprobs = plain_logprobs(fixed, episode, 1.0)
            ratio = (plain_logprobs(before, episode, 1.0) - fixed_logprobs).exp()
            total = total - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean() / 4
        total.backward()
        other.optimizer.step()
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_sequences_ratio_does_not_depend_on_what_shares_its_row_or_its_chunk_of_logits():
    """GSPO: one ratio per completion, the geometric mean of its own tokens' and of no others."""
    settings = replace(BASE, ratio="sequence", clip_low=0.05, clip_high=0.05)
    found, gradients = [], []
    for row_tokens, logit_rows in ((40, 0), (400, 0), (400, 3)):
        model = make_model("llama")
        changed = replace(settings, row_tokens=row_tokens)
        policy = make_policy(model, changed, savings=Savings(logit_rows=logit_rows))
        episodes = make_episodes(model)
        found.append(update(policy, episodes))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    ratios = []
    for episode in episodes[:8]:  # the others have no advantage, and are not learned from
        with torch.no_grad():
            logprobs = plain_logprobs(model, episode, 1.0).double()
        log_ratio = logprobs - torch.tensor(episode.completion.logprobs, dtype=torch.float64)
        ratios.append(log_ratio.mean().exp().item())
    for metrics, gradient in zip(found, gradients, strict=True):
        assert (metrics["ratio_min"], metrics["ratio_max"]) == pytest.approx((min(ratios), max(ratios)))
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_an_update_raises_what_was_rewarded_and_lowers_what_was_not():
    model = make_model("llama")
    episodes = make_episodes(model, noise=0.0)
    policy = make_policy(model, BASE, lr=1e-3)
    before = [plain_logprobs(model, e, 1.0).mean().item() for e in episodes]
    update(policy, episodes)
    after = [plain_logprobs(model.eval(), e, 1.0).mean().item() for e in episodes]
    change = [b - a for a, b in zip(before, after, strict=True)]
    assert min(change[1], change[3]) > max(change[0], change[2])  # rewards 1 and 1 against 0 and 0.25
    assert change[6] > max(change[4], change[5], change[7])


def test_groups_that_teach_nothing_cost_no_forward_pass_without_a_kl():
    policy = make_policy(make_model("llama"), BASE)
    episodes = make_episodes(policy.model)
    with_prompts = sum(len(e.prompt) + len(e.completion.ids) for e in episodes if e.group < 2)
    assert update(policy, episodes)["tokens"] == with_prompts


def test_a_group_of_one_is_refused_with_the_reason():
    with pytest.raises(
        ValueError, match=r"group_size is 1 but must be in 2..10000 .*an advantage compares one with the"
    ):
        Settings(group_size=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("kl_coef", -0.1),
        ("normaliser", "rows"),
        ("advantage_scale", "batch"),
        ("ratio", "group"),
        ("clip_low", 1.5),
        ("clip_high", -0.1),
        ("dual_clip", 1.0),
        ("dual_clip", -3.0),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r} but must be"):
        Settings(**{name: value})


def broken(episode, kind):
    completion = episode.completion
    if kind == "empty completion":
        return replace(episode, completion=replace(completion, ids=[], logprobs=[]))
    if kind == "log-prob not finite":
        return replace(episode, completion=replace(completion, logprobs=[math.nan, *completion.logprobs[1:]]))
    if kind == "not one log-prob per token":
        return replace(episode, completion=replace(completion, logprobs=completion.logprobs[1:]))
    return replace(episode, reward={"undecided": None, "reward not finite": math.nan}[kind])


@pytest.mark.parametrize(
    "kind",
    [
        "empty completion",
        "log-prob not finite",
        "not one log-prob per token",
        "undecided",
        "reward not finite",
    ],
)
def test_an_episode_that_cannot_be_trusted_is_counted_and_left_out_of_every_mean(kind):
    model = make_model("llama")
    episodes = make_episodes(model)
    with_broken = [broken(episodes[0], kind), *episodes[1:]]
    settings = replace(BASE, normaliser="tokens")
    policy = make_policy(model, settings)
    found = update(policy, with_broken)
    gradient = [p.grad.clone() for p in model.parameters()]
    assert found[f"rejected: {kind}"] == 1
    assert found["reward_mean"] == pytest.approx(5.25 / 11)
    without = update(policy, episodes[1:])
    assert not any(name.startswith("rejected") for name in without)
    assert found["loss"] == without["loss"]
    assert all(torch.equal(a, p.grad) for a, p in zip(gradient, model.parameters(), strict=True))


def test_an_undecided_answer_is_a_wrong_one_as_in_simplerl_zoo_and_still_counted():
    settings = replace(BASE, undecided_is_wrong=True)
    model = make_model("llama")
    episodes = make_episodes(model)
    wrong = [replace(episodes[1], reward=0.0), *episodes[:1], *episodes[2:]]
    undecided = [replace(episodes[1], reward=None), *wrong[1:]]
    found, expected = (update(make_policy(copy.deepcopy(model), settings), x) for x in (undecided, wrong))
    assert found["undecided"] == pytest.approx(1 / 12) and expected["undecided"] == 0
    assert not any(name.startswith("rejected") for name in found)
    for name in ("loss", "grad_norm", "reward_mean", "reward_std"):
        assert found[name] == expected[name], name
    assert found["reward_mean"] == pytest.approx(4.25 / 12)


def test_a_token_of_a_wrong_answer_beyond_the_dual_clip_has_no_gradient_and_no_other_token_is_touched():
    ratios = torch.tensor([0.5, 1.0, 2.9, 3.1, 20.0, 3.1, 20.0], dtype=torch.float64)
    advantages = torch.tensor([-1.0, -1.0, -2.0, -2.0, -1.0, 1.0, 0.0], dtype=torch.float64)
    logprobs = ratios.log().requires_grad_()
    losses = token_losses(logprobs, torch.zeros_like(ratios), advantages, Settings())
    losses.sum().backward()
    # float64, written out: below the clip, inside it, above it, twice beyond the dual clip, right, no signal
    expected = torch.tensor([0.8, 1.0, 5.8, 6.0, 3.0, -1.2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(losses.detach(), expected)
    slopes = torch.tensor([0.0, 1.0, 5.8, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, slopes)


def test_an_episode_without_a_prompt_is_refused_because_its_first_token_is_predicted_from_nothing():
    completion = Completion(ids=[5, 6, 2], logprobs=[-1.0, -2.0, -3.0], finished=True)
    episode = Episode(0, "q", [], completion, 1.0)
    with pytest.raises(ValueError, match=r"have 3 tokens but 2 of them.*give every episode a prompt"):
        EpisodeBatch.of([WeightedEpisode(episode, 1.0, 1.0)])


def test_a_batch_in_which_nothing_can_be_trusted_stops_with_the_reasons():
    policy = make_policy(make_model("llama"), BASE)
    episodes = [broken(e, "log-prob not finite") for e in make_episodes(policy.model)]
    message = r"nothing can be learned from 12 episodes: {'log-prob not finite': 12}.*lower --lr"
    with pytest.raises(ValueError, match=message):
        update(policy, episodes)
    with pytest.raises(ValueError, match="nothing can be learned from 0 episodes"):
        update(policy, [])


@pytest.mark.parametrize("kl_coef", [0.0, 1e-4])
def test_a_batch_of_truncated_completions_takes_no_step_and_is_counted(kl_coef):
    policy = make_policy(make_model("llama"), replace(BASE, mask_truncated=True, kl_coef=kl_coef), lr=1e-2)
    before = [p.clone() for p in policy.model.parameters()]
    episodes = make_episodes(policy.model)
    episodes = [replace(e, completion=replace(e.completion, finished=False)) for e in episodes]
    found = update(policy, episodes)
    assert (found["updates"], found["empty_minibatches"], found["truncated"]) == (0, 1, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    assert not policy.optimizer.state


def test_savings_that_need_one_row_or_another_loss_are_refused():
    with pytest.raises(ValueError, match="update_in_backward is on but a mini-batch has several rows"):
        make_policy(make_model("llama"), BASE, savings=Savings(update_in_backward=True))
    with pytest.raises(ValueError, match=r"head_update is blocked but .*cross-entropy.*--head_update whole"):
        blocked = Savings(offload_gradients=True, head_update="blocked")
        make_policy(make_model("llama"), BASE, savings=blocked)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", device="cpu")


def questions(n=3):
    rows = make_rows("short", n, seed=5)
    return [Question(f"id{i}", row["problem"], row["answer"]) for i, row in enumerate(rows)]


def tiny_policy(tiny, *, reward=correctness, **options):
    model, tokenizer = tiny
    small = {"group_size": 4, "max_new_tokens": 60, "row_tokens": 256, "kl_coef": 0.0, "temperature": 1.4}
    settings = Settings(**small | options)
    chat = ChatFormat(tokenizer, instruction="")
    return Policy(copy.deepcopy(model), chat, settings, lr=1e-3, reward=reward)


def test_a_rollout_is_graded_groups_with_the_log_probs_that_the_trainer_finds_too(tiny):
    policy = tiny_policy(tiny)
    asked = questions()
    episodes = rollout(policy, asked)
    assert [e.group for e in episodes] == [0] * 4 + [1] * 4 + [2] * 4
    for episode in episodes:
        question = asked[episode.group]
        assert episode.question == question.id
        assert [episode.reward] == correctness(question, [episode.completion])
        assert episode.completion.finished == (episode.completion.ids[-1] in policy.chat.eos_token_ids)
    assert {e.reward for e in episodes} == {0.0, 1.0}
    found = update(policy, episodes)
    assert (found["sampler_ratio_min"], found["sampler_ratio_max"]) == pytest.approx((1, 1), abs=1e-4)


def test_the_temperature_of_the_trainer_is_the_samplers(tiny):
    """If it were not, log-probs at temperature 1.4 would be compared with those at 1: no ratio would be 1."""
    policy = tiny_policy(tiny, temperature=1.0)
    cold = rollout(policy, questions())
    policy.settings = replace(policy.settings, temperature=1.4)
    assert update(policy, cold)["sampler_ratio_max"] > 1.01


def test_the_same_prompt_gets_other_completions_each_time_and_the_same_ones_after_a_resume(tiny):
    policy = tiny_policy(tiny, temperature=2.0)
    first, second = rollout(policy, questions(1)), rollout(policy, questions(1))
    assert policy.drawn == 2
    assert [e.completion.ids for e in first] != [e.completion.ids for e in second]
    assert len({tuple(e.completion.ids) for e in first}) > 1  # and the samples of a group differ
    again = tiny_policy(tiny, temperature=2.0)
    again.drawn = 1
    assert rollout(again, questions(1)) == second


def test_the_entropy_is_that_of_the_sampled_distributions_within_four_standard_errors(tiny):
    policy = tiny_policy(tiny, group_size=16)
    episodes = rollout(policy, questions(4))
    exact, sampled = [], []
    for episode in episodes:
        ids = torch.tensor(episode.prompt + episode.completion.ids)
        with torch.no_grad():
            hidden = hidden_states(policy.model, PackedBatch.build([Document(ids, 1)]))
            logits = (hidden @ head_weight(policy.model).T)[len(episode.prompt) - 1 : -1].double() / 1.4
        p = logits.log_softmax(-1)
        exact.append(-(p.exp() * p).sum(-1))
        sampled.append(-torch.tensor(episode.completion.logprobs, dtype=torch.float64))
    exact, sampled = torch.cat(exact), torch.cat(sampled)
    error = (sampled - exact).std() / math.sqrt(len(exact))
    assert abs(update(policy, episodes)["entropy"] - exact.mean().item()) < 4 * error


def test_prompts_without_a_gold_answer_are_named_before_anything_is_sampled(tiny):
    asked = [*questions(2), Question("bare", "1+1?", " ")]
    with pytest.raises(ValueError, match=r"1 of 3 prompts have no gold answer to grade by: \['bare'\]"):
        rollout(tiny_policy(tiny), asked)


def test_what_the_grader_cannot_decide_is_no_reward_at_all():
    texts = {"so \\boxed{5}": 1.0, "so \\boxed{6}": 0.0, "no idea": 0.0, "9^{9^{9^9}}": None}
    completions = [Completion([1], [0.0], True, text) for text in texts]
    assert correctness(Question("q", "?", "5"), completions) == list(texts.values())


def test_a_row_too_short_for_prompt_and_completion_is_refused_before_anything_is_sampled(tiny):
    with pytest.raises(ValueError, match=r"row_tokens is 64 but .* pass --row_tokens \d+"):
        rollout(tiny_policy(tiny, row_tokens=64), questions())


def test_rewards_of_ones_own_add_up_and_each_is_logged_by_its_name(tiny):
    asked = questions(2)

    def short(question, completions):
        assert question in asked and len(completions) == 4  # a group at a time
        return [-len(completion.ids) / 30 for completion in completions]

    def spoilt(question, completions):
        return [None, 2, 2, 2]

    policy = tiny_policy(tiny, reward={"short": short, "spoilt": spoilt})
    episodes = rollout(policy, asked)
    for i, episode in enumerate(episodes):
        length = len(episode.completion.ids)
        assert episode.rewards == {"short": -length / 30, "spoilt": 2.0 if i % 4 else None}
        assert episode.reward == (2 - length / 30 if i % 4 else None)  # one None: the answer is undecided
    found = update(policy, episodes)
    assert found["reward: short"] == pytest.approx(-found["length"] / 30)
    assert found["reward: spoilt"] == 1.5
    assert found["undecided"] == 0.25


def test_the_clip_stops_the_gradient_only_where_the_policy_has_already_gone_the_rewarded_way():
    logprobs = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    token_losses(logprobs, torch.zeros_like(advantages), advantages, Settings()).sum().backward()
    ratio = logprobs.detach().exp()
    torch.testing.assert_close(
        logprobs.grad, torch.tensor([0.0, ratio[1], -ratio[2], 0.0], dtype=torch.float64)
    )


def test_the_kl_is_zero_at_the_reference_and_pulls_towards_it():
    zero = torch.zeros(1, dtype=torch.float64)
    for distance in (-0.3, 0.0, 0.3):
        logprobs = torch.tensor([distance], dtype=torch.float64, requires_grad=True)
        old = logprobs.detach()
        token_losses(logprobs, old, zero, Settings(kl_coef=1.0), reference=zero).sum().backward()
        assert logprobs.grad.item() == pytest.approx(1 - math.exp(-distance), abs=1e-12)


def test_hidden_states_of_the_reference_are_those_of_the_start():
    model = make_model("llama")
    policy = make_policy(model, replace(BASE, kl_coef=1e-4), lr=1e-2)
    start = copy.deepcopy(model)
    update(policy, make_episodes(model))
    with policy.reference() as reference:
        assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), start.parameters(), strict=True))
        assert not any(
            torch.equal(a, b) for a, b in zip(reference.parameters(), model.parameters(), strict=True)
        )
        assert not any(p.requires_grad for p in reference.parameters())


def test_the_savings_rows_of_logits_bound_the_chunks_of_the_fused_loss(monkeypatch):
    """max_rows is passed on."""
    model, sizes, made = make_model("llama"), [], lce.row_gradients_
    monkeypatch.setattr(
        lce, "row_gradients_", lambda logits, *rest: sizes.append(len(logits)) or made(logits, *rest)
    )
    policy = make_policy(model, BASE, savings=Savings(recompute=False, logit_rows=3))
    update(policy, make_episodes(model))
    assert max(sizes) <= 3 < sum(sizes)


def test_no_pass_over_the_tokens_computes_more_rows_of_logits_at_once_than_logit_rows(monkeypatch):
    """The reference's log-probs and the update."""
    model, passes = make_model("llama"), []

    def chunks(hidden, weight, kept, max_rows=0):
        passes.append([len(rows) for rows, *_ in logit_chunks(hidden, weight, kept, max_rows)])
        return logit_chunks(hidden, weight, kept, max_rows)

    monkeypatch.setattr(lce, "logit_chunks", chunks)
    settings = replace(BASE, row_tokens=4_096, kl_coef=0.1)
    found = []
    for logit_rows in (0, 7):
        policy = make_policy(copy.deepcopy(model), settings, savings=Savings(logit_rows=logit_rows))
        found.append(update(policy, make_episodes(model)))
    whole, parts = passes[:2], passes[2:]
    assert len(parts) == 2 and all(len(sizes) == 1 for sizes in whole)
    assert all(max(sizes) == 7 and sum(sizes) == sum(whole[0]) for sizes in parts)
    assert found[0]["kl"] == pytest.approx(found[1]["kl"], abs=1e-6)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-4)


def test_a_policy_that_samples_without_graphs_says_so_to_the_sampler(monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "steps_for", lambda *how: asked.append(how[-1]) or Eager())
    model, tokenizer = load("tiny", device="cpu")
    chat, questions = ChatFormat(tokenizer, instruction=""), [Question("q", "1+2?", "3")]
    for switch in ({}, {"cuda_graphs": False}):
        policy = Policy(model, chat, BASE, lr=1e-3, **switch)
        rollout(policy, questions)
        policy.close()
    assert asked == [True, False]
