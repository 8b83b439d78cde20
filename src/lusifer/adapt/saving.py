"""The finished model as a folder that Sentence Transformers loads."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import nn

from lusifer.adapt.configuration import AdaptedConfig
from lusifer.adapt.modeling import AdaptedEncoder, LayerHead
from lusifer.adapt.report import summary
from lusifer.model.checkpoint import SAFE
from lusifer.model.sentence_transformer import to_sentence_transformer
from lusifer.publishing import publish_folder, write_json

ADAPTED = "adapted.json"  # Whose vector space it answers in.


def sentence_transformer(
    encoder: Any, tokenizer: Any, head: LayerHead, layers: list[int], *, window: int, prompts: dict[str, str]
) -> SentenceTransformer:
    """Encoder and head as one model.

    A head without MLP on the last layer alone becomes built-in modules, which load without lusifer; any other becomes
    an `AdaptedEncoder`.

    Args:
        encoder: The encoder.
        tokenizer: Its tokenizer.
        head: The head.
        layers: Layers it reads.
        window: Most tokens of a text.
        prompts: Prompts by name; ``query`` is the default one.
    """
    depth = int(encoder.config.num_hidden_layers)
    if head.up is None and layers == [depth]:
        model = _plain(encoder, tokenizer, head, window)
    else:
        hidden = 0 if head.up is None else head.up.out_features
        config = AdaptedConfig(
            encoder_config=encoder.config.to_dict(),
            layers=layers,
            dimension=head.linear.out_features,
            mlp_dim=hidden,
            max_seq_length=window,
        )
        adapted = AdaptedEncoder(config, encoder)
        adapted.head = head
        model = to_sentence_transformer(adapted, tokenizer)
    model.prompts.update(prompts)
    model.default_prompt_name = "query"
    return model.eval()


def _plain(encoder: Any, tokenizer: Any, head: LayerHead, window: int) -> SentenceTransformer:
    inputs, outputs = head.linear.in_features, head.linear.out_features
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module = Transformer(folder, max_seq_length=window, model_kwargs={"dtype": torch.float32, **SAFE})
    dense = Dense(inputs, outputs, activation_function=nn.Identity())
    dense.linear.load_state_dict(head.linear.state_dict())
    model = SentenceTransformer(modules=[module, Pooling(inputs), dense, Normalize()])
    return model.to(head.linear.weight.device)


def save(model: SentenceTransformer, folder: Path, origin: dict[str, Any], report: dict[str, Any]) -> None:
    """Writes the model, complete or not at all.

    Args:
        model: The model.
        folder: Where to; an older model there is replaced.
        origin: Teacher, its hash and dimension.
        report: What was measured, for the card.
    """
    with publish_folder(folder, "adapted model") as new:
        model.save_pretrained(str(new), create_model_card=False)
        write_json(new / ADAPTED, origin)
        (new / "README.md").write_text(card(origin, report), encoding="utf-8")


def card(origin: dict[str, Any], report: dict[str, Any]) -> str:
    """The model's card in Markdown."""
    teacher = origin["teacher"]
    rows = [
        f"| {language} | {100 * score:.0f} | {100 * report['everyday_teacher'][language]:.0f} |"
        for language, score in (report.get("everyday") or {}).items()
        if language in report.get("everyday_teacher", {})
    ]
    table = ["| language | this model | the teacher itself |", "|---|---:|---:|", *rows] if rows else []
    return "\n".join(
        [
            "---",
            "library_name: sentence-transformers",
            "pipeline_tag: sentence-similarity",
            "tags: [lusifer, multilingual, sentence-similarity]",
            "---",
            "",
            f"# {teacher}, in every language of {report['encoder']}",
            "",
            f"Embeds texts in many languages into the vector space of `{teacher}`: an index that it filled",
            "with English text is searched with this model. Learnt from English text alone, by `lusifer adapt`.",
            "",
            *[f"- {line}" for line in summary(report)],
            f"- {report['texts']:,} English texts ({report['source']})",
            f"- {report['steps']}; {report['seconds']:,} seconds",
            "",
            "Everyday sentences whose English translation is the nearest of the teacher's vectors, %:" if rows else "",
            "",
            *table,
            "",
            "```python",
            "import lusifer",
            "",
            'model = lusifer.load("PATH")',
            'vectors = model.encode_query(["Wo ist der Bahnhof?"])',
            "```",
            "",
        ]
    )
