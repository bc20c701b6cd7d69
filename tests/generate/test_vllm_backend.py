"""vLLM needs a card; here a stand-in for its engine answers with the calls and fields that its sources document."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from kit import models
from kit.data.chat import ChatFormat
from kit.evaluate.benchmarks import parse_benchmarks
from kit.evaluate.measure import evaluate
from kit.generate.sampler import generate
from kit.generate.sampling import SamplingParams
from kit.generate.vllm_backend import VllmModel


class Engine:
    """Answers prompt [.., n] with n, n - 1, ..., 0, one token a step for all; of a finished request it tells once."""

    model_config = SimpleNamespace(dtype="torch.bfloat16", max_model_len=100)

    def __init__(self):
        self.requests, self.waiting = {}, {}

    def add_request(self, request_id, prompt, settings):
        self.requests[request_id] = (prompt, settings)
        ids = list(range(prompt["prompt_token_ids"][-1], -1, -1))[: settings.max_tokens]
        self.waiting[request_id] = ids

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        request_id = min(self.waiting, key=lambda i: len(self.waiting[i]))  # the shortest ends first
        ids = self.waiting.pop(request_id)
        logprobs = [{i: SimpleNamespace(logprob=-i / 8), i + 1: SimpleNamespace(logprob=-9.0)} for i in ids]
        return [
            SimpleNamespace(
                request_id=request_id,
                finished=True,
                outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs)],
            )
        ]


@pytest.fixture
def model(monkeypatch):
    engine, made = Engine(), {}

    def llm(**settings):
        made.update(settings)
        return SimpleNamespace(llm_engine=engine)

    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=2))
    vllm = ModuleType("vllm")
    vllm.__spec__ = ModuleSpec("vllm", None)
    vars(vllm).update(
        __version__="0", LLM=llm, SamplingParams=lambda **s: SimpleNamespace(**s), sampling_params=kinds
    )
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    model = VllmModel("owner/name", 8)
    assert made == {"model": "owner/name", "max_num_seqs": 8, "logprobs_mode": "processed_logprobs"}
    return model


def test_where_vllm_is_missing_the_error_names_the_extra():
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    with pytest.raises(ValueError, match=r"pip install -e '\.\[vllm\]'"):
        VllmModel("owner/name", 8)


def test_completions_come_back_in_order_with_their_logprobs_and_every_sample_has_a_seed(model):
    params = SamplingParams(temperature=0.6, top_p=0.95, top_k=7, max_new_tokens=6)
    seen = []
    found = generate(model, [[5, 9], [5, 3], [5, 1]], params, num_slots=8, seed=0, eos_token_id=[0, 2],
                     on_finish=lambda i, c: seen.append(i), decode=str)  # fmt: skip
    assert [c.ids for c in found] == [[9, 8, 7, 6, 5, 4], [3, 2, 1, 0], [1, 0]]
    assert [c.finished for c in found] == [False, True, True]
    assert found[1].logprobs == [-3 / 8, -2 / 8, -1 / 8, 0]
    assert found[2].text == "[1, 0]"
    assert seen == [2, 1, 0]
    settings = [s for _, s in model.engine.requests.values()]
    assert [prompt for prompt, _ in model.engine.requests.values()] == [
        {"prompt_token_ids": [5, n]} for n in (9, 3, 1)
    ]
    assert {
        (s.temperature, s.top_p, s.top_k, s.max_tokens, s.logprobs, s.ignore_eos, s.detokenize)
        for s in settings
    } == {(0.6, 0.95, 7, 6, 0, True, False)}
    assert all(s.stop_token_ids == [0, 2] for s in settings)
    assert len({s.seed for s in settings}) == 3
    assert all(0 <= s.seed < 2**63 for s in settings)


def test_the_context_is_respected(model):
    with pytest.raises(ValueError, match="made for 100 in all"):
        generate(model, [[5, 9]], SamplingParams(max_new_tokens=99), num_slots=8, seed=0, eos_token_id=0)


def test_an_evaluation_writes_the_same_log_and_says_which_engine(model, tmp_path):
    tokenizer = models.load("tiny", device="cpu")[1]
    benchmark = parse_benchmarks("toy", limit=2)[0]
    chat = ChatFormat(tokenizer, instruction="")
    found = evaluate(model, chat, benchmark, SamplingParams(max_new_tokens=9), tmp_path, num_samples=2)
    tiny = models.load("tiny", device="cpu")[0]
    ours = evaluate(tiny, chat, benchmark, SamplingParams(max_new_tokens=9), tmp_path / "kit", num_samples=2)
    assert found.header.keys() == ours.header.keys()
    assert found.rows[0].keys() == ours.rows[0].keys()
    assert (found.header["engine"], ours.header["engine"]) == ("vllm 0", "kit")
    assert len(found.rows) == 4
