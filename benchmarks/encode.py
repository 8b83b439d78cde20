"""What encoding costs: against a naive and an ideal loop, Sentence Transformers and the matmul roofline, in one run.

Random XLM-R (6 x 384) and Llama (12 x 576, vocabulary 32,000), LoRA r 16 on both. 2,000 texts of 5 to 300 tokens
(log-normal, median 41), made of words whose length in characters differs by language by a factor of eight, as scripts
do; both backbones have the same tokenizer, so that neither gains by it. Each of five turns takes other 400 of the texts
through every row, in CPU time; a row's figure is the median of its five ratios.

naive            float32, unsorted batches of 32 padded to a multiple of 8, LM head computed and dropped, adapters
                 beside the weights: what the published code does
ideal bfloat16   a loop by hand over tensors made before: sorted by tokens, adapters merged, no tokenising
ours             ``lusifer.load(...).encode(texts)``, everything included
plain ST         ``SentenceTransformer(path).encode(texts)`` of the same checkpoint
ST LLM alone     Sentence Transformers with the LLM alone, mean pooled
ST encoder alone the same with the encoder

``ratio`` is the naive loop's time over the row's, ``roofline_share`` useful work (real tokens alone, by formula) over
what matrix products of the models' own shapes reach in the same turn and data type, ``min_cosine`` the least cosine
with the naive loop's embeddings. A second table gives our own time by part, each with its share of the roofline.
Writes runs/bench/encode.json, encode.md and encode.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import linear, normalize
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

import lusifer
from lusifer import LusiferModel
from lusifer.model import modeling as lusifer_modeling
from lusifer.model.backbones import load_tokenizer
from lusifer.model.sentence_transformer import lusifer_model, save_atomically, to_sentence_transformer
from lusifer.model.text_encoder import set_precision
from lusifer.model.token_batches import PASS_TOKENS, micro_batches

OUT = Path("runs/bench")
VOCABULARY, TURNS, BATCH = 32_000, 5, 32
ENCODER = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
LLM = {
    "hidden_size": 576, "num_hidden_layers": 12, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536,
}  # fmt: skip


def words() -> list[str]:
    """A vocabulary in eight made-up languages with words of 1 to 8 characters a token."""
    letters = [chr(0x4E00 + i) for i in range(3000)]
    return [
        letters[i % 3000] + "abcdefgh"[i // 3000 % 8] * (i % 8) + str(i // 24_000) * (i >= 24_000)
        for i in range(VOCABULARY - 4)
    ]


def save_backbones(folder: Path) -> tuple[Path, Path]:
    """Random encoder and LLM with one tokenizer, as any two folders of transformers."""
    inner = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words()])}, "<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    torch.manual_seed(0)
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    made = {
        "encoder": XLMRobertaModel(
            XLMRobertaConfig(**shared, **ENCODER, max_position_embeddings=514), add_pooling_layer=False
        ),
        "llm": LlamaModel(LlamaConfig(**shared, **LLM)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        if name == "encoder":
            inner.post_processor = processors.TemplateProcessing(
                single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
            )
        else:
            inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        PreTrainedTokenizerFast(tokenizer_object=inner, **special, model_max_length=512).save_pretrained(folder / name)
    return folder / "encoder", folder / "llm"


def save_model(encoder: Path, llm: Path, folder: Path) -> None:
    """A LUSIFER checkpoint with adapters that do something."""
    model = LusiferModel.from_backbones(str(encoder), str(llm), max_seq_length=512)
    for part in ("encoder", "llm"):
        model.add_adapter(part, {"r": 16, "lora_alpha": 32})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    save_atomically(to_sentence_transformer(model.eval(), load_tokenizer("encoder", str(encoder))), folder)


def make_texts(count: int) -> list[str]:
    """The fixed mix: each text in one language, lengths log-normal."""
    random = np.random.default_rng(0)
    vocabulary = words()
    lengths = np.clip(np.round(np.exp(random.normal(np.log(41), 0.85, size=count))), 5, 300).astype(int) - 2
    spoken = random.integers(8, size=count)
    return [
        " ".join(vocabulary[8 * i + language] for i in random.integers((VOCABULARY - 12) // 8, size=length))
        for length, language in zip(np.maximum(lengths, 3), spoken, strict=True)
    ]


def useful(lengths: list[int]) -> dict[str, float]:
    """Floating point operations of real tokens, by part; LLM positions are the text's, BOS and the added token."""

    def stack(shape: dict[str, int], per_layer: int, positions: list[int]) -> float:
        width, depth = shape["hidden_size"], shape["num_hidden_layers"]
        return depth * sum(2 * per_layer * n + 4 * width * n * n for n in positions)

    e, d = ENCODER["hidden_size"], LLM["hidden_size"]
    kv = d * LLM["num_key_value_heads"] // LLM["num_attention_heads"]
    longer = [n + 2 for n in lengths]
    return {
        "encoder": stack(ENCODER, 4 * e * e + 2 * e * ENCODER["intermediate_size"], lengths),
        "connector": sum(2 * (e * d + d * d + e * d) * n for n in lengths),
        "llm": stack(LLM, 2 * d * d + 2 * d * kv + 3 * d * LLM["intermediate_size"], longer),
    }


def roofline(dtype: torch.dtype) -> float:
    """Operations a CPU second of matrix products at the models' shapes, weighted by how often each occurs."""
    e, d, kv = ENCODER["hidden_size"], LLM["hidden_size"], 192
    shapes = [(e, e, 24), (e, 1536, 12), (d, d, 24), (d, kv, 24), (d, 1536, 24), (1536, d, 12)]
    work, seconds = 0.0, 0.0
    for depth, width, times in shapes:
        rows, weight = torch.randn(PASS_TOKENS, depth, dtype=dtype), torch.randn(width, depth, dtype=dtype)
        linear(rows, weight)
        begin = time.process_time()
        for _ in range(8 * times):
            linear(rows, weight)
        seconds += time.process_time() - begin
        work += 8 * times * 2 * PASS_TOKENS * depth * width
    return work / seconds


def naive(model: LusiferModel, tokenizer: Any, head: torch.Tensor) -> Callable[[list[str]], torch.Tensor]:
    """The published loop."""

    def run(texts: list[str]) -> torch.Tensor:
        parts = []
        with torch.no_grad():
            for begin in range(0, len(texts), BATCH):
                batch = tokenizer(texts[begin : begin + BATCH], padding=True, pad_to_multiple_of=8, return_tensors="pt")
                output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                linear(output.last_hidden_state, head)
                parts.append(output.pooler_output)
        return normalize(torch.cat(parts), dim=1)

    return run


def ideal(model: LusiferModel, ids: dict[str, list[int]]) -> Callable[[list[str]], torch.Tensor]:
    """A loop by hand over the merged backbones, texts tokenised before."""
    encoder, llm, connector = model.encoder, model.llm, model.connector

    def run(texts: list[str]) -> torch.Tensor:
        rows = [ids[text] for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        found = torch.empty(len(texts), LLM["hidden_size"])
        for group in micro_batches(lengths, PASS_TOKENS):
            n, width = lengths[group], int(lengths[group].max())
            batch = torch.tensor([rows[i] + [1] * (width - len(rows[i])) for i in group.tolist()])
            real = torch.arange(width) < n.unsqueeze(1)
            states = encoder(input_ids=batch, attention_mask=real.long()).last_hidden_state
            soft = torch.zeros(len(group), width + 2, LLM["hidden_size"])
            soft[:, 0] = llm.get_input_embeddings().weight[0].float()
            soft[:, 1:-1] = connector(states.float()) * real.unsqueeze(-1)
            soft[torch.arange(len(group)), n + 1] = connector.added_tokens[0]
            mask = torch.arange(width + 2) < (n + 2).unsqueeze(1)
            hidden = llm(inputs_embeds=soft.to(llm.dtype), attention_mask=mask.long(), is_causal=False, use_cache=False)
            weights = (mask & (torch.arange(width + 2) > 0)).float()
            found[group] = torch.einsum("bs,bsd->bd", weights, hidden.last_hidden_state.float()) / (n + 1).unsqueeze(1)
        return normalize(found, dim=1)

    def quietly(texts: list[str]) -> torch.Tensor:
        with torch.inference_mode():
            return run(texts)

    return quietly


def alone(folder: Path, dtype: torch.dtype) -> SentenceTransformer:
    """Sentence Transformers with one backbone, attention in both directions."""
    module = Transformer(str(folder), model_kwargs={"dtype": dtype}, max_seq_length=512)
    module.auto_model.config.is_causal = False
    return SentenceTransformer(modules=[module, Pooling(module.get_embedding_dimension()), Normalize()], device="cpu")


def systems(folder: Path, texts: list[str]) -> dict[str, tuple[torch.dtype, Callable[[list[str]], Any]]]:
    """Every row: its data type and how it embeds."""
    encoder, llm = save_backbones(folder)
    save_model(encoder, llm, folder / "model")
    path = str(folder / "model")
    slow = lusifer_model(lusifer.load(path, device="cpu"))
    tokenizer = load_tokenizer("encoder", str(encoder))
    by_hand = lusifer_model(lusifer.load(path, device="cpu")).merge().eval()
    by_hand.encoder.to(torch.bfloat16)
    by_hand.llm.to(torch.bfloat16)
    ids = dict(zip(texts, tokenizer(texts)["input_ids"], strict=True))
    rows: dict[str, tuple[torch.dtype, Callable[[list[str]], Any]]] = {
        "naive, float32": (torch.float32, naive(slow, tokenizer, torch.randn(VOCABULARY, LLM["hidden_size"]))),
        "ideal, bfloat16": (torch.bfloat16, ideal(by_hand, ids)),
    }
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        fast, plain = lusifer.load(path, device="cpu"), SentenceTransformer(path, device="cpu")
        for model in (fast, plain):
            set_precision(model, name)
        rows[f"ours, {name}"] = (dtype, fast.encode)
        rows[f"plain ST, {name}"] = (dtype, plain.encode)
        rows[f"ST LLM alone, {name}"] = (dtype, alone(llm, dtype).encode)
        rows[f"ST encoder alone, {name}"] = (dtype, alone(encoder, dtype).encode)
    return rows


def measure(rows: dict[str, tuple[torch.dtype, Callable[[list[str]], Any]]], texts: list[str], tokenizer: Any) -> Any:
    """CPU seconds by row and turn, least cosine with the naive loop, and share of the roofline."""
    each = len(texts) // TURNS
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    shares: dict[str, list[float]] = {name: [] for name in rows}
    cosines: dict[str, float] = {}
    for turn in range(TURNS):
        part = texts[turn * each : (turn + 1) * each]
        work = useful([len(ids) for ids in tokenizer(part)["input_ids"]])
        peaks = {dtype: roofline(dtype) for dtype in (torch.float32, torch.bfloat16)}
        reference = None
        for name, (dtype, encode) in rows.items():
            split, lusifer_modeling.WORTH_SPLITTING = (
                lusifer_modeling.WORTH_SPLITTING,
                (math.inf if name.startswith("naive") else lusifer_modeling.WORTH_SPLITTING),
            )
            begin = time.process_time()
            found = torch.as_tensor(encode(part))
            seconds[name].append(time.process_time() - begin)
            lusifer_modeling.WORTH_SPLITTING = split
            parts = {"ST LLM": ["llm"], "ST enc": ["encoder"]}.get(name[:6], list(work))
            shares[name].append(sum(work[p] for p in parts) / seconds[name][-1] / peaks[dtype])
            reference = found if reference is None else reference
            if not name.startswith(("ST LLM", "ST enc")):
                cosines[name] = min(cosines.get(name, 1.0), float((found * reference).sum(dim=1).min()))
            print(f"turn {turn + 1}  {name:28} {seconds[name][-1]:8.1f} s  {shares[name][-1]:.2f} of peak", flush=True)
    base = seconds["naive, float32"]
    return {
        name: {
            "ratio": round(statistics.median(b / s for b, s in zip(base, seconds[name], strict=True)), 2),
            "roofline_share": round(statistics.median(shares[name]), 3),
            "min_cosine": cosines.get(name),
            "cpu_seconds": [round(s, 2) for s in seconds[name]],
        }
        for name in rows
    }


def by_part(model: SentenceTransformer, dtype: torch.dtype, texts: list[str], tokenizer: Any) -> dict[str, Any]:
    """CPU seconds of encoder, connector, LLM and all else within one call, and their shares of the roofline."""
    inner = lusifer_model(model)
    spent = dict.fromkeys(("encoder", "connector", "llm"), 0.0)
    begun: dict[str, float] = {}
    hooks = []
    for name in spent:
        part = getattr(inner, name)

        def start(*_: Any, name: str = name) -> None:
            begun[name] = time.process_time()

        def stop(*_: Any, name: str = name) -> None:
            spent[name] += time.process_time() - begun[name]

        hooks += [part.register_forward_pre_hook(start), part.register_forward_hook(stop)]
    model.encode(texts[:8])
    spent.update(dict.fromkeys(spent, 0.0))
    peak = roofline(dtype)
    begin = time.process_time()
    model.encode(texts)
    whole = time.process_time() - begin
    for hook in hooks:
        hook.remove()
    work = useful([len(ids) for ids in tokenizer(texts)["input_ids"]])
    found = {
        name: {"time": round(seconds / whole, 3), "roofline_share": round(work[name] / seconds / peak, 3)}
        for name, seconds in spent.items()
    }
    return {**found, "all else": {"time": round(1 - sum(spent.values()) / whole, 3)}}


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of the ratios."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(results)[::-1]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    bars = axes.barh(
        names,
        [results[name]["ratio"] for name in names],
        color=["#0072b2" if "ours" in n else "#b5b5b5" for n in names],
    )
    axes.bar_label(
        bars,
        [f"{results[n]['ratio']:.1f}x, {100 * results[n]['roofline_share']:.0f} % of peak" for n in names],
        padding=3,
    )
    axes.set_xlabel("times the throughput of the naive loop, CPU time")
    axes.margins(x=0.4)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs all rows and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = make_texts(options.texts)
    with tempfile.TemporaryDirectory() as scratch:
        rows = systems(Path(scratch), texts)
        tokenizer = load_tokenizer("encoder", str(Path(scratch) / "encoder"))
        results = measure(rows, texts, tokenizer)
        for dtype in (torch.float32, torch.bfloat16):
            name = f"ours, {str(dtype).removeprefix('torch.')}"
            model: Any = rows[name][1]
            results[name]["parts"] = by_part(model.__self__, dtype, texts[: len(texts) // TURNS], tokenizer)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "encode.json").write_text(json.dumps(results, indent=1))
    lines = ["| row | ratio | share of the roofline | least cosine |", "|---|---:|---:|---:|"]
    for name, row in results.items():
        cosine = "" if row["min_cosine"] is None else f"{row['min_cosine']:.6f}"
        lines.append(f"| {name} | {row['ratio']:.2f} | {100 * row['roofline_share']:.0f} % | {cosine} |")
    lines += ["", "| row | part | share of the time | share of the roofline |", "|---|---|---:|---:|"]
    for name, row in results.items():
        for part, facts in row.get("parts", {}).items():
            share = f"{100 * facts['roofline_share']:.0f} %" if "roofline_share" in facts else ""
            lines.append(f"| {name} | {part} | {100 * facts['time']:.0f} % | {share} |")
    (OUT / "encode.md").write_text("\n".join(lines) + "\n")
    plot(results, OUT / "encode.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
