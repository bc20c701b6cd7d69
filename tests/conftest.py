"""Fixtures: tiny random models of the families, and a skip that names the data that are missing."""

import copy
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may use the network; read on import of huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork and spawn
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: more threads would only wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTEST_XDIST_AUTO_NUM_WORKERS"] = "0"  # a pytest that a test starts has no workers

import pytest
import torch
from children import IN_THE_INTERPRETER, ROOT
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from kit.kernels.backend import INTERPRET
from kit.models.attention import REGISTERED
from kit.packing import Document

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 7
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "gemma3": Gemma3TextConfig(
        **SHAPE | {"num_key_value_heads": 1},
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=True,
    ),
}
# Qwen3 is Llama with Gemma's norms of heads: tests of what a family computes run on it, others on the three
ALL_FAMILIES = FAMILIES | {"qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)}


# tests that run only somewhere else -> whether this is the place
RUN_HERE = {"gpu": torch.cuda.is_available(), "interpreter": INTERPRET}
left_out: dict[str, set[str]] = {marker: set() for marker in RUN_HERE}  # which xdist does not count
in_the_interpreter: dict[str, int] = {}  # file -> its tests that passed in a process of their own


def pytest_configure(config):
    """Let a warning of a recipe fail the test that it comes from, as pyproject.toml does for the kit."""
    recipes = "|".join(path.stem for path in (ROOT / "recipes").rglob("*.py"))
    config.addinivalue_line("filterwarnings", rf"error:::({recipes})\Z")


def pytest_collection_modifyitems(config, items):
    """Leave out what can only run somewhere else, whatever -m selects."""
    absent = [marker for marker, here in RUN_HERE.items() if not here]
    elsewhere = [item for item in items if any(map(item.get_closest_marker, absent))]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]


def pytest_deselected(items):
    for marker, found in left_out.items():
        found.update(item.nodeid for item in items if item.get_closest_marker(marker))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = {marker: sorted(ids) for marker, ids in left_out.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for marker, ids in getattr(node, "workeroutput", {}).get("left_out", {}).items():
        left_out[marker].update(ids)


def pytest_runtest_logreport(report):
    count = dict(report.user_properties).get(IN_THE_INTERPRETER)
    if count is not None:
        in_the_interpreter[report.nodeid.split("::")[0]] = count


def pytest_terminal_summary(terminalreporter):
    tell = terminalreporter.write_line
    if cards := left_out["gpu"]:
        how = "run them with -m gpu" if RUN_HERE["gpu"] else "there is none here"
        tell(f"{len(cards)} tests need an NVIDIA card and were deselected: {how}")
    if in_the_interpreter:
        count, files = sum(in_the_interpreter.values()), len(in_the_interpreter)
        tell(f"{count} tests of {files} files passed in Triton's interpreter, in processes of their own")
    if waiting := [test for test in left_out["interpreter"] if test.split("::")[0] not in in_the_interpreter]:
        tell(
            f"{len(waiting)} tests need Triton's interpreter and were deselected: -m slow runs them, in "
            "processes of their own"
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Run the tests on a card in one process: they limit its memory and time it."""
    return 1 if config.option.markexpr == "gpu" else None


@pytest.fixture
def fresh_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ctrl_c_interrupts():
    """Let SIGINT interrupt, which a process started in a shell's background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=FAMILIES)
def tiny_model(request):
    """Make a random model of each family."""
    return make_model(request.param)


def make_model(family: str, dtype: torch.dtype = torch.float32):
    """Make a random model whose logits are far from flat, so that greedy decoding has something to decide."""
    torch.manual_seed(0)
    config = copy.deepcopy(
        ALL_FAMILIES[family]
    )  # a model shares its config, and with it the kind of attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=REGISTERED["kit"], dtype=dtype)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def random_documents(lengths, *, vocab_size: int = 97, seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)

    def document(length: int) -> Document:
        ids = torch.randint(3, vocab_size, (length,), generator=generator, dtype=torch.int32)
        return Document(ids, min(length // 3, length - 1))

    return [document(length) for length in lengths]


def real_data(name: str) -> Path:
    """Return the path of a file of real data, or skip the test, naming the file."""
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here: real data does not ship with the kit")
    return path
