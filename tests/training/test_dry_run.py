"""The dry run: its estimate of activations against what autograd keeps, and what it says of machines and data."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, ModernBertConfig, XLMRobertaConfig

from lusifer import LusiferConfig, LusiferError, LusiferModel
from lusifer.recipes.files import load_recipe
from lusifer.training.planning import dry_run as module
from lusifer.training.planning.cards import Card, find_card
from lusifer.training.planning.costs import _values
from lusifer.training.planning.dry_run import dry_run, limits_here


def kept_bytes(model, batch, precision):
    """Bytes of all storages the graph of one pass holds, parameters and their casts aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        # Casts of weights are as wide as a weight and do not grow with the batch.
        if tensor.untyped_storage().data_ptr() not in own and tensor.shape[0] not in (192, 256, 512, 16):
            held[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    context = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        output = model(**batch).pooler_output
    assert output.requires_grad
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.15), ("float32", 0.35)])
def test_activations_are_estimated_per_token_and_layer(precision, tolerance):
    """In float32 the norms make no copies, which the formula counts: it errs on the safe side there."""
    torch.manual_seed(0)
    encoder = XLMRobertaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    llm = LlamaConfig(
        vocab_size=99, hidden_size=192, num_hidden_layers=6, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=512,
    )  # fmt: skip
    model = LusiferModel(LusiferConfig(encoder_config=encoder, llm_config=llm)).train()
    if precision == "bfloat16":
        model.llm.bfloat16()
    model.add_adapter("llm", {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0})
    model.set_trainable(encoder="frozen", connector=True, llm=True)
    batch = {"input_ids": torch.randint(5, 99, (10, 60)), "attention_mask": torch.ones(10, 60, dtype=torch.long)}
    tokens = 10 * 62
    estimated = tokens * _values(model.config.llm_config, False) * (2 if precision == "bfloat16" else 4)
    assert kept_bytes(model, batch, precision) == pytest.approx(estimated, rel=tolerance)


RECIPES = Path(__file__).parents[2] / "recipes"
XLMR = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
MMBERT = {"hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152}
SMOL = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "intermediate_size": 8192}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Overrides that name configurations of the real sizes."""
    folder = tmp_path_factory.mktemp("sizes")
    XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514, **XLMR).save_pretrained(folder / "xlmr")
    MistralConfig().save_pretrained(folder / "mistral")
    ModernBertConfig(vocab_size=256000, max_position_embeddings=8192, **MMBERT).save_pretrained(folder / "mmbert")
    LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **SMOL).save_pretrained(folder / "smol")
    pairs = {"paper-xlmr-mistral": ("xlmr", "mistral"), "modern": ("mmbert", "smol")}
    return {
        name: [RECIPES / f"{name}.yaml", ["--model.encoder", str(folder / one), "--model.llm", str(folder / other)]]
        for name, (one, other) in pairs.items()
    }


def verdicts(real, name, *, ranks=1, gpu, more=()):
    path, overrides = real[name]
    facts = dry_run(load_recipe(path, [*overrides, *more]), "r", ranks=ranks, gpu=gpu, data=False)
    return facts, {stage: (row["fits"], row["advice"]) for stage, row in facts["stages"].items()}


@pytest.mark.parametrize(("ranks", "gpu"), [(8, "a100-80gb"), (1, "h100")])
def test_the_paper_recipe_fits_large_cards_as_shipped(real, ranks, gpu):
    facts, said = verdicts(real, "paper-xlmr-mistral", ranks=ranks, gpu=gpu)
    assert said == {"align": (True, ""), "contrast": (True, "")}
    assert all(row["hours, at most"] > 0 for row in facts["stages"].values())


def test_the_modern_recipe_fits_the_card_it_names(real):
    assert verdicts(real, "modern", gpu="24")[1] == {"align": (True, ""), "contrast": (True, "")}


def test_what_does_not_fit_says_what_would(real):
    four_bits = ["--model.quantization", "4bit", "--scale.strategy", "ddp"]
    _, said = verdicts(real, "paper-xlmr-mistral", gpu="24gb", more=four_bits)
    assert said["align"] == (True, "") and said["contrast"][0] is False
    advice = shlex.split(said["contrast"][1])
    assert advice[0] == "--contrast.graph_tokens"
    assert verdicts(real, "paper-xlmr-mistral", gpu="24", more=[*four_bits, *advice])[1]["contrast"] == (True, "")
    # Without 4 bits it takes smaller passes; and nothing makes 7 billion parameters fit into 4 GB.
    assert "max_tokens" in verdicts(real, "paper-xlmr-mistral", gpu="24")[1]["contrast"][1]
    assert verdicts(real, "paper-xlmr-mistral", gpu="4")[1]["contrast"] == (False, "")


def test_a_recipe_is_cut_to_the_memory_of_the_machine(real, monkeypatch):
    path, overrides = real["modern"]
    recipe = load_recipe(path, overrides)
    for memory, fields in ((1e12, {}), (16e9, {"contrast": {"graph_tokens"}})):
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda memory=memory: SimpleNamespace(total=memory))
        limits = limits_here(recipe)
        assert {name: set(values) for name, values in limits.items()} == fields
    monkeypatch.setattr(module, "find_card", lambda name: Card("small", 12.0, None))
    limits = limits_here(recipe)
    more = [
        word
        for name, values in limits.items()
        for field, value in values.items()
        for word in (f"--{name}.{field}", str(value))
    ]
    assert verdicts(real, "modern", gpu="12.7", more=more)[1] == {"align": (True, ""), "contrast": (True, "")}


@pytest.mark.parametrize("name", ["h100", "NVIDIA H100", "A100-80GB", "24", "24 GB", "RTX 4090"])
def test_cards_are_known_by_their_names_or_memory(name):
    card = find_card(name)
    assert card.memory in (0.95 * 80, 0.95 * 24)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090", 165e12), ("Other", None)],
)
def test_the_card_of_this_machine_is_known_by_its_longest_name(monkeypatch, name, peak):
    facts = SimpleNamespace(name=name, total_memory=10e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert find_card(None) == Card(name, pytest.approx(9.5), peak)


@pytest.mark.parametrize("name", ["h99", "0", "-3", "much"])
def test_an_unknown_card_is_refused(name):
    with pytest.raises(LusiferError, match="its memory in GB"):
        find_card(name)


def test_rows_epochs_and_the_launch_line(tiny_encoder, tiny_llm, tmp_path):
    rows = [f'{{"query": "q{i}", "positive": ["p{i}", "r{i}"]}}' for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    (tmp_path / "r.yaml").write_text(
        f"{{output: {tmp_path / 'run'}, warm_start: {{enabled: false}}, "
        f"model: {{encoder: {tiny_encoder}, llm: {tiny_llm}, max_seq_length: 32}}, "
        f"contrast: {{steps: 10, batch_size: 8, "
        f"data: [{{source: {tmp_path / 'pairs.jsonl'}, positives: 2}}, {{source: nowhere}}]}}}}"
    )
    overrides = ["--seed", "3", "--output", "a b"]
    facts = dry_run(load_recipe(tmp_path / "r.yaml", overrides), "r.yaml", ranks=16, overrides=overrides)
    assert (
        facts["sets"][0]["rows"] == 40 and "epochs" not in facts["sets"][0] and "nowhere" in facts["sets"][1]["problem"]
    )
    assert facts["launch"].startswith("torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend")
    assert facts["launch"].endswith("-m lusifer train r.yaml --seed 3 --output 'a b'")
    (tmp_path / "s.yaml").write_text((tmp_path / "r.yaml").read_text().replace(", {source: nowhere}", ""))
    (row,) = dry_run(load_recipe(tmp_path / "s.yaml"), "s.yaml")["sets"]
    assert row["epochs"] == 1.0  # 10 steps of 4 records.
