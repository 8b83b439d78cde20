"""The finished model as a folder that Sentence Transformers loads."""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch import nn

from lusifer.adapt.configuration import AdaptedConfig
from lusifer.adapt.modeling import AdaptedEncoder, LayerHead
from lusifer.adapt.report import summary
from lusifer.model.card import CARD
from lusifer.model.configuration import ADAPTED
from lusifer.model.sentence_transformer import to_sentence_transformer
from lusifer.publishing import publish_folder, write_json
from lusifer.trust import SAFE


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
        (new / CARD).write_text(card(origin, report), encoding="utf-8")


def card(origin: dict[str, Any], report: dict[str, Any]) -> str:
    """The model's card in Markdown; the text is ``resources/adapted.md.jinja``."""
    teacher = report.get("everyday_teacher", {})
    rows = [(code, 100 * score, 100 * teacher[code]) for code, score in report.get("everyday", {}).items()]
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["lusifer", "multilingual", "sentence-similarity"],
    )
    template = (files("lusifer") / "resources" / "adapted.md.jinja").read_text(encoding="utf-8")
    values = {"teacher": origin["teacher"], "report": report, "lines": summary(report), "rows": rows}
    return str(ModelCard.from_template(data, template_str=template, **values).content) + "\n"
