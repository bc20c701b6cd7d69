"""vLLM behind kit.generate.sampler: the engine for those who outgrow one card. Optional: pip install -e '.[vllm]'.

A VllmModel is a model that `generate` and `evaluate` take like any other, and the same log is written. vLLM draws from streams of
its own, seeded sample by sample with the kit's keys: a resumed run repeats what it would have drawn as far as its kernels repeat
themselves, but its tokens are not those of the kit's sampler. Log-probs are of the distribution that was sampled, as ours are.
Never run where this was written, which has no GPU: made from vLLM's sources (2026), tested against a stand-in for its engine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from kit.generate.sampling import SamplingParams

MAX_SEED = 2**63 - 1


class VllmModel:
    """What generate and evaluate need to know of a model, and the engine that runs it."""

    def __init__(self, name: str, num_slots: int):
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("engine is vllm but vLLM is not installed; pip install -e '.[vllm]' (a Linux machine with a GPU), "
                             "or use the kit's own engine: --engine kit")  # fmt: skip
        import vllm

        self.vllm, self.name, self.version = vllm, name, vllm.__version__
        self.engine = vllm.LLM(
            model=name, max_num_seqs=num_slots, logprobs_mode="processed_logprobs"
        ).llm_engine
        settings = self.engine.model_config
        self.dtype, self.config = (
            settings.dtype,
            SimpleNamespace(max_position_embeddings=settings.max_model_len),
        )

    @property
    def fingerprint(self) -> str:
        """A local folder's weights by their content; a hub id by its name."""
        files = sorted(Path(self.name).glob("*.safetensors"))
        state = hashlib.blake2b(b"" if files else self.name.encode(), digest_size=8)
        for file in files:
            with file.open("rb") as content:
                while block := content.read(1 << 24):
                    state.update(block)
        return state.hexdigest()

    def run(
        self, prompts: list[tuple[int, ...]], params: SamplingParams, streams: list[int], stop: set[int]
    ) -> Iterator[tuple[int, list[int], list[float], float]]:
        """(index of the prompt, ids, their log-probs, seconds) of each response as it ends."""
        start = time.perf_counter()
        for index, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
            settings = self.vllm.SamplingParams(
                temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, max_tokens=params.max_new_tokens,
                seed=stream & MAX_SEED, stop_token_ids=sorted(stop), ignore_eos=True, logprobs=0, detokenize=False,
                output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            self.engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, settings)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    (response,) = output.outputs
                    ids = list(response.token_ids)
                    logprobs = [found[i].logprob for i, found in zip(ids, response.logprobs, strict=True)]
                    yield int(output.request_id), ids, logprobs, time.perf_counter() - start
