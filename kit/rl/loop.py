"""The loop around kit.rl.grpo: draw prompts, roll out, update, log metrics, write checkpoints.

A step depends only on the weights, the seed and its own number: the number gives the position in the stream
of prompts, and that position keys every sample's random numbers. On a CPU, a run that is killed and resumed
ends bit for bit where an unbroken one does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kit.command import LetFinish, Stopped
from kit.data.problems import Question, draw
from kit.inputs import digest_of_questions
from kit.journal import REWARD, ROLLOUT, Journal
from kit.machine import describe_machines
from kit.memory.measured import PeakMemory
from kit.models.backbone import head_weight
from kit.progress import Progress, print_line
from kit.rl.episodes import Episode, by_group
from kit.rl.grpo import Policy, rollout, update
from kit.run import MACHINE, ROLLOUTS, RunFolder, write_json
from kit.train import checkpoint
from kit.train.weight_updates import NotFinite

if TYPE_CHECKING:
    from kit.memory.simulate import Plan


def train(
    policy: Policy,
    questions: Sequence[Question],
    run: RunFolder,
    *,
    steps: int,
    batch_prompts: int,
    checkpoint_every: int = 0,
    save_fp32: bool = False,
    planned: Plan | None = None,
) -> Path:
    """Train for `steps` steps of batch_prompts prompts. Returns the folder of the finished model.

    checkpoint_every: steps; 0 = none before the end. save_fp32: as for kit.train.train. planned: the larger
    of the plans of sampling and update; on a card, it is printed after ten steps beside what was measured,
    and both are stored in memory.json.

    Writes run.metrics, the first group of every step to rollouts.jsonl, and checkpoints. If run.path holds a
    checkpoint, training continues from it; if it holds the finished model, nothing is done. Raises ValueError
    if another run has written them.
    Raises ValueError, naming the last checkpoint, if loss or gradient is not finite or memory runs out; and
    Stopped after Ctrl-C, with a checkpoint of the last step that ended.
    """
    policy.savings.check_saving(save_fp32)
    finished, checkpoints = run.path / "model", run.path / "checkpoints"
    group = policy.optimizer.param_groups[0]
    fixed = replace(policy.settings, num_slots=1)  # how many are sampled at once may change
    settings = (fixed, group["lr"], group["weight_decay"], steps, batch_prompts)
    name = checkpoint.name_of_run(policy.model, questions=digest_of_questions(questions), settings=settings)
    if checkpoint.is_finished(finished, name):
        return finished
    write_json(run.path / MACHINE, describe_machines())
    samples = Journal(run.path / ROLLOUTS, ROLLOUT)
    done = checkpoint.resume(checkpoints, policy.model, policy.optimizer, run=name, num_steps=steps)
    for journal in (run.metrics, samples):
        journal.keep(lambda row: row["step"] <= done)
    policy.drawn = done * batch_prompts
    if done:
        print(f"training    goes on after step {done} of {steps}")
    memory = PeakMemory(head_weight(policy.model).device, planned, run.path / "memory.json")
    saved = done

    def save(step: int) -> None:
        nonlocal saved
        if step > saved:
            run.metrics.sync()
            samples.sync()
            checkpoint.save(checkpoints, policy.model, policy.chat.tokenizer, policy.optimizer, step, name)
            saved = step

    def sample_or_stop(step: int, prompts: list[Question]) -> list[Episode]:
        """Roll out. After Ctrl-C the weights are those of the last step, so they are kept."""
        try:
            return rollout(policy, prompts)
        except torch.OutOfMemoryError as error:
            raise memory.exhausted(step, checkpoint.latest(checkpoints), "a smaller --num_slots") from error
        except KeyboardInterrupt:
            save(step - 1)
            kept = f"checkpoint {step - 1} kept" if step > 1 else "nothing learned so far"
            raise Stopped(f"in the rollout of step {step} of {steps}, {kept}") from None

    def learn(step: int, first: Question, episodes: list[Episode], seconds: float) -> str:
        """Update the weights, log the step, and return what to show.

        first: the prompt of the first group. seconds: of the rollout.
        """
        try:
            found = update(policy, episodes)
        except NotFinite as error:
            raise checkpoint.diverged(step, group["lr"], error, checkpoints) from error
        memory.look(step, steps)
        speed = sum(len(episode.completion.ids) for episode in episodes) / seconds
        time_and_memory = {
            "rollout_seconds": seconds,
            "rollout_tokens_per_second": speed,
            "peak_gib": memory.gib,
            "reserved_gib": memory.reserved_gib,
        }
        run.metrics.append({"step": step, **found, **time_and_memory})
        for i, episode in enumerate(by_group(episodes)[0]):
            completion = episode.completion
            samples.append(
                {
                    "step": step,
                    "sample": i,
                    "question": episode.question,
                    "problem": first.problem,
                    "gold": first.answer,
                    "reward": episode.reward,
                    "rewards": episode.rewards,
                    "tokens": len(completion.ids),
                    "finished": completion.finished,
                    "text": completion.text,
                }
            )
        print_line(line(step, steps, found, speed))
        return f"reward {found['reward_mean']:.3f}, {speed:,.0f} tokens/s"

    with LetFinish("this step, then a checkpoint") as interrupt:
        with Progress("GRPO", "steps", steps, done) as progress:
            for step in range(done + 1, steps + 1):
                start = time.perf_counter()
                try:
                    prompts = draw(questions, policy.drawn, batch_prompts, seed=policy.settings.seed)
                    episodes = sample_or_stop(step, prompts)
                    seconds = time.perf_counter() - start
                    progress.update(learn(step, prompts[0], episodes, seconds))
                    due = checkpoint_every and step % checkpoint_every == 0 and step < steps
                except torch.OutOfMemoryError as error:
                    raise memory.exhausted(step, checkpoint.latest(checkpoints)) from error
                if due or interrupt.agreed():
                    save(step)
                    if interrupt.agreed():  # also if it came while the checkpoint was written
                        raise Stopped(f"at step {step} of {steps}, checkpoint {step} kept")

        interrupt.what = "the model's folder"
        rests = checkpoint.rests_of(policy.optimizer) if save_fp32 else None
        policy.close()
        run.metrics.sync()
        samples.sync()
        checkpoint.finish(finished, policy.model, policy.chat.tokenizer, checkpoints, steps, name, rests)
    return finished


def line(step: int, steps: int, found: dict[str, float], rollout_speed: float) -> str:
    """Return what to watch of a step's metrics as one line; run.metrics has all of them."""
    named = [f"{name.removeprefix(REWARD)} {x:.3f}" for name, x in found.items() if name.startswith(REWARD)]
    each = f" ({', '.join(named)})" if len(named) > 1 else ""
    parts = [f"reward {found['reward_mean']:.3f}{each}", f"length {found['length']:.0f}"]
    if "kl" in found:
        parts.append(f"KL {found['kl']:.2e}")
    parts.append(f"{rollout_speed:,.0f} tokens/s sampled")
    if empty := found["empty_minibatches"]:
        parts.append(
            f"no update in {empty} mini-batches: every completion cut off, rejected or without signal"
        )
    return f"step {step} of {steps}: " + "; ".join(parts)
